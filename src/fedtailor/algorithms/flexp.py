"""FlexP-style personalised split learning (Yuan et al., arXiv 2508.10349, and its revision FlexP-SFT). **Our reading**: the abstract's
statements hold (each client keeps as many layers as it can, no client part is averaged, nobody waits, layers at the server are
aligned), the equations are ours.

Client k holds the first `front` and the last `back` layers with embeddings, head and labels; the server holds a copy of the layers between
them for each client. A step, whenever the client is ready:
    client  h1 = front(x)                          up
    server  h2 = middle_k(h1)                      down
    client  loss(back(h2), y), its step on the back; gradient of h2   up
    server  its step on middle_k, then alignment; gradient of h1      down, if the front trains
    client  its step on the front
Alignment pulls the copies of a layer together over the clients whose middle has it, at no cost on the wire: after each step
    w <- (w + lr alignment wbar) / (1 + lr alignment),    wbar = sum_j n_j w_j / sum_j n_j
which is the exact step on alignment/2 ||w - wbar||^2 with wbar held: 0 leaves clients to themselves, a large one makes the copies equal.
A personal model is the client's own ends around its own middle; a newcomer gets the ends as they began around the mean of the middles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedtailor.algorithms.fedavg import one_size
from fedtailor.core import (
    HIDDEN,
    SERVER,
    TARGETS,
    Algorithm,
    Back,
    ClientId,
    Flow,
    Job,
    Layers,
    Message,
    Part,
    Site,
    Slope,
    State,
    Step,
    Talk,
    Through,
    Tree,
    answer_with,
    as_they_come,
)
from fedtailor.cut import parts
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError
from fedtailor.optimizers import learning_rate, stepped
from fedtailor.trees import numel

MASK = "attention_mask"


def flexp(job: Job, *, front: int | list[int] = 1, back: int | list[int] = 1, alignment: float = 1.0) -> Algorithm:
    """FlexP-style: every client holds its own ends of the model, the server a copy of the middle for each; nobody waits."""
    fronts, backs = ([x] if isinstance(x, int) else list(x) for x in (front, back))
    one_size(job, "flexp")
    if job.layers is None:
        raise ConfigError(
            "algorithm flexp cuts a model by its layers: use a model that has a list of them, and technique lora, prefix, full, ia3 or head"
        )
    if job.plan.dropout:
        raise ConfigError(
            "algorithm flexp computes parts again where it has to, which dropout would change: set train.dropout = false"
        )
    if alignment < 0:
        raise ConfigError(f"algorithm.alignment must not be negative (got {alignment})")
    if not fronts or not backs or min(backs) < 1:
        raise ConfigError("algorithm.front and algorithm.back are numbers of layers, or lists of them; back must be at least 1")
    layers: Layers = job.layers
    if min(fronts) < layers.least:
        raise ConfigError(
            f"algorithm.front = {min(fronts)}: with this technique clients need {layers.least} layer at the front, or more"
        )
    for a in fronts:
        for b in backs:
            parts(layers.depth, a, b)

    def cut(number: int) -> tuple[Part, Part, Part]:
        """(front, middle, back) of the client with this number."""
        return parts(layers.depth, fronts[number % len(fronts)], backs[number % len(backs)])

    def init(params: Tree) -> State:
        cuts = {cut(number) for number in range(len(fronts) * len(backs))}
        held = [layers.part(params, between) for _, between, _ in cuts]
        if len(cuts) > 1 and any(part[name].shape != params[name].shape for part in held for name in part):
            raise ConfigError(
                "algorithm flexp: a prefix is one table over all layers, which clients must cut alike: give one front and one back"
            )
        return {"params": params, "middles": {}}

    def ends(own: Tree | None, site: Site) -> Tree:
        if own:
            return own
        first, _, last = cut(site.number)
        fresh = {"front": layers.part(site.init, first), "back": layers.part(site.init, last)}
        return {**fresh, "moments": {"front": {}, "back": {}}}

    def order_of(site: Site) -> list[np.ndarray]:
        """Rows of each step of this round: the same whenever they are asked for."""
        return batches(job.plan, site.data["train"].lengths, site.random("split"))

    def batch_of(site: Site, rows: np.ndarray) -> dict[str, Any]:
        data = site.data["train"]
        return data.batch(rows, int(data.lengths[rows].max()), len(rows))

    def through_front(own: Tree, site: Site, batch: Tree, step: int) -> Through:
        read = {name: x for name, x in batch.items() if name not in TARGETS}
        return Through(cut(site.number)[0], own["front"], read, f"{site.id}/{site.round}/{step}/front")

    def go(own: Tree | None, msg: Message, site: Site) -> Flow:
        """Take the front's step back, if there is one, and go on to the next batch."""
        own, step, order = ends(own, site), int(msg.info["step"]), order_of(site)
        if "gradient" in msg.body:
            before = through_front(own, site, batch_of(site, order[step - 1]), step - 1)
            slopes = yield Back(before, msg.body["gradient"])
            own = descended(own, "front", slopes.params, site, step - 1, len(order))
        info = {
            "step": float(step),
            "steps": float(len(order)),
            "n": float(len(site.data["train"])),
            "number": float(site.number),
        }
        if step >= len(order):
            return own, Message("rested", {}, info)
        batch = batch_of(site, order[step])
        hidden = yield through_front(own, site, batch, step)
        mask = {MASK: batch[MASK].to(torch.uint8)} if MASK in batch else {}
        return own, Message("sent", {HIDDEN: hidden, **mask}, info)

    def turn(own: Tree | None, msg: Message, site: Site) -> Flow:
        """Loss, and the step of the back."""
        own, step, order = ends(own, site), int(msg.info["step"]), order_of(site)
        batch = batch_of(site, order[step])
        found = yield Slope(job.loss, cut(site.number)[2], own["back"], {**batch, HIDDEN: msg.body[HIDDEN]})
        own = descended(own, "back", found.params, site, step, len(order))
        info = {"step": float(step), "steps": float(len(order)), "n": float(len(site.data["train"])), "loss": found.loss}
        return own, Message("turned", {"gradient": found.hidden}, {**info, "examples": float(len(order[step]))})

    def descended(own: Tree, end: str, slopes: Tree, site: Site, step: int, steps: int) -> Tree:
        rate = learning_rate(job.plan.at(site.round), step, steps)
        params, moments = stepped(job.plan, own[end], slopes, own["moments"][end], rate)
        return {**own, end: params, "moments": {**own["moments"], end: moments}}

    def middle(own: Tree | None, msg: Message, site: Site) -> Flow:
        """The server's part for all clients that are ready: outputs for those that sent, a step for those that turned."""
        sent, turned = msg.body["sent"], msg.body["turned"]
        todo: list[Step] = [way(given) for given in sent.values()]
        todo += [Back(way(given), given["gradient"]) for given in turned.values()]
        found = yield todo
        body: Tree = {client: {HIDDEN: outputs} for client, outputs in zip(sent, found, strict=False)}
        for client, slopes in zip(turned, found[len(sent) :], strict=True):
            given = turned[client]
            rate = learning_rate(job.plan.at(site.round), int(given["step"]), int(given["steps"]))
            params, moments = stepped(job.plan, given["params"], slopes.params, given["moments"], rate)
            inward = {"gradient": slopes.hidden} if slopes.hidden is not None else {}
            body[client] = {"params": params, "moments": moments, "rate": rate, **inward}
        return own, Message("passed", body)

    def way(given: Tree) -> Through:
        batch = {name: given[name].long() if name == MASK else given[name] for name in (HIDDEN, MASK) if name in given}
        return Through(cut(int(given["number"]))[1], given["params"], batch, given["name"], bool(given["inward"]))

    def begun(state: State, info: Mapping[str, float]) -> Tree:
        """The server's copy for a client that it has not met before."""
        first, between, _ = cut(int(info["number"]))
        inward = float(numel(layers.part(state["params"], first)) > 0)  # a frozen front has no use for a gradient
        return {
            "params": layers.part(state["params"], between),
            "moments": {},
            "inward": inward,
            "n": info["n"],
            "number": info["number"],
        }

    def round(state: State, cohort: list[ClientId]) -> Talk:
        middles: Tree = dict(state["middles"])
        letters = dict.fromkeys(cohort, Message("go", {}, {"step": 0.0}))
        under_way: dict[ClientId, Tree] = {}  # what each client's present step began with
        count = 0
        while came := (yield as_they_come(letters)):
            letters, sent, turned = {}, {}, {}
            for client, reply in sorted(came.items()):
                step = reply.info["step"]
                if reply.verb == "sent":
                    middles.setdefault(client, begun(state, reply.info))
                    count += 1
                    named = {"step": step, "name": f"{client}/{count}/middle"}
                    sent[client] = under_way[client] = {**dict(reply.body.items()), **middles[client], **named}
                elif reply.verb == "turned" and client in under_way and under_way[client]["step"] == step:  # else it is stale
                    gradient = {"gradient": reply.body["gradient"], "steps": reply.info["steps"]}
                    turned[client] = {**under_way.pop(client), **gradient}
            done = (yield {SERVER: Message("middle", {"sent": sent, "turned": turned})}) if sent or turned else {}
            found = dict(done[SERVER].body.items()) if SERVER in done else {}
            for client in sorted(sent.keys() & found.keys()):
                letters[client] = Message("turn", {HIDDEN: found[client][HIDDEN]}, {"step": sent[client]["step"]})
            for client in sorted(turned.keys() & found.keys()):
                middles[client] = {**middles[client], "params": found[client]["params"], "moments": found[client]["moments"]}
                inward = {name: x for name, x in found[client].items() if name == "gradient"}
                letters[client] = Message("go", inward, {"step": turned[client]["step"] + 1})
            for client in sorted(turned.keys() & found.keys()):
                pulled = aligned(middles, client, found[client]["rate"] * alignment)
                middles[client] = {**middles[client], "params": pulled}
        return {**state, "middles": middles}

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        return (yield {c: Message("answer", state["middles"].get(c, {}).get("params", {})) for c in cohort})

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        mine, (_, between, _) = ends(own, site), cut(site.number)
        return layers.whole([mine["front"], broadcast or layers.part(site.init, between), mine["back"]])

    def model(state: State) -> Tree:
        """The ends as they began around the mean of the middles."""
        params: Tree = state["params"]
        middles: Tree = state["middles"]
        if not middles:
            return params
        first, between, last = cut(0)
        mean = mean_of(middles)
        if mean.keys() == layers.part(params, between).keys():  # clients cut alike: a prefix's columns go back to their places
            return layers.whole([layers.part(params, first), mean, layers.part(params, last)])
        return {**params, **mean}

    _, judged = answer_with(job, lambda state: {}, personal)
    return Algorithm(
        init=init,
        round=round,
        client={"go": go, "turn": turn, "middle": middle, "answer": judged},
        answer=answer,
        model=model,
        personal=personal,
        updates=False,
    )


def mean_of(middles: Tree) -> Tree:
    """The mean of each tensor over the clients whose middle has it, by their numbers of examples."""
    sums: Tree = {}
    for client in sorted(middles):
        weight = float(middles[client]["n"])
        for name, tensor in middles[client]["params"].items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = (total + weight * tensor.double(), count + weight)
    return {name: (total / count).float() for name, (total, count) in sums.items()}


def aligned(middles: Tree, client: ClientId, pull: float) -> Tree:
    """This client's middle, pulled towards the mean of all: by nothing where `pull` is 0, all the way where it is infinite."""
    own: Tree = middles[client]["params"]
    if not pull:
        return own
    mean = mean_of(middles)
    return {name: (tensor + pull * mean[name]) / (1 + pull) for name, tensor in own.items()}
