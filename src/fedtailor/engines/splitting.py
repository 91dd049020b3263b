"""A training step whose layers lie in two places: outputs go one way, their gradients come back.

    client  through(front)            -> hidden states    up
    server  through(middle)           -> hidden states    down
    client  slope(loss, back)         -> their gradient   up
    server  back(middle), its step    -> the gradient     down (not where the front is frozen)
    client  back(front), its step
What going back needs is `Kept`: a graph in memory, a cache, never a part of any state. Where it is gone, `through` makes it again.
With `torch.vmap(forward)` in the place of the forward, all of this is of many clients at once, each tree and tensor with a leading axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor.core import Batch, Forward, Loss, Tree
from fedtailor.cut import HIDDEN
from fedtailor.trees import tensors, tree_map


class Kept(NamedTuple):
    """What `back` needs of a `through`."""

    outputs: Tensor  # with their graph
    params: Tree  # its leaves
    hidden: Tensor | None  # what came in, a leaf too; None at the front


def through(forward: Forward, params: Tree, batch: Batch) -> tuple[Tensor, Kept]:
    """(outputs, what going back needs) of a part of a cut model."""
    leaves, given = _leaves(params, batch)
    outputs = forward(leaves, given)
    return outputs.detach(), Kept(outputs, leaves, given.get(HIDDEN))


def back(kept: Kept, gradient: Tensor) -> tuple[Tree, Tensor | None]:
    """(gradients of the params, gradient of what came in), from the gradient of the outputs. Tensors that took no part have zeros."""
    return _slopes(kept.outputs, kept.params, kept.hidden, gradient)


def slope(loss: Loss, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> tuple[Tensor, Tree, Tensor | None]:
    """(loss, gradients of the params, gradient of what came in) at the part that has the labels."""
    leaves, given = _leaves(params, batch)
    value = loss(forward, leaves, given, aux)
    return value.detach(), *_slopes(value, leaves, given.get(HIDDEN), None)


def _leaves(params: Tree, batch: Batch) -> tuple[Tree, dict[str, Tensor]]:
    leaves = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), params)
    given = dict(batch)
    if HIDDEN in given:
        given[HIDDEN] = given[HIDDEN].detach().requires_grad_(True)
    return leaves, given


def _slopes(outputs: Tensor, params: Tree, hidden: Tensor | None, gradient: Tensor | None) -> tuple[Tree, Tensor | None]:
    named = [t for _, t in tensors(params) if t.requires_grad]
    wanted = named if hidden is None else [*named, hidden]
    if not wanted or not outputs.requires_grad:  # a frozen front: nothing to go back to
        return tree_map(torch.zeros_like, params), None
    found = torch.autograd.grad(outputs, wanted, gradient, allow_unused=True)
    slopes = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)}
    return tree_map(lambda t: slopes.get(id(t), t), params), None if hidden is None else slopes[id(hidden)]
