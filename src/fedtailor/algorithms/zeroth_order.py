"""Training by losses alone: forward passes at the clients, seeds and scalars on the wire.

MeZO (Malladi et al., arXiv 2305.17333): for a random direction z and a batch,
    g = (L(p + eps z) - L(p - eps z)) / (2 eps),   p <- p - lr g z
FedKSeed (Qin et al., arXiv 2312.06353): directions come from a pool of K seeds that everybody knows, so a tree is what it started as plus
K numbers:
    p = p_0 + sum_k moved_k z_k;   a client sends (k, -lr g) for each of its steps, the server adds the clients' weighted mean to `moved`.
Down: K numbers. Up: two numbers a step. Works with any technique that has tensors; `prompt` is the soft counterpart of prompt-search.
Our reading: plain sampling of seeds, without FedKSeed-Pro's probabilities; directions are unit normal over the whole tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, difference, spoken
from fedtailor.algorithms.fedavg import one_size, weights_by
from fedtailor.core import (
    Algorithm,
    Flow,
    Job,
    Message,
    Predict,
    Site,
    State,
    Tree,
    answer_with,
    falling,
    one_exchange,
    stream,
)
from fedtailor.errors import ConfigError
from fedtailor.metrics import mean_loss
from fedtailor.trees import tree_map


@card("global", "8 bytes a step", "4 bytes a direction", "our reading")
def zeroth_order(
    job: Job, *, seeds: int = 256, steps: int = 16, eps: float = 1e-2, lr: float = 1e-2, weighting: str = "examples"
) -> Algorithm:
    """MeZO steps in a pool of known directions (FedKSeed): K numbers down, two a step up; `train.batch` is the batch of a step."""
    one_size(job, "zeroth-order")
    for name, value in {"seeds": seeds, "steps": steps, "eps": eps, "lr": lr}.items():
        if value <= 0:
            raise ConfigError(f"algorithm.{name} must be above 0 (got {value})")
    weigh = weights_by(weighting)

    def params_of(state: State) -> Tree:
        return shifted(state["start"], state["moved"], job.seed)

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        data, draw = site.data["train"], site.random("zeroth-order")
        params = shifted(site.init, msg.body["moved"], job.seed)
        rate = lr * falling(job.plan.decay, (site.round - 1) / job.plan.rounds)
        chosen, moves, losses = torch.randint(seeds, (steps if len(data) else 0,), generator=draw), [], []
        for k in chosen.tolist():
            batch = data.take(torch.randint(len(data), (min(job.plan.batch, len(data)),), generator=draw).tolist())
            above = yield Predict(job.judge, moved(params, k, eps, job.seed), batch)
            below = yield Predict(job.judge, moved(params, k, -eps, job.seed), batch)
            ends = mean_loss(job.tally(above)), mean_loss(job.tally(below))
            moves.append(-rate * (ends[0] - ends[1]) / (2 * eps))
            losses.append(sum(ends) / 2)
            params = moved(params, k, moves[-1], job.seed)
        seen = {
            "n": float(len(data)),
            "loss": sum(losses) / max(len(losses), 1),
            "queries": 2.0 * min(job.plan.batch, len(data)) * len(moves),
        }
        return own, Message("moved", {"seed": chosen.to(torch.int32), "move": torch.tensor(moves, dtype=torch.float32)}, seen)

    def merge(state: State, replies: dict[str, Message]) -> State:
        total = sum(weigh(reply) for reply in replies.values())
        after = state["moved"].double()
        for reply in replies.values():
            share = weigh(reply) / total * reply.body["move"].double()
            after = after.index_add(0, reply.body["seed"].long(), share)
        return {**state, "moved": after.float()}

    def steps_of(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("moved",), ("n",)):
            return why
        count = len(reply.body["seed"])
        known = {"seed": torch.zeros(count, dtype=torch.int32), "move": torch.zeros(count)}
        if why := difference(reply.body, known) or (f"{count} steps, where {steps} were due" if count not in (0, steps) else ""):
            return why
        return "" if not count or 0 <= int(reply.body["seed"].min()) <= int(reply.body["seed"].max()) < seeds else "no such seed"

    answer, judged = answer_with(job, params_of)
    return Algorithm(
        init=lambda params: {"start": params, "moved": torch.zeros(seeds)},
        round=one_exchange(lambda state, client: Message("train", {"moved": state["moved"]}), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=params_of,
        updates=False,
        check=checks(job, train=steps_of),
    )


def direction(like: Tree, k: int, seed: int) -> Tree:
    """The pool's k-th direction: unit normal, drawn name by name in sorted order on the CPU, so that all machines agree."""
    draw = stream(seed, "direction", k)
    return {name: torch.randn(like[name].shape, generator=draw) for name in sorted(like)}


def moved(params: Tree, k: int, by: float, seed: int) -> Tree:
    """params + by z_k."""
    return tree_map(lambda p, z: p + by * z, params, direction(params, k, seed))


def shifted(start: Tree, by: Tensor, seed: int) -> Tree:
    """start + sum_k by_k z_k; directions that nobody has used yet are not drawn."""
    total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in start.items()}
    for k in by.nonzero().flatten().tolist():
        z = direction(start, k, seed)
        for name in total:
            total[name] += float(by[k]) * z[name].double()
    return {name: (start[name].double() + total[name]).float() for name in start}
