"""ZooPFL-style: a black box that is only ever called. After "ZooPFL: Exploring Black-box Foundation Models for Personalized Federated
Learning" (Lu et al., arXiv 2310.05143), whose equations are not known here: what is theirs is that the model gives no gradients, that its
*input* is changed by an auto-encoder which is pre-trained and then trained by zeroth-order steps, with a small embedding a client, and that its
*output* goes through a linear map of the client's own. **Our reading** of the rest:
    f(x)      what can be seen of an input without the model: hashed counts of its tokens, or its pixels pooled to 8 x 8; of length 1
    z         = f(x) V + b, d numbers: the encoder (V, b) is what everybody shares
    prompt    = start + (z + e_i) A, an own soft prompt (or prefix) for each row; e_i stays, A random and fixed (as in BBT, 2201.03514)
    logits    = R_i o,  o = g(x, prompt): the frozen transformer with its head; R_i is private and starts as the identity
    round <= `pretrain`:  V, b and a decoder back to f(x) go down the mean square error of f(x), by the experiment's plan, and are averaged
    later rounds, `steps` times, on a batch:  v = dL/dz by calls of g alone, for each row,
        cge:  v_j = [L(z + mu u_j) - L(z - mu u_j)] / (2 mu), u_j the axes                    2 d calls of g a row
        rge:  v = (d / q) sum_k [L(z + mu u_k) - L(z)] / mu u_k, |u_k| = 1, drawn each step    q + 1 calls of g a row
        then by the chain rule V, b and e_i go down v at rate `lr`, and R_i down its own gradient at `output_lr`: o has been seen
    server:   the shared tensors move by the clients' mean change, weighted by examples
For cge the mean of a row's outputs stands for o. `shared` = "all" averages R as well. What is perturbed is z, so A is a part of the black
box and is not trained. e_i is personal, no secret: b has the same gradient, so a client's changes of b add up to it. The wire:
(|f| + 1) d numbers both ways (+ |f| d + |f| while pre-training, + classes^2 with "all").
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
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
    Predict,
    Site,
    State,
    Tree,
    answer_with,
    falling,
    one_exchange,
    stream,
)
from fedtailor.data.examples import IGNORED
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import Wrapped, classification
from fedtailor.metrics import TOKENS
from fedtailor.techniques.peft import PROMPT, of_head
from fedtailor.trees import moved, subtract

ENCODER, OUTPUT = ("weight", "bias"), "output"
CELLS = 8  # of an image, each way
ODD = 2654435761  # Knuth's: neighbours among token ids go to unlike places


@card(
    "personal",
    "(|f| + 1) d; |f| (d + 1) more while pre-training",
    "the same",
    "our reading",
    "prefix, prompt with a trained head",
)
def zoopfl(
    job: Job,
    *,
    code: int = 8,
    features: int = 256,
    estimator: str = "cge",
    queries: int = 8,
    mu: float = 0.1,
    steps: int = 8,
    lr: float = 0.1,
    output_lr: float = 0.1,
    scale: float = 1.0,
    pretrain: int = 1,
    shared: str = "encoder",
) -> Algorithm:
    """A black box: its prompts come from a shared encoder trained by calls alone, its outputs go through a map of the client's own."""
    one_size(job, "zoopfl")
    one_of("algorithm.estimator", estimator, ("cge", "rge"))
    one_of("algorithm.shared", shared, ("encoder", "all"))
    if min(code, features, queries, steps) < 1 or min(mu, lr, output_lr, scale) <= 0 or pretrain < 0:
        raise ConfigError(
            "algorithm zoopfl needs code, features, queries and steps of 1 or more, mu, lr, output_lr and scale above 0, and pretrain >= 0"
        )
    if job.loss is not classification:
        raise ConfigError(
            "algorithm zoopfl maps classes to classes: choose zeroth-order for language, which needs no gradients either"
        )
    width = job.pixels[0] * CELLS**2 if job.pixels else features
    calls = 2 * code if estimator == "cge" else queries + 1

    def init(params: Tree) -> State:
        if PROMPT not in params or not any(map(of_head, params)):
            raise ConfigError(
                "algorithm zoopfl writes prompts and maps a head's outputs: choose technique prompt or prefix with a trained head, or "
                "algorithm zeroth-order for other trees"
            )
        there = torch.randn((width, code), generator=stream(job.seed, "zoopfl", "encoder"))
        ends = {"weight": there, "bias": torch.zeros(code), "back": there.mT.contiguous() / width, "origin": torch.zeros(width)}
        return {"params": params, "shared": {**ends, OUTPUT: torch.eye(job.classes)}, "turn": 0}

    def serve(state: State, client: ClientId) -> Message:
        names = (*ENCODER, "back", "origin") if state["turn"] < pretrain else sent(state).keys()
        return Message("reconstruct" if state["turn"] < pretrain else "train", {name: state["shared"][name] for name in names})

    def sent(state: State) -> Tree:
        return {name: state["shared"][name] for name in (*ENCODER, *((OUTPUT,) if shared == "all" else ()))}

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        told = [r for r in replies.values() if r.info["n"]]
        if not told:
            return state
        known = {name: state["shared"][name] for name in told[0].body}
        after = moved(known, [r.body for r in told], [r.info["n"] for r in told])
        return {**state, "shared": {**state["shared"], **after}, "turn": int(state["turn"]) + 1}

    def reconstruct(own: Tree | None, msg: Message, site: Site) -> Flow:
        done = yield Fit(reconstructing(width), msg.body, site.data["train"], {}, job.plan, passes=0)
        return own, Message("update", subtract(done.params, msg.body), {**done.seen, "queries": 0.0})

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        data, draw = site.data["train"], site.random("zoopfl")
        rate = falling(job.plan.decay, (site.round - 1) / job.plan.rounds)
        now, losses = client_side(own, msg.body), []
        for _ in range(steps if len(data) else 0):
            batch = data.take(torch.randint(len(data), (min(job.plan.batch, len(data)),), generator=draw).tolist())
            towards = torch.eye(code) if estimator == "cge" else F.normalize(torch.randn((queries, code), generator=draw), dim=1)
            asked = {**now, "tree": site.init, "decoder": decoder(site.init), "towards": towards}
            seen = yield Predict(partial(looked, estimator, mu), asked, batch, passes=calls)
            losses.append(float(seen["loss"].mean()))
            now = stepped(now, seen, lr * rate, output_lr * rate)
        private = {"embedding": now["embedding"], OUTPUT: now[OUTPUT], "code": now["code"]}
        info = {
            "n": float(len(data)),
            "loss": sum(losses) / max(len(losses), 1),
            "queries": float(calls * min(job.plan.batch, len(data)) * len(losses)),
        }
        return private, Message("update", {name: now[name] - t for name, t in msg.body.items()}, info)

    def client_side(own: Tree | None, letter: Tree) -> Tree:
        """What a client works with: its own embedding and output map beside what it was sent."""
        fresh = {"embedding": torch.zeros(code), OUTPUT: torch.eye(job.classes), "code": torch.zeros(code)}
        return {**fresh, **(own or {}), **letter}

    def decoder(tree: Tree) -> Tensor:
        start: Tensor = tree[PROMPT]
        noise = torch.randn((code, start.numel()), generator=stream(job.seed, "zoopfl", "decoder"))
        return noise * start.std() * scale / math.sqrt(code)

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        """One tree in the place of one a row: the prompt at the mean code last seen, the output map in the head."""
        now = client_side(own, broadcast)
        return written(site.init, now["code"] + now["embedding"] if own else now["bias"], now[OUTPUT])

    def written(tree: Tree, at: Tensor, output: Tensor) -> Tree:
        prompt = tree[PROMPT] + (at @ decoder(tree)).view_as(tree[PROMPT])
        return {**{name: mapped(name, t, output) for name, t in tree.items()}, PROMPT: prompt}

    def answered(own: Tree | None, msg: Message, site: Site) -> Flow:
        asked, body = {**client_side(own, msg.body), "tree": site.init, "decoder": decoder(site.init)}, {}
        for split in ("test", "global"):
            if split in site.data and len(site.data[split]):
                body[split] = job.tally((yield Predict(partial(judged, job.judge), asked, site.data[split])))
        return own, Message("judged", body, {"n": float(len(site.data.get("test", ())))})

    answer, _ = answer_with(job, sent, personal)
    return Algorithm(
        init=init,
        round=one_exchange(serve, merge),
        client={"reconstruct": reconstruct, "train": train, "answer": answered},
        answer=answer,
        model=lambda state: written(state["params"], state["shared"]["bias"], state["shared"][OUTPUT]),
        personal=personal,
        check=checks(job, reconstruct=update(), train=update()),
    )


