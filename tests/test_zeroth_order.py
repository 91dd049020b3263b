"""Losses alone: the update against the rule written out, the tree against its sum of directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federations import PLAN, Outcome, by_hand
from fedtailor import wire
from fedtailor.algorithms.zeroth_order import direction, shifted
from fedtailor.core import Message, Plan
from fedtailor.errors import ConfigError
from fedtailor.trees import numel
from tiny import distance, same

OPTIONS = {"seeds": 5, "steps": 3, "eps": 1e-2, "lr": 0.05}


def test_a_client_takes_mezo_steps(world: Callable[..., Any]) -> None:
    """The rule written out for one client, loss by loss."""
    plan = Plan(batch=100)  # all of a client's rows or more: a batch is drawn with replacement
    here, own = world("zeroth-order", technique="prompt", topts={"length": 2}, options=OPTIONS, plan=plan, clients=1), {}
    state = by_hand(here, here.algorithm.init(here.technique.init), 1, own)
    reply = next(seen.reply for seen in here.log if seen.client == "c0")
    site = here.sites("c0", 1)
    draw, data = site.random("zeroth-order"), site.data["train"]
    seeds = torch.randint(5, (3,), generator=draw)
    params, forward, moves = dict(here.technique.init), here.technique.bind(False), []

    def loss(tree: dict[str, torch.Tensor], rows: list[int]) -> float:
        part = data.take(rows)
        batch = part.batch(range(len(rows)), int(max(part.lengths)), len(rows))
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(forward(tree, batch), batch["labels"]))

    for k in seeds.tolist():
        rows = torch.randint(len(data), (len(data),), generator=draw).tolist()
        z = direction(params, k, 0)
        up, down = ({n: p + side * 0.01 * z[n] for n, p in params.items()} for side in (1, -1))
        moves.append(-0.05 * (loss(up, rows) - loss(down, rows)) / 0.02)
        params = {n: p + moves[-1] * z[n] for n, p in params.items()}
    assert reply.body["seed"].tolist() == seeds.tolist()
    assert reply.body["move"].tolist() == pytest.approx(moves, rel=2e-3, abs=1e-5)
    assert distance(params, here.algorithm.model(state)) < 1e-4


def test_the_server_adds_weighted_moves(world: Callable[..., Any]) -> None:
    here = world("zeroth-order", technique="prompt", topts={"length": 2}, options=OPTIONS)
    talk = here.algorithm.round(here.algorithm.init(here.technique.init), ["c0", "c1"])
    next(talk)
    said = {
        "c0": Message("moved", {"seed": torch.tensor([1, 1], dtype=torch.int32), "move": torch.tensor([1.0, 2.0])}, {"n": 3.0}),
        "c1": Message("moved", {"seed": torch.tensor([1, 4], dtype=torch.int32), "move": torch.tensor([5.0, 8.0])}, {"n": 1.0}),
    }
    with pytest.raises(StopIteration) as end:
        talk.send(said)
    assert end.value.value["moved"].tolist() == [0, 3 * 0.75 + 5 * 0.25, 0, 0, 2.0]


def test_a_tree_is_its_start_and_a_sum_of_directions(world: Callable[..., Any]) -> None:
    here = world("zeroth-order", technique="prompt", topts={"length": 2}, options=OPTIONS)
    start, by = here.technique.init, torch.tensor([0.5, 0.0, -2.0])
    zs = [direction(start, k, 7) for k in range(3)]
    whole = {n: start[n] + 0.5 * zs[0][n] - 2 * zs[2][n] for n in start}
    assert distance(whole, shifted(start, by, 7)) < 1e-6
    assert not same(zs[0], zs[1])
    assert same(zs[0], direction(dict(reversed(start.items())), 0, 7))  # whatever order the names come in
    flat = torch.cat([t.flatten() for z in (direction(start, k, 7) for k in range(200)) for t in z.values()])
    assert float(flat.mean()) == pytest.approx(0, abs=0.02)
    assert float(flat.std()) == pytest.approx(1, abs=0.02)


def test_it_learns_with_a_few_numbers_on_the_wire(federation: Callable[..., Outcome]) -> None:
    options = {"seeds": 64, "steps": 20, "eps": 1e-2, "lr": 0.03}
    few, many = (
        federation("zeroth-order", technique="head", options=options, rounds=rounds, plan=PLAN._replace(batch=8))
        for rounds in (1, 12)
    )
    trained = [sum(float(o.answers[c].body["test"]["nll"]) for c in ("c0", "c1", "c2")) for o in (few, many)]
    assert trained[1] < 0.8 * trained[0], trained
    letter, reply = next((seen.letter, seen.reply) for seen in many.log if seen.reply.verb == "moved")
    assert numel(letter.body) == 64
    assert numel(reply.body) == 2 * 20
    assert len(wire.encode(reply)) < 20 * 8 + 500


@pytest.mark.parametrize("name", ["seeds", "steps", "eps", "lr"])
def test_what_must_be_positive(name: str, world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.{name} must be above 0"):
        world("zeroth-order", options={name: 0})
