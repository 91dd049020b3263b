"""FedFomo: Personalized Federated Learning with First Order Model Optimization (Zhang et al., arXiv 2012.08565).

Every client has a whole tree of its own; there is no global one. In a round client i gets the trees of M others:
    b   its tree before its last training,   L  the mean loss on its validation rows
    s_n = (L(b) - L(w_n)) / ||w_n - b||      for its own trained tree and for each of the M
    w_i <- b + sum_n a_n (w_n - b),  a_n = s_n+ / sum s+;   w_i <- b where no score is positive
    then it trains w_i on its rows, and sends it with the M + 1 scores (up |t| + M + 1 numbers, down M |t|)
The server keeps everybody's last tree and the affinities p_i[n] += s_n / |sum_m s_m|; each of the M is, with probability
epsilon - decay * round, anybody at random, and else whoever has the largest p_i that is left.

As the authors' code (NVlabs/FedFomo) has it: the baseline b, the L1 norm, the signed affinities, going back to b, which throws the last
training away. Re-implementations take `norm = "l2"` (with 1e-5 added) and `otherwise = "trained"`.
Ours: the trees of all clients that were ever heard can be sent, not only those of the last cohort; a newcomer is sent the mean of the
last trees by examples to start from (|t| down, once), which is also `model`; a client's trained tree is what is judged; a client
without validation rows keeps what it trained. The authors' clustering of clients and its averages as further candidates are left out.
`norm = "product"` measures LoRA modules by ||B_n A_n - B A||_F, which does not depend on how a product is written as factors. The move
itself is one of factors, and a mean of factors is not the mean of their products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, difference, spoken
from fedtailor.algorithms.fedavg import one_size
from fedtailor.algorithms.hetlora import product_norm
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Message, Predict, Site, State, Talk, Tree, answer_with, stream
from fedtailor.errors import ConfigError, one_of
from fedtailor.metrics import apart, mean_loss, side_by_side
from fedtailor.trees import lora_pairs, subtract, tensors, tree_map, weighted_mean

NORMS = ("l1", "l2", "l2-squared", "product")
OWN = "own"
"""The name of a client's own score; those of its peers are numbers."""
SELF_TRUST = 0.1
"""Where a client's affinity to itself starts, as in the authors' code; all others start at 0."""


@card("personal", "|t| + m + 1 numbers", "m |t|", "exact")
def fedfomo(
    job: Job, *, m: int = 5, epsilon: float = 0.3, decay: float = 0.05, norm: str = "l1", otherwise: str = "base"
) -> Algorithm:
    """Personal trees that move towards those of others which do better on a client's validation rows."""
    one_size(job, "fedfomo")
    one_of("algorithm.norm", norm, NORMS)
    one_of("algorithm.otherwise", otherwise, ("base", "trained"))
    if m < 1 or not 0 <= epsilon <= 1 or decay < 0:
        raise ConfigError(
            f"algorithm fedfomo needs m >= 1, 0 <= epsilon <= 1 and decay >= 0 (got {m}, {epsilon:g} and {decay:g})"
        )
    if not job.valid:
        raise ConfigError(
            "algorithm fedfomo judges trees on validation rows: set clients.valid above 0, or choose fedper, which needs none"
        )

    def init(params: Tree) -> State:
        if norm == "product" and not lora_pairs(params):
            raise ConfigError('algorithm.norm "product" measures LoRA modules: set technique.kind = "lora", or norm to "l1"')
        return {"params": params, "trees": {}, "rows": {}, "affinity": {}, "turn": 0}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        first = msg.body.get("start", site.init)
        mine = own or {"params": first, "base": first}
        base, valid = mine["base"], site.data.get("valid", ())
        peers = msg.body.get("peers", {})
        trees = [mine["params"], *(peers[str(i)] for i in range(len(peers)))]
        start, scores = mine["params"], {}
        if (own or peers) and len(valid):
            judged = {str(i): tree for i, tree in enumerate([base, *trees])}
            outputs = yield Predict(partial(side_by_side, job.judge), judged, site.data["valid"], passes=len(judged))
            losses = [mean_loss(job.tally(one)) for one in apart(outputs)]
            found = [score(losses[0] - loss, distance(tree, base, norm)) for loss, tree in zip(losses[1:], trees, strict=True)]
            start = combined(base, trees, found, base if otherwise == "base" else mine["params"])
            scores = dict(zip((OWN, *map(str, range(len(peers)))), found, strict=True))
        done = yield Fit(job.loss, start, site.data["train"], {}, job.plan)
        return {"params": done.params, "base": start}, Message("tree", done.params, {**done.seen, **scores})

    def round(state: State, cohort: list[ClientId]) -> Talk:
        turn, trees, affinity = int(state["turn"]), state["trees"], state["affinity"]
        chance = epsilon - decay * turn
        asked: dict[ClientId, list[ClientId]] = {}
        letters: dict[ClientId, Message] = {}
        for c in cohort:
            draw = stream(job.seed, "fedfomo", c, turn)
            asked[c] = picked(affinity.get(c, {}), [p for p in sorted(trees) if p != c], m, chance, draw)
            sent = {"peers": {str(i): trees[p] for i, p in enumerate(asked[c])}} if asked[c] else {}
            letters[c] = Message("train", sent if sent and c in trees else {**sent, "start": state["params"]})
        replies = yield letters
        heard = {c: r for c, r in sorted(replies.items()) if float(r.info["n"])}  # without rows there is nothing to teach
        trees = {**trees, **{c: dict(r.body.items()) for c, r in heard.items()}}
        rows = {**state["rows"], **{c: float(r.info["n"]) for c, r in heard.items()}}
        told = {c: credited(affinity.get(c, {c: SELF_TRUST}), c, asked[c], r.info) for c, r in sorted(replies.items())}
        everybody = sorted(trees)
        mean = weighted_mean([trees[c] for c in everybody], [rows[c] for c in everybody]) if heard else state["params"]
        return {
            "params": mean,
            "trees": {c: trees[c] for c in everybody},
            "rows": {c: rows[c] for c in everybody},
            "affinity": {**affinity, **told},
            "turn": turn + 1,
        }

    def scored(letter: Message, reply: Message) -> str:
        peers = letter.body.get("peers", {})
        names = {OWN, *peers} & reply.info.keys()
        if why := spoken(reply, ("tree",), ("n",)):
            return why
        if names and names != {OWN, *peers}:
            return f"it scores {len(names)} trees, where {len(peers) + 1} were to be judged"
        return difference(reply.body, peers["0"] if peers else letter.body["start"])

    answer, judged = answer_with(job, lambda state: state["params"], own_or_mean)
    return Algorithm(
        init=init,
        round=round,
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=own_or_mean,
        updates=False,  # trees, not differences: what a filter lost of one is not owed to the next
        check=checks(job, train=scored),
    )


