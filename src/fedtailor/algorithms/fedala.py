"""FedALA: Adaptive Local Aggregation for Personalized Federated Learning (Zhang et al., AAAI 2023, arXiv 2212.01197).

A client does not start from the server's tree but from a mixture of it with what it had, with a learned weight for every number:
    start    theta = old + (global - old) * W  in the last `layers` layers;  theta = global  below
    learn W  on a share of its rows, batch by batch:  W <- clip(W - eta dL/dtheta * (global - old), 0, 1)
             the first time pass after pass, until the losses of `window` passes differ by less than `threshold`; later one pass
    client   old <- train(theta, its data);  sends old - global;  W and old stay
    server   w <- w + sum_k p_k (old_k - w),  p_k by examples
The wire is FedAvg's. W starts at 1, where the rule is FedAvg (eta = 0: bit for bit); W = 0 in all layers is local training.

As the authors' code has it: the loss of a pass is that of its last batch, W is learned by plain steps, and a client is judged as it would
start its next round (`deploy` = "mixed"; "trained": as it ended its last). threshold = 0.01, share = 0.8, eta = 1 and layers = 1 are
theirs. Ours: rows are drawn and not a block; after `most` passes the first learning ends anyway; layers are counted among those of which
the technique trains something, the head being the last (0: all); evaluation mixes by the W of a client's last round; who is lost or not
drawn keeps what it has. A is mixed with A and B with B where the tree is LoRA's: that is no mixture of their products.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
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
    Fitted,
    Flow,
    Forward,
    Job,
    Layers,
    Loss,
    Message,
    Part,
    Plan,
    Site,
    State,
    Tree,
    answer_with,
    one_exchange,
)
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import Wrapped
from fedtailor.techniques.peft import of_head
from fedtailor.trees import moved, subtract


@card("personal", "|t|", "|t|", "exact")
def fedala(
    job: Job,
    *,
    layers: int = 1,
    share: float = 0.8,
    eta: float = 1.0,
    threshold: float = 0.01,
    window: int = 10,
    most: int = 50,
    start: float = 1.0,
    deploy: str = "mixed",
    weighting: str = "examples",
) -> Algorithm:
    """A client starts each round from the global tree and its own, mixed number by number with weights that it learns."""
    one_size(job, "fedala")
    weigh, fitting = weights_by(weighting), mixing(job.loss)
    one_of("algorithm.deploy", deploy, ("mixed", "trained"))
    if layers < 0 or not 0 < share <= 1 or eta < 0 or not 0 <= start <= 1:
        raise ConfigError(
            "algorithm fedala needs layers >= 0 (0: all), 0 < share <= 1, eta >= 0 and 0 <= start <= 1 "
            f"(got {layers}, {share:g}, {eta:g} and {start:g})"
        )
    if threshold < 0 or window < 1 or most < 1:
        raise ConfigError(
            f"algorithm fedala needs threshold >= 0, window >= 1 and most >= 1 (got {threshold:g}, {window} and {most})"
        )
    plan = Plan(batch=job.plan.batch, optimizer="sgd", lr=eta)

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        old, kept = (own["params"], own["weights"]) if own else (site.init, {})
        moves = any(not torch.equal(old[name], msg.body[name]) for name in begun(site))
        if eta and moves and len(site.data["train"]):  # else no loss says anything about W
            kept = yield from learn(kept, old, msg.body, site)
        first = mixed(old, msg.body, kept or begun(site))
        done = yield Fit(job.loss, first, site.data["train"], {}, job.plan)
        return {"params": done.params, "weights": kept}, Message("update", subtract(done.params, msg.body), done.seen)

    def learn(kept: Tree, old: Tree, new: Tree, site: Site) -> Generator[Fit, Fitted, Tree]:
        """W after its passes."""
        weights, reach = kept or begun(site), reached(job.layers, site.init, layers)
        aux = {"old": {name: old[name] for name in weights}, "new": new}
        rows, losses = site.data["train"], list[float]()
        drawn = torch.randperm(len(rows), generator=site.random("fedala"))[: max(1, int(share * len(rows)))].tolist()
        parts = [rows.take(drawn[i : i + plan.batch]) for i in range(0, len(drawn), plan.batch)]
        while len(losses) < (1 if kept else most):
            for part in parts:
                done = yield Fit(fitting, {"weights": weights}, part, aux, plan)
                # Not in the loss: whoever is at a border must be able to leave it.
                weights = {n: torch.where(reach[n], t.clamp(0, 1), 1.0) for n, t in done.params["weights"].items()}
            losses.append(done.seen["loss"])
            if len(losses) > window and float(np.std(losses[-window:])) < threshold:
                break
        return weights

    def begun(site: Site) -> Tree:
        reach = reached(job.layers, site.init, layers)
        return {name: torch.where(t, start, 1.0).to(site.init[name].dtype) for name, t in reach.items() if t.any()}

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        if own and deploy == "trained":
            return own["params"]  # type: ignore[no-any-return]
        old, kept = (own["params"], own["weights"]) if own else (site.init, {})
        return mixed(old, broadcast, kept or begun(site))

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        return {"params": moved(state["params"], [r.body for r in replies.values()], [weigh(r) for r in replies.values()])}

    answer, judged = answer_with(job, lambda state: state["params"], personal)
    return Algorithm(
        init=lambda params: {"params": params},
        round=one_exchange(lambda state, client: Message("train", state["params"]), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=personal,
        check=checks(job, train=update()),
    )


def reached(layers: Layers | None, tree: Tree, count: int) -> Tree:
    """True where a number belongs to the last `count` layers (0: all) of those that have any in the tree; the head is the last. Where the
    model has no list of layers, the head is one and all else another."""
    if layers:
        cuts = [Part(0, 0, True, False), *(Part(i, i + 1, False, False) for i in range(layers.depth))]
        groups = [layers.part(tree, part) for part in (*cuts, Part(layers.depth, layers.depth, False, True))]
    else:
        groups = [{n: t for n, t in tree.items() if of_head(n) == head} for head in (False, True)]
    held = [group for group in groups if group]
    high = [i >= len(held) - count or not count for i in range(len(held))]
    marks = [
        {n: torch.full(t.shape, yes, dtype=torch.bool) for n, t in group.items()} for group, yes in zip(held, high, strict=True)
    ]
    return layers.whole(marks) if layers else {n: t for mark in marks for n, t in mark.items()}


def mixed(old: Tree, new: Tree, weights: Tree) -> Tree:
    """old + (new - old) * W, exactly `new` where W is 1 and exactly `old` where it is 0; `new` where there is no W."""
    return {name: old[name].lerp(t, weights[name]) if name in weights else t for name, t in new.items()}


def mixing(base: Loss) -> Loss:
    """base of the mixture of aux["old"] and aux["new"] by params["weights"]."""
    return _Mixing(base)


class _Mixing(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        base: Callable[..., Tensor]
        _, base = self  # type: ignore[assignment]
        return base(forward, mixed(aux["old"], aux["new"], params["weights"]), batch, {})
