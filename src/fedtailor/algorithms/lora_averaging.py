"""LoRA factors averaged as factors: FedIT, FFA-LoRA, FedSA-LoRA.

FedIT (arXiv 2305.05644):   A = sum p_k A_k, B = sum p_k B_k. Inexact: the mean of products is not the product of means.
FFA-LoRA (arXiv 2403.12313): A is frozen at one shared random start and never sent; B = sum p_k B_k is exact.
FedSA-LoRA (arXiv 2410.01463): only A is sent and averaged; B and the head stay on the client.
Weights p_k = n_k / sum n. The aggregation error of a round is the relative Frobenius norm of what averaging factors loses,
    || sum p_k B_k A_k - (sum p_k B_k)(sum p_k A_k) || / || sum p_k B_k A_k ||,
reported as state["aggregation_error"] (0 for FFA; FedSA reports none: the server never sees a product).
"""

from __future__ import annotations

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size, weights_by
from fedtailor.algorithms.fedper import partly_shared
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Message, Site, State, Tree, answer_with, one_exchange
from fedtailor.errors import ConfigError
from fedtailor.trees import add, aggregation_error, lora_pairs, subtract, weighted_mean

weigh = weights_by("examples")


@card("global", "|t|", "|t|", "exact", "lora")
def fedit(job: Job) -> Algorithm:
    """FedIT: averages A and B apart, weighted by examples; the error of doing so is reported."""
    return _averaging(job, "fedit", lambda name: True)


@card("global", "|t| - sum r d_in", "|t| - sum r d_in", "exact", "lora")
def ffa(job: Job) -> Algorithm:
    """FFA-LoRA: A stays at its shared start and never travels; averaging B alone is exact, at half the bytes."""
    return _averaging(job, "ffa", lambda name: ".lora_A." not in name)


@card("personal", "sum r d_in", "sum r d_in", "exact", "lora")
def fedsa(job: Job) -> Algorithm:
    """FedSA-LoRA: A is shared, B and the head are personal."""
    return partly_shared(job, "fedsa", lambda name: ".lora_A." in name, lambda params: _needs_lora(params, "fedsa"))


def _averaging(job: Job, name: str, sent) -> Algorithm:  # type: ignore[no-untyped-def]
    one_size(job, name)

    def init(params: Tree) -> State:
        _needs_lora(params, name)
        return {"params": {n: t for n, t in params.items() if sent(n)}, "aggregation_error": 0.0}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        # Names that are not in the tree keep the backbone's own tensor: FFA's A is drawn there from the seed, for everybody.
        done = yield Fit(job.loss, msg.body, site.data["train"], {}, job.plan)
        return own, Message("update", subtract(done.params, msg.body), done.seen)

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        weights = [weigh(r) for r in replies.values()]
        old = state["params"]
        params = add(old, weighted_mean([r.body for r in replies.values()], weights))
        error = aggregation_error([add(old, dict(r.body.items())) for r in replies.values()], weights, params)
        return {"params": params, "aggregation_error": error}

    answer, judged = answer_with(job, lambda state: state["params"])
    return Algorithm(
        init=init,
        round=one_exchange(lambda state, client: Message("train", state["params"]), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        check=checks(job, train=update()),
    )


def _needs_lora(params: Tree, name: str) -> None:
    if not lora_pairs(params):
        raise ConfigError(f'algorithm {name} works on LoRA factors: set technique.kind = "lora" (or use fedavg)')
