"""Which rows make which batch: a pure function of the plan, the lengths and the client's random stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from fedtailor.core import Plan

WINDOW = 50
"""Batches that are drawn together and sorted by length (as transformers' length-grouped sampling does): padding falls, and which
rows of like length meet stays random."""


def batches(
    plan: Plan, lengths: Sequence[int] | np.ndarray, random: torch.Generator, pace: torch.Generator | None = None
) -> list[np.ndarray]:
    """Row numbers of each optimiser step of one Fit.

    Every pass is a fresh permutation. Within windows of WINDOW batches, rows are sorted by length and cut into batches:
    neighbours in length share a batch. `pace` orders the batches of a pass: at a step, it says which quantile of the client's
    own batch lengths comes. Clients that share a pace meet long batches together, so a stack of them has little padding, and
    the order says nothing about a client's own rows. Without it the order is drawn from `random`.
    """
    n = len(lengths)
    if n == 0:
        return []
    steps = plan.steps or max(1, round(plan.epochs * math.ceil(n / plan.batch)))
    sizes = np.asarray(lengths)
    out: list[np.ndarray] = []
    while len(out) < steps:
        out += _one_pass(plan.batch, sizes, random, pace or random)
    return out[:steps]


def _one_pass(batch: int, sizes: np.ndarray, random: torch.Generator, pace: torch.Generator) -> list[np.ndarray]:
    order = torch.randperm(len(sizes), generator=random).numpy()
    cut: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW * batch):
        window = order[start : start + WINDOW * batch]
        window = window[np.argsort(sizes[window], kind="stable")]
        cut += [window[i : i + batch] for i in range(0, len(window), batch)]
    cut.sort(key=lambda rows: int(sizes[rows].max()))
    # The rank of the i-th draw among the first len(cut) says which batch comes at step i.
    draws = torch.rand(len(cut), generator=pace)
    return [cut[rank] for rank in draws.argsort().argsort().tolist()]
