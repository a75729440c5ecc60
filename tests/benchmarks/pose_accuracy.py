"""Accuracy of an ONNX pose network through our whole path, on annotated photos of people.

    python tests/benchmarks/pose_accuracy.py [SHARED_DIR]

PCK@a: share of the annotated joints found within a × the longer side of the joints' box (bb), or
a × the distance from the neck to the middle of the hips (torso; images without it are left out).
Annotated joints that were not found count as wrong.
"""

import csv
import os
import sys
from pathlib import Path

import numpy as np

from cfld.images import decode_image
from cfld.keypoints import read_keypoints
from cfld.pose import is_found
from cfld.pose_network import PersonPose, PoseEstimator, PoseEstimatorConfig

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH_SIZE = 8


def main() -> None:
    shared = Path(sys.argv[1] if len(sys.argv) > 1 else default_shared())
    folder = shared / "data" / "people"
    truth = {image.name: image.people[0] for image in read_keypoints(folder / "annotations.csv")}
    with (folder / "people.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    network = str(shared / "models" / "openpose_mobilenet_v2_small.onnx")
    estimator = PoseEstimator(PoseEstimatorConfig(network=network, batch_size=BATCH_SIZE))
    photos = [decode_image((folder / name).read_bytes()) for name in truth]
    poses = dict(zip(truth, estimator.estimate(photos), strict=True))
    groups = {
        "all": list(truth),
        "data set ground truth": [n for n in truth if "ground truth" in rows[n]["annotation"]],
        "estimated": [n for n in truth if "ground truth" not in rows[n]["annotation"]],
        "nobody else in the crop": [n for n in truth if rows[n]["others_in_crop"] == "0"],
    }
    print("| images | number | no person | found | PCK@0.1bb | PCK@0.2torso |")
    print("|---|---|---|---|---|---|")
    for title, names in groups.items():
        figures = score([truth[n] for n in names], [poses[n] for n in names])
        print(
            f"| {title} | {len(names)} | {figures[0]} | "
            + " | ".join(f"{f:.3f}" for f in figures[1:])
            + " |"
        )


def score(truths: list[np.ndarray], poses: list[PersonPose]) -> tuple[int, float, float, float]:
    """Photos without a person, and the shares found, right by the box, right by the torso."""
    found, by_box, by_torso = [], [], []
    for truth, pose in zip(truths, poses, strict=True):
        annotated = is_found(truth)
        distance = np.linalg.norm((pose.keypoints - truth)[annotated, :2], axis=1)
        distance = np.nan_to_num(distance, nan=np.inf)
        found.extend(np.isfinite(distance))
        by_box.extend(distance <= 0.1 * np.ptp(truth[annotated, :2], axis=0).max())
        torso = np.linalg.norm(truth[1, :2] - truth[[8, 11], :2].mean(axis=0))
        if np.isfinite(torso):
            by_torso.extend(distance <= 0.2 * torso)
    nobody = sum(pose.num_people == 0 for pose in poses)
    return nobody, float(np.mean(found)), float(np.mean(by_box)), float(np.mean(by_torso))


def default_shared() -> Path:
    return Path(os.environ.get("CFLD_SHARED", REPOSITORY.parent / "shared"))


if __name__ == "__main__":
    main()
