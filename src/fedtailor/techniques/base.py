"""What a technique is, and the one forward function that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from fedtailor import wire
from fedtailor.backbone import Backbone, first_token, fork
from fedtailor.core import HIDDEN, TARGETS, Batch, Forward, Loss, Reader, Tree
from fedtailor.errors import ConfigError
from fedtailor.metrics import Metric

DELTA = "delta"
"""In a tree: unscaled B A products by module, merged into the frozen weights (what FLoRA and FedEx leave behind)."""


MEAN = "mean"
"""In a tree: the forward gives the mean hidden state before the last layer, (batch, width), in the place of logits."""


WITHIN = "within"
"""In a tree: names of weights; the forward gives what comes into the modules that have them, side by side: (batch, tokens, sum of widths)."""


FRAME = ("frame.top", "frame.bottom", "frame.left", "frame.right")
"""In a tree: strips that are added to the border of every image (what pFedPT learns)."""


def frame_shapes(pixels: Sequence[int], pad: int) -> dict[str, tuple[int, int, int]]:
    """Shapes of a frame's strips for images of (channels, height, width); {} where it is 0 pixels wide."""
    channels, height, width = pixels
    across, down = (channels, pad, width), (channels, height - 2 * pad, pad)
    return dict(zip(FRAME, (across, across, down, down), strict=True)) if pad else {}


def framed(images: Tensor, params: Tree) -> Tensor:
    """Images (batch, channels, height, width) plus the frame of `params`, zero in the middle."""
    top, bottom, left, right = (params[name].to(images.dtype) for name in FRAME)
    middle = left.new_zeros(left.shape[0], left.shape[1], images.shape[-1] - 2 * left.shape[2])
    return images + torch.cat([top, torch.cat([left, middle, right], 2), bottom], 1)


def save_frame(tree: Tree, folder: Path) -> None:
    """No adapter format has a place for a frame: it lies beside the others' files."""
    if FRAME[0] in tree:
        path = folder / "frame.safetensors"
        with wire.saving(path):
            save_file({name: tree[name].contiguous() for name in FRAME}, str(path), {"format": "pt"})


class Technique(NamedTuple):
    kind: str
    backbone: Backbone
    init: Tree  # the initial trained tree, float32 on the CPU
    resized: Callable[[int], Tree]  # the initial tree at another rank or length
    bind: Callable[[bool], Forward]  # a forward on modules of its own (one a thread), tensors shared; argument: dropout
    save: Callable[[Tree, Path], None]  # write the folder that PEFT (or transformers) loads
    merge: Callable[[Tree, Path], None]  # write a plain transformers folder
    scaling: float = 1.0  # LoRA's alpha / r, the same at every rank
    passes: Callable[[Sequence[Tree]], int] = len  # forward passes of a batch that is judged with each of these trees in turn
    takes: int = 0  # positions of the model that it takes from the texts, beside a prompt's or prefix's
    loss: Loss | None = None  # what it is trained with where its outputs are no logits
    metric: Callable[[Metric], Metric] | None = None  # and how they are judged
    reader: Reader | None = None  # what reads the passages that are found with it
    frozen: Tree = {}  # tensors that stand still, under the names by which a tree may replace them


def binder(
    model: nn.Module,
    paths: Mapping[str, str],
    unread: str | None = None,
    scaling: float = 1.0,
    around: Callable[[nn.Module, Tree], AbstractContextManager[None]] | None = None,
) -> Callable[[bool], Forward]:
    """`Technique.bind` for a prepared model.

    Args:
        paths: name in the tree -> name of the parameter that it replaces.
        unread: the backbone's module from which on only the first token counts, if there is one.
        around: entered with (the thread's own modules, params) for each forward: prefixes and their lengths.
    """
    deltas = {name[: -len(".lora_A.weight")] for name in paths if name.endswith(".lora_A.weight")}

    def bind(dropout: bool = False) -> Forward:
        own = fork(model).train(dropout)
        if unread:
            place = next(m for name, m in own.named_modules() if f".{name}".endswith(f".{unread}"))
            place.register_forward_pre_hook(first_token)
        dtype = next(model.parameters()).dtype
        bases = {module: f"{module}.base_layer.weight" for module in deltas}
        tensors = dict(own.named_parameters()) if bases else {}

        def forward(params: Tree, batch: Batch) -> Tensor:
            swapped = {path: params[name].to(dtype) for name, path in paths.items() if name in params}
            for module, delta in params.get(DELTA, {}).items():
                frozen = tensors[bases[module]]
                change = (scaling * delta).to(dtype)
                # GPT-2's Conv1D keeps (d_in, d_out) where Linear keeps (d_out, d_in).
                swapped[bases[module]] = frozen + (change if _is_linear(own, bases[module]) else change.mT)
            inputs = {k: v for k, v in batch.items() if k not in TARGETS}
            inputs |= {name: inputs[name].to(dtype) for name in ("pixel_values", HIDDEN) if name in inputs}
            if FRAME[0] in params:
                inputs["pixel_values"] = framed(inputs["pixel_values"], params)
            bent: AbstractContextManager[None] = around(own, params) if around else nullcontext()
            seen: AbstractContextManager[list[Tensor]] = entering(own) if MEAN in params else nullcontext([])
            if WITHIN in params:
                seen = arriving([own.get_submodule(paths[name].rpartition(".")[0]) for name in params[WITHIN]])
            with bent, seen as came:
                outputs = functional_call(own, swapped, (), inputs)
            if WITHIN in params:
                return torch.cat(came, -1).float()
            if came:
                mask = batch.get("attention_mask", came[0].new_ones(came[0].shape[:2]))
                return pooled(came[0][:, -mask.shape[1] :].float(), mask)  # a soft prompt stands before the text
            # An encoder without a head has no logits: its last hidden states, (batch, tokens, width), are what it says.
            found: Tensor = outputs["logits" if "logits" in outputs else "last_hidden_state"]
            return found.float()

        return forward

    return bind


@contextmanager
def entering(model: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that come into the last layer while this is entered. (What comes out of it may be one token only, and PEFT's prefixes
    take hidden states among the outputs for something else.)

    Raises:
        ConfigError: the model has no list of layers.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not stacks:
        raise ConfigError("this model has no list of layers, so nothing is known of its hidden states: choose another model")
    last = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))[-1]
    came: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        came.append(given[0] if given else named["hidden_states"])

    hook = last.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield came
    finally:
        hook.remove()


@contextmanager
def arriving(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What comes into these modules while this is entered, in their order."""
    came: list[Tensor] = [torch.empty(0)] * len(modules)

    def look(place: int) -> Callable[..., None]:
        return lambda module, given: came.__setitem__(place, given[0])

    hooks = [module.register_forward_pre_hook(look(place)) for place, module in enumerate(modules)]
    try:
        yield came
    finally:
        for hook in hooks:
            hook.remove()


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that count, of length 1. Shapes: (batch, tokens, width), (batch, tokens) -> (batch, width)."""
    weights = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp_min(1), dim=-1)


def _is_linear(model: nn.Module, weight: str) -> bool:
    return isinstance(model.get_submodule(weight.rpartition(".")[0]), nn.Linear)


@torch.no_grad()
def detached(tree: Mapping[str, Tensor]) -> Tree:
    """Float32 copies on the CPU."""
    return {name: t.detach().float().cpu().clone() for name, t in tree.items()}
