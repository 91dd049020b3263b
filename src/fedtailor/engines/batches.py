"""Which rows make which batch: a pure function of the plan, the lengths and the client's random stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fedtailor.core import Plan

WINDOW = 8
"""Batches that are drawn together and sorted by length: padding falls, and which rows meet stays random."""


def batches(plan: Plan, lengths: Sequence[int] | np.ndarray, random: torch.Generator) -> list[np.ndarray]:
    """Row numbers of each optimiser step of one Fit.

    Every pass is a fresh permutation. Within windows of WINDOW batches, rows are sorted by length and cut into batches, and the
    batches of the pass are shuffled again: neighbours in length share a batch, the order of batches says nothing about length.
    """
    n = len(lengths)
    if n == 0:
        return []
    per_pass = math.ceil(n / plan.batch)
    steps = plan.steps or max(1, round(plan.epochs * per_pass))
    sizes = np.asarray(lengths)
    out: list[np.ndarray] = []
    while len(out) < steps:
        out += _one_pass(plan.batch, sizes, random)
    return out[:steps]


def _one_pass(batch: int, sizes: np.ndarray, random: torch.Generator) -> list[np.ndarray]:
    order = torch.randperm(len(sizes), generator=random).numpy()
    cut: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW * batch):
        window = order[start : start + WINDOW * batch]
        window = window[np.argsort(sizes[window], kind="stable")]
        cut += [window[i : i + batch] for i in range(0, len(window), batch)]
    return [cut[i] for i in torch.randperm(len(cut), generator=random).tolist()]
