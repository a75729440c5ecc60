"""D: the coarse-grained prompt, refined by learnable queries over the last feature map."""

from dataclasses import dataclass

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cfld.attention import run
from cfld.checks import check_choice, check_multiples, check_sizes
from cfld.prompt_ablations import ClipPrompt, EmptyPrompt, FeaturePrompt

Prompt = Float[Tensor, "batch tokens dim"]
Source = Float[Tensor, "batch 3 height width"]
Features = tuple[Float[Tensor, "batch _c _h _w"], ...]
KINDS = ("refined", "features", "clip", "empty")


@dataclass(frozen=True, kw_only=True)
class PromptDecoderConfig:
    """Sizes of D; the defaults are the paper's."""

    kind: str = "refined"
    """`refined` queries, or of Table 3: `features` (B5), `clip` (B2), `empty` (B1)."""
    num_queries: int = 16
    """The paper's Q."""
    depth: int = 8
    """The paper's R."""
    dim: int = 768
    """Channels of the prompt, as the UNet's cross-attention wants them."""
    num_heads: int = 24

    def __post_init__(self) -> None:
        check_choice("prompt_decoder.kind", self.kind, KINDS)
        check_sizes("prompt_decoder", self, "num_queries", "depth", "dim", "num_heads")
        check_multiples("prompt_decoder.dim", self.dim, "prompt_decoder.num_heads", self.num_heads)

    def num_tokens(self, num_feature_tokens: int) -> int:
        """Length of the prompt."""
        lengths = {"refined": self.num_queries, "clip": 1}
        return lengths.get(self.kind, num_feature_tokens)


@dataclass(frozen=True, kw_only=True)
class FeatureShape:
    """Channels and number of tokens of the last feature map."""

    dim: int
    num_tokens: int


class PromptDecoder(nn.Module):
    """Learnable queries refined over the last feature map (CFLD Fig. 2b)."""

    def __init__(self, config: PromptDecoderConfig, features: FeatureShape) -> None:
        super().__init__()
        self.recompute = False
        queries = (config.num_queries, config.dim)
        self.queries = nn.Parameter(0.02 * torch.randn(queries))
        self.query_positions = nn.Parameter(0.02 * torch.randn(queries))
        self.feature_positions = nn.Parameter(
            0.02 * torch.randn(1, features.num_tokens, features.dim)
        )
        self.blocks = nn.ModuleList(
            PromptDecoderBlock(config, features.dim) for _ in range(config.depth)
        )

    def forward(self, source: Source, features: Features) -> Prompt:
        """The prompt F_out; neither the features nor the prompt are normalised."""
        context = rearrange(features[-1], "b c h w -> b (h w) c") + self.feature_positions
        hidden = self.queries.expand(len(source), -1, -1)
        for block in self.blocks:
            hidden = run(block, hidden, self.query_positions, context, recompute=self.recompute)
        return hidden


class PromptDecoderBlock(nn.Module):
    """Transformer decoder block with the cross-attention first.

    The positions are added before each attention and stay in the residual stream, as in the
    authors' code.
    """

    def __init__(self, config: PromptDecoderConfig, feature_dim: int) -> None:
        super().__init__()
        self.cross_norm = nn.LayerNorm(config.dim)
        self.cross_attention = Attention(
            config.dim,
            cross_attention_dim=feature_dim,
            heads=config.num_heads,
            dim_head=config.dim // config.num_heads,
        )
        self.self_norm = nn.LayerNorm(config.dim)
        self.self_attention = Attention(
            config.dim,
            heads=config.num_heads,
            dim_head=config.dim // config.num_heads,
        )
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config.dim, activation_fn="geglu")

    def forward(
        self,
        hidden: Prompt,
        positions: Float[Tensor, "tokens dim"],
        context: Float[Tensor, "batch context_tokens context_dim"],
    ) -> Prompt:
        """Cross-attention, self-attention, feed-forward; each normalised first, then added."""
        hidden = hidden + positions
        hidden = hidden + self.cross_attention(self.cross_norm(hidden), context)
        hidden = hidden + positions
        hidden = hidden + self.self_attention(self.self_norm(hidden))
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


def build_prompt_decoder(
    config: PromptDecoderConfig, features: FeatureShape, *, pretrained: bool
) -> nn.Module:
    """D, or what stands in its place in Table 3."""
    match config.kind:
        case "refined":
            return PromptDecoder(config, features)
        case "features":
            return FeaturePrompt(features.dim, config.dim)
        case "empty":
            return EmptyPrompt(features.num_tokens, config.dim)
        case _:
            return ClipPrompt(config.dim, pretrained=pretrained)
