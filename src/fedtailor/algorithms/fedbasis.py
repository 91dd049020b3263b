"""FedBasis-style: a few global bases, a client's model a combination of them. After "Federated Learning of Shareable Bases for
Personalization-Friendly Image Classification" (Zhang et al., arXiv 2304.07882), of which only the idea is public.

The paper's: K bases v_k that everybody shares; layer by layer  theta_m = sum_k a_m[k] v_k; a client's own are its coefficients a_m, and
all that a new client has to learn. **Our reading** of the rest, each choice an option where it matters:
    a_m = softmax(s_m / tau), for every tensor apart ("tensor") or one for the whole tree ("tree"); s_m starts at 0
    client:  s_m <- train(s_m), bases still;  V_m <- train(V), s_m still;  sends V_m - V        (`phases` = "joint": both at once)
    server:  v_k <- v_k + mean of (V_m[k] - v_k), weighted by examples; or by examples times the client's mean a_m[k] ("coefficients",
             which tells the server those K numbers)
    LoRA:    products are combined, sum_k a[k] B_k A_k, as factors of K times the rank; a head and everything else is combined as it is
Equal bases under equal coefficients never part (their gradients are equal), so all but the first start as draws of their own: each tensor
with its own mean and `spread` times its standard deviation. LoRA's B, which is 0, stays so: its bases part by their A.
The wire is K trees each way. K = 1 is FedAvg, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size, weights_by
from fedtailor.core import (
    Algorithm,
    Batch,
    ClientId,
    Fit,
    Flow,
    Forward,
    Job,
    Loss,
    Message,
    Site,
    State,
    Tree,
    answer_with,
    one_exchange,
    stream,
)
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import Wrapped
from fedtailor.trees import lora_pairs, moved, subtract

TREE = "tree"


@card("personal", "K |t|", "K |t|", "our reading")
def fedbasis(
    job: Job,
    *,
    bases: int = 3,
    per: str = "tensor",
    tau: float = 1.0,
    phases: str = "alternate",
    coefficient_lr: float = 0.0,
    spread: float = 1.0,
    weights: str = "examples",
) -> Algorithm:
    """A few global bases; each client combines them with coefficients of its own. `coefficient_lr` = 0 takes the experiment's rate."""
    one_size(job, "fedbasis")
    one_of("algorithm.per", per, ("tensor", TREE))
    one_of("algorithm.phases", phases, ("alternate", "joint"))
    one_of("algorithm.weights", weights, ("examples", "coefficients"))
    if bases < 1 or tau <= 0 or spread < 0 or coefficient_lr < 0:
        raise ConfigError(
            f"algorithm fedbasis needs bases >= 1, tau > 0, spread >= 0, coefficient_lr >= 0 (got {bases}, {tau}, {spread}, {coefficient_lr})"
        )
    weigh, fitting = weights_by("examples"), combining(job.loss, tau)
    slow = job.plan._replace(lr=coefficient_lr or job.plan.lr)

    def init(params: Tree) -> State:
        return {"params": {f"b{k}": begun(params, k, spread, job.seed) for k in range(bases)}}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        scores = own["scores"] if own else equal(msg.body)
        rows = site.data["train"]
        if bases == 1:
            done = yield Fit(fitting, {"bases": dict(msg.body)}, rows, {"scores": scores}, job.plan)
            moves = done.params["bases"]
        elif phases == "joint":
            done = yield Fit(fitting, {"bases": dict(msg.body), "scores": scores}, rows, {}, job.plan)
            moves, scores = done.params["bases"], done.params["scores"]
        else:
            found = yield Fit(fitting, {"scores": scores}, rows, {"bases": msg.body}, slow)
            scores = found.params["scores"]
            done = yield Fit(fitting, {"bases": dict(msg.body)}, rows, {"scores": scores}, job.plan)
            moves = done.params["bases"]
        said = {} if weights == "examples" else {"share": torch.stack([s.div(tau).softmax(0) for s in scores.values()]).mean(0)}
        return {"scores": scores}, Message("update", {"bases": subtract(moves, msg.body), **said}, done.seen)

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        told = list(replies.values())
        params: Tree = {}
        for k, (name, basis) in enumerate(in_order(state["params"])):
            shares = [float(r.body["share"][k]) if "share" in r.body else 1.0 for r in told]
            heavy = [weigh(r) * share for r, share in zip(told, shares, strict=True)]
            # A basis that nobody has a share in stays where it is.
            params[name] = moved(basis, [r.body["bases"][name] for r in told], heavy) if sum(heavy) > 0 else basis
        return {"params": params}

    def equal(broadcast: Tree) -> Tree:
        inner = {down for down, _ in lora_pairs(broadcast["b0"]).values()}  # a product has one coefficient, under its B
        names = broadcast["b0"].keys() - inner if per == "tensor" else {TREE}
        return {name: torch.zeros(bases) for name in sorted(names)}

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        return combined(broadcast, own["scores"] if own else equal(broadcast), tau)

    def sent(state: State) -> Tree:
        return state["params"]  # type: ignore[no-any-return]

    def like(letter: Message, reply: Message) -> Tree:
        return {"bases": letter.body, **({"share": torch.zeros(bases)} if weights == "coefficients" else {})}

    def fits(letter: Message, reply: Message) -> str:
        share = reply.body.get("share", torch.zeros(bases))
        alike = update(like)(letter, reply)
        # Filters round: a share a little below 0 is one.
        return alike or ("" if share.min() > -0.05 and share.sum() < 1.05 else "its shares in the bases are not 0 to 1 in all")

    answer, judged = answer_with(job, sent, personal)
    return Algorithm(
        init=init,
        round=one_exchange(lambda state, client: Message("train", state["params"]), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: combined(state["params"], equal(state["params"]), tau),
        personal=personal,
        check=checks(job, train=fits),
    )


def begun(params: Tree, number: int, spread: float, seed: int) -> Tree:
    """The technique's initial tree as the first basis; as another one, a draw of the same mean and deviation tensor by tensor."""

    def drawn(name: str, t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=stream(seed, "basis", str(number), name), dtype=torch.float32).to(t.dtype)
        wide = t.float().std(correction=0).nan_to_num()
        return t.mean() + noise * wide * spread if wide > 0 else t + 0.01 * spread * t.abs() * noise

    return (
        dict(params) if number == 0 or not spread else {n: drawn(n, t) if t.is_floating_point() else t for n, t in params.items()}
    )


def in_order(bases: Tree) -> list[tuple[str, Tree]]:
    """By number: a tree that has crossed the wire is sorted by name, in which b10 comes before b2."""
    return sorted(bases.items(), key=lambda item: int(item[0][1:]))


def combined(bases: Tree, scores: Tree, tau: float) -> Tree:
    """The tree of a client: bases {b0, b1, ...}, each a flat tree; scores (bases,) by tensor name, or one of them as "tree"."""
    trees = [basis for _, basis in in_order(bases)]
    if len(trees) == 1:
        return dict(trees[0])

    def share(name: str) -> Tensor:
        return scores[name if name in scores else TREE].div(tau).softmax(0)  # type: ignore[no-any-return]

    pairs = lora_pairs(trees[0])
    out: Tree = {}
    for down, up in pairs.values():
        a = share(up)
        out[down] = torch.cat([tree[down] for tree in trees])
        out[up] = torch.cat([a[k] * tree[up] for k, tree in enumerate(trees)], 1)
    for name in trees[0].keys() - out.keys():
        a = share(name)
        out[name] = sum(a[k] * tree[name] for k, tree in enumerate(trees))
    return {name: out[name] for name in trees[0]}


def combining(base: Loss, tau: float) -> Loss:
    """base of the combination; bases and scores are what is trained, or stand still in `aux`."""
    return _Combining(base, tau)


class _Combining(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        base: Callable[..., Any]
        _, base, tau = self  # type: ignore[assignment]
        whole = {**aux, **params}
        return base(forward, combined(whole["bases"], whole["scores"], tau), batch, {})  # type: ignore[arg-type,no-any-return]
