"""SCAFFOLD: Stochastic Controlled Averaging for Federated Learning (Karimireddy et al., arXiv 1910.06378), option II.

    client:  w <- w - eta (g - c_k + c), K steps;  c_k+ = c_k - c + (w_t - w_k) / (K eta);  sends w_k - w_t and c_k+ - c_k
    server:  w += eta_g mean(dw_k),  c += (|S| / N) mean(dc_k)
Means are uniform. The wire is twice FedAvg's, both ways; c_k stays on the client. K is the number of optimiser steps really
taken, over all local epochs. The rule divides by the step size: plain SGD with a constant rate only.
"""

from __future__ import annotations

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Message, Site, State, Tree, answer_with, one_exchange
from fedtailor.errors import ConfigError
from fedtailor.losses import shifted
from fedtailor.trees import add, scale, subtract, weighted_mean, zeros_like


@card("global", "2 |t|", "2 |t|", "exact")
def scaffold(job: Job, *, server_lr: float = 1.0) -> Algorithm:
    """Control variates that cancel the drift of clients on different data. Needs train.optimizer = "sgd"."""
    one_size(job, "scaffold")
    plan, loss = job.plan, shifted(job.loss)
    if plan.optimizer != "sgd" or plan.momentum or plan.schedule != "constant" or plan.clip or plan.weight_decay:
        raise ConfigError(
            'algorithm scaffold needs train.optimizer = "sgd" with a constant rate and no momentum, clip or weight_decay: '
            "its control variates divide by the step size (for adamw choose fedprox)"
        )

    def init(params: Tree) -> State:
        return {"params": params, "control": zeros_like(params)}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        params, control = msg.body["params"], msg.body["control"]
        mine = own["control"] if own else zeros_like(control)
        done = yield Fit(loss, params, site.data["train"], {"shift": subtract(control, mine)}, plan)
        delta = subtract(done.params, params)
        # The rate really used: it may decay from round to round. Without a step there is no difference either.
        change = subtract(scale(delta, -1 / (done.seen["steps"] * done.seen["lr"] or 1.0)), control)
        return {"control": add(mine, change)}, Message("update", {"params": delta, "control": change}, done.seen)

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        mean = weighted_mean([r.body for r in replies.values()], [1.0] * len(replies))
        share = len(replies) / job.clients
        return {
            "params": add(state["params"], scale(mean["params"], server_lr)),
            "control": add(state["control"], scale(mean["control"], share)),
        }

    answer, judged = answer_with(job, lambda state: state["params"])
    return Algorithm(
        init=init,
        round=one_exchange(lambda state, client: Message("train", state), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        check=checks(job, train=update()),
    )
