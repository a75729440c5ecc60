"""A: hybrid-granularity attention, the fine appearance that biases the up-sampling attention."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers.models.attention import BasicTransformerBlock
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cfld.attention import run
from cfld.checks import check_choice, check_multiples, check_sizes

BIASED = ("queries", "context", "nothing")


@dataclass(frozen=True, kw_only=True)
class AppearanceConfig:
    """Sizes of A and what it biases."""

    depth: int = 4
    """Transformer blocks of each branch (the paper's K)."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Channels of the branches at each level, finest first."""
    head_dim: int = 32
    biases: str = "queries"
    """What is biased: `queries` (Eq. 4), `context` (keys and values, Table 3 B1) or `nothing`."""

    def __post_init__(self) -> None:
        check_choice("appearance.biases", self.biases, BIASED)
        check_sizes("appearance", self, "depth", "widths", "head_dim")
        check_multiples("appearance.widths", self.widths, "appearance.head_dim", self.head_dim)


@dataclass(frozen=True, kw_only=True)
class BranchShape:
    """What one branch of A connects: a feature map and a cross-attention of the UNet."""

    level: int
    feature_dim: int
    bias_dim: int
    stride: int = 1
    """Feature tokens along one side that give one token of the bias."""


class AppearanceBranch(nn.Module):
    """Transformer blocks between two zero convolutions (CFLD Fig. 2c)."""

    def __init__(self, config: AppearanceConfig, shape: BranchShape) -> None:
        super().__init__()
        width = config.widths[shape.level]
        self.conv_in = nn.Conv2d(shape.feature_dim, width, shape.stride, stride=shape.stride)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                dim=width,
                num_attention_heads=width // config.head_dim,
                attention_head_dim=config.head_dim,
                double_self_attention=True,
            )
            for _ in range(config.depth)
        )
        self.conv_out = nn.Conv2d(width, shape.bias_dim, kernel_size=1)
        for parameter in (*self.conv_in.parameters(), *self.conv_out.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self, features: Float[Tensor, "batch channels height width"], recompute: bool = False
    ) -> Float[Tensor, "batch tokens dim"]:
        """The bias of one layer, B = phi_A(f) in Eq. 4."""
        hidden = self.conv_in(features)
        height = hidden.shape[-2]
        hidden = rearrange(hidden, "b c h w -> b (h w) c")
        for block in self.blocks:
            hidden = run(block, hidden, recompute=recompute)
        hidden = self.conv_out(rearrange(hidden, "b (h w) c -> b c h w", h=height))
        return rearrange(hidden, "b c h w -> b (h w) c")


class AppearanceEncoder(nn.Module):
    """One independent branch for each up-sampling cross-attention, in the UNet's order."""

    def __init__(self, config: AppearanceConfig, shapes: Sequence[BranchShape]) -> None:
        super().__init__()
        self.recompute = False
        self.levels = tuple(shape.level for shape in shapes)
        self.branches = nn.ModuleList(AppearanceBranch(config, shape) for shape in shapes)

    def forward(
        self, features: tuple[Float[Tensor, "batch _c _h _w"], ...]
    ) -> tuple[Float[Tensor, "batch _tokens _dim"], ...]:
        """One bias per up-sampling cross-attention, from the feature map of its level."""
        return tuple(
            branch(features[level], self.recompute)
            for branch, level in zip(self.branches, self.levels, strict=True)
        )
