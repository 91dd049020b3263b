"""What a client's message in split learning must be for the server to take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedtailor.algorithms.checks import Check, checks, difference, spoken
from fedtailor.algorithms.split_deltas import AT, OF, VALUES
from fedtailor.algorithms.split_rules import ENDS, MASK, Ground, at_of
from fedtailor.core import HIDDEN, Layers, Message, Tree
from fedtailor.cut import cut_at
from fedtailor.errors import ConfigError
from fedtailor.trees import tensors

MOST_BATCHES = 100_000  # in which a client shows its rows
TELLS = ("pass", "step", "steps", "n", "front", "back")


def check_of(on: Ground) -> Check:
    """The check of strangers' replies."""

    def go(letter: Message, reply: Message) -> str:
        if reply.verb == "unfit":
            return "" if isinstance(reply.body["why"], str) else "it does not say why"
        inward = ("inward",) if reply.verb == "sent" else ()
        if why := spoken(reply, ("sent", "rested", "unfit"), (*TELLS, "number", *inward)) or placed(letter, reply):
            return why
        if reply.verb == "sent" and (why := extent(reply, on.job.plan.batch)):
            return why
        return complaint(on.layers, reply, None)

    def turn(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("turned",), TELLS) or placed(letter, reply):
            return why
        return difference(reply.body, {"gradient": letter.body[HIDDEN]} if "wanted" in letter.info else {})

    def show(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("shown",), ("front", "back", "batches", "n")):
            return why
        batches, states = reply.info["batches"], {HIDDEN if k == "states" else k: x for k, x in reply.body.items()}
        if not 0 <= batches <= MOST_BATCHES or batches != int(batches) or not set(states) <= {HIDDEN, MASK}:
            return "it shows something else than hidden states"
        if letter.info["batch"] >= batches:
            return "it shows more than it has" if states else ""
        return complaint(on.layers, reply._replace(body=states, info={**dict.fromkeys(TELLS, 0.0), **reply.info}), None)

    return checks(on.job, go=go, turn=turn, show=show)


def extent(reply: Message, most: int) -> str:
    """What is wrong with how much a client sends, and under which names: one batch, as hidden states or row by row."""
    body = reply.body
    if "rows" not in body:
        names, count = {HIDDEN, *([MASK] if reply.info.get("masked") else [])}, len(body[HIDDEN])
    else:
        names, count = {"rows", "said", *(name for name in (OF, AT, VALUES) if OF in body and name in body)}, len(body["rows"])
        if not body["said"].keys() <= {str(int(row)) for row in body["rows"].reshape(-1)}:
            return "it sends rows that it does not name"
    if body.keys() != names:
        return f"it sends {', '.join(sorted(body))[:200]}, where {', '.join(sorted(names))} was expected"
    return "" if count <= most else f"it sends {count} rows, where a batch has {most}"


def placed(letter: Message, reply: Message) -> str:
    """What is wrong with where a client says that it is: it is where the letter says, in whole numbers."""
    if any(x != int(x) or x < 0 for name, x in reply.info.items() if name in (*TELLS, "number")):
        return "it counts in parts, or below 0"
    if any(reply.info[name] != letter.info[name] for name in ("pass", "step")):
        return "it is at another step than it was asked for"
    info = at_of(reply)
    return (
        "" if (info["step"] >= info["steps"]) == (reply.verb == "rested") else "it goes on after its last step, or rests before"
    )


def complaint(layers: Layers, reply: Message, given: Tree | None) -> str:
    """What is wrong with a client's message; "" if nothing is."""
    try:
        if reply.verb == "turned":
            gradient = reply.body.get("gradient")
            if gradient is not None and given and list(gradient.shape) != given["shape"]:
                return f"its gradient has shape {list(gradient.shape)}, where {given['shape']} was sent"
            return ""
        info = at_of(reply)
        cut_at(layers, info["front"], info["back"])
        return "" if reply.verb == "rested" else _unreadable(layers, reply.body)
    except (KeyError, AttributeError, ConfigError) as error:
        return str(error)


def _unreadable(layers: Layers, body: Mapping[str, Any]) -> str:
    hidden = list(body["said"].values()) if "rows" in body else [body[HIDDEN]]
    for h in hidden:
        if h.dtype not in (layers.dtype, torch.float32):  # which filters give
            return f"its hidden states are {h.dtype}, expected {layers.dtype}"
        if h.dim() != 2 + ("rows" not in body) or (layers.hidden and h.shape[-1] != layers.hidden):
            return f"its hidden states have shape {list(h.shape)}, where the last axis is {layers.hidden or 'the width'}"
        if not h.numel():
            return "its hidden states are none"
    if "rows" in body and (body["rows"].dim() != 1 or body["rows"].dtype != torch.int32 or not len(body["rows"])):
        return "it names no rows"
    if MASK in body and (body[MASK].dtype != torch.uint8 or body[MASK].shape != hidden[0].shape[:2]):
        return f"its mask has shape {list(body[MASK].shape)}, its hidden states {list(hidden[0].shape)}"
    return ""


def strange(on: Ground, known: Mapping[str, Any], reply: Message, params: Tree) -> str:
    """What does not fit what the server knows: a client keeps its cut, and rests with the tensors of its ends that move."""
    at = at_of(reply)
    if reply.verb in ("sent", "rested") and any(name in known and known[name] != at[name] for name in ("front", "back")):
        return f"its cut is {at['front']} and {at['back']}, and was {known['front']} and {known['back']}"
    if reply.verb != "rested" or on.rules.ahead or not at["steps"]:
        return ""
    first, _, last = on.cut(at["front"], at["back"])
    parts = {end: on.layers.part(params, part) for end, part in zip(ENDS, (first, last), strict=True)}
    want = {end: {n: tree[n] for n in on.moving(tree, end, at["pass"])} for end, tree in parts.items()}
    got: dict[str, Tensor] = dict(tensors(reply.body))
    return difference(got, dict(tensors(want)))
