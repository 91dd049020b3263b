"""What a member's replies in federated retrieval must be for the server to take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedtailor.algorithms.checks import Check, checks, difference, spoken, tallied, update
from fedtailor.core import Job, Message

SEEN = {"int": torch.int32, "float": torch.float32}
NEAR = 1.01  # a cosine is at most 1, and filters round it


def check_of(job: Job, k: int, merge: str) -> Check:
    """The check of strangers' replies."""

    def embed(letter: Message, reply: Message) -> str:
        if not reply.body:
            return spoken(reply, ("embedded",))
        rows, width = reply.body["queries"].shape
        return spoken(reply, ("embedded",)) or difference(reply.body, {"queries": torch.zeros(1).expand(rows, width)})

    def judge(letter: Message, reply: Message) -> str:
        if reply.body.keys() - {"test", "without"}:
            return "its judgement is of something else"
        wrong = (why for sums in reply.body.values() if (why := tallied(job, sums)))
        return spoken(reply, ("judged",), ("n",)) or next(wrong, "")

    def search(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("found",)):
            return why
        if merge == "calibrated" and "scores" in reply.body and not {"mean", "deviation"} <= reply.body.keys():
            return "its list comes without mean and deviation"
        return found(reply.body, len(letter.body["queries"]), letter.body["queries"].shape[1], k, job.classes)

    return checks(job, train=update(), embed=embed, judge=judge, search=search)


def found(body: Mapping[str, Any], queries: int, width: int, k: int, classes: int) -> str:
    """What is wrong with a list of neighbours; none at all is fine."""
    if not body:
        return ""
    if "votes" in body:
        shares = body["votes"].shape[1]
        if not 0 < shares <= classes or bool((body["votes"] < 0).any()) or bool((body["best"].abs() > NEAR).any()):
            return "it votes for classes that there are not, or more than once"
        return difference(body, {"votes": _like("float", queries, shares), "best": _like("float", queries)})
    near = body["scores"].shape[1]
    want: dict[str, Any] = {"scores": _like("float", queries, near), "rows": _like("int", queries, near)}
    want |= {"labels": _like("int", queries, near)} if "labels" in body else {}
    want |= {name: _like("float", queries) for name in ("mean", "deviation") if name in body}
    for name, content in (("embeddings", ("vectors", width)), ("passages", ("tokens", 0))):
        if name in body:
            want[name] = _cited(body[name], *content)
    if why := difference(body, want):
        return why
    if not 0 < near <= k or bool((body["scores"].abs() > NEAR).any()) or int(body["rows"].min()) < 0:
        return "its list is longer than was asked for, or its cosines are none"
    if "labels" in body and not 0 <= int(body["labels"].min()) <= int(body["labels"].max()) < max(classes, 1):
        return "it names classes that there are not"
    if "passages" in body:
        lengths = body["passages"]["lengths"]
        if (
            int(lengths.min()) < 0
            or int(lengths.sum()) != len(body["passages"]["tokens"])
            or int(body["passages"]["tokens"].min()) < 0
        ):
            return "its passages are not as long as it says"
    return ""


def _cited(part: Mapping[str, Any], name: str, width: int) -> dict[str, Tensor]:
    count = len(part["rows"])
    if name == "vectors":
        return {"rows": _like("int", count), name: _like("float", count, width)}
    return {"rows": _like("int", count), "lengths": _like("int", count), name: _like("int", len(part[name]))}


def _like(kind: str, *shape: int) -> Tensor:
    """A tensor of this form that takes no memory."""
    return torch.zeros((), dtype=SEEN[kind]).expand(*shape)
