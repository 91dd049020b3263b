"""SplitFed: When Federated Learning Meets Split Learning (Thapa et al., AAAI 2022, arXiv 2004.12088), and SplitLoRA (Lin et al.,
arXiv 2407.00952). Labels stay with the client here (a U-shape; `back = 0` leaves it the head alone), where both papers send them up.

    v1   the server has a middle for each client; after a round middles, fronts and backs become their means by examples
    v2   the server has one middle, which clients train one after the other, in an order drawn each round; fronts and backs as in v1
    splitlora   one middle, and one step of it for the batches of all clients together; the clients' LoRA factors become their plain
                means after a round (in the authors' code after 100 steps)
"""

from __future__ import annotations

from typing import Literal

import torch

from fedtailor.algorithms.cards import LAYERED, card
from fedtailor.algorithms.split_rules import ENDS, EVERYBODY, Rules, ground
from fedtailor.algorithms.split_server import steps
from fedtailor.algorithms.split_training import split_algorithm
from fedtailor.core import Algorithm, ClientId, Job, State, Talk, Tree, stream
from fedtailor.cut import cut_at
from fedtailor.errors import ConfigError
from fedtailor.trees import lora_pairs, weighted_mean


@card("global", "2 x batch x tokens x width a step + ends", "2 x batch x tokens x width a step + ends", "exact", LAYERED)
def splitfed(
    job: Job,
    *,
    front: int = 1,
    back: int = 1,
    version: Literal["v1", "v2"] = "v1",
    delta: float = 0.0,
    cache_mb: float = 1000.0,
) -> Algorithm:
    """SplitFed v1 (a middle a client, averaged) or v2 (one middle, clients one after the other); fronts and backs are averaged."""
    rules = Rules(lambda site: (front, back), shared=version == "v2", cache=0, delta=delta, room=1e6 * cache_mb)
    return _averaged(job, "splitfed", (front, back), rules, weighted=True)


@card("global", "2 x batch x tokens x width a step + ends", "2 x batch x tokens x width a step + ends", "exact", LAYERED)
def splitlora(job: Job, *, front: int = 1, back: int = 1, delta: float = 0.0, cache_mb: float = 1000.0) -> Algorithm:
    """SplitLoRA: one middle for the batches of all clients together; the clients' factors are averaged after a round."""
    rules = Rules(lambda site: (front, back), shared=True, lockstep=True, cache=0, delta=delta, room=1e6 * cache_mb)
    return _averaged(job, "splitlora", (front, back), rules, weighted=False)


def _averaged(job: Job, name: str, cut: tuple[int, int], rules: Rules, weighted: bool) -> Algorithm:
    on, shared = ground(job, name, rules), rules.shared
    layers, in_turn = on.layers, shared and not rules.lockstep  # one middle, and not for all at a time: from hand to hand
    first, between, last = cut_at(layers, *cut)

    def check(params: Tree) -> None:
        if name == "splitlora" and not lora_pairs(params):
            raise ConfigError(
                "algorithm splitlora averages LoRA factors: set technique.kind to 'lora', or take algorithm splitfed"
            )

    def round(state: State, cohort: list[ClientId]) -> Talk:
        params: Tree = state["params"]
        state = {
            **state,
            "middles": {owner: {**m, "params": layers.part(params, between)} for owner, m in state["middles"].items()},
        }
        ends = {"front": layers.part(params, first), "back": layers.part(params, last)}
        turns = [cohort]
        if in_turn:
            order = torch.randperm(len(cohort), generator=stream(job.seed, "turns", state["round"] + 1))
            turns = [[cohort[i]] for i in order.tolist()]
        rested: dict[ClientId, Tree] = {}
        for some in turns:
            state, done = yield from steps(on, state, some, dict.fromkeys(some, ends))
            rested |= done
        if not rested:
            return state
        told = sorted(rested)
        weights = [float(state["clients"][c]["n"]) if weighted else 1.0 for c in told]
        means = {end: weighted_mean([rested[c][end] for c in told], weights) for end in ENDS}
        middles: Tree = state["middles"]
        middle = middles[EVERYBODY]["params"] if shared else weighted_mean([middles[c]["params"] for c in told], weights)
        whole = layers.whole([{**ends["front"], **means["front"]}, middle, {**ends["back"], **means["back"]}])
        return {**state, "params": whole, "middles": {owner: {**m, "params": middle} for owner, m in middles.items()}}

    def model(state: State) -> Tree:
        return state["params"]  # type: ignore[no-any-return]

    def said(state: State, client: ClientId) -> Tree:
        return {
            place: layers.part(state["params"], part)
            for place, part in zip(("front", "middle", "back"), (first, between, last), strict=True)
        }

    return split_algorithm(on, round, model, said, check)
