"""One attention function for every family, registered through transformers' public interface.

It does two things that the stock one does not: under `vmap` it folds the client axis into the batch axis (CPU attention has no
batching rule for its backward), and it takes a prefix where a model has no cache to carry one (vision models).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "fedtailor"
HALF = (torch.bfloat16, torch.float16)
_local = threading.local()  # a prefix belongs to one forward of one worker thread


class _Folded(torch.autograd.Function):
    """scaled_dot_product_attention whose vmap rule is one call over (client x batch).

    Shapes: q (batch, heads, time, dim), k and v (batch, heads, keys, dim), mask (batch, 1 or heads, time, keys) or None.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, p: float, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale, is_causal=causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None: ...

    @staticmethod
    def vmap(
        info: Any, dims: Sequence[int | None], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any
    ) -> tuple[Tensor, int]:
        clients = info.batch_size

        def fold(t: Tensor, dim: int | None) -> Tensor:
            whole = t.movedim(dim, 0) if dim is not None else t.expand(clients, *t.shape)
            return whole.reshape(-1, *t.shape[1:] if dim is None else whole.shape[2:])

        # These calls run one level below vmap, so plain autograd records them: no rule for a backward is needed.
        query, key, value = (fold(t, dim) for t, dim in zip((q, k, v), dims[:3], strict=True))
        seen = fold(mask, dims[3]) if mask is not None else None
        scale, p, causal = rest
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=p, scale=scale, is_causal=causal)
        return out.view(clients, -1, *out.shape[1:]), 0


def _repeat(t: Tensor, times: int) -> Tensor:
    """(batch, kv_heads, keys, dim) -> (batch, kv_heads * times, keys, dim), for grouped-query attention."""
    batch, heads, keys, dim = t.shape
    return t[:, :, None].expand(batch, heads, times, keys, dim).reshape(batch, heads * times, keys, dim)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: returns ((batch, time, heads, dim), None)."""
    if getattr(_local, "modules", None) is not None:
        _local.modules.append(module)
        _local.pairs.append((key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    prefix = getattr(_local, "prefix", None)
    if prefix is not None:
        key, value, attention_mask = _with_prefix(module, prefix, key, value, attention_mask)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = _repeat(key, groups), _repeat(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = query.dtype
    if dtype in HALF and query.device.type == "cpu":
        # On CPUs the backward of half-precision attention is several times slower than that of float32 (docs/performance.md).
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.dtype in HALF:
            attention_mask = attention_mask.float()
    if torch._C._functorch.maybe_current_level() is not None:
        out = _Folded.apply(  # type: ignore[no-untyped-call]
            query, key, value, attention_mask, scale, dropout, causal
        )
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scale, is_causal=causal
        )
    return out.to(dtype).transpose(1, 2).contiguous(), None


def _with_prefix(
    module: nn.Module, prefix: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prefix of shape (layers, 2, heads, length, dim): every query sees all of it."""
    layer = prefix[int(module.fedtailor_layer)].to(key.dtype)  # type: ignore[arg-type]  # set once, where the technique is made
    batch = key.shape[0]
    key = torch.cat([layer[0].expand(batch, *layer.shape[1:]), key], dim=2)
    value = torch.cat([layer[1].expand(batch, *layer.shape[1:]), value], dim=2)
    if mask is not None:
        seen = torch.ones((), dtype=mask.dtype, device=mask.device) if mask.dtype == torch.bool else mask.new_zeros(())
        mask = torch.cat([seen.expand(*mask.shape[:-1], layer.shape[2]), mask], dim=-1)
    return key, value, mask


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The stock boolean mask, never skipped: the skip looks into the mask's values, which vmap refuses."""
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def register() -> str:
    """Make the attention known to transformers; returns the name to pass as `attn_implementation`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


@contextmanager
def prefixed(prefix: Tensor) -> Iterator[None]:
    """Every attention layer of the forward inside sees this prefix, (layers, 2, kv_heads, length, dim)."""
    _local.prefix = prefix
    try:
        yield
    finally:
        _local.prefix = None


@contextmanager
def observed() -> Iterator[tuple[list[nn.Module], list[tuple[Tensor, Tensor]]]]:
    """Collects the attention modules of the forward inside, and their (keys, values), in the order in which they run."""
    _local.modules, _local.pairs = [], []
    try:
        yield _local.modules, _local.pairs
    finally:
        _local.modules = None
