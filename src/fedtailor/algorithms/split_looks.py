"""Evaluation through the cut: nobody needs the whole model, and nothing is kept of it.

    client  show     hidden states of some rows, through its front          up
    server  through  those through the client's middle                      down
    client  answer   those through its back, and judged: sums               up
and so on until all rows of its test split, and of its sample of the global test set, have been judged. Labels stay at home.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeAlias

import numpy as np
import torch

from fedtailor.algorithms.split_checks import complaint
from fedtailor.algorithms.split_client import batch_of, begun, shortened
from fedtailor.algorithms.split_rules import ENDS, MASK, Ground, at_of
from fedtailor.algorithms.split_server import told
from fedtailor.core import (
    HIDDEN,
    SERVER,
    TARGETS,
    ClientId,
    Flow,
    Handler,
    Letters,
    Message,
    Site,
    State,
    Step,
    Talk,
    Through,
    Tree,
)
from fedtailor.errors import ConfigError
from fedtailor.trees import add

ROWS, TOKENS = 64, 1024
"""In one letter, at most; of a language model no more rows than in a step, as what it says of a token is as wide as its vocabulary."""
TOGETHER = 32
"""Clients whose hidden states are at the server at a time."""
Said: TypeAlias = Callable[[State, ClientId], Tree]
Judged: TypeAlias = Generator[Any, dict[ClientId, Message], dict[ClientId, Message]]


def handlers(on: Ground) -> dict[str, Handler]:
    """The handlers of an evaluation, by verb; they return the client's own state as it was."""

    def show(own: Tree | None, msg: Message, site: Site) -> Flow:
        mine, todo, number = ends(on, own, msg.body, site), pieces(on, site), int(msg.info["batch"])
        front, back = (float(layers) for layers in mine["cut"])
        info = {"front": front, "back": back, "batches": float(len(todo)), "n": float(len(site.data.get("test", ())))}
        if number >= len(todo):
            return own, Message("shown", {}, info)
        batch = batch_of(site, todo[number][1], todo[number][0])
        hidden = yield past(on, mine, "front", batch, site.id)
        mask = {MASK: batch[MASK].to(torch.uint8)} if MASK in batch else {}
        return own, Message("shown", {"states": hidden, **mask}, info)

    def answer(own: Tree | None, msg: Message, site: Site) -> Flow:
        split, rows = pieces(on, site)[int(msg.info["batch"])]
        batch, hidden = batch_of(site, rows, split), msg.body["states"]
        given = {**shortened(batch, hidden), HIDDEN: hidden}
        logits = yield past(on, ends(on, own, msg.body, site), "back", given, site.id)
        outputs = on.job.judge(lambda params, batch: logits, {}, batch)
        return own, Message("judged", {split: on.job.tally(outputs)}, {"n": float(len(rows))})

    def through(own: Tree | None, msg: Message, site: Site) -> Flow:
        shown, middles = msg.body["shown"], msg.body["middles"]
        todo: list[Step] = []
        for client, given in shown.items():
            mask = {MASK: given[MASK].long()} if MASK in given else {}
            between = on.cut(given["front"], given["back"])[1]
            todo.append(Through(between, middles[client], {HIDDEN: given["states"], **mask}, f"{client}/look", back=False))
        return own, Message("passed", dict(zip(shown, (yield todo), strict=True)))

    return {"show": show, "through": through, "answer": answer}


def past(on: Ground, mine: Tree, end: str, batch: Tree, client: ClientId) -> Through:
    """A batch through a client's front or back, from where nobody comes back."""
    part = on.cut(*mine["cut"])[0 if end == "front" else 2]
    read = {name: x for name, x in batch.items() if name not in TARGETS}
    return Through(part, mine[end], read, f"{client}/look", back=False)


def ends(on: Ground, own: Tree | None, sent: Tree, site: Site) -> Tree:
    """What a client is judged with: its ends, unless others were sent."""
    try:
        mine = begun(on, own, site)
    except ConfigError:  # its device has room for no part: in a simulation any cut tells what it would have
        mine = begun(on, own, site, (on.layers.least, 0))
    return {**mine, **{end: {**mine[end], **sent.get(end, {})} for end in ENDS}}


