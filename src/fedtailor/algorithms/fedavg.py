"""FedAvg and its server optimisers.

FedAvg: Communication-Efficient Learning of Deep Networks from Decentralized Data (McMahan et al., arXiv 1602.05629).
    client k:  w_k <- train(w, its data);  sends w_k - w and n_k
    server:    w <- w + sum_k p_k (w_k - w),  p_k = n_k / sum n, or 1/K where `weighting` is "uniform"
Where clients differ in rank or prefix length, the server holds the largest, a client trains the first rows (or columns) of it, and
each entry is averaged over the clients that hold it, as HeteroFL does with widths (arXiv 2010.01264).
FedAvgM (arXiv 1909.06335), FedAdam, FedYogi, FedAdagrad (arXiv 2003.00295): the mean difference D is a pseudo-gradient for an
optimiser at the server (optimizers.py). v starts at 0 and there is no bias correction, as in the reference implementation; tau
is 1e-3 and not its 1e-9, which divides by nearly nothing where LoRA's B starts at zero.
"""

from __future__ import annotations

from collections.abc import Callable

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Loss, Message, Site, State, Tree, answer_with, one_exchange
from fedtailor.errors import ConfigError, one_of
from fedtailor.optimizers import ServerOptimizer, adagrad, adam, momentum, yogi
from fedtailor.trees import cut, moved, overlapping_mean, subtract


@card("global", "|t|", "|t|", "exact")
def fedavg(
    job: Job,
    *,
    weighting: str = "examples",
    server_opt: ServerOptimizer | None = None,
    loss: Loss | None = None,
    aux: Callable[[Site], Tree] = lambda site: {},
) -> Algorithm:
    """Federated averaging: the mean of the clients' differences, weighted by examples or uniformly."""
    weigh = weights_by(weighting)
    local_loss = loss or job.loss

    def init(params: Tree) -> State:
        return {"params": params, "optimizer": server_opt.init(params) if server_opt else {}}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        start = cut(msg.body, site.init)
        done = yield Fit(local_loss, start, site.data["train"], {"anchor": start, **aux(site)}, job.plan)
        return own, Message("update", subtract(done.params, start), done.seen)

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        bodies, weights = [r.body for r in replies.values()], [weigh(r) for r in replies.values()]
        if server_opt is None:
            return {**state, "params": moved(state["params"], bodies, weights)}
        delta = overlapping_mean(bodies, weights, state["params"])
        params, optimizer = server_opt.step(state["params"], delta, state["optimizer"])
        return {"params": params, "optimizer": optimizer}

    answer, judged = answer_with(job, lambda state: state["params"])
    return Algorithm(
        init=init,
        round=one_exchange(lambda state, client: Message("train", state["params"]), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        check=checks(job, train=update(smaller=bool(job.sizes))),
    )


@card("global", "|t|", "|t|", "exact")
def fedavgm(job: Job, *, weighting: str = "examples", lr: float = 1.0, beta: float = 0.9) -> Algorithm:
    """FedAvg with momentum at the server."""
    return fedavg(job, weighting=weighting, server_opt=momentum(lr, beta))


@card("global", "|t|", "|t|", "exact")
def fedadam(
    job: Job, *, weighting: str = "examples", lr: float = 0.02, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Algorithm:
    """FedAvg with Adam at the server."""
    return fedavg(job, weighting=weighting, server_opt=adam(lr, beta1, beta2, tau))


@card("global", "|t|", "|t|", "exact")
def fedyogi(
    job: Job, *, weighting: str = "examples", lr: float = 0.02, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Algorithm:
    """FedAvg with Yogi at the server: its second moment grows and falls slowly."""
    return fedavg(job, weighting=weighting, server_opt=yogi(lr, beta1, beta2, tau))


@card("global", "|t|", "|t|", "exact")
def fedadagrad(job: Job, *, weighting: str = "examples", lr: float = 0.05, tau: float = 1e-3) -> Algorithm:
    """FedAvg with Adagrad at the server: steps only get smaller."""
    return fedavg(job, weighting=weighting, server_opt=adagrad(lr, tau))


def one_size(job: Job, name: str) -> None:
    """For algorithms that need equal shapes.

    Raises:
        ConfigError: clients differ in rank or prefix length.
    """
    if len(set(job.sizes)) > 1:
        raise ConfigError(
            f"algorithm {name} needs the same rank or length at every client: leave clients.ranks and clients.lengths out, "
            "or choose fedavg, fedprox, a server optimiser, hetlora or flora; with models of their own ditto, apfl, fml, fedppa or local"
        )


def weights_by(weighting: str):  # type: ignore[no-untyped-def]
    """reply -> its weight in the mean.

    Raises:
        ConfigError: neither "examples" nor "uniform".
    """
    one_of("algorithm.weighting", weighting, ("examples", "uniform"))
    # A client without examples trained nothing: it must not count, and must not make the sum of weights zero either.
    return (lambda reply: float(reply.info["n"]) or 1e-9) if weighting == "examples" else (lambda reply: 1.0)
