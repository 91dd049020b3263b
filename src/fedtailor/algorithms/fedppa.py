"""FedPPA-style: clients of different depth share the layers that they have in common, and are drawn to their mean step by step. After
"FedPPA: Progressive Parameter Alignment for Personalized Federated Learning" (Prasetia et al., arXiv 2510.14698).

The paper's: local training, the layers in common (same kind, same order), their plain mean over the clients that have them, and an
alignment of clients with it that grows; FedPPA+ weighs by the entropy of a client's labels. How they are aligned is not public:
**our reading** does it inside the next round's training, in `stages` s = 1..S of equal length, over common layers only
(together they are the experiment's plan: as many steps, every row once a pass; `train.schedule` starts anew in each),
    rule "interpolate":  m <- (1 - lam s/S) m + lam s/S mean, before each stage
    rule "proximal":     loss + (lam s/S)/2 ||m - mean||^2, in each stage
    server: mean_l = sum e_i m_i,l over the clients whose layers are like each other's up to l;  e_i = 1, or the entropy ("entropy")
A client adapts the first `depths[i]` layers of the model (dealt in turn; none: all) and may have a rank of its own (`clients.ranks`); what
is of another shape anywhere up to l is not common at l. Heads, and what belongs to no layer, stay with their clients. lam = 0 trains
alone; "interpolate" with lam = 1 and one stage is FedAvg with uniform weights on the common layers, under heads that stay.
The wire is a client's adapted layers, each way.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Layers, Message, Part, Plan, Site, State, Talk, Tree, answer_with
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import proximal
from fedtailor.trees import signature, weighted_mean

NO_LAYERS = (
    "algorithm fedppa averages layer by layer: choose a technique with tensors of each layer (lora, ia3, full) of a model that has a list of "
    "layers; for a prefix, a prompt or a head alone there is fedbasis, which takes any tree"
)


@card("personal", "adapted layers (+ 1 number)", "adapted layers; all at first", "our reading", "lora, ia3, full")
def fedppa(
    job: Job,
    *,
    lam: float = 0.5,
    stages: int = 4,
    rule: str = "interpolate",
    weights: str = "uniform",
    depths: Sequence[int] = (),
) -> Algorithm:
    """Layers that clients have in common are averaged, and pull each client more and more; the rest is its own."""
    one_of("algorithm.rule", rule, ("interpolate", "proximal"))
    one_of("algorithm.weights", weights, ("uniform", "entropy"))
    if lam < 0 or (rule == "interpolate" and lam > 1):
        raise ConfigError(
            f"algorithm.lam: from 0 (nobody is aligned) to 1, or any positive number with rule 'proximal' (got {lam})"
        )
    if stages < 1:
        raise ConfigError(f"algorithm.stages: parts of a round's training, at least 1 (got {stages})")
    if weights == "entropy" and not job.classes:
        raise ConfigError("algorithm.weights = 'entropy' is that of class labels, which this data has not: use 'uniform'")
    if job.layers is None:
        raise ConfigError(NO_LAYERS)
    layers = job.layers
    if not all(1 <= depth <= layers.depth for depth in depths):
        raise ConfigError(
            f"algorithm.depths: how many layers clients in turn adapt, each from 1 to {layers.depth} of this model (got {list(depths)})"
        )
    alike = Counter(job.sizes[i % len(job.sizes)] if job.sizes else 0 for i in range(job.clients))
    if job.clients > 1 and max(alike.values()) < 2:
        raise ConfigError(
            "algorithm fedppa: no two clients have a layer in common, as each has another rank: give two of clients.ranks the same, or "
            "choose fml, whose clients learn from a model of one size beside their own"
        )

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        params = own["params"] if own else begun(site)
        mean = {n: t for n, t in msg.body.items() if n in params and params[n].shape == t.shape}
        moments, seen = dict[str, Any](), 0.0
        for stage, rows in enumerate(dealt(job.plan, site.data["train"].lengths, stages, site.random("fedppa")), start=1):
            pull, loss, aux = lam * stage / stages, job.loss, {}
            if rule == "interpolate":
                params = {n: t.lerp(mean[n], pull) if n in mean else t for n, t in params.items()}
            elif mean and pull:
                loss, aux = proximal(job.loss, pull), {"anchor": mean}
            if rows:
                done = yield Fit(
                    loss, params, site.data["train"].take(rows), aux, job.plan._replace(epochs=1.0, steps=0), moments
                )
                params, moments, seen = done.params, done.optimizer, done.seen["loss"]
        told = {"n": float(len(site.data["train"])), "loss": seen}
        if weights == "entropy":
            told["entropy"] = entropy(site.data["train"].column("labels"))
        return {"params": params}, Message("update", layered(params), told)

    def begun(site: Site) -> Tree:
        deep = depths[site.number % len(depths)] if depths else layers.depth
        deeper = {n for layer in by_layer(layers, site.init)[deep:] for n in layer}
        return {n: t for n, t in site.init.items() if n not in deeper}

    def layered(params: Tree) -> Tree:
        return {n: t for layer in by_layer(layers, params) for n, t in layer.items()}

    def init(params: Tree) -> State:
        held = [n for layer in by_layer(layers, params) for n in layer]
        if not held or len(set(held)) < len(held):
            raise ConfigError(NO_LAYERS)
        return {"params": params, "means": {}, "groups": {}}

    def round(state: State, cohort: list[ClientId]) -> Talk:
        letters = {tuple(state["groups"].get(c, ())): Message("train", means_of(state, c)) for c in cohort}
        replies = yield {c: letters[tuple(state["groups"].get(c, ()))] for c in cohort}
        told = {c: by_layer(layers, dict(replies[c].body)) for c in sorted(replies)}
        groups = {c: groups_of(tree) for c, tree in told.items()}
        members: dict[str, list[ClientId]] = {}
        for client, names in groups.items():
            for group in names:
                members.setdefault(group, []).append(client)
        means, params = dict(state["means"]), dict(state["params"])
        for group, those in sorted(members.items(), key=lambda item: (len(item[1]), item[0])):
            number = int(group.partition("-")[0])
            means[group] = weighted_mean([told[c][number] for c in those], shares([replies[c] for c in those]))
            params |= {n: t for n, t in means[group].items() if n in params and params[n].shape == t.shape}
        return {"params": params, "means": means, "groups": {**state["groups"], **groups}}

    def shares(replies: list[Message]) -> list[float]:
        found = [r.info["entropy"] if weights == "entropy" else 1.0 for r in replies]
        # Where every client has one class nobody's counts for more; and who trained nothing counts for nothing.
        found = found if sum(found) > 0 else [1.0] * len(found)
        return [max(x * float(r.info["n"] > 0), 1e-9) for x, r in zip(found, replies, strict=True)]

    def means_of(state: State, client: ClientId) -> Tree:
        """The means of a client's layers; before it has said which it has, all there are to begin with."""
        if client not in state["groups"]:
            return layered(state["params"])
        return {n: t for group in state["groups"][client] for n, t in state["means"][group].items()}

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        start = begun(site)
        newcomers = {n: broadcast[n] if n in broadcast and broadcast[n].shape == t.shape else t for n, t in start.items()}
        return own["params"] if own else newcomers

    def like(letter: Message, reply: Message) -> Tree:
        """The first layers of what was sent, as many as the reply is about: a client may be less deep."""
        out: Tree = {}
        for layer in by_layer(layers, dict(letter.body)):
            if layer and layer.keys().isdisjoint(reply.body):
                break
            out |= layer
        return out

    needs = ("n", "entropy") if weights == "entropy" else ("n",)
    answer, judged = answer_with(job, lambda state: layered(state["params"]), personal)
    return Algorithm(
        init=init,
        round=round,
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=personal,
        check=checks(job, train=update(like, needs, smaller=True)),
    )


