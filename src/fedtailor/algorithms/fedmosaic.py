"""FedMosaic's RELA: each client's own mean of the others, by how alike their tasks are (Seo et al., arXiv 2506.11024).

Every client trains a local tree L beside a frozen "global" one G, made for it alone; a gate g a module says how much of each answers.
    client i:  sketch: D = grad of the loss by one matrix at the initial tree, a batch at a time; the leading `share` of its rows, plus
               N(0, noise^2); mean over `samples` batches; s_i <- memory s_i + (1 - memory) mean, without `memory` the first time
               (L_i, b_i) <- train, G_i still, on the loss of  g G_i + (1 - g) L_i,  g = sigmoid(b_i), b_i = 0 at first
               sends L_i and s_i;  b_i stays
    server:    S_ij = mean over the columns of cos(column of s_i, column of s_j)
               G_i <- sum_{j != i} w_ij L_j,  w_i = softmax(S_i / tau) over all others ever heard
Down |t|, up |t| + the sketch. With nobody else heard G_i is the client's own last tree, at first the initial one. LoRA's two adapters answer
side by side, g B_G A_G + (1 - g) B_L A_L, as factors of twice the rank; the L_j are averaged factor by factor, as in the authors' code.

That code (snumprlab/fedmosaic at 7887f5f) is the rule. **Our reading**: its gate is a sigmoid of the tokens that enter a module, for which
each technique's modules would have to be changed; here it is one number a module (a head or a prefix is one too), which a tree can hold. As
there, it starts at 1/2 and never leaves its client. Ours: the reference model of the sketch is the experiment's own backbone with the
technique's initial tree, frozen and the same everywhere, and the matrix is of that tree: in the model's last layer, one that starts at zero
(LoRA's B; its A has no gradient there) or else the last. For `full` that is the last feed-forward matrix, as in the paper. Rows are its
longer axis. The gradient is exact: the authors' keeps only the diagonal of the last RMSNorm's Jacobian. Where a part of the clients takes
part their weights do not add up to 1; here they do, over everybody. Who is new is given the plain mean, which is also `model`.
Co-LoRA, the paper's way across architectures, is left out: clients have one backbone and equal shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, difference, spoken
from fedtailor.algorithms.fedavg import one_size
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
    Part,
    Plan,
    Site,
    State,
    Talk,
    Tree,
    answer_with,
)
from fedtailor.errors import ConfigError
from fedtailor.losses import Wrapped, beside
from fedtailor.trees import lora_pairs, weighted_mean


@card("personal", "|t| + its sketch", "|t|", "our reading")
def fedmosaic(
    job: Job, *, tau: float = 0.5, samples: int = 4, share: float = 0.4, noise: float = 1e-4, memory: float = 0.5
) -> Algorithm:
    """RELA: a frozen mean of the others beside a local tree, weighted by the cosines of noisy gradients on a frozen reference model."""
    one_size(job, "fedmosaic")
    if tau <= 0 or samples < 1 or not 0 < share <= 1 or noise < 0 or not 0 <= memory < 1:
        raise ConfigError("algorithm fedmosaic needs tau > 0, samples >= 1, 0 < share <= 1, noise >= 0 and 0 <= memory < 1")
    loss, reference = gated(job.loss), beside(job.loss)
    look = Plan(steps=1, batch=job.plan.batch, optimizer="sgd", lr=1.0)  # what one such step takes away is the gradient

    def of_last_layer(tree: Tree) -> Tree:
        depth = job.layers.depth if job.layers else 0
        return (job.layers.part(tree, Part(depth - 1, depth, False, False)) if job.layers else {}) or tree

    def init(params: Tree) -> State:
        found = {name: t for name, t in of_last_layer(params).items() if isinstance(t, Tensor) and t.is_floating_point()}
        if not found:
            raise ConfigError(
                "algorithm fedmosaic tells tasks apart by the gradient of a reference model, which is the technique's initial tree, and "
                "this one has no tensors: choose technique lora, prefix or head, or algorithm prompt-search (template) or rag (retriever)"
            )
        # A factor whose partner starts at zero has no gradient; the partner has.
        places = {name: (t.dim() > 1, not t.any(), i) for i, (name, t) in enumerate(found.items())}
        return {"params": params, "on": max(places, key=lambda name: places[name]), "trees": {}, "sketches": {}}

    def sanitised(gradient: Tensor, on: str) -> Tensor:
        return leading(of_last_layer({on: gradient})[on], share)

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        mine = own or {"params": site.init, "gates": closed(site.init)}
        rows, on, draw = site.data["train"], msg.body["on"], site.random("fedmosaic")
        seen = []
        for _ in range(samples if len(rows) else 0):
            step = yield Fit(reference, {on: site.init[on]}, rows, {"rest": site.init}, look)
            kept = sanitised(site.init[on] - step.params[on], on)
            seen.append(kept + noise * torch.randn(kept.shape, generator=draw))
        start = {"local": mine["params"], "gates": mine["gates"]}
        done = yield Fit(loss, start, rows, {"global": msg.body["global"]}, job.plan)
        if not seen:
            return own, Message("tree", {}, done.seen)
        sketch = torch.stack(seen).mean(0)
        sketch = memory * own["sketch"] + (1 - memory) * sketch if own else sketch
        new = {"params": done.params["local"], "gates": done.params["gates"], "global": msg.body["global"], "sketch": sketch}
        return new, Message("tree", {"tree": new["params"], "sketch": sketch}, done.seen)

    def customised(state: State, client: ClientId, shares: Mapping[ClientId, Tensor]) -> Tree:
        trees = state["trees"]
        others = [c for c in trees if c != client]
        if client not in trees or not others:
            return state["params"]  # type: ignore[no-any-return]
        each = dict(zip(trees, shares[client].tolist(), strict=True))
        return weighted_mean([trees[c] for c in others], [each[c] for c in others])

    def round(state: State, cohort: list[ClientId]) -> Talk:
        shares = weights(state["sketches"], tau)
        replies = yield {c: Message("train", {"global": customised(state, c, shares), "on": state["on"]}) for c in cohort}
        heard = {c: r.body for c, r in replies.items() if float(r.info["n"])}  # who has no rows has no task
        if not heard:
            return state
        trees = {**state["trees"], **{c: dict(body["tree"].items()) for c, body in heard.items()}}
        sketches = {**state["sketches"], **{c: body["sketch"] for c, body in heard.items()}}
        names = sorted(trees)
        mean = weighted_mean([trees[c] for c in names], [1.0] * len(names))
        return {**state, "params": mean, "trees": {c: trees[c] for c in names}, "sketches": {c: sketches[c] for c in names}}

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        return mixed(own["gates"], own["global"], own["params"]) if own else broadcast or site.init

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        return (yield {c: Message("answer", {} if c in state["trees"] else state["params"]) for c in cohort})

    def sketched(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("tree",), ("n",)):
            return why
        tree, on = letter.body["global"], letter.body["on"]
        return difference(reply.body, {"tree": tree, "sketch": sanitised(tree[on], on)} if reply.info["n"] else {})

    return Algorithm(
        init=init,
        round=round,
        client={"train": train, "answer": answer_with(job, lambda state: {}, personal)[1]},
        answer=answer,
        model=lambda state: state["params"],
        personal=personal,
        updates=False,  # trees and sketches, not differences
        check=checks(job, train=sketched),
    )


def leading(gradient: Tensor, share: float) -> Tensor:
    """The first rows of a gradient as a matrix whose rows are its longer axis."""
    table = gradient.flatten(1) if gradient.dim() > 1 else gradient[:, None]
    table = table if table.shape[0] >= table.shape[1] else table.T
    return table[: max(1, int(share * len(table)))].contiguous()


def weights(sketches: Mapping[ClientId, Tensor], tau: float) -> dict[ClientId, Tensor]:
    """client -> its weights of all clients in their order, 0 for itself; {} where there are fewer than two."""
    if len(sketches) < 2:
        return {}
    columns = F.normalize(torch.stack(list(sketches.values())).double(), dim=1)
    alike = torch.einsum("irc,jrc->ij", columns, columns) / columns.shape[2]
    return dict(zip(sketches, (alike.fill_diagonal_(-torch.inf) / tau).softmax(1), strict=True))


def closed(tree: Tree) -> Tree:
    """A gate a module at its start, half open."""
    return {module: torch.zeros(()) for module in sorted({*lora_pairs(tree), *map(module_of, tree)})}


def module_of(name: str) -> str:
    return name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] or name


def mixed(gates: Tree, shared: Tree, own: Tree) -> Tree:
    """sigmoid(gate) of the shared tree and the rest of the own one, module by module."""
    open_ = {module: gate.sigmoid() for module, gate in gates.items()}
    out: Tree = {}
    for module, (down, up) in lora_pairs(own).items():
        out[down] = torch.cat([shared[down], own[down]])
        out[up] = torch.cat([open_[module] * shared[up], (1 - open_[module]) * own[up]], 1)
    # Written so that where both are equal a gate's gradient is exactly 0: Adam would make a step of rounding.
    for name in own.keys() - out.keys():
        out[name] = own[name] + open_[module_of(name)] * (shared[name] - own[name])
    return {name: out[name] for name in own}


def gated(base: Loss) -> Loss:
    """base of the mixture of "global" in `aux` and the params {"local", "gates"}."""
    return _Gated(base)


class _Gated(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, base = self
        return base(forward, mixed(params["gates"], aux["global"], params["local"]), batch, {})  # type: ignore[operator,no-any-return]
