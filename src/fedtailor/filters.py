"""Filters between algorithm and wire: pure functions on a message, the same in every engine.

A filter changes the body's floating-point tensors; its inverse runs after decoding. `int8` and `topk` keep what they lost and add it
to the next message (error feedback, arXiv 1901.09847), so that nothing is lost for good; that memory belongs to the sender.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor.core import Message, Tree
from fedtailor.errors import ConfigError, nearest
from fedtailor.trees import tree_map
from fedtailor.wire import WireError

SCALE, AT, SHAPE = "#scale", "#at", "#shape"


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


def _lossy(
    squeeze: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]],
    restore: Callable[[Tensor, dict[str, Tensor]], Tensor],
    suffixes: tuple[str, ...],
    feedback: bool,
    only: str = "",
) -> Filter:
    """A filter from one tensor -> ({suffix: what is sent}, what will be received), "" being the suffix of the tensor's own name, and
    the way back. `only`: it is for tensors of this name."""

    def pack(tree: Mapping[str, object], kept: Mapping[str, object]) -> tuple[Tree, Tree]:
        out: Tree = {}
        lost: Tree = {}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                below = kept.get(name, {})
                out[name], lost[name] = pack(value, below if isinstance(below, Mapping) else {})
            elif isinstance(value, Tensor) and value.is_floating_point() and value.numel() and only in ("", name):
                before = kept.get(name)
                full = value.float() + before if isinstance(before, Tensor) and before.shape == value.shape else value.float()
                sent, received = squeeze(full)
                out |= {name + suffix: t for suffix, t in sent.items()}
                if feedback:
                    lost[name] = full - received
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
            beside = {suffix: t for suffix in suffixes if isinstance(t := tree.get(name + suffix), Tensor)}
            if isinstance(value, Mapping):
                out[name] = unpack(value)
            elif isinstance(value, Tensor) and len(beside) == len(suffixes):
                out[name] = restore(value, beside)
            elif not name.endswith(suffixes):
                out[name] = value
        return out

    return Filter(apply, lambda message: message._replace(body=unpack(message.body)))


def _int8(feedback: bool = True) -> Filter:
    """Send floats as int8 with a scale for each line of the longest axis; about a quarter of the bytes of float32."""

    def squeeze(full: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rounded, step = quantize(full)
        return {"": rounded, SCALE: step}, rounded.float() * step

    def restore(rounded: Tensor, beside: dict[str, Tensor]) -> Tensor:
        scale = beside[SCALE]
        # Else torch would broadcast, and two small tensors become one of any size.
        if scale.dim() != rounded.dim() or any(n not in (1, size) for n, size in zip(scale.shape, rounded.shape, strict=True)):
            raise WireError(f"int8: scales of shape {list(scale.shape)} for a tensor of shape {list(rounded.shape)}")
        return rounded.float() * scale

    return _lossy(squeeze, restore, (SCALE,), feedback)


def _topk(feedback: bool = True, share: str = "0.1", only: str = "") -> Filter:
    """Send the largest entries of each tensor, this share of them, and where they stand: a bit an entry, or four bytes a sent one.

    Raises:
        ConfigError: the share is no number above 0 and at most 1.
    """
    try:
        part = float(share)
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise ConfigError(f"filter 'topk={share}': the share of entries that is sent is above 0 and at most 1, as in topk=0.1")

    def squeeze(full: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        flat = full.reshape(-1)
        count = max(1, math.ceil(part * len(flat)))
        places = flat.abs().topk(count).indices.sort().values
        values, received = flat[places], torch.zeros_like(flat)
        received[places] = values
        return {"": values, AT: marked(places, len(flat)), SHAPE: torch.tensor(full.shape, dtype=torch.int64)}, received.view(
            full.shape
        )

    def restore(values: Tensor, beside: dict[str, Tensor]) -> Tensor:
        shape, at = torch.Size(beside[SHAPE].tolist()), places_of(beside[AT])
        if (
            values.dim() != 1
            or not 0 < len(values) == len(at)
            or shape.numel() > min(MOST, 1 / part) * len(at)
            or int(at.min()) < 0
            or int(at.max()) >= shape.numel()
        ):
            raise WireError(f"topk: {len(values)} values at {len(at)} places of a tensor of {shape.numel()} entries")
        out = torch.zeros(shape.numel())
        out[at] = values.float()
        return out.view(shape)

    return _lossy(squeeze, restore, (AT, SHAPE), feedback, only)


def marked(places: Tensor, size: int) -> Tensor:
    """Places among `size` entries for the wire, whichever is smaller: a bit an entry, or four bytes a place."""
    if size >= 32 * len(places):
        return places.to(torch.int32)
    bits = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8)
    bits[places] = 1
    return (bits.view(-1, 8) * BITS).sum(1, dtype=torch.uint8)


def places_of(at: Tensor) -> Tensor:
    """The places that `marked` wrote down, in order."""
    return ((at[:, None] & BITS) > 0).reshape(-1).nonzero()[:, 0] if at.dtype == torch.uint8 else at.long()


BITS = 2 ** torch.arange(8, dtype=torch.uint8)
MOST = 100_000
"""Entries that one sent entry may stand for: what arrives decides how much memory is taken."""

FILTERS: Mapping[str, tuple[Callable[..., Filter], str]] = {
    "bf16": (lambda: _cast(torch.bfloat16), "floats as bfloat16: half the bytes, three digits"),
    "fp16": (lambda: _cast(torch.float16), "floats as float16: half the bytes; small numbers vanish below 6e-8"),
    "int8": (_int8, "floats as int8, a scale a line, what rounding lost is sent later: a quarter of the bytes"),
    "int8-plain": (lambda: _int8(feedback=False), "int8 that forgets what rounding lost"),
    "topk": (
        functools.partial(_topk, True),
        "topk=0.1: the largest tenth of each tensor, the rest is sent later; topk=0.1@NAME: of that tensor",
    ),
    "topk-plain": (functools.partial(_topk, False), "topk that forgets the rest"),
}
FEEDBACK = ("int8", "topk")
"""Filters that add what one message lost to the next one of its kind."""


NOTHING = Filter(lambda message, memory: (message, memory), lambda message: message)


def base(name: str) -> str:
    """A filter's name without its argument."""
    return name.partition("=")[0]


def _made(name: str) -> Filter:
    known, found, argument = name.partition("=")
    if known not in FILTERS:
        raise ConfigError(f"unknown filter '{name}': {nearest(known, FILTERS)}")
    if not found:
        return FILTERS[known][0]()
    if not known.startswith("topk"):
        raise ConfigError(f"filter '{name}': {known} has no argument (topk has: topk=0.1)")
    share, _, only = argument.partition("@")
    return FILTERS[known][0](share=share, only=only)


def chain(names: list[str] | tuple[str, ...]) -> Filter:
    """The named filters one after the other, undone in reverse; no names: NOTHING.

    Raises:
        ConfigError: an unknown name, with the nearest known one.
    """
    if not names:
        return NOTHING
    parts = [_made(name) for name in names]

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
