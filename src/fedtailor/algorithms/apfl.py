"""APFL: Adaptive Personalized Federated Learning (Deng et al., arXiv 2003.13461).

A client holds v_k and a number alpha_k in [0, 1]; its model is the mixture  m_k = alpha_k v_k + (1 - alpha_k) w.
    every step, all from the same batch:
        w       <- w - eta grad f(w)
        v_k     <- v_k - eta alpha_k grad f(m_k)
        alpha_k <- alpha_k - eta <v_k - w, grad f(m_k)>        (where `adaptive`; kept in [0, 1])
    client k: sends w_k - w;  v_k and alpha_k stay        server: FedAvg
The three are one loss, f(w) + f(m_k) with w held still in m_k, so any optimiser can take the steps; the equations are plain SGD's. The
authors' code moves alpha at the first step of a round only and pulls it to 0 by 0.02 alpha; here it moves at every step, unpulled. A step
costs twice FedAvg's, a message is FedAvg's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.fedavg import fedavg
from fedtailor.core import Algorithm, Batch, Fit, Flow, Forward, Job, Loss, Message, Site, Tree, answer_with
from fedtailor.errors import ConfigError
from fedtailor.losses import Wrapped
from fedtailor.trees import cut, subtract, tree_map


@card("personal", "|t|", "|t|", "exact")
def apfl(job: Job, *, alpha: float = 0.5, adaptive: bool = True, weighting: str = "examples") -> Algorithm:
    """FedAvg, and beside it a tree a client that is mixed with the global one in a proportion that is learned."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"algorithm.alpha is the share of a client's own tree, from 0 to 1 (got {alpha})")
    if job.plan.clip:
        raise ConfigError(
            "algorithm apfl trains two trees in one step, which train.clip would couple: leave it out, or choose ditto"
        )
    averaged, loss = fedavg(job, weighting=weighting), mixing(job.loss, adaptive)

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        shared = cut(msg.body, site.init)
        kept = own or begun(shared)
        moving, aux = ({"alpha": kept["alpha"]}, {}) if adaptive else ({}, {"alpha": kept["alpha"]})
        done = yield Fit(loss, {"shared": shared, "own": kept["own"], **moving}, site.data["train"], aux, job.plan, passes=2)
        mine = {"own": done.params["own"], "alpha": done.params.get("alpha", kept["alpha"]).clamp(0, 1)}
        return mine, Message("update", subtract(done.params["shared"], shared), done.seen)

    def begun(shared: Tree) -> Tree:
        return {"own": shared, "alpha": torch.tensor(alpha)}

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        shared = cut(broadcast, site.init)
        return mixed(own["alpha"], own["own"], shared) if own else shared

    answer, judged = answer_with(job, averaged.model, personal)
    return averaged._replace(client={"train": train, "answer": judged}, answer=answer, personal=personal)


def mixed(alpha: Tensor, own: Tree, shared: Tree) -> Tree:
    return tree_map(lambda v, w: alpha * v + (1 - alpha) * w, own, shared)


class Held(torch.autograd.Function):
    """A number kept in [0, 1]: at a border its slope is nothing outwards, and all there is inwards, so that it can leave again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(alpha: Tensor) -> Tensor:
        return alpha.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (alpha,) = ctx.saved_tensors
        return slope.masked_fill(((alpha >= 1) & (slope < 0)) | ((alpha <= 0) & (slope > 0)), 0)


def mixing(base: Loss, adaptive: bool) -> Loss:
    """base(w) + base(alpha v + (1 - alpha) w), w held still in the second; alpha in the params, or in `aux`."""
    return _Mixing(base, adaptive)


class _Mixing(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, base, adaptive = self
        alpha = Held.apply(params["alpha"]) if adaptive else aux["alpha"]  # type: ignore[no-untyped-call]
        still = tree_map(lambda w: w.detach(), params["shared"])
        both = base(forward, params["shared"], batch, aux) + base(forward, mixed(alpha, params["own"], still), batch, aux)  # type: ignore[operator]
        return both  # type: ignore[no-any-return]
