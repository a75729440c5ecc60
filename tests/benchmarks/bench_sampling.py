"""One guided sampling step, against three separate UNet calls that project the prompt anew.

python tests/benchmarks/bench_sampling.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cfld.conditioning import Conditioning, Kept, drop_conditions
from cfld.config import PRESETS, CFLDConfig
from cfld.guidance import cumulative_terms, guide, guided_prediction
from cfld.model import CFLD

NUM_ROUNDS = 15
TIMESTEP = torch.tensor(500)
PAPER = PRESETS["paper"]
CONFIGS = {
    "tiny": PRESETS["tiny"],
    "middle (78 M UNet, latents 32x32)": replace(
        PAPER,
        source_encoder=replace(
            PAPER.source_encoder,
            image_size=(128, 128),
            width=32,
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 4, 8),
            window_size=8,
        ),
        prompt_decoder=replace(PAPER.prompt_decoder, dim=256, num_heads=8, depth=2),
        appearance=replace(PAPER.appearance, widths=(32, 64, 128), depth=2),
        unet=replace(PAPER.unet, channels=(96, 192, 384, 384)),
    ),
}
# The authors' scales and the paper's, and a pair of scales that needs all three predictions.
SCALES = ((2.0, 2.0), (2.0, 1.5))


def three_calls(
    model: CFLD, latents: Tensor, branches: list[Conditioning], scales: tuple
) -> Tensor:
    """Eq. 7 as it is written."""
    nothing, pose, both = (model.predict(latents, TIMESTEP, branch) for branch in branches)
    return nothing + scales[0] * (pose - nothing) + scales[1] * (both - pose)


def seconds(step: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@torch.no_grad()
def measure(name: str, config: CFLDConfig) -> None:
    torch.manual_seed(0)
    model = CFLD(config, pretrained=False).eval()
    for parameter in model.appearance.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    conditioning = model.condition(
        torch.rand(1, 3, *config.source_encoder.image_size) * 2 - 1,
        torch.rand(1, 21, *config.pose_map_size),
    )
    latents = torch.randn(1, config.codec.latent_channels, *config.latent_size)
    rows = {flag: torch.tensor([flag]) for flag in (False, True)}
    branches = [
        drop_conditions(
            conditioning,
            model.learnable_vector,
            Kept(prompt=rows[appearance], pose=rows[pose], appearance=rows[appearance]),
        )
        for pose, appearance in ((False, False), (True, False), (True, True))
    ]
    for scales in SCALES:
        guided = guide(model, conditioning, cumulative_terms(*scales))
        steps = {
            "plain": lambda scales=scales: three_calls(model, latents, branches, scales),
            "ours": lambda guided=guided: guided_prediction(model, latents, TIMESTEP, guided),
        }
        error = (steps["plain"]() - steps["ours"]()).abs().max().item()
        times: dict[str, list[float]] = {which: [] for which in steps}
        for _ in range(NUM_ROUNDS):
            for which, step in steps.items():
                times[which].append(seconds(step))
        plain, ours = (statistics.median(times[which]) for which in steps)
        ratio = statistics.median(p / o for p, o in zip(*times.values(), strict=True))
        sys.stdout.write(
            f"{name}, scales {scales}: {len(guided.weights)} predictions, plain {plain * 1e3:.0f} "
            f"ms, ours {ours * 1e3:.0f} ms, ratio {ratio:.2f}, largest difference {error:.1e}\n"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)  # two threads that wait for a busy core measure its other work
    sys.stdout.write(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for name, config in CONFIGS.items():
        measure(name, config)
