"""What happens inside the model, as pictures: attention of D's queries, A's biases, pose maps."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from cfld.attention import attention_weights, project_keys_values, split_heads
from cfld.config import CFLDConfig
from cfld.model import CFLD
from cfld.pipeline_inputs import Size
from cfld.prompt_decoder import PromptDecoder

Picture = UInt8[np.ndarray, "height width 3"]
Map = Float[np.ndarray, "_ _"]
AttentionMaps = Float[Tensor, "batch heads queries height width"]


@torch.no_grad()
def query_attention(
    model: CFLD, source: Float[Tensor, "batch 3 source_height source_width"]
) -> tuple[AttentionMaps, ...]:
    """Where each query of D looks in the source image, for each block (CFLD Fig. 7).

    Over height and width of the last feature map the weights of a head's query sum to 1.

    Raises:
        ValueError: If the prompt does not come from queries.
    """
    if not isinstance(model.prompt_decoder, PromptDecoder):
        raise ValueError(
            f"prompt_decoder.kind is {model.config.prompt_decoder.kind!r}: no queries attend to "
            "the source image"
        )
    weights: list[Tensor] = []

    def record(attention: Attention, inputs: tuple[Tensor, Tensor]) -> None:
        hidden, context = inputs
        key, _ = project_keys_values(attention, context)
        weights.append(attention_weights(split_heads(attention, attention.to_q(hidden)), key))

    layers = [block.get_submodule("cross_attention") for block in model.prompt_decoder.blocks]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        model.encode_source(source)
    finally:
        for hook in hooks:
            hook.remove()
    height, _ = model.config.source_encoder.sizes[-1]
    return tuple(rearrange(each, "b heads q (h w) -> b heads q h w", h=height) for each in weights)


def bias_sizes(config: CFLDConfig) -> list[Size]:
    """Height and width of the map that each of A's biases is, in the UNet's order."""
    sizes = [config.source_encoder.sizes[shape.level] for shape in config.branch_shapes]
    return [
        (height // shape.stride, width // shape.stride)
        for (height, width), shape in zip(sizes, config.branch_shapes, strict=True)
    ]


def bias_strength(bias: Float[Tensor, "tokens dim"], size: Size) -> Map:
    """The length of each token of a bias, as a map."""
    lengths = bias.float().norm(dim=-1)
    return rearrange(lengths, "(h w) -> h w", h=size[0]).cpu().numpy()


def bias_components(bias: Float[Tensor, "tokens dim"], size: Size) -> Picture:
    """The three main directions in which a bias varies, as red, green and blue.

    Tokens of one colour bias the queries alike. The sign of a direction means nothing; here its
    largest share is positive.
    """
    centred = bias.float() - bias.float().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    shares = centred @ (directions * largest.sign()).T
    shares = torch.nn.functional.pad(shares, (0, 3 - shares.shape[1]))
    spread = shares.std(dim=0, correction=0).clamp_min(1e-12) * 2
    colours = ((shares / spread).clamp(-1, 1) + 1) * 127.5
    return rearrange(colours.round().byte(), "(h w) rgb -> h w rgb", h=size[0]).cpu().numpy()


def paint_heat(values: Map) -> Picture:
    """A map from black (0) over red to white (its maximum)."""
    scaled = np.clip(values / max(float(values.max()), 1e-12), 0, 1)
    painted = cv2.applyColorMap(np.rint(scaled * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return cv2.cvtColor(painted, cv2.COLOR_BGR2RGB)


def overlay_heat(photo: Picture, values: Map) -> Picture:
    """A map, stretched over a photo that is shown in faint grey."""
    height, width = photo.shape[:2]
    values = values.astype(np.float32)
    heat = paint_heat(cv2.resize(values, (width, height), interpolation=cv2.INTER_CUBIC))
    grey = photo.mean(axis=2, keepdims=True)
    return np.rint(0.35 * grey + 0.65 * heat).astype(np.uint8)
