"""P: residual blocks that turn the pose map into residuals for the UNet's down-sampling blocks."""

from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float
from torch import Tensor, nn

from cfld.attention import run
from cfld.checks import check_sizes
from cfld.pose import POSE_MAP_CHANNELS


@dataclass(frozen=True, kw_only=True)
class PoseAdapterConfig:
    """Sizes of P beyond those the UNet fixes."""

    patch_size: int = 4
    """Pixels of the pose map along one side of a token of the UNet's first level."""
    num_groups: int = 32
    """Groups of its group normalisation."""

    def __post_init__(self) -> None:
        check_sizes("pose_adapter", self, "patch_size", "num_groups")


class PoseAdapter(nn.Module):
    """Pixel unshuffle, then one residual block per UNet level (CFLD Fig. 2, P; T2I-Adapter)."""

    def __init__(self, config: PoseAdapterConfig, *, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.recompute = False
        self.unshuffle = nn.PixelUnshuffle(config.patch_size)
        self.conv_in = nn.Conv2d(
            POSE_MAP_CHANNELS * config.patch_size**2, channels[0], kernel_size=1
        )
        self.resnets = nn.ModuleList(
            ResnetBlock2D(
                in_channels=incoming,
                out_channels=outgoing,
                temb_channels=None,
                groups=config.num_groups,
            )
            for incoming, outgoing in zip((channels[0], *channels), channels, strict=False)
        )

    def forward(
        self, pose_map: Float[Tensor, "batch 21 height width"]
    ) -> tuple[Float[Tensor, "batch _c _h _w"], ...]:
        """Residuals, finest first: each block's output before its 2x2 average pooling."""
        hidden = self.conv_in(self.unshuffle(pose_map))
        residuals = []
        for level, resnet in enumerate(self.resnets):
            hidden = F.avg_pool2d(hidden, 2) if level else hidden
            hidden = run(resnet, hidden, None, recompute=self.recompute)
            residuals.append(hidden)
        return tuple(residuals)
