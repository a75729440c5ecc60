"""Attention and checkpointing shared by every part: which kernel runs, and what is recomputed."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import rearrange
from jaxtyping import Float
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Queries = Float[Tensor, "batch heads tokens head_dim"]
Context = Float[Tensor, "batch heads context_tokens head_dim"]  # keys, or values
Weights = Float[Tensor, "batch heads tokens context_tokens"]
KeysValues = tuple[Context, Context]
# Those of several layers, whose numbers of heads and channels differ.
LayerContext = Float[Tensor, "batch _heads _context_tokens _head_dim"]
LayersKeysValues = tuple[tuple[LayerContext, LayerContext], ...]


def attend(query: Queries, key: Context, value: Context) -> Queries:
    """Softmax attention in three plain operations, scaled by 1 / sqrt(head size).

    On a CPU its bfloat16 backward is about twice as fast as torch's fused one.
    """
    return attention_weights(query, key) @ value


def attention_weights(query: Queries, key: Context) -> Weights:
    """How much each query takes of each value: their sum is 1."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1)


Kernel = Callable[[Queries, Context, Context], Queries]
ATTENTION: dict[str, Kernel] = {
    "sdpa": F.scaled_dot_product_attention,
    "plain": attend,
}


class AttentionProcessor:
    """diffusers' attention processor for S, D and A: plain attention by the chosen kernel."""

    def __init__(self, attention: str) -> None:
        self.kernel = ATTENTION[attention]

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "batch tokens dim"],
        encoder_hidden_states: Float[Tensor, "batch context_tokens context_dim"] | None = None,
        attention_mask: None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend from `hidden_states` to `encoder_hidden_states`, to itself without them."""
        del attention_mask  # diffusers passes it by name; nothing here is masked
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        keys_values = project_keys_values(attn, context)
        return mix_values(attn, self.kernel, attn.to_q(hidden_states), keys_values)


def set_kernel(module: nn.Module, attention: str) -> None:
    """Let all attention in S, D or A run by this kernel."""
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.set_processor(AttentionProcessor(attention))
        elif isinstance(layer, WindowAttention):
            layer.fused_attn = attention == "sdpa"


def project_keys_values(
    attn: Attention, context: Float[Tensor, "batch context_tokens context_dim"]
) -> KeysValues:
    """Keys and values of `context`, split into heads."""
    return split_heads(attn, attn.to_k(context)), split_heads(attn, attn.to_v(context))


def split_heads(
    attn: Attention, tokens: Float[Tensor, "batch tokens inner"]
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """The channels of each head apart."""
    return rearrange(tokens, "b n (h d) -> b h n d", h=attn.heads)


def mix_values(
    attn: Attention,
    kernel: Kernel,
    query: Float[Tensor, "batch tokens inner"],
    keys_values: KeysValues,
) -> Float[Tensor, "batch tokens dim"]:
    """Split the heads of `query`, attend, join the heads and project out."""
    key, value = keys_values
    query = split_heads(attn, query).to(key.dtype)
    mixed = rearrange(kernel(query, key, value), "b h n d -> b n (h d)")
    to_out, dropout = attn.to_out
    return dropout(to_out(mixed))


def run(module: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Call `module`; with `recompute`, keep only its inputs and run it again in the backward."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)
