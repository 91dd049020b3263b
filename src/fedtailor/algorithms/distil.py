"""Clients learn from each other through what they say of public examples: logits cross, weights and private rows do not.

FedMD (Li and Wang, arXiv 1910.03581): clients match the mean of everybody's class scores on public rows (digest), then train on their own
rows (revisit). FedDF (Lin et al., arXiv 2006.07242): the server trains a student on the ensemble's averaged logits.
    client k   digest: Fit(KL to the teacher on the public rows of the last round), revisit: Fit(own rows), then its logits z_k on
               the public rows of this round
    server     consensus c = sum_k w_k z_k (or of softmax z_k); w_k equal, by examples, or row by row by confidence
               1 - H(softmax z_k) / log C; then its own student: Fit(KL to c on those rows)
    teacher of the next round: c itself (rule "fedmd"), or the student's logits on those rows ("feddf")
Clients may differ in technique, rank and backbone, as long as the classes are the same. The server's student is the experiment's own
technique; it has never seen a private row.

Ours: KL with a temperature where FedMD takes the mean absolute difference; no supervised warm-up on the public rows (their labels are
never read); under "feddf" weights do not cross, so clients learn from the student's logits where FedDF hands out its weights;
the confidence rule; `top` logits only, the mass of the others spread evenly. Of the filters `int8-plain` and `fp16` suit logits:
int8's error feedback would add what other rows lost, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedtailor.algorithms.baselines import own_tree
from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, difference
from fedtailor.algorithms.checks import spoken as spoken_by
from fedtailor.core import (
    SERVER,
    Algorithm,
    Batch,
    ClientId,
    Fit,
    Flow,
    Forward,
    Job,
    Message,
    Predict,
    Site,
    State,
    Talk,
    Tree,
    answer_with,
    stream,
)
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import distilling

RULES, AVERAGES, WEIGHTS = ("fedmd", "feddf"), ("logits", "probabilities"), ("uniform", "examples", "confidence")


@card("personal", "rows x classes", "rows x classes", "our reading", "any, also several")
def distil(
    job: Job,
    *,
    rule: str = "fedmd",
    average: str = "logits",
    weights: str = "uniform",
    temperature: float = 2.0,
    rows: int = 512,
    digest: float = 1.0,
    student: float = 2.0,
    top: int = 0,
) -> Algorithm:
    """Federated distillation: logits on `rows` public examples a round; `digest` and `student` are passes over them."""
    for name, found, known in (("rule", rule, RULES), ("average", average, AVERAGES), ("weights", weights, WEIGHTS)):
        one_of(f"algorithm.{name}", found, known)
    for name, value in {"rows": rows, "temperature": temperature, "digest": digest, "student": student}.items():
        if value <= 0:
            raise ConfigError(f"algorithm.{name} must be above 0 (got {value})")
    if top < 0:
        raise ConfigError(f"algorithm.top must be 0 (all classes) or more (got {top})")
    if not job.public:
        raise ConfigError(
            "algorithm distil needs public examples: set data.public to a data set or to a share of the training rows"
        )
    loss = distilling(temperature)

    def init(params: Tree) -> State:
        return {"params": params, "rows": drawn(0), "teacher": {}, "turn": 0}

    def drawn(turn: int) -> Tensor:
        return torch.randperm(job.public, generator=stream(job.seed, "public", turn))[:rows].to(torch.int32)

    def learn(params: Tree, site: Site, at: Tensor, teacher: Tensor, passes: float) -> Fit:
        data = site.data["public"].take(at.tolist()).having("teacher", teacher)
        return Fit(loss, params, data, {}, job.plan._replace(epochs=passes, steps=0))

    def exchange(own: Tree | None, msg: Message, site: Site) -> Flow:
        """Digest, revisit, speak."""
        params = own["params"] if own else site.init
        if "teacher" in msg.body:
            digested = yield learn(params, site, msg.body["taught"], msg.body["teacher"], digest)
            params = digested.params
        done = yield Fit(job.loss, params, site.data["train"], {}, job.plan)
        said = yield Predict(speak, done.params, site.data["public"].take(msg.body["rows"].tolist()))
        classes = {"classes": float(said["logits"].shape[1])}
        return {"params": done.params}, Message("said", spoken(said["logits"], top), {**done.seen, **classes})

    def teach(own: Tree | None, msg: Message, site: Site) -> Flow:
        """The server's own student, beside it."""
        done = yield learn(msg.body["params"], site, msg.body["rows"], msg.body["teacher"], student)
        said = yield Predict(speak, done.params, site.data["public"].take(msg.body["rows"].tolist()))
        return own, Message("taught", {"params": done.params, "logits": said["logits"]}, done.seen)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        at, teacher = state["rows"], state["teacher"]
        letter = Message("exchange", {"rows": at, **teacher})
        replies = yield dict.fromkeys(cohort, letter)
        heard = [replies[c] for c in sorted(replies) if float(replies[c].info["n"])]
        if not heard:
            return state
        logits = [heard_of(reply.body, int(reply.info["classes"])) for reply in heard]
        shares = [float(reply.info["n"]) for reply in heard] if weights == "examples" else [1.0] * len(heard)
        agreed = consensus(logits, shares, average, weights == "confidence")
        learnt = yield {SERVER: Message("teach", {"params": state["params"], "rows": at, "teacher": agreed})}
        turn = int(state["turn"]) + 1
        params, told = state["params"], agreed
        if SERVER in learnt:
            params = learnt[SERVER].body["params"]
            told = learnt[SERVER].body["logits"] if rule == "feddf" else agreed
        return {"params": params, "rows": drawn(turn), "teacher": {"taught": at, "teacher": told}, "turn": turn}

    def said(letter: Message, reply: Message) -> str:
        if why := spoken_by(reply, ("said",), ("n", "classes")):
            return why
        classes, count = int(reply.info["classes"]), len(letter.body["rows"])
        if classes != (job.classes or classes) or classes < 1:
            return f"it speaks of {classes} classes, where there are {job.classes}"
        if not top or top >= classes:
            return difference(reply.body, {"logits": torch.zeros(1).expand(count, classes)})
        kinds = {"values": torch.zeros(1).expand(count, top), "classes": torch.zeros(1, dtype=torch.int16).expand(count, top)}
        if why := difference(reply.body, kinds):
            return why
        named = reply.body["classes"]
        return "" if 0 <= int(named.min()) <= int(named.max()) < classes else "it names classes that there are not"

    answer, judged = answer_with(job, lambda state: {}, own_tree, student=lambda state: state["params"])
    return Algorithm(
        init=init,
        round=round,
        client={"exchange": exchange, "teach": teach, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=own_tree,
        of_all_kinds=True,
        updates=False,
        check=checks(job, exchange=said),
    )


def speak(forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Rows of logits, (rows, classes)."""
    return {"logits": forward(params, batch)}


def spoken(logits: Tensor, top: int) -> Tree:
    """What a client says: all logits, or its `top` log probabilities a row with their classes."""
    if not top or top >= logits.shape[1]:
        return {"logits": logits}
    values, classes = logits.log_softmax(-1).topk(top, dim=-1)
    return {"values": values, "classes": classes.to(torch.int16)}


def heard_of(body: Tree, classes: int) -> Tensor:
    """The logits (rows, classes) that were meant; what `top` left out shares the mass that is left."""
    if "logits" in body:
        logits: Tensor = body["logits"]
        return logits.float()
    values: Tensor = body["values"].float()
    at: Tensor = body["classes"].long()
    left = (1 - values.exp().sum(1, keepdim=True)).clamp_min(1e-6) / (classes - values.shape[1])
    return left.log().expand(-1, classes).scatter(1, at, values)


def consensus(logits: Sequence[Tensor], shares: Sequence[float], average: str, by_confidence: bool) -> Tensor:
    """The logits (rows, classes) that the clients agree on."""
    stacked = torch.stack(list(logits)).double()
    weights = torch.tensor(shares, dtype=torch.float64)[:, None, None].expand(-1, stacked.shape[1], 1)
    if by_confidence:
        said = stacked.log_softmax(-1)
        entropy = -(said.exp() * said).sum(-1, keepdim=True)
        weights = weights * (1 - entropy / math.log(stacked.shape[-1])).clamp_min(1e-3)
    weights = weights / weights.sum(0)
    if average == "logits":
        return (weights * stacked).sum(0).float()
    return (weights * stacked.softmax(-1)).sum(0).clamp_min(1e-12).log().float()
