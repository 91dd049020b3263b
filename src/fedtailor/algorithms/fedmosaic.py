"""FedMosaic: each client's own mean of the others, by how alike their tasks are (Seo et al., arXiv 2506.11024): RELA and Co-LoRA.

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

**Different models** (`clients.kinds`): with technique colora in all of them the pieces P and Q are averaged over all others, with w_i, and what
else a tree has over those of the same kind, with w_i scaled to them; a client keeps its own where there is none. Before its first round a
client whose backbone is not the server's aligns its frozen A and B with it on public rows (alignment.py). The server's model is the
reference model of the sketches too, so every client runs it beside its own: choose the smallest. `model` is that model with the plain mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.algorithms.alignment import align
from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, difference, spoken
from fedtailor.algorithms.colora_pieces import alike, pieces, rest
from fedtailor.algorithms.fedavg import one_size
from fedtailor.algorithms.gates import closed, gated, mixed
from fedtailor.core import (
    Algorithm,
    ClientId,
    Fit,
    Flow,
    Job,
    Kind,
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
from fedtailor.losses import beside
from fedtailor.trees import signature, weighted_mean


@card("personal", "|t| + its sketch", "|t|", "our reading")
def fedmosaic(
    job: Job,
    *,
    tau: float = 0.5,
    samples: int = 4,
    share: float = 0.4,
    noise: float = 1e-4,
    memory: float = 0.5,
    align_rows: int = 100,
    align_steps: int = 100,
    align_lr: float = 3e-3,
) -> Algorithm:
    """A frozen mean of the others beside a local tree, weighted by the cosines of noisy gradients on a frozen reference model."""
    one_size(job, "fedmosaic")
    if tau <= 0 or samples < 1 or not 0 < share <= 1 or noise < 0 or not 0 <= memory < 1:
        raise ConfigError("algorithm fedmosaic needs tau > 0, samples >= 1, 0 < share <= 1, noise >= 0 and 0 <= memory < 1")
    if align_rows < 1 or align_steps < 0 or align_lr <= 0:
        raise ConfigError("algorithm fedmosaic needs align_rows >= 1, align_steps >= 0 and align_lr > 0")
    alike(job)
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
        on = max(places, key=lambda name: places[name])
        return {"params": params, "on": on, "trees": {}, "sketches": {}, **({"kinds": {}} if job.kinds else {})}

    def sanitised(gradient: Tensor, on: str) -> Tensor:
        return leading(of_last_layer({on: gradient})[on], share)

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        mine = own or {"params": site.init, "gates": closed(site.init), "frozen": {}}
        rows, on, draw, kind = site.data["train"], msg.body["on"], site.random("fedmosaic"), kind_of(site)
        if not len(rows):
            return own, Message("tree", {}, {"n": 0.0})
        if not own and kind and not kind.same:
            mine["frozen"] = yield from align(site, kind.frozen, job.frozen, align_rows, align_steps, align_lr)
        start, read = (site.reference.init, site.reference.data["train"]) if site.reference else (site.init, rows)
        seen = []
        for _ in range(samples):
            step = yield Fit(reference, {on: start[on]}, read, {"rest": start}, look, reference=bool(site.reference))
            kept = sanitised(start[on] - step.params[on], on)
            seen.append(kept + noise * torch.randn(kept.shape, generator=draw))
        # What nobody else could give is the client's own last.
        shared = {**mine["params"], **msg.body["global"]} if job.kinds else msg.body["global"]
        done = yield Fit(
            loss, {"local": mine["params"], "gates": mine["gates"]}, rows, {"global": shared, "rest": mine["frozen"]}, job.plan
        )
        sketch = torch.stack(seen).mean(0)
        sketch = memory * own["sketch"] + (1 - memory) * sketch if own else sketch
        new = {**mine, "params": done.params["local"], "gates": done.params["gates"], "global": shared, "sketch": sketch}
        info = {**done.seen, "kind": float(site.number % len(job.kinds))} if job.kinds else done.seen
        return new, Message("tree", {"tree": new["params"], "sketch": sketch}, info)

    def kind_of(site: Site) -> Kind | None:
        return job.kinds[site.number % len(job.kinds)] if job.kinds else None

    def customised(state: State, client: ClientId, shares: Mapping[ClientId, Tensor]) -> Tree:
        trees = state["trees"]
        others = [c for c in trees if c != client]
        if client not in trees or not others:
            return {} if job.kinds else state["params"]
        each = dict(zip(trees, shares[client].tolist(), strict=True))

        def mean(those: list[ClientId], part: Callable[[Tree], Tree]) -> Tree:
            # Of a small `tau` nothing may be left for any of them.
            return weighted_mean([part(trees[c]) for c in those], [each[c] for c in those]) if any(each[c] for c in those) else {}

        if not job.kinds:
            return mean(others, dict)
        peers = [c for c in others if state["kinds"][c] == state["kinds"][client]]
        return {**mean(others, pieces), **mean(peers, rest)}

    def round(state: State, cohort: list[ClientId]) -> Talk:
        shares = weights(state["sketches"], tau)
        replies = yield {c: Message("train", {"global": customised(state, c, shares), "on": state["on"]}) for c in cohort}
        heard = {c: r.body for c, r in replies.items() if float(r.info["n"])}  # who has no rows has no task
        if not heard:
            return state
        trees = {**state["trees"], **{c: dict(body["tree"].items()) for c, body in heard.items()}}
        sketches = {**state["sketches"], **{c: body["sketch"] for c, body in heard.items()}}
        names = sorted(trees)
        new = {**state, "trees": {c: trees[c] for c in names}, "sketches": {c: sketches[c] for c in names}}
        if not job.kinds:
            return {**new, "params": weighted_mean([trees[c] for c in names], [1.0] * len(names))}
        kinds = {**state["kinds"], **{c: int(replies[c].info["kind"]) for c in heard}}
        like = signature(state["params"])
        peers = [c for c in names if job.kinds[kinds[c]].same and signature(trees[c]) == like]
        params = {**state["params"], **weighted_mean([pieces(trees[c]) for c in names], [1.0] * len(names))}
        params |= weighted_mean([rest(trees[c]) for c in peers], [1.0] * len(peers)) if peers else {}
        return {**new, "params": params, "kinds": kinds}

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        return {**mixed(own["gates"], own["global"], own["params"]), **own["frozen"]} if own else broadcast or site.init

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        new = {} if job.kinds else state["params"]  # a mean of P and Q is nothing to who has not aligned A and B
        return (yield {c: Message("answer", {} if c in state["trees"] else new) for c in cohort})

    def sketched(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("tree",), ("n",)):
            return why
        if not reply.info["n"]:
            return difference(reply.body, {})
        tree, on = letter.body["global"], letter.body["on"]
        if job.kinds:
            if reply.info.get("kind") not in range(len(job.kinds)):
                return f"it is of kind {reply.info.get('kind')}, and there are {len(job.kinds)}"
            tree = job.kinds[int(reply.info["kind"])].init
        return difference(reply.body, {"tree": tree, "sketch": sanitised(tree[on], on)})

    return Algorithm(
        init=init,
        round=round,
        client={"train": train, "answer": answer_with(job, lambda state: {}, personal)[1]},
        answer=answer,
        model=lambda state: state["params"],
        personal=personal,
        of_all_kinds=True,
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
