"""Our batched decoder against controlnet-aux's, on a real network's outputs for real photos.

    python tests/benchmarks/bench_pose_decoder.py [SHARED_DIR]

Both get the same heatmaps and affinity fields (32 photos, network input 448x320) and the same two
threads; repeats are interleaved. Agreement: people and joints that both find, and their distance
in pixels of the network's input. controlnet-aux gives whole pixels, so a distance of up to 0.71 is
our refinement alone.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from controlnet_aux_decoder import ControlnetAuxDecoder

from cfld.images import decode_image, resize_image
from cfld.openpose import OnnxInput, OnnxNetwork
from cfld.pose_decoder import DecoderConfig, decode_people

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_THREADS = 2
NUM_REPEATS = 5
BATCH_SIZE = 32
INPUT_SIZE, PHOTO_SIZE = (448, 320), (368, 240)


def main() -> None:
    torch.set_num_threads(NUM_THREADS)
    cv2.setNumThreads(NUM_THREADS)
    shared = os.environ.get("CFLD_SHARED", REPOSITORY.parent / "shared")
    heatmaps, affinities = network_outputs(Path(sys.argv[1] if len(sys.argv) > 1 else shared))
    reference, config = ControlnetAuxDecoder(), DecoderConfig()

    def ours(batch_size: int) -> list[np.ndarray]:
        batches = zip(heatmaps.split(batch_size), affinities.split(batch_size), strict=True)
        return [people for batch in batches for people in decode_people(*batch, config)]

    def theirs() -> list[np.ndarray]:
        maps = zip(heatmaps.numpy(), affinities.numpy(), strict=True)
        return [reference(*of_image) for of_image in maps]

    agreement(ours(BATCH_SIZE), theirs())
    rounds = [(timed(theirs), timed(ours, BATCH_SIZE), timed(ours, 1)) for _ in range(NUM_REPEATS)]
    names = ("controlnet-aux", f"ours, batch {BATCH_SIZE}", "ours, batch 1")
    for name, seconds in zip(names, zip(*rounds, strict=True), strict=True):
        per_image_ms = [1e3 * s / len(heatmaps) for s in seconds]
        ratio = statistics.median(r[0] / s for r, s in zip(rounds, seconds, strict=True))
        print(
            f"{name}: {statistics.median(per_image_ms):.2f} ms per image "
            f"({min(per_image_ms):.2f} to {max(per_image_ms):.2f}), {ratio:.1f} x as fast"
        )


def network_outputs(shared: Path) -> tuple[torch.Tensor, torch.Tensor]:
    path = shared / "models" / "openpose_mobilenet_v2_small.onnx"
    network = OnnxNetwork(str(path), OnnxInput(), NUM_THREADS)
    photos = sorted((shared / "data" / "people").glob("*.jpg"))[:BATCH_SIZE]
    canvases = np.full((len(photos), *INPUT_SIZE, 3), 128, dtype=np.uint8)
    top, left = ((whole - part) // 2 for whole, part in zip(INPUT_SIZE, PHOTO_SIZE, strict=True))
    for canvas, photo in zip(canvases, photos, strict=True):
        image = resize_image(decode_image(photo.read_bytes()), PHOTO_SIZE)
        canvas[top : top + PHOTO_SIZE[0], left : left + PHOTO_SIZE[1]] = image
    return network(canvases)


def agreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    same_count = [len(a) == len(b) for a, b in zip(ours, theirs, strict=True)]
    a, b = (
        np.concatenate([people for people, same in zip(side, same_count, strict=True) if same])
        for side in (ours, theirs)
    )
    found_a, found_b = np.isfinite(a[..., 0]), np.isfinite(b[..., 0])
    distance = np.linalg.norm((a - b)[found_a & found_b, :2], axis=-1)
    score = np.abs(a - b)[found_a & found_b, 2]
    close = int((distance < 1).sum())
    num_joints = sum(int(np.isfinite(people[..., 0]).sum()) for people in theirs)
    print(
        f"photos with the same number of people: {sum(same_count)} of {len(ours)}; "
        f"people: {sum(map(len, ours))} and {sum(map(len, theirs))}\n"
        f"their joints that we find within 1 px: {close} of {num_joints} "
        f"({close / num_joints:.1%}); ours that they miss: {int((found_a & ~found_b).sum())}\n"
        f"distance in input px: median {np.median(distance):.3f}, largest {distance.max():.3f}; "
        f"largest difference of scores {score.max():.1e}"
    )


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