def own_or_mean(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
    """A client's trained tree; who never took part is given everybody's mean."""
    params: Tree = own["params"] if own else broadcast
    return params


def picked(
    affinity: Mapping[ClientId, float], others: Sequence[ClientId], m: int, chance: float, draw: torch.Generator
) -> list[ClientId]:
    """At most `m` of the others: each, with this chance, any of those left, and else the one with the largest affinity; equals by lot."""
    left = [others[i] for i in torch.randperm(len(others), generator=draw).tolist()]
    out: list[ClientId] = []
    while left and len(out) < m:
        explores = float(torch.rand((), generator=draw)) < chance
        out.append(left[0] if explores else max(left, key=lambda c: affinity.get(c, 0.0)))
        left.remove(out[-1])
    return out


def distance(tree: Tree, base: Tree, norm: str) -> float:
    """||tree - base|| in one of NORMS."""
    if norm == "l1":
        return sum(float(t.double().abs().sum()) for _, t in tensors(subtract(tree, base)))
    pairs = lora_pairs(tree) if norm == "product" else {}
    factors = {name for pair in pairs.values() for name in pair}
    rest = {name: t for name, t in tree.items() if name not in factors}
    square = sum(float(t.double().square().sum()) for _, t in tensors(subtract(rest, {n: base[n] for n in rest})))
    for a, b in pairs.values():
        # B_n A_n - B A is one product of factors of twice the rank.
        square += product_norm(torch.cat([tree[a], base[a]]).double(), torch.cat([tree[b], -base[b]], dim=1).double()) ** 2
    return square if norm == "l2-squared" else square**0.5 + (1e-5 if norm == "l2" else 0.0)


def score(gain: float, away: float) -> float:
    """What the loss falls a unit of distance; 0 for the baseline itself."""
    return gain / away if away else 0.0


def combined(base: Tree, trees: Sequence[Tree], scores: Sequence[float], otherwise: Tree) -> Tree:
    """base + sum_n a_n (tree_n - base) with the positive scores, normalised; `otherwise` where there is none."""
    good = [(tree, s) for tree, s in zip(trees, scores, strict=True) if s > 0]
    if not good:
        return otherwise
    total = sum(s for _, s in good)
    return tree_map(
        lambda b, *ts: b + sum((s / total) * (t - b) for t, (_, s) in zip(ts, good, strict=True)), base, *(t for t, _ in good)
    )


def credited(
    affinity: Mapping[ClientId, float], client: ClientId, peers: Sequence[ClientId], info: Mapping[str, float]
) -> dict[ClientId, float]:
    """A client's affinities after its scores: s_n / |sum s| is added to each; as they were where it scored nobody."""
    if OWN not in info:
        return dict(affinity)
    scores = {client: info[OWN], **{peer: info[str(i)] for i, peer in enumerate(peers)}}
    total = abs(sum(scores.values()))
    total += 1e-9 if total < 1e-9 else 0.0
    out = {**affinity, **{c: affinity.get(c, 0.0) + s / total for c, s in scores.items()}}
    return {c: out[c] for c in sorted(out)}
