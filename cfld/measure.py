"""Memory and floating-point operations of a computation, measured on tensors without data.

On torch's meta device everything runs as on a GPU (same operations, same saved tensors, same
gradient checkpointing), but nothing is computed or stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """What a computation needs."""

    peak_bytes: int
    """The most that its tensors occupied at a time, without the weights."""
    flops: int
    """Multiplications and additions of matrix products, convolutions and attention."""


def measure(computation: Callable[[], Tensor], module: nn.Module, *, backward: bool) -> Cost:
    """Run a computation on meta tensors, with the backward of its result if wanted.

    The module's gradients count towards the peak as they appear; none are left behind.
    """
    meter = _Meter([*module.parameters(), *module.buffers()])
    with torch.set_grad_enabled(backward), _FusedAttention(), meter:
        result = computation()
        if backward:
            # result.backward() would pass through _FusedAttention and so suspend it, but what is
            # recomputed in the backward needs it.
            Variable._execution_engine.run_backward(
                (result,),
                (torch.ones_like(result),),
                False,  # keep_graph
                False,  # create_graph
                (),  # inputs: all leaves
                allow_unreachable=True,
                accumulate_grad=True,
            )
    module.zero_grad(set_to_none=True)
    return Cost(peak_bytes=meter.peak_bytes, flops=meter.flops)


class _Meter(TorchDispatchMode):
    """Adds up operations, and the storages they return until the last tensor lets go of them."""

    def __init__(self, uncounted: list[Tensor]) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.flops = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in uncounted}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operations = flop_registry.get(func._overloadpacket)
        if operations is not None:
            self.flops += operations(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self.sizes.pop(key)


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by the fused kernel of GPUs, which the meta device would not choose."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value, mask = _attention_arguments(*args, **kwargs)
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, compute_log_sumexp=torch.is_grad_enabled()
            )[0]
        return func(*args, **kwargs)


def _attention_arguments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return query, key, value, attn_mask
