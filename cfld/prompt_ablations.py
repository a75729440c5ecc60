"""Prompts that stand in the place of D in the paper's ablations (CFLD Table 3)."""

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

CLIP = "openai/clip-vit-large-patch14"
CLIP_SIZE = (224, 224)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Source = Float[Tensor, "batch 3 height width"]
Features = tuple[Float[Tensor, "batch _c _h _w"], ...]
Prompt = Float[Tensor, "batch tokens dim"]


class FeaturePrompt(nn.Module):
    """The tokens of the last feature map through one linear layer (B5)."""

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(feature_dim, dim, bias=False)

    def forward(self, source: Source, features: Features) -> Prompt:
        """One token of the prompt per token of the last feature map."""
        del source
        return self.project(rearrange(features[-1], "b c h w -> b (h w) c"))


class EmptyPrompt(nn.Module):
    """Zeros, for A to fill layer by layer (B1)."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.shape = (num_tokens, dim)

    def forward(self, source: Source, features: Features) -> Prompt:
        """Zeros in the features' type."""
        del source
        return features[-1].new_zeros(len(features[-1]), *self.shape)


class ClipPrompt(nn.Module):
    """CLIP's frozen image encoder and a trained mapper to one token, as in Paint by Example (B2).

    The mapper is a linear layer, five transformer blocks and a normalisation. Its input is the
    source image resized to CLIP's 224 pixels, where the authors resize the original photo.
    """

    def __init__(self, dim: int, *, pretrained: bool) -> None:
        super().__init__()
        self.clip = load_clip(pretrained=pretrained).requires_grad_(False)
        self.project = nn.Linear(self.clip.config.hidden_size, dim, bias=False)
        block = nn.TransformerEncoderLayer(
            dim,
            nhead=1,
            dim_feedforward=4 * dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.mapper = nn.TransformerEncoder(
            block, num_layers=5, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )

    def forward(self, source: Source, features: Features) -> Prompt:
        """One token: CLIP's pooled output, mapped."""
        del features
        image = F.interpolate(source, CLIP_SIZE, mode="bicubic", antialias=True)
        mean, std = (source.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        pooled = self.clip(pixel_values=(image * 0.5 + 0.5 - mean) / std).pooler_output
        return self.mapper(self.project(pooled).unsqueeze(1))


def load_clip(*, pretrained: bool) -> Any:
    """CLIP's ViT-L/14 image encoder.

    Raises:
        ImportError: If transformers is not installed.
    """
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModel
    except ImportError as error:
        raise ImportError(
            "prompt_decoder.kind 'clip' needs transformers; run 'pip install cfld[clip]'"
        ) from error
    if pretrained:
        return CLIPVisionModel.from_pretrained(CLIP, use_safetensors=True)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=24,
            patch_size=14,
        )
    )