def mapped(name: str, t: Tensor, output: Tensor) -> Tensor:
    """A tensor of the tree with the output map in it, where it is of the head's last layer: R (W h + c) = (R W) h + R c."""
    return output @ t if of_head(name) and len(t) == len(output) else t


def seen_of(batch: Batch, width: int) -> Tensor:
    """f(x), (rows, width), of length 1."""
    if "pixel_values" in batch:
        found = F.adaptive_avg_pool2d(batch["pixel_values"].float(), CELLS).flatten(1)
    else:
        places = (batch["input_ids"] * ODD).remainder(2**32).remainder(width)
        here = (places[..., None] == torch.arange(width, device=places.device)) & (batch["attention_mask"][..., None] > 0)
        found = here.float().sum(1)
    return F.normalize(found, dim=1)


def reconstructing(width: int) -> Loss:
    """Mean square error, a row, of f(x) after encoder and decoder; the model is not called."""
    return _Reconstructing(width)


class _Reconstructing(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        width: Any
        _, width = self
        found, rows = seen_of(batch, width), (batch["labels"] != IGNORED).float()
        again: Tensor = (found @ params["weight"] + params["bias"]) @ params["back"] + params["origin"]
        return ((again - found).square().sum(1) * rows).sum() / rows.sum().clamp_min(1)


def called(forward: Forward, params: Tree, batch: Batch, codes: Tensor) -> Tensor:
    """Outputs of the black box, (rows, classes), each row under the prompt of its own code (rows, d)."""
    tree, inputs = params["tree"], {name: t for name, t in batch.items() if name != "labels"}
    prompts = tree[PROMPT] + ((codes + params["embedding"]) @ params["decoder"]).view(-1, *tree[PROMPT].shape)

    def one(prompt: Tensor, row: Batch) -> Tensor:
        return forward({**tree, PROMPT: prompt}, {name: t[None] for name, t in row.items()})[0]

    return vmap(one)(prompts, inputs)  # type: ignore[no-any-return]


def coded(params: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
    """f(x) and z of these rows."""
    found = seen_of(batch, len(params["weight"]))
    return found, found @ params["weight"] + params["bias"]


def looked(estimator: str, mu: float, forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Rows of {features, code, slope (dL/dz, by calls alone), output, label, loss}."""
    found, z = coded(params, batch)
    places = offsets(estimator, params["towards"], mu)
    # Several places in one call: what a call costs whatever its size is paid once.
    size = max(1, TOKENS // max(1, batch.get("input_ids", batch["labels"]).numel()))

    def around(steps: Tensor) -> Tensor:
        rows = {name: t.repeat_interleave(len(steps), 0) for name, t in batch.items()}
        return called(forward, params, rows, (z[:, None] + steps).flatten(0, 1)).view(len(z), len(steps), -1)

    outputs = torch.cat([around(steps) for steps in places.split(size)], 1)
    logits, labels = outputs @ params[OUTPUT].mT, batch["labels"]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(outputs.shape[1]), reduction="none").view(len(z), -1)
    plain = outputs.mean(1) if estimator == "cge" else outputs[:, 0]
    slope = slopes(estimator, losses, params["towards"], mu)
    loss = losses.mean(1) if estimator == "cge" else losses[:, 0]
    return {"features": found, "code": z, "slope": slope, "output": plain, "label": labels, "loss": loss}


def offsets(estimator: str, towards: Tensor, mu: float) -> Tensor:
    """Where the black box is asked, from z: (calls, d)."""
    first = -mu * towards if estimator == "cge" else torch.zeros_like(towards[:1])
    return torch.cat([first, mu * towards])


def slopes(estimator: str, losses: Tensor, towards: Tensor, mu: float) -> Tensor:
    """Gradients (rows, d) from the losses (rows, calls) at those places."""
    if estimator == "cge":
        below, above = losses.chunk(2, 1)
        return (above - below) / (2 * mu) @ towards
    return towards.shape[1] / len(towards) * ((losses[:, 1:] - losses[:, :1]) / mu) @ towards


def stepped(now: Tree, seen: Tree, lr: float, output_lr: float) -> Tree:
    """Encoder and embedding a step down the estimate, the output map down its own gradient."""
    slope, rows = seen["slope"], len(seen["slope"])
    mean = slope.mean(0)
    wrong = (seen["output"] @ now[OUTPUT].mT).softmax(1) - F.one_hot(seen["label"], len(now[OUTPUT]))
    return {
        **now,
        "weight": now["weight"] - lr * seen["features"].mT @ slope / rows,
        "bias": now["bias"] - lr * mean,
        "embedding": now["embedding"] - lr * mean,
        OUTPUT: now[OUTPUT] - output_lr * wrong.mT @ seen["output"] / rows,
        "code": seen["code"].mean(0),
    }


def judged(judge: Any, forward: Forward, params: Tree, batch: Batch) -> Tree:
    """What `judge` says of the mapped outputs, each row under its own prompt."""
    return judge(lambda params, batch: called(forward, params, batch, coded(params, batch)[1]) @ params[OUTPUT].mT, params, batch)  # type: ignore[no-any-return]