def pieces(on: Ground, site: Site) -> list[tuple[str, np.ndarray]]:
    """(split, rows) of each letter: rows of like lengths together."""
    found: list[tuple[str, np.ndarray]] = []
    for split in ("test", "global"):
        lengths = np.asarray(site.data[split].lengths) if split in site.data else np.arange(0)
        order = np.argsort(-lengths, kind="stable")
        while len(order):
            longest = max(1, int(lengths[order[0]]), on.layers.tokens)
            size = max(1, min(ROWS if on.job.classes else on.job.plan.batch, TOKENS // longest))
            found.append((split, order[:size]))
            order = order[size:]
    return found


def answers(on: Ground, said: Said) -> Callable[[State, list[ClientId]], Talk]:
    """The server's conversation: what each client that was heard to the end says of itself; `said`: what it is to be judged with."""

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        found: dict[ClientId, Message] = {}
        for start in range(0, len(cohort), TOGETHER):
            found |= yield from _judged(on, said, state, cohort[start : start + TOGETHER])
        return found

    return answer


def _judged(on: Ground, said: Said, state: State, cohort: list[ClientId]) -> Judged:
    given = {client: said(state, client) for client in cohort}
    found: dict[ClientId, Message] = {}
    under_way, number = list(cohort), 0
    while under_way:
        came = yield {c: Message("show", _only(given[c], "front"), {"batch": float(number)}) for c in under_way}
        found |= {c: Message("judged", {}, {"n": r.info.get("n", 0.0)}) for c, r in came.items() if c not in found}
        judged = yield from _passed(on, state, given, {c: r for c, r in came.items() if r.body}, number)
        found |= {c: found[c]._replace(body=_summed(found[c].body, r.body)) for c, r in judged.items()}
        # Who is not heard to the end would be judged by some of its rows.
        heard = {c for c in came if c in judged or not came[c].body}
        found = {c: m for c, m in found.items() if c in heard or c not in under_way}
        number += 1
        under_way = [c for c in judged if number < came[c].info.get("batches", 0.0)]
    return found


def _passed(on: Ground, state: State, given: Tree, came: dict[ClientId, Message], number: int) -> Judged:
    """What these clients say of the rows whose hidden states have come."""
    shown, notes = _usable(on, came)
    if notes:
        yield Letters({}, note=told(notes))
    if not shown:
        return {}
    middles = {c: _middle(on, state, given[c], shown[c]) for c in shown}
    passed = (yield {SERVER: Message("through", {"shown": shown, "middles": middles})})[SERVER].body
    at = {"batch": float(number)}
    return (yield {c: Message("answer", {"states": h, **_only(given[c], "back")}, at) for c, h in passed.items()})


def _only(given: Tree, end: str) -> Tree:
    return {end: given[end]} if end in given else {}


def _middle(on: Ground, state: State, given: Tree, shown: Tree) -> Tree:
    """This client's middle, or as it began."""
    middle: Tree = given.get("middle") or on.layers.part(state["params"], on.cut(shown["front"], shown["back"])[1])
    return middle


def _usable(on: Ground, came: dict[ClientId, Message]) -> tuple[Tree, list[str]]:
    """(hidden states that fit the model, with where they go in; what is wrong with others)."""
    shown: Tree = {}
    notes: list[str] = []
    for client, reply in sorted(came.items()):
        as_sent = reply._replace(body={HIDDEN: reply.body.get("states"), **{k: x for k, x in reply.body.items() if k == MASK}})
        if problem := complaint(on.layers, as_sent, None):
            notes.append(f"{client} is not judged: {problem}")
        else:
            shown[client] = {**reply.body, **at_of(reply)}
    return shown, notes


def _summed(before: Tree, more: Tree) -> Tree:
    """Sums of each split."""
    return {**before, **{split: add(before[split], sums) if split in before else sums for split, sums in more.items()}}
