"""FedMedian: FedAvg whose mean is a coordinate-wise median (Yin et al., arXiv 1803.01498, there with a gradient a round).

client k:  w_k <- train(w, its data);  sends w_k - w
server:    w <- w + median_k (w_k - w), coordinate by coordinate: a few wild clients cannot move it far
"""

import torch

from fedtailor.core import Algorithm, Fit, Message, answer_with, one_exchange
from fedtailor.trees import add, subtract, tree_map


def fedmedian(job, *, server_lr: float = 1.0) -> Algorithm:
    """The median of the clients' differences instead of their mean."""

    def train(own, msg, site):  # runs on the client: state in, state out
        done = yield Fit(job.loss, msg.body, site.data["train"], {}, job.plan)  # heavy work is asked for
        return own, Message("update", subtract(done.params, msg.body), done.seen)

    def merge(state, replies):  # runs on the server, replies in client order
        bodies = [reply.body for reply in replies.values()]
        median = tree_map(lambda *ts: server_lr * torch.stack(ts).median(0).values, bodies[0], *bodies[1:])
        return {"params": add(state["params"], median)}

    answer, judged = answer_with(job, lambda state: state["params"])
    return Algorithm(
        init=lambda params: {"params": params},
        round=one_exchange(lambda state, client: Message("train", state["params"]), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
    )
