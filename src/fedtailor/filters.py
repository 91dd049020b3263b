"""Filters between algorithm and wire: pure functions on a message, the same in every engine.

A filter changes the body's floating-point tensors; its inverse runs after decoding. `int8` keeps what rounding lost and adds it
to the next message (error feedback, arXiv 1901.09847), so that nothing is lost for good; that memory belongs to the sender.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor.core import Message, Tree
from fedtailor.errors import ConfigError, nearest
from fedtailor.trees import tree_map

SCALE = "#scale"


class Filter(NamedTuple):
    apply: Callable[[Message, Tree], tuple[Message, Tree]]  # (message, memory) -> (message for the wire, new memory)
    undo: Callable[[Message], Message]


def _cast(dtype: torch.dtype) -> Filter:
    """Send floats as `dtype`; the receiver gets float32 back. Half the bytes of float32."""

    def apply(message: Message, memory: Tree) -> tuple[Message, Tree]:
        return message._replace(body=tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, message.body)), memory

    def undo(message: Message) -> Message:
        return message._replace(body=tree_map(lambda t: t.float() if t.dtype == dtype else t, message.body))

    return Filter(apply, undo)


def quantize(t: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 values, float32 scales): symmetric, ties to even; one scale along the longest axis (the last of equals), so that
    scales stay few next to what they scale: LoRA's B, (width, rank), has one a rank and not one a row.

    Shapes: t (..., n, ...) -> the same in int8, and (..., 1, ...) float32.
    """
    axis = max(range(t.dim()), key=lambda k: (t.shape[k], k), default=None)
    largest = t.abs() if axis is None else t.abs().amax(dim=axis, keepdim=True)
    step = (largest.float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(t.float() / step).clamp(-127, 127).to(torch.int8), step


def _int8(feedback: bool = True) -> Filter:
    """Send floats as int8 with a scale for each line of the longest axis; about a quarter of the bytes of float32."""

    def pack(tree: Mapping[str, object], kept: Mapping[str, object]) -> tuple[Tree, Tree]:
        out: Tree = {}
        lost: Tree = {}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                below = kept.get(name, {})
                out[name], lost[name] = pack(value, below if isinstance(below, Mapping) else {})
            elif isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                before = kept.get(name)
                full = value.float() + before if isinstance(before, Tensor) and before.shape == value.shape else value.float()
                out[name], out[name + SCALE] = quantize(full)
                if feedback:
                    lost[name] = full - out[name].float() * out[name + SCALE]
            else:
                out[name] = value
        return out, lost

    def apply(message: Message, memory: Tree) -> tuple[Message, Tree]:
        # What an update lost is owed to the next update, not to a reply of another kind with tensors of the same names.
        body, lost = pack(message.body, memory.get(message.verb, {}))
        return message._replace(body=body), {**memory, message.verb: lost} if lost else memory

    def unpack(tree: Mapping[str, object]) -> Tree:
        out: Tree = {}
        for name, value in tree.items():
            step = tree.get(name + SCALE)
            if isinstance(value, Mapping):
                out[name] = unpack(value)
            elif isinstance(value, Tensor) and isinstance(step, Tensor):
                out[name] = value.float() * step
            elif not name.endswith(SCALE):
                out[name] = value
        return out

    return Filter(apply, lambda message: message._replace(body=unpack(message.body)))


FILTERS: Mapping[str, tuple[Callable[[], Filter], str]] = {
    "bf16": (lambda: _cast(torch.bfloat16), "floats as bfloat16: half the bytes, three digits"),
    "fp16": (lambda: _cast(torch.float16), "floats as float16: half the bytes; small numbers vanish below 6e-8"),
    "int8": (_int8, "floats as int8, a scale a line, what rounding lost is sent later: a quarter of the bytes"),
    "int8-plain": (lambda: _int8(feedback=False), "int8 that forgets what rounding lost"),
}


NOTHING = Filter(lambda message, memory: (message, memory), lambda message: message)


def chain(names: list[str] | tuple[str, ...]) -> Filter:
    """The named filters one after the other, undone in reverse; no names: NOTHING.

    Raises:
        ConfigError: an unknown name, with the nearest known one.
    """
    for name in names:
        if name not in FILTERS:
            raise ConfigError(f"unknown filter '{name}': {nearest(name, FILTERS)}")
    if not names:
        return NOTHING
    parts = [FILTERS[name][0]() for name in names]

    def apply(message: Message, memory: Tree) -> tuple[Message, Tree]:
        new: Tree = {}
        for index, part in enumerate(parts):
            message, kept = part.apply(message, memory.get(str(index), {}))
            if kept:
                new[str(index)] = kept
        return message, new

    def undo(message: Message) -> Message:
        for part in reversed(parts):
            message = part.undo(message)
        return message

    return Filter(apply, undo)
