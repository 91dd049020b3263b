"""FlexP-style personalised split learning (Yuan et al., arXiv 2508.10349, and its revision FlexP-SFT). **Our reading**: the abstract's
statements hold (each client keeps as many layers as it can, no client part is averaged, nobody waits, layers at the server are
aligned), the equations are ours.

Client k holds the first `front` and the last `back` layers with embeddings, head and labels; the server holds a copy of the layers between
them for each client. Steps are those of split_training.py. Nobody waits: a client goes on as soon as its own answer is there, also into
its next pass; a round is only where one looks, when as many passes have ended as there are clients in the cohort.
Alignment pulls the copies of a layer together over the clients whose middle has it, at no cost on the wire: after each step
    w <- (w + lr alignment wbar) / (1 + lr alignment),    wbar = sum_j n_j w_j / sum_j n_j
which is the exact step on alignment/2 ||w - wbar||^2 with wbar held: 0 leaves clients to themselves, a large one makes the copies equal.
A personal model is the client's own ends around its own middle; a newcomer gets the ends as they began around the mean of the middles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedtailor.algorithms.cards import LAYERED, card
from fedtailor.algorithms.split_client import order_of
from fedtailor.algorithms.split_rules import Rules, dealt, ground
from fedtailor.algorithms.split_server import steps
from fedtailor.algorithms.split_training import own_middle, split_algorithm
from fedtailor.core import Algorithm, ClientId, Job, Site, State, Talk, Tree
from fedtailor.cut import cut_at
from fedtailor.errors import ConfigError
from fedtailor.planning import Choice, chosen


@card("personal", "2 x batch x tokens x width a step", "2 x batch x tokens x width a step", "our reading", LAYERED)
def flexp(
    job: Job,
    *,
    front: int | list[int] | Literal["optimal", "memory"] = 1,
    back: int | list[int] = 1,
    alignment: float = 1.0,
    train_front: bool = True,
    cache_mb: float = 1000.0,
    penalty: list[float] = [],  # noqa: B006 (never written to)
    weight: float = 1.0,
    least_front: int = 1,
    delta: float = 0.0,
) -> Algorithm:
    """FlexP-style: every client holds its own ends of the model, the server a copy of the middle for each; nobody waits.

    `front` = "optimal": each client takes the cut of the least seconds a step + weight * penalty[front] that fits its memory; "memory":
    the largest front that fits. Penalties of fronts 0, 1, ... are what a pilot has measured; the last one holds for longer fronts. Both
    rules give `least_front` layers or more: a front of 0 sends embeddings, from which words can be read off.
    `delta`: of a row that was sent before, this share of its numbers is sent again, those that have changed most; 0 sends all.
    """
    fronts = [] if isinstance(front, str) else [front] if isinstance(front, int) else list(front)
    backs = [back] if isinstance(back, int) else list(back)
    if min(alignment, cache_mb, weight) < 0:
        raise ConfigError(
            f"algorithm.alignment, cache_mb and weight must not be negative (got {alignment}, {cache_mb}, {weight})"
        )
    if not backs or not (fronts or isinstance(front, str)):
        raise ConfigError("algorithm.front and algorithm.back are numbers of layers, or lists of them")
    given = {(a, b) for a in fronts for b in backs}
    choice = Choice(front, back, train_front, penalty, weight, least_front)

    def cut(site: Site) -> tuple[int, int]:
        """The cut of this client; one that its device has no memory for is refused."""
        if fronts and not site.device.memory:
            return dealt(fronts, site.number), dealt(backs, site.number)
        data = site.data["train"]
        widths = [int(data.lengths[rows].max()) for rows in order_of(job, site, 1)] or [1]
        sizes = (job.plan.batch, int(np.median(widths)), int(max(data.lengths, default=1)))
        best = chosen(choice.estimates(layers, job, site.device, site.number, *sizes), choice.rule)
        return best.front, best.back

    def settle(middles: Tree, rates: Mapping[ClientId, float]) -> Tree:
        return aligned(middles, {client: rate * alignment for client, rate in rates.items()}) if alignment else middles

    def moves(number: int, place: str, name: str) -> bool:
        return train_front or place != "front"

    on = ground(job, "flexp", Rules(cut, moves, settle, ahead=True, cache=1e6 * cache_mb, delta=delta, room=1e6 * cache_mb))
    layers = on.layers
    for at in sorted(given):
        cut_at(layers, *at)

    def check(params: Tree) -> None:
        cuts = given or {(a, b) for a in range(layers.least, layers.depth - max(backs)) for b in backs}
        held = [layers.part(params, cut_at(layers, *at)[1]) for at in cuts]
        if len(cuts) > 1 and any(part[name].shape != params[name].shape for part in held for name in part):
            raise ConfigError(
                "algorithm flexp: a prefix is one table over all layers, which clients must cut alike: give one front and one back"
            )

    def round(state: State, cohort: list[ClientId]) -> Talk:
        after, _ = yield from steps(on, state, cohort)
        return after

    def model(state: State) -> Tree:
        """The ends as they began around the mean of the middles."""
        params: Tree = state["params"]
        middles: Tree = state["middles"]
        if not middles:
            return params
        mean = mean_of(middles)
        one = state["clients"][min(middles)]
        first, between, last = cut_at(layers, one["front"], one["back"])
        if mean.keys() == layers.part(params, between).keys():  # clients cut alike: a prefix's columns go back to their places
            return layers.whole([layers.part(params, first), mean, layers.part(params, last)])
        return {**params, **mean}

    return split_algorithm(on, round, model, own_middle, check)


def mean_of(middles: Tree) -> Tree:
    """The mean of each tensor over the clients whose middle has it, by their numbers of examples."""
    return {name: (total / count).float() for name, (total, count) in sums_of(middles).items()}


def sums_of(middles: Tree) -> dict[str, tuple[Tensor, float]]:
    """(weighted sum, sum of weights) of each tensor over the clients whose middle has it."""
    sums: dict[str, tuple[Tensor, float]] = {}
    for client in sorted(middles):
        weight = float(middles[client]["n"])
        for name, tensor in middles[client]["params"].items():
            total, count = sums.get(name, (torch.zeros_like(tensor, dtype=torch.float64), 0.0))
            sums[name] = (total + weight * tensor, count + weight)
    return sums


def aligned(middles: Tree, pulls: Mapping[ClientId, float]) -> Tree:
    """Middles of which these are pulled towards the mean of all, one after the other: by nothing where the pull is 0, all the way where it
    is infinite."""
    sums, after = sums_of(middles), dict(middles)
    for client, pull in sorted(pulls.items()):
        held, moved = middles[client], {}
        for name, own in held["params"].items():
            total, count = sums[name]
            moved[name] = ((own + pull * (total / count)) / (1 + pull)).to(own.dtype)
            sums[name] = (total + float(held["n"]) * (moved[name].double() - own), count)
        after[client] = {**held, "params": moved}
    return after
