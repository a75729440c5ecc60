"""Whole pictures through the pipeline: images/s, and how much of the matrix rate they use.

python tests/benchmarks/bench_generation.py --device cuda --dtype fp16 bf16 --batch 16
python tests/benchmarks/bench_generation.py --config tiny --device cpu --dtype fp32 --batch 2

Random weights. The baseline is Eq. 7 as it is written, three UNet calls a step, not compiled. The
matrix rate is that of one large product of matrices, measured in the same run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import cfld.pipeline
from cfld.codec import build_codec
from cfld.config import PRESETS
from cfld.describe import describe
from cfld.guidance import GuidedConditioning, Term, guide, guided_prediction
from cfld.model import CFLD
from cfld.pipeline import CFLDPipeline
from cfld.pipeline_inputs import FramedPose

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MATRIX_SIZES = {"cuda": 8192, "cpu": 2048}
# Unequal scales would need three predictions also from us: these are the paper's.
SCALES = {"pose_guidance_scale": 2.0, "appearance_guidance_scale": 2.0}


def seconds(device: str, work: Callable[[], object]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of ten products."""
    size = MATRIX_SIZES[device]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest = min(seconds(device, lambda: left @ right) for _ in range(10))
    return 2 * size**3 / fastest


def three_terms(*_: float) -> tuple[Term, ...]:
    """Eq. 7's three predictions, the middle one with the weight 0 that equal scales give it."""
    return (
        Term(prompt=False, pose=False, appearance=False, weight=-1.0),
        Term(prompt=False, pose=True, appearance=False, weight=0.0),
        Term(prompt=True, pose=True, appearance=True, weight=2.0),
    )


def one_call_a_term(model: CFLD, latents: Tensor, step: Tensor, guided: list) -> Tensor:
    return sum(guided_prediction(model, latents, step, term) for term in guided)


def guide_each(model: CFLD, conditioning, terms: tuple[Term, ...]) -> list[GuidedConditioning]:
    return [guide(model, conditioning, (term,)) for term in terms]


def plainly(work: Callable[[], object]) -> object:
    """Run with the pipeline's guidance replaced by that of the baseline."""
    with mock.patch.multiple(
        cfld.pipeline,
        cumulative_terms=three_terms,
        guide=guide_each,
        guided_prediction=one_call_a_term,
    ):
        return work()


def build_pipeline(preset: str, device: str, dtype: torch.dtype) -> CFLDPipeline:
    torch.manual_seed(0)
    with torch.device(device):
        model = CFLD(PRESETS[preset], pretrained=False).eval().to(dtype)
        codec = build_codec(PRESETS[preset].codec, pretrained=False).to(dtype)
    pipeline = CFLDPipeline.from_model(model, codec).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure(options: argparse.Namespace, name: str, flops_per_image: int) -> None:
    device, dtype = options.device, DTYPES[name]
    rate = matrix_rate(device, dtype)
    pipeline = build_pipeline(options.config, device, dtype)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (options.batch, 1101, 750, 3), dtype=np.uint8))
    joints = np.stack([rng.uniform(0, 750, 18), rng.uniform(0, 1101, 18), np.ones(18)], axis=1)
    poses = [FramedPose(joints.astype(np.float32), (1101, 750))] * options.batch

    def generate() -> object:
        return pipeline(
            images, poses, num_inference_steps=options.steps, output_type="pt", **SCALES
        )

    sys.stdout.write(f"{name}: one large product of matrices {rate / 1e12:.2f} TFLOP/s\n")
    runs = {"three calls": lambda: plainly(generate), "eager": generate}
    times: dict[str, list[float]] = {run: [] for run in runs}
    for work in runs.values():
        work()
    for _ in range(options.rounds):
        for run, work in runs.items():
            times[run].append(seconds(device, work))
    if options.compile:
        pipeline.unet.compile()
        generate()
        times["compiled"] = [seconds(device, generate) for _ in range(options.rounds)]
    plain = statistics.median(times["three calls"])
    for run, measured in times.items():
        images_per_second = options.batch / statistics.median(measured)
        utilisation = (
            ""
            if run == "three calls"
            else (f", {flops_per_image * images_per_second / rate:.1%} of the matrix rate")
        )
        sys.stdout.write(
            f"  {run}: {images_per_second:.3f} images/s "
            f"({options.batch / max(measured):.3f} to {options.batch / min(measured):.3f}), "
            f"{plain / statistics.median(measured):.2f} x three calls{utilisation}\n"
        )
    if device == "cuda":
        sys.stdout.write(f"  peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB\n")
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=PRESETS, default="paper")
    parser.add_argument("--device", choices=MATRIX_SIZES, default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp16", "bf16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also with the UNet compiled")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    flops = describe(PRESETS[options.config], num_inference_steps=options.steps).flops_per_image
    sys.stdout.write(
        f"{where}, torch {torch.__version__}, {options.config}, batch {options.batch}, "
        f"{options.steps} steps, {flops / 1e12:.3f} TFLOP an image, {options.rounds} rounds\n"
    )
    for name in options.dtype:
        measure(options, name, flops)


if __name__ == "__main__":
    main()