def by_layer(layers: Layers, tree: Tree) -> list[Tree]:
    """What of a tree lies in each layer of the model, and in no other place."""
    return [layers.part(tree, Part(number, number + 1, False, False)) for number in range(layers.depth)]


def dealt(plan: Plan, lengths: np.ndarray, stages: int, random: Generator) -> list[list[int]]:
    """Row numbers of each stage: the plan's batches, in `stages` parts as equal as can be."""
    drawn = batches(plan, lengths, random)
    ends = [len(drawn) * stage // stages for stage in range(stages + 1)]
    return [[int(row) for batch in drawn[a:b] for row in batch] for a, b in pairwise(ends)]


def groups_of(tree: Sequence[Tree]) -> list[str]:
    """A name for each layer of a client that has tensors; the same at clients whose layers are alike up to there."""
    names, before = [], hashlib.sha256()
    for number, layer in enumerate(tree):
        before.update(repr(signature(layer)).encode())
        if layer:
            names.append(f"{number}-{before.hexdigest()[:16]}")
    return names


def entropy(labels: Tensor) -> float:
    """Of the classes of (rows,) labels, in nats; 0 for none."""
    chances = torch.bincount(labels).double() / max(len(labels), 1)
    return float(-torch.special.xlogy(chances, chances).sum()) + 0.0
