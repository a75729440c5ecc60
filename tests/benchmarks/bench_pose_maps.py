"""Pose maps at 256x256, against the full-grid Gaussians of the authors' formula.

python tests/benchmarks/bench_pose_maps.py
"""

import statistics
import sys
import time

import numpy as np
import torch

from cfld.images import decode_image, encode_png
from cfld.pose import canvas_points, draw_heatmaps, draw_skeleton

BATCH, NUM_ROUNDS = 64, 7


def full_grid(points: np.ndarray) -> np.ndarray:
    """One exponential per pixel and joint, a meshgrid per joint, as the authors compute them."""
    maps = np.zeros((256, 256, 18), np.float32)
    for joint, (x, y) in enumerate(points):
        columns, rows = np.meshgrid(np.arange(256), np.arange(256))
        maps[..., joint] = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 6**2))
    return maps


def main() -> None:
    rng = np.random.default_rng(0)
    keypoints = np.ones((BATCH, 18, 3), np.float32)
    keypoints[..., :2] = rng.integers(0, 176, (BATCH, 18, 2))
    points = canvas_points(keypoints, (256, 176))
    on_device, buffer = torch.from_numpy(points), torch.empty(BATCH, 18, 256, 256)
    skeletons = [encode_png(draw_skeleton(k, (256, 176))) for k in keypoints]
    contenders = {
        "full grid": lambda: [full_grid(p) for p in points],
        "separable, reused buffer": lambda: draw_heatmaps(on_device, out=buffer),
        "separable, fresh buffer": lambda: draw_heatmaps(on_device),
        "skeleton drawn": lambda: [draw_skeleton(k, (256, 176)) for k in keypoints],
        "skeleton from PNG": lambda: [decode_image(data) for data in skeletons],
    }
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(NUM_ROUNDS):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            rounds[name].append((time.perf_counter() - start) / BATCH * 1e3)
    for name, taken in rounds.items():
        base = rounds["skeleton from PNG" if name.startswith("skeleton") else "full grid"]
        ratio = statistics.median(b / t for b, t in zip(base, taken, strict=True))
        sys.stdout.write(f"{name}: {statistics.median(taken):.3f} ms an image, x {ratio:.1f}\n")
    reference = np.stack([full_grid(p).transpose(2, 0, 1) for p in points])
    sys.stdout.write(
        f"largest error {np.abs(draw_heatmaps(on_device).numpy() - reference).max()}\n"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
