"""The datasets that can be built: `--dataset NAME` is a key of `DATASETS`."""

from preprocessing.datasets import deepfashion, folder, market1501, synthetic, table

DATASETS = {
    "deepfashion": deepfashion.DATASET,
    "market1501": market1501.DATASET,
    "folder": folder.DATASET,
    "table": table.DATASET,
    "synthetic": synthetic.DATASET,
}
