"""PFSL: Personalized & Fair Split Learning with Data & Label Privacy for thin clients (Wadhwa et al., arXiv 2303.10624).

The front is frozen and the same for all; the server holds a middle for each client, the client its back with the labels.
    every step     front(x) up, middle's output down, its gradient up: three tensors, none for the front
    every round    middles <- their plain mean;  backs <- their plain mean, sent back to all
    last `personal` rounds   middles stand still, backs are no longer averaged: each client fits its own
    fairness       every client does `train.steps` steps a round, whatever its data
As in the authors' code the means are not weighted. In one thing we differ from it: what is frozen does not move (there Adam's
moments go on moving the middles after the checkpoint), and the back is not averaged once more at the checkpoint.
"""

from __future__ import annotations

from fedtailor.algorithms.cards import LAYERED, card
from fedtailor.algorithms.split_rules import Rules, ground
from fedtailor.algorithms.split_server import steps
from fedtailor.algorithms.split_training import split_algorithm
from fedtailor.core import Algorithm, ClientId, Job, State, Talk, Tree
from fedtailor.cut import cut_at
from fedtailor.errors import ConfigError
from fedtailor.trees import weighted_mean


@card("personal", "batch x tokens x width a step + back", "2 x batch x tokens x width a step + back", "exact", LAYERED)
def pfsl(job: Job, *, front: int = 1, back: int = 1, personal: int = 0, cache_mb: float = 1000.0) -> Algorithm:
    """PFSL: frozen fronts, a middle a client, equal work, plain means of middles and backs, and a personal phase at the end."""
    if not job.plan.steps:
        raise ConfigError("algorithm pfsl gives every client as much work: set train.steps, the steps of a client in a round")
    if not 0 <= personal < max(job.plan.rounds, 1):
        raise ConfigError(
            f"algorithm.personal = {personal}: rounds of the personal phase at the end, fewer than rounds = {job.plan.rounds}"
        )
    common = job.plan.rounds - personal

    def moves(round: int, place: str, name: str) -> bool:
        return place == "back" or (place == "middle" and (not personal or round <= common))

    on = ground(job, "pfsl", Rules(lambda site: (front, back), moves, cache=1e6 * cache_mb))
    layers = on.layers
    first, between, last = cut_at(layers, front, back)

    def together(number: int) -> bool:
        return not personal or number <= common

    def personal_yet(state: State, client: ClientId) -> bool:
        """Whether this client has a back of its own: it has made a pass of the personal phase."""
        return bool(personal and state["clients"].get(client, {}).get("pass", 0) > common + 1)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        number, params = state["round"] + 1, state["params"]
        middles = {c: {**m, "params": layers.part(params, between)} for c, m in state["middles"].items()}
        ends = {"back": layers.part(params, last)}
        theirs = [c for c in cohort if number > 1 and not personal_yet(state, c)]
        after, rested = yield from steps(on, {**state, "middles": middles}, cohort, dict.fromkeys(theirs, ends))
        if not rested or not together(number):
            return after
        told = sorted(rested)
        each = ([after["middles"][c]["params"] for c in told], [rested[c]["back"] for c in told])
        middle, back_ = (weighted_mean(trees, [1.0] * len(told)) for trees in each)
        return {**after, "params": layers.whole([layers.part(params, first), middle, back_])}

    def said(state: State, client: ClientId) -> Tree:
        tree = {"middle": layers.part(state["params"], between)}
        return tree if personal_yet(state, client) else {**tree, "back": layers.part(state["params"], last)}

    def model(state: State) -> Tree:
        return state["params"]  # type: ignore[no-any-return]

    return split_algorithm(on, round, model, said)
