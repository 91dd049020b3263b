"""Lengths that clients choose: which, what crosses, and that equal lengths are FedAvg."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federations import PLAN, Outcome, by_hand
from fedtailor.algorithms.adaptive import affordable, first_rows
from fedtailor.core import Device, Fit, Fitted, Message, Plan, Predict
from fedtailor.errors import ConfigError
from fedtailor.techniques.peft import PROMPT
from tiny import distance

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")


def test_at_one_length_a_client_trains_as_in_fedavg(federation: Callable[..., Outcome]) -> None:
    options = {"lengths": [3], "pilot": 1}
    mine = federation("adaptive-prefix", technique="prefix", topts={"length": 3}, options=options, plan=SGD, rounds=2)
    fedavg = federation("fedavg", technique="prefix", topts={"length": 3}, plan=SGD, rounds=2)
    assert mine.state["lengths"] == dict.fromkeys(("c0", "c1", "c2"), 3)
    assert {n: t.shape for n, t in mine.state["params"].items()} == {n: t.shape for n, t in fedavg.state["params"].items()}
    letter = Message("train", mine.state["params"])
    site = mine.world.sites("c0", 3)
    asks = [next(o.world.algorithm.client["train"](None, letter, site)) for o in (mine, fedavg)]
    assert all(isinstance(ask, Fit) for ask in asks)
    assert distance(asks[0].params, asks[1].params) == 0
    assert asks[0].plan == asks[1].plan


@pytest.mark.parametrize(
    ("losses", "tolerance", "kept"),
    [((1.0, 0.9, 0.5), 0.0, 4), ((1.0, 0.9, 0.5), 1.0, 1), ((1.0, 0.51, 0.5), 0.05, 2), ((0.4, 0.9, 0.5), 0.0, 1)],
)
def test_the_shortest_that_is_good_enough(
    losses: tuple[float, ...], tolerance: float, kept: int, world: Callable[..., Any]
) -> None:
    options = {"lengths": [4, 1, 2], "pilot": 7, "tolerance": tolerance}
    here = world("adaptive-prefix", technique="prefix", topts={"length": 4}, options=options)
    state = here.algorithm.init(here.technique.init)
    site = here.sites("c0", 1)
    flow = here.algorithm.client["choose"](None, Message("choose", state["params"]), site)
    ask, tried = next(flow), []
    while True:
        if isinstance(ask, Predict):
            found = losses[len(tried) - 1]
            result: Any = {"nll": torch.full((4,), found), "predicted": torch.zeros(4), "label": torch.zeros(4)}
        else:
            if ask.plan.steps == 7:
                tried.append(len(ask.params[PROMPT]))
            result = Fitted(ask.params, {"n": 1.0}, {})
        try:
            ask = flow.send(result)
        except StopIteration as end:
            own, reply = end.value
            break
    assert tried == [1, 2, 4]
    assert own == {"length": kept}
    assert reply.info["length"] == kept
    assert len(reply.body[PROMPT]) == kept


def test_an_uplink_bounds_the_length(world: Callable[..., Any]) -> None:
    here = world("adaptive-prefix", technique="prefix", topts={"length": 4}, options={"lengths": [1, 2, 4]})
    tree = here.technique.init
    row = tree[PROMPT][:1].numel() * 4
    rest = sum(t.numel() * 4 for n, t in tree.items() if n != PROMPT)
    assert affordable(tree, [1, 2, 4], Device(), 1.0) == [1, 2, 4]
    assert affordable(tree, [1, 2, 4], Device(uplink=rest + 2 * row), 1.0) == [1, 2]
    assert affordable(tree, [1, 2, 4], Device(uplink=rest + 2 * row), 2.0) == [1, 2, 4]
    assert affordable(tree, [1, 2, 4], Device(uplink=1), 1.0) == [1]
    assert affordable(tree, [1, 2, 4], Device(uplink=1), 0.0) == [1, 2, 4]


def test_each_row_is_averaged_over_who_holds_it(world: Callable[..., Any]) -> None:
    here = world("adaptive-prefix", technique="prefix", topts={"length": 4}, options={"lengths": [1, 4]})
    state = here.algorithm.init(here.technique.init)
    talk = here.algorithm.round(state, ["c0", "c1"])
    next(talk)
    one = {n: torch.ones_like(t) for n, t in first_rows(state["params"], 1).items()}
    two = {n: torch.full_like(t, 4.0) for n, t in state["params"].items()}
    said = {"c0": Message("update", one, {"n": 1.0, "length": 1.0}), "c1": Message("update", two, {"n": 2.0, "length": 4.0})}
    with pytest.raises(StopIteration) as end:
        talk.send(said)
    change = end.value.value["params"][PROMPT] - state["params"][PROMPT]
    torch.testing.assert_close(change[0], torch.full_like(change[0], 3.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(change[1:], torch.full_like(change[1:], 4.0), rtol=0, atol=1e-5)
    letters = next(here.algorithm.round(end.value.value, ["c0", "c1", "c2"]))
    assert {c: (m.verb, len(m.body[PROMPT])) for c, m in letters.items()} == {  # type: ignore[union-attr]
        "c0": ("train", 1), "c1": ("train", 4), "c2": ("choose", 4),
    }  # fmt: skip


def test_short_prefixes_cost_fewer_bytes(federation: Callable[..., Outcome]) -> None:
    options = {"lengths": [1, 8], "pilot": 1, "tolerance": 1e9}  # everybody takes the shortest
    short = federation("adaptive-prefix", technique="prefix", topts={"length": 8}, options=options, plan=PLAN, rounds=3)
    long = federation("fedavg", technique="prefix", topts={"length": 8}, plan=PLAN, rounds=3)
    assert set(short.state["lengths"].values()) == {1}
    assert short.ledger.total("bytes_up") < 0.6 * long.ledger.total("bytes_up")
    own: dict[str, Any] = {}
    state = by_hand(short.world, short.state, 4, own)
    assert len(state["params"][PROMPT]) == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lengths": []}, "list lengths of 1 or more"),
        ({"lengths": [0, 2]}, "list lengths of 1 or more"),
        ({"pilot": 0}, "algorithm.pilot must be at least 1"),
        ({"tolerance": -0.1}, "at least 0"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], says: str, world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=says):
        world("adaptive-prefix", technique="prefix", topts={"length": 4}, options=options)


def test_it_needs_a_prefix_long_enough(world: Callable[..., Any]) -> None:
    here = world("adaptive-prefix", options={"lengths": [2]})
    with pytest.raises(ConfigError, match="'prefix' or 'prompt'"):
        here.algorithm.init(here.technique.init)
    here = world("adaptive-prefix", technique="prompt", topts={"length": 2}, options={"lengths": [2, 5]})
    with pytest.raises(ConfigError, match=r"technique.length = 2: set it to 5, the longest"):
        here.algorithm.init(here.technique.init)
    with pytest.raises(ConfigError, match=r"leave clients\.lengths out"):
        world("adaptive-prefix", technique="prefix", topts={"length": 2}, sizes={"c0": 1, "c1": 2, "c2": 2})
