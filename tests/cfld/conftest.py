"""Small models and batches that the tests of the network share, and random metric networks."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pytorch_fid import inception as pytorch_fid
from torch import nn
from torchvision.models import alexnet, inception_v3

from cfld.codec import build_codec
from cfld.config import PRESETS, CFLDConfig
from cfld.evaluation.metric_networks import WEIGHTS_URLS
from cfld.model import CFLD
from cfld.objective import TrainingBatch, draw_rows
from cfld.pipeline import CFLDPipeline
from shards.format import FORMAT_NAME, FORMAT_VERSION, INDEX_SCHEMA, PAIRS_SCHEMA

TINY = PRESETS["tiny"]


@pytest.fixture
def frozen_config() -> CFLDConfig:
    """`tiny` with the paper's choice of what trains in the UNet."""
    return replace(TINY, unet=replace(TINY.unet, is_frozen=True))


@pytest.fixture(scope="session")
def build() -> Callable[..., CFLD]:
    """Builds a model with seeded random weights; its zero convolutions are not zero if stirred."""

    def build_model(config: CFLDConfig, *, stirred: bool = False) -> CFLD:
        torch.manual_seed(0)
        model = CFLD(config, pretrained=False).eval()
        if stirred:
            with torch.no_grad():
                for branch in model.appearance.branches:
                    for parameter in (*branch.conv_in.parameters(), *branch.conv_out.parameters()):
                        parameter.normal_(std=0.3)
        return model

    return build_model


@pytest.fixture
def model(build: Callable[..., CFLD], frozen_config: CFLDConfig) -> CFLD:
    """A small model as it starts training."""
    return build(frozen_config)


@pytest.fixture
def stirred(build: Callable[..., CFLD], frozen_config: CFLDConfig) -> CFLD:
    """A small model as if it were trained."""
    return build(frozen_config, stirred=True)


@pytest.fixture(scope="session")
def micro() -> dict[str, CFLDConfig]:
    """The smallest settings with all parts, by codec: 8x8 latents, three levels."""
    pixels = replace(
        TINY,
        source_encoder=replace(
            TINY.source_encoder, image_size=(32, 32), width=16, depths=(2, 1, 1, 1), window_size=4
        ),
        prompt_decoder=replace(TINY.prompt_decoder, num_queries=4, depth=1, dim=32, num_heads=2),
        appearance=replace(TINY.appearance, widths=(16, 16, 32), head_dim=16),
        unet=replace(TINY.unet, channels=(32, 32, 64, 64), is_frozen=True),
    )
    codec = replace(TINY.codec, kind="vae", factor=2, channels=(16, 32), num_groups=8)
    return {"pixels": pixels, "vae": replace(pixels, codec=codec)}


@pytest.fixture(scope="session")
def weights(
    micro: dict[str, CFLDConfig],
    build: Callable[..., CFLD],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The folder of a saved pipeline with the smallest settings."""
    folder = tmp_path_factory.mktemp("weights")
    config = micro["pixels"]
    model = build(config, stirred=True)
    CFLDPipeline.from_model(model, build_codec(config.codec)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def batch() -> TrainingBatch:
    """Two pairs."""
    generator = torch.Generator().manual_seed(0)
    return TrainingBatch(
        source=torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1,
        pose_maps=torch.rand(4, 21, 64, 64, generator=generator),
        latents=torch.randn(4, 48, 16, 16, generator=generator),
        draws=draw_rows([torch.Generator().manual_seed(pair) for pair in (1, 2)], (48, 16, 16)),
    )


@pytest.fixture(scope="session")
def metric_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `--metric-weights` takes it; the classifiers, which no metric uses, are zero."""
    folder = tmp_path_factory.mktemp("metric_weights")
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        # pytorch-fid builds its network only together with its weights.
        patch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        networks = {
            "lpips": alexnet(),
            "fid_paper": inception_v3(init_weights=False),
            "fid": pytorch_fid.fid_inception_v3(),
        }
    for name, network in networks.items():
        generator = torch.Generator().manual_seed(1)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=generator)
        state = {
            key: torch.zeros(1).expand_as(value) if key.startswith(("classifier", "fc")) else value
            for key, value in network.state_dict().items()
        }
        torch.save(state, folder / WEIGHTS_URLS[name].rpartition("/")[2])
    return folder


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., Path]:
    """Writes a shard set as its README describes it, without the code that builds shards.

    Photos are given by name as image, keypoints and split.
    """

    def write(
        folder: Path,
        photos: Mapping[str, tuple[Image.Image, np.ndarray, str]],
        pairs: Iterable[tuple[str, str]],
        **manifest: str,
    ) -> Path:
        folder.mkdir()
        rows = []
        with tarfile.open(folder / "test-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, (image, keypoints, split) in photos.items():
                width, height = image.size
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                record = {"height": height, "photo_height": height}
                record |= {"width": width, "photo_width": width}
                places = {}
                for member, data in (("image", buffer.getvalue()), ("pose", b"-"),
                                     ("json", json.dumps(record).encode())):  # fmt: skip
                    info = tarfile.TarInfo(f"{name}.{member}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    padded = -len(data) % 512 + len(data)
                    places[f"{member}_offset"] = tar.offset - padded
                    places[f"{member}_size"] = len(data)
                rows.append(
                    {
                        "key": name, "name": f"{name}.jpg", "person": "p",
                        "image_extension": "png", "split": split, "view": None,
                        "shard": "test-000000.tar", "latent_offset": None, "latent_size": None,
                        "height": height, "width": width, "keypoints": keypoints.flatten().tolist(),
                        "num_people": 1, "is_valid": True, **places,
                    }
                )  # fmt: skip
        places = {row["key"]: place for place, row in enumerate(rows)}
        table = [{"source": places[a], "target": places[b], "split": "test"} for a, b in pairs]
        pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), folder / "index.parquet")
        pq.write_table(pa.Table.from_pylist(table, PAIRS_SCHEMA), folder / "pairs.parquet")
        document = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **manifest}
        (folder / "manifest.json").write_text(json.dumps(document))
        return folder

    return write
