"""HetLoRA: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models (Cho et al., arXiv 2401.06432).

Our reading: no official code is known; the rule is reconstructed from a quoted caption and a re-implementation, and the
defaults of gamma, lam and r_min are ours.
    down:    the first r_k ranks of the global factors
    client:  loss + lam sum_l ||B[:, floor(g r_k):]||_F ||A[floor(g r_k):, :]||_F; afterwards, where that tail is smaller than it was
             at receipt, r_k <- max(r_min, floor(g r_k)) and the tail is cut off
    server:  pad to r_max with zeros, weigh by ||B_k A_k||_F (over all modules), average A and B; the head by the same weights
||B A||_F^2 = sum((B'B) * (A A')) is computed without forming the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
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
)
from fedtailor.errors import ConfigError
from fedtailor.losses import tail_norms
from fedtailor.trees import aggregation_error, lora_pairs, weighted_mean


@card("global", "sum r_k (d_in + d_out) + head", "sum r_k (d_in + d_out) + head", "our reading", "lora")
def hetlora(job: Job, *, gamma: float = 0.99, lam: float = 0.01, r_min: int = 2) -> Algorithm:
    """HetLoRA: ranks differ a client and shrink where their last ranks carry nothing (our reading)."""
    if not 0 < gamma <= 1 or r_min < 1:
        raise ConfigError(f"algorithm hetlora needs 0 < gamma <= 1 and r_min >= 1 (got gamma = {gamma}, r_min = {r_min})")

    def init(params: Tree) -> State:
        if not lora_pairs(params):
            raise ConfigError('algorithm hetlora works on LoRA factors: set technique.kind = "lora" (or use fedavg)')
        return {"params": params, "ranks": {}, "aggregation_error": 0.0}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        pairs = lora_pairs(msg.body)
        rank = next(iter(msg.body[a].shape[0] for a, _ in pairs.values()))
        cut = max(r_min, int(gamma * rank))
        loss = TailLoss(job.loss, lam, cut) if lam and cut < rank else job.loss
        done = yield Fit(loss, msg.body, site.data["train"], {}, job.plan)
        kept = rank
        if cut < rank and tail_norms(done.params, pairs, cut) < tail_norms(msg.body, pairs, cut):
            kept = cut
        size = float(sum(product_norm(done.params[a][:kept], done.params[b][:, :kept]) ** 2 for a, b in pairs.values()) ** 0.5)
        return own, Message("update", truncate(done.params, kept), {**done.seen, "rank": float(kept), "norm": size})

    def serve(state: State, client: ClientId) -> Message:
        return Message("train", truncate(state["params"], state["ranks"].get(client, ranks_of(state["params"]))))

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        largest = ranks_of(state["params"])
        trees = [pad(dict(r.body.items()), largest) for r in replies.values()]
        norms = [r.info["norm"] for r in replies.values()]
        weights = norms if sum(norms) > 0 else [1.0] * len(norms)
        params = weighted_mean(trees, weights)
        ranks = {**state["ranks"], **{c: int(r.info["rank"]) for c, r in replies.items()}}
        return {"params": params, "ranks": ranks, "aggregation_error": aggregation_error(trees, weights, params)}

    def first(own: Tree | None, msg: Message, site: Site) -> Flow:
        """A client's device says how many ranks it affords: it cuts what it is sent for the first time."""
        own_rank = ranks_of(site.init)
        sent = ranks_of(msg.body)
        return (yield from train(own, msg._replace(body=truncate(msg.body, min(own_rank, sent))), site))

    answer, judged = answer_with(job, lambda state: state["params"])
    handlers, check = {"train": first, "answer": judged}, checks(job, train=update(of_its_rank, ("n", "rank", "norm")))
    return Algorithm(init, one_exchange(serve, merge), handlers, answer, lambda state: state["params"], check=check)


def of_its_rank(letter: Message, reply: Message) -> Tree:
    """What a reply of this rank is like.

    Raises:
        ValueError: no client of the letter's can have this rank, or this norm.
    """
    rank, norm = reply.info["rank"], reply.info["norm"]
    if rank != int(rank) or not 1 <= rank <= ranks_of(letter.body) or norm < 0:
        raise ValueError(f"rank {rank:g}, norm {norm:g}")
    return truncate(letter.body, int(rank))


class TailLoss(tuple[Any, ...]):
    """base + lam * what ranks from `start` on carry; a value, so clients of the same rank are stacked together."""

    def __new__(cls, base: Loss, lam: float, start: int) -> TailLoss:
        return super().__new__(cls, ("tail", base, lam, start))

    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, base, lam, start = self
        return base(forward, params, batch, aux) + lam * tail_norms(params, lora_pairs(params), start)  # type: ignore[no-any-return]


def ranks_of(tree: Tree) -> int:
    return max(int(tree[a].shape[0]) for a, _ in lora_pairs(tree).values())


def truncate(tree: Tree, rank: int) -> Tree:
    """The first `rank` rows of each A and columns of each B."""
    out = dict(tree.items())
    for a, b in lora_pairs(tree).values():
        out[a], out[b] = out[a][:rank].contiguous(), out[b][:, :rank].contiguous()
    return out


def pad(tree: Tree, rank: int) -> Tree:
    """Zero rows of A and columns of B up to `rank`: the product B A is the same."""
    out = dict(tree)
    for a, b in lora_pairs(tree).values():
        missing = rank - out[a].shape[0]
        out[a] = torch.cat([out[a], out[a].new_zeros(missing, out[a].shape[1])])
        out[b] = torch.cat([out[b], out[b].new_zeros(out[b].shape[0], missing)], dim=1)
    return out


def product_norm(a: Tensor, b: Tensor) -> float:
    """||B A||_F for A (r, d_in), B (d_out, r)."""
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0).sqrt())
