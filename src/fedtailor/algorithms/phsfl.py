"""PHSFL-style: Personalized Hierarchical Split Federated Learning in Wireless Networks (Pervej & Molisch, arXiv 2411.06042, ICC 2025).
The idea is the authors' (a frozen random head while the body is trained, personal heads afterwards, edge servers below a central
one); the order of updates is **our reading**, and labels stay at home, where the paper sends them to the edge server.

    a round        every client of an edge server trains its body (all but the head) in split steps; the edge averages its clients by examples
    every `edge_rounds` rounds   the central server averages the edges that were heard since, by the examples of who took part
    last `personal` rounds       the body stands still; each client fits its own head: features go forward, no gradient comes back
A client whose edge is not known yet begins with the central body. With edge_rounds = 1 two tiers are one, by weights that multiply
(tested); `edges` = 1 is one tier. Everybody draws the head from the seed that all share, with He's scale: it never travels. The freezing is
FedBABU's (arXiv 2106.06042).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedtailor.algorithms.cards import LAYERED, card
from fedtailor.algorithms.split_rules import ENDS, Rules, ground
from fedtailor.algorithms.split_server import steps
from fedtailor.algorithms.split_training import split_algorithm
from fedtailor.core import Algorithm, ClientId, Job, State, Talk, Tree, stream
from fedtailor.cut import cut_at
from fedtailor.errors import ConfigError
from fedtailor.techniques.peft import of_head
from fedtailor.trees import weighted_mean


@card("personal", "2 x batch x tokens x width a step + ends", "2 x batch x tokens x width a step + ends", "our reading", LAYERED)
def phsfl(
    job: Job,
    *,
    front: int = 1,
    back: int = 1,
    edges: int = 1,
    edge_rounds: int = 1,
    personal: int = 1,
    cache_mb: float = 1000.0,
    delta: float = 0.0,
) -> Algorithm:
    """PHSFL-style: bodies averaged at edge servers and then centrally under a frozen random head; personal heads at the end."""
    if edges < 1 or edge_rounds < 1:
        raise ConfigError(f"algorithm.edges and algorithm.edge_rounds must be at least 1 (got {edges}, {edge_rounds})")
    if not 0 <= personal < max(job.plan.rounds, 1):
        raise ConfigError(
            f"algorithm.personal = {personal}: rounds of the personal phase at the end, fewer than rounds = {job.plan.rounds}"
        )
    body_rounds = job.plan.rounds - personal

    def moves(round: int, place: str, name: str) -> bool:
        return of_head(name) != trains_body(round)

    def start(params: Tree) -> Tree:
        return {name: he(tensor, job.seed, name) if of_head(name) else tensor for name, tensor in params.items()}

    room = 1e6 * cache_mb
    on = ground(job, "phsfl", Rules(lambda site: (front, back), moves, cache=room, delta=delta, room=room, start=start))
    layers = on.layers
    cuts = dict(zip(("front", "middle", "back"), cut_at(layers, front, back), strict=True))

    def check(params: Tree) -> None:
        heads = [name for name in params if of_head(name)]
        if not heads or len(heads) == len(params):
            raise ConfigError(
                "algorithm phsfl freezes heads and trains the rest: choose a technique that trains both (lora, prefix)"
            )

    def body(state: State, client: ClientId) -> Tree:
        """front, middle and back of what this client's edge server has, without the head."""
        known = state["clients"].get(client)
        tree = state["edges"].get(str(known["number"] % edges), state["params"]) if known else state["params"]
        rest = {name: t for name, t in tree.items() if not of_head(name)}
        return {place: layers.part(rest, part) for place, part in cuts.items()}

    def personal_yet(state: State, client: ClientId) -> bool:
        """Whether this client has made a pass of the personal phase: before it, it may have an older body."""
        return bool(state["clients"].get(client, {}).get("pass", 0) > body_rounds + 1)

    def trains_body(number: int) -> bool:
        return not personal or number <= body_rounds

    def round(state: State, cohort: list[ClientId]) -> Talk:
        number = state["round"] + 1
        bodies = {c: body(state, c) for c in cohort if trains_body(number) or not personal_yet(state, c)}
        middles = {c: {**m, "params": bodies[c]["middle"]} if c in bodies else m for c, m in state["middles"].items()}
        ends = {c: {end: tree[end] for end in ENDS} for c, tree in bodies.items()}
        after, rested = yield from steps(on, {**state, "middles": middles}, cohort, ends)
        if not rested or not trains_body(number):
            return after
        clients, heads = after["clients"], {n: t for n, t in state["params"].items() if of_head(n)}
        trees, heard = dict(state["edges"]), dict(state["heard"])
        for edge in sorted({clients[c]["number"] % edges for c in rested}):
            told = [c for c in sorted(rested) if clients[c]["number"] % edges == edge]
            done = [layers.whole([rested[c]["front"], after["middles"][c]["params"], rested[c]["back"]]) for c in told]
            counts = [float(clients[c]["n"]) for c in told]
            trees[str(edge)] = {**weighted_mean(done, counts), **heads}
            heard[str(edge)] = heard.get(str(edge), 0.0) + sum(counts)
        if number % edge_rounds and number != body_rounds:
            return {**after, "edges": trees, "heard": heard}
        central = {**weighted_mean([trees[edge] for edge in sorted(heard)], [heard[edge] for edge in sorted(heard)]), **heads}
        return {**after, "params": central, "edges": dict.fromkeys(trees, central), "heard": {}}

    def model(state: State) -> Tree:
        return state["params"]  # type: ignore[no-any-return]

    return split_algorithm(on, round, model, body, check, lambda: {"edges": {}, "heard": {}})


def he(tensor: Tensor, seed: int, name: str) -> Tensor:
    """A head that stays as it is drawn needs a scale that its inputs get through: normal of variance 2 / inputs; biases are 0."""
    if tensor.dim() < 2:
        return torch.zeros_like(tensor)
    return torch.randn(tensor.shape, generator=stream(seed, "head", name)) * math.sqrt(2 / tensor.shape[1])
