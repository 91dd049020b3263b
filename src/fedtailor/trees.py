"""Arithmetic on trees: nested dicts of tensors by name. Nothing here changes its arguments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtailor.core import Tree

SEPARATOR = "/"


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) in sorted order; the parts of a path are joined by "/"."""
    for name in sorted(tree):
        value = tree[name]
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}{SEPARATOR}")
        else:
            yield prefix + name, value


def tensors(tree: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensor leaves of `leaves`."""
    return ((path, leaf) for path, leaf in leaves(tree) if isinstance(leaf, Tensor))


def tree_map(fn: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]) -> Tree:
    """fn over the tensor leaves of trees with the same names; other leaves are taken from the first tree.

    Raises:
        KeyError: a name of the first tree is missing from another one.
    """
    out: Tree = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = tree_map(fn, value, *(other[name] for other in others))
        elif isinstance(value, Tensor):
            out[name] = fn(value, *(other[name] for other in others))
        else:
            out[name] = value
    return out


def add(a: Tree, b: Tree) -> Tree:
    return tree_map(torch.add, a, b)


def subtract(a: Tree, b: Tree) -> Tree:
    return tree_map(torch.sub, a, b)


def scale(tree: Tree, factor: float) -> Tree:
    return tree_map(lambda t: t * factor, tree)


def zeros_like(tree: Tree) -> Tree:
    return tree_map(torch.zeros_like, tree)


class UnequalShapes(ValueError):
    """Tensors of one name that should have one shape."""


def weighted_mean(trees: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> Tree:
    """sum_k w_k tree_k / sum_k w_k, tensor by tensor, so that trees on disk are never in memory together.

    The sum runs in the order given (client order, so that arrival order cannot change a bit) and in float32 or better.

    Raises:
        UnequalShapes: as it says. ValueError: no trees, unequal numbers of trees and weights, or weights that do not add up to
            something positive.
    """
    total = float(sum(weights))
    if not trees or len(trees) != len(weights) or not total > 0:
        raise ValueError(f"weighted_mean of {len(trees)} trees with weights {list(weights)}")
    out: Tree = {}
    for name in trees[0]:
        first = trees[0][name]
        if isinstance(first, Mapping):
            out[name] = weighted_mean([tree[name] for tree in trees], weights)
        elif isinstance(first, Tensor):
            exact = torch.promote_types(first.dtype, torch.float32) if first.is_floating_point() else torch.float64
            mean = first.to(exact) * (weights[0] / total)
            for tree, weight in zip(trees[1:], weights[1:], strict=True):
                part = tree[name]
                if part.shape != first.shape:  # or torch would broadcast
                    raise UnequalShapes(f"weighted_mean of shapes {list(first.shape)} and {list(part.shape)} for '{name}'")
                mean.add_(part.to(exact), alpha=weight / total)
            # A count that is equal everywhere must not lose one to rounding.
            out[name] = (mean if first.is_floating_point() else mean.round()).to(first.dtype)
        else:
            out[name] = first
    return out


def cut(tree: Tree, like: Tree) -> Tree:
    """The first entries of each tensor along each axis, as many as `like` has under that name; the rest as it is.

    A client of a smaller rank or prefix length gets its part of the server's tree so. Where there is nothing to cut it is the tree itself:
    what everybody was sent stays one object, and is stacked as one.
    """
    out = {
        name: t[tuple(slice(0, size) for size in like[name].shape)].contiguous()
        if isinstance(t, Tensor) and name in like and like[name].shape != t.shape
        else t
        for name, t in tree.items()
    }
    return tree if all(t is tree[name] for name, t in out.items()) else out


def overlapping_mean(trees: Sequence[Mapping[str, Any]], weights: Sequence[float], like: Tree) -> Tree:
    """`weighted_mean` of trees that hold the first entries of `like` along each axis: every entry is averaged over the trees
    that hold it, with their weights, and is 0 where none does. Equal shapes give `weighted_mean`, bit for bit.
    """
    out: Tree = {}
    for name, whole in like.items():
        with contextlib.suppress(UnequalShapes):  # tried first, and not asked: a tree on disk is read once so
            out |= weighted_mean([_Only(tree, name) for tree in trees], weights)
        if not isinstance(whole, Tensor) or (name in out and out[name].shape == whole.shape):
            continue
        total, held = torch.zeros_like(whole), torch.zeros_like(whole)
        for tree, weight in zip(trees, weights, strict=True):
            part = tuple(slice(0, size) for size in tree[name].shape)
            total[part] += weight * tree[name]
            held[part] += weight
        out[name] = torch.where(held > 0, total / held.clamp_min(torch.finfo(held.dtype).tiny), 0)
    return out


class _Only(Mapping[str, Any]):
    """One entry of a tree, read when it is asked for."""

    def __init__(self, tree: Mapping[str, Any], name: str) -> None:
        self._tree, self._name = tree, name

    def __getitem__(self, name: str) -> Any:
        return self._tree[name]

    def __iter__(self) -> Iterator[str]:
        yield self._name

    def __len__(self) -> int:
        return 1


def moved(params: Tree, trees: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> Tree:
    """`add(params, overlapping_mean(trees, weights, params))`, bit for bit, tensor by tensor: the mean is never whole in memory."""
    out: Tree = {}
    for name, start in params.items():
        if isinstance(start, Mapping):
            out[name] = moved(dict(start), [tree[name] for tree in trees], weights)
        elif isinstance(start, Tensor):
            mean = overlapping_mean([_Only(tree, name) for tree in trees], weights, {name: start})[name]
            out[name] = mean.add_(start) if mean.dtype == start.dtype else start + mean
        else:
            out[name] = start
    return out


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree whose tensors have a new leading client axis. Other leaves must be equal and are taken from the first."""
    return tree_map(lambda *parts: torch.stack(parts), trees[0], *trees[1:])


def unstack(tree: Tree, index: int) -> Tree:
    """The tree of one client, with tensors of its own (a view would keep every client's memory alive)."""
    return tree_map(lambda t: t[index].clone(), tree)


def select(tree: Tree, names: Iterable[str]) -> Tree:
    return {name: tree[name] for name in names if name in tree}


def norm(tree: Mapping[str, Any]) -> float:
    """Euclidean norm over all tensor leaves."""
    return float(sum(float(t.detach().double().square().sum()) for _, t in tensors(tree)) ** 0.5)


def nbytes(tree: Mapping[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for _, t in tensors(tree))


def numel(tree: Mapping[str, Any]) -> int:
    return sum(t.numel() for _, t in tensors(tree))


def is_finite(tree: Mapping[str, Any]) -> bool:
    # Least and most are NaN where anything is: ten times as quick as isfinite, which makes a tensor of booleans.
    return all(all(map(math.isfinite, t.aminmax())) for _, t in tensors(tree) if t.is_floating_point() and t.numel())


def signature(tree: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Names, shapes and dtypes: trees with the same signature can be stacked and averaged."""
    return tuple((path, tuple(t.shape), str(t.dtype)) for path, t in tensors(tree))


def lora_pairs(tree: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """module -> (name of its A of shape (r, d_in), name of its B of shape (d_out, r)) for the LoRA factors of a flat tree."""
    suffix_a, suffix_b = ".lora_A.weight", ".lora_B.weight"
    modules = [name[: -len(suffix_a)] for name in tree if name.endswith(suffix_a)]
    return {m: (m + suffix_a, m + suffix_b) for m in sorted(modules) if m + suffix_b in tree}


def aggregation_error(trees: Sequence[Mapping[str, Any]], weights: Sequence[float], mean: Mapping[str, Any]) -> float:
    """||sum p_k B_k A_k - B A|| / ||sum p_k B_k A_k|| over the LoRA modules, for the factors B, A kept in `mean`.

    Factors that `mean` lacks (frozen, equal everywhere) make averaging exact: 0.
    """
    total, wrong, size = float(sum(weights)), 0.0, 0.0
    for a, b in lora_pairs(mean).values():
        exact = sum((w / total) * (t[b].double() @ t[a].double()) for w, t in zip(weights, trees, strict=True))
        assert isinstance(exact, Tensor)
        wrong += float((exact - mean[b].double() @ mean[a].double()).square().sum())
        size += float(exact.square().sum())
    return (wrong / size) ** 0.5 if size else 0.0
