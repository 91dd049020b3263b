"""Ditto: Fair and Robust Federated Learning Through Personalization (Li et al., arXiv 2012.04221), algorithm 1.

    client k:  w_k <- train(w, its data);  sends w_k - w
               v_k <- train(v_k, its data) on  loss(v) + lam/2 ||v - w||^2,  w what the server sent;  v_k stays
    server:    FedAvg
Two trainings a round at FedAvg's wire. lam = 0 is training alone, a large lam holds v_k at the global tree. v_k begins as w in the
client's first round, and its optimiser, like w's, anew in each round.
"""

from __future__ import annotations

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.fedavg import fedavg
from fedtailor.core import Algorithm, Fit, Flow, Job, Message, Site, Tree, answer_with
from fedtailor.errors import ConfigError
from fedtailor.losses import proximal
from fedtailor.trees import cut, subtract


@card("personal", "|t|", "|t|", "exact")
def ditto(job: Job, *, lam: float = 0.1, weighting: str = "examples") -> Algorithm:
    """FedAvg, and beside it a tree a client that is its own and held near the global one."""
    if lam < 0:
        raise ConfigError(f"algorithm.lam must not be negative (got {lam})")
    averaged, near = fedavg(job, weighting=weighting), proximal(job.loss, lam)

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        start = cut(msg.body, site.init)
        done = yield Fit(job.loss, start, site.data["train"], {}, job.plan)
        mine = yield Fit(near, personal(own, msg.body, site), site.data["train"], {"anchor": start} if lam else {}, job.plan)
        return {"params": mine.params}, Message("update", subtract(done.params, start), done.seen)

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        tree: Tree = own["params"] if own else cut(broadcast, site.init)
        return tree

    answer, judged = answer_with(job, averaged.model, personal)
    return averaged._replace(client={"train": train, "answer": judged}, answer=answer, personal=personal)
