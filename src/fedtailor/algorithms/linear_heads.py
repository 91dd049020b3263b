"""Trees that are one linear head over a frozen model: many of them at once, on features that the model computes once.

What enters the head of a classifier does not depend on the head, so a row's passes through the model are one, however many heads are tried.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fedtailor.core import Batch, Forward, Tree
from fedtailor.techniques.base import WITHIN
from fedtailor.techniques.peft import of_head


class Head(NamedTuple):
    """Where a head lies in a tree; the tree's names in sorted order are bias, weight."""

    weight: str  # (classes, width)
    bias: str  # (classes,)


def linear_head(tree: Tree) -> Head | None:
    """The head that this tree is, if it is nothing else."""
    names = sorted(tree)
    if len(names) != 2 or not all(map(of_head, names)) or [n.rpartition(".")[2] for n in names] != ["bias", "weight"]:
        return None
    bias, weight = (tree[name] for name in names)
    return Head(names[1], names[0]) if weight.dim() == 2 and bias.shape == weight.shape[:1] else None


def features(forward: Forward, params: Tree, batch: Batch, head: Head) -> Tree:
    """Rows of {features}: what enters the head, (batch, width)."""
    return {"features": forward({**params, WITHIN: [head.weight]}, batch)}


def products(heads: int, head_numbers: int, rows: int) -> float:
    """Operations of `logits`; as many again for the heads' gradients."""
    return 2.0 * heads * head_numbers * rows


def logits(heads: Tensor, inputs: Tensor) -> Tensor:
    """Of flat heads (n, classes + classes x width), bias first, on inputs (rows, width): (n, rows, classes)."""
    classes = heads.shape[1] // (inputs.shape[1] + 1)
    bias, weight = heads[:, :classes], heads[:, classes:].unflatten(1, (classes, -1))
    said: Tensor = inputs @ weight.mT + bias[:, None]
    return said
