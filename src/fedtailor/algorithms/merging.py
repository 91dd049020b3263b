"""What FLoRA and FedEx-LoRA share: low-rank products merged into the base, and how a client that missed some catches up.

The base itself is frozen and exists once; what was merged is a tree beside it, delta[module] = sum of the B A merged so far
(unscaled, (d_out, d_in)), the same bits on the server and on every client that is up to date, because both add the same
products in the same order. `log[time]` keeps recent products as factors; `known[client]` is the last time a client is sure to
have merged (it replied then).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedtailor.core import Batch, ClientId, Forward, Job, Loss, Message, State, Tree
from fedtailor.errors import ConfigError
from fedtailor.trees import numel


def unrounded(job: Job, name: str) -> None:
    """What is merged must be the same bits on both sides, and stays for good.

    Raises:
        ConfigError: a filter would round what the server sends.
    """
    if not job.exact_down:
        raise ConfigError(f"algorithm {name} merges what it is sent into the base: leave filters.down out (filters.up may stay)")


def catch_up(state: State, client: ClientId) -> Tree:
    """The part of a letter that brings a client up to date: missed factors, or the whole delta where that is smaller."""
    since = state["known"].get(client, -1)
    missed = {t: f for t, f in state["log"].items() if int(t) >= max(since, 0)}
    complete = len(missed) == state["time"] - max(since, 0)
    if complete and numel(missed) <= numel(state["delta"]):
        return {"missed": missed, "time": state["time"], "from": max(since, 0)}
    return {"delta": state["delta"], "time": state["time"]}


def merged(own: Tree | None, msg: Message) -> Tree:
    """A client's state after merging what the letter carries: {delta, time}."""
    if "delta" in msg.body:
        return {"delta": msg.body["delta"], "time": msg.body["time"]}
    mine = own or {"delta": {}, "time": 0}
    delta = mine["delta"]
    for time in sorted(msg.body["missed"], key=int):
        if int(time) >= mine["time"]:  # a lost reply makes the server send again what is already merged
            delta = plus(delta, msg.body["missed"][time])
    return {"delta": delta, "time": msg.body["time"]}


def plus(delta: Tree, factors: Tree) -> Tree:
    """delta + B A for each module."""
    return {m: (delta[m] + f["B"] @ f["A"]) if m in delta else f["B"] @ f["A"] for m, f in factors.items()}


def merge_into_base(state: State, factors: Tree) -> State:
    """The state after merging these factors, keeping in the log only what is smaller than the delta itself."""
    delta = plus(state["delta"], factors)
    log = {**state["log"], str(state["time"]): factors}
    while log and numel(log) > numel(delta):
        log.pop(min(log, key=int))
    return {**state, "delta": delta, "log": log, "time": state["time"] + 1}


class merged_loss(tuple[Any, ...]):
    """The loss of a tree on the merged base, whose delta is in `aux`; a value, so equal losses are stacked together."""

    def __new__(cls, base: Loss) -> merged_loss:
        return super().__new__(cls, ("merged", base))

    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        full = {**params, "delta": aux["delta"]} if "delta" in aux else params
        return self[1](forward, full, batch, aux)  # type: ignore[no-any-return]
