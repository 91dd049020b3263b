"""DyPFL-style: clients that keep a personal tree as long as it is better than everybody's. Our reading of an abstract.

Personalizing or Not: Dynamically Personalized Federated Learning with Incentives (Ma et al., arXiv 2208.06192) is known here by its
abstract alone: a share of the clients, the personalisation rate, trains personal models, and a client may adopt the global one where
that does better. Its incentive, objective and update are not known, and none of this is claimed to be them:
    w     everybody trains it, and it is averaged: FedAvg, bit for bit, whatever happens beside it
    v_k   a personaliser's own tree, as in Ditto (Li et al., arXiv 2012.04221): v_k <- train(loss(v) + lam/2 ||v - w||^2), from w the
          first time; it never leaves the client
    a client is a personaliser while L_k(v_k) <= L_k(w) - margin, L_k the loss on its validation rows, asked after each round that it
    takes part in; in its first round it tries. With `rate`, each is one for good or never, drawn once with this probability
A client is judged with v_k where L_k(v_k) <= L_k(w) - margin held when it last looked, and else with w. Who has stopped keeps v_k as it
is, and goes on with it should w become the worse one. The rate of each round is reported as state["personalisation_rate"].
"""

from __future__ import annotations

from functools import partial

import torch

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import fedavg, one_size, weights_by
from fedtailor.core import (
    Algorithm,
    ClientId,
    Fit,
    Flow,
    Job,
    Message,
    Predict,
    Site,
    State,
    Tree,
    answer_with,
    one_exchange,
    stream,
)
from fedtailor.errors import ConfigError
from fedtailor.losses import proximal
from fedtailor.metrics import apart, mean_loss, side_by_side
from fedtailor.trees import moved


@card("personal", "|t| + 1 number", "|t|", "our reading")
def dypfl(
    job: Job, *, lam: float = 0.1, margin: float = 0.0, rate: float | None = None, weighting: str = "examples"
) -> Algorithm:
    """FedAvg beside personal trees of those clients for whom they are better (our reading of an abstract)."""
    one_size(job, "dypfl")
    weigh, shared, personal_loss = weights_by(weighting), fedavg(job, weighting=weighting), proximal(job.loss, lam)
    if lam < 0 or (rate is not None and not 0 <= rate <= 1):
        raise ConfigError(f"algorithm dypfl needs lam >= 0 and a rate from 0 to 1 (got {lam:g} and {rate})")
    if rate is None and not job.valid:
        raise ConfigError(
            "algorithm dypfl decides on validation rows: set clients.valid above 0, or algorithm.rate, or choose fedper, which needs none"
        )

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        w = msg.body
        _, reply = yield from shared.client["train"](None, msg, site)  # the first ask, as in FedAvg: the same batches
        if rate is None:
            tries = own is None or bool(own["better"])
        else:
            tries = float(torch.rand((), generator=stream(site.seed, "dypfl", site.id))) < rate
        v = own["params"] if own else w
        if tries:
            done = yield Fit(personal_loss, v, site.data["train"], {"anchor": w}, job.plan)
            v = done.params
        if tries or own:
            own = {"params": v, "better": int((yield from better(v, w, site)))}
        return own, reply._replace(info={**reply.info, "personal": float(tries)})

    def better(v: Tree, w: Tree, site: Site):  # type: ignore[no-untyped-def]
        """Whether v is to be used instead of w. Without validation rows: where a rate was asked for, because nothing speaks against it."""
        rows = site.data.get("valid", ())
        if not len(rows):
            return rate is not None
        outputs = yield Predict(partial(side_by_side, job.judge), {"own": v, "shared": w}, site.data["valid"], passes=2)
        own, shared = (mean_loss(job.tally(one)) for one in apart(outputs))
        return own <= shared - margin

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        params: Tree = own["params"] if own and own["better"] else broadcast
        return params

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        told = list(replies.values())
        return {
            "params": moved(state["params"], [r.body for r in told], [weigh(r) for r in told]),
            "personalisation_rate": sum(float(r.info["personal"]) for r in told) / len(told),
        }

    answer, judged = answer_with(job, lambda state: state["params"], personal)
    return Algorithm(
        init=lambda params: {"params": params, "personalisation_rate": 0.0},
        round=one_exchange(lambda state, client: Message("train", state["params"]), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=personal,
        check=checks(job, train=update(needs=("n", "personal"))),
        tells=lambda state: {"personalisation_rate": state["personalisation_rate"]},
    )
