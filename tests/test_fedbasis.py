"""FedBasis-style bases: their gradients by the chain rule, and FedAvg where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federations import Outcome, World
from fedtailor import wire
from fedtailor.algorithms.fedbasis import combined
from fedtailor.core import Message, Plan, Tree
from fedtailor.data.examples import Subset
from fedtailor.errors import ConfigError
from fedtailor.losses import classification
from fedtailor.trees import lora_pairs
from tiny import distance, rows_of, same

Federation = Callable[..., Outcome]
WHOLE = Plan(epochs=1, batch=16, lr=0.1, optimizer="sgd")  # all of a client's rows in one step
PREFIX: dict[str, Any] = {"technique": "prefix", "topts": {"length": 2}}


def slope(done: Outcome, params: Tree) -> Tree:
    """Gradient of the plain loss over c0's rows at one tree."""
    data = Subset(rows_of("bert"), range(6))
    moving = {name: t.clone().requires_grad_() for name, t in params.items()}
    batch = data.batch(range(6), int(data.lengths.max()), 6)
    classification(done.world.technique.bind(False), moving, batch, {}).backward()
    return {name: t.grad for name, t in moving.items()}


@pytest.mark.parametrize("technique", [{}, PREFIX])
def test_one_basis_is_fedavg_bit_for_bit(technique: dict[str, Any], federation: Federation) -> None:
    one, plain = federation("fedbasis", options={"bases": 1}, **technique), federation("fedavg", **technique)
    assert same(one.state["params"]["b0"], plain.state["params"])
    for client in ("c0", "c1", "c2"):
        assert same(dict(one.answers[client].body["test"]), dict(plain.answers[client].body["test"]))


def test_gradients_are_those_of_the_chain_rule(federation: Federation) -> None:
    """dL/dv_k = a_k g and dL/ds = (diag(a) - a a') <g, v> / tau, both at once from equal coefficients."""
    options = {"bases": 3, "phases": "joint", "tau": 0.5}
    done = federation("fedbasis", options=options, plan=WHOLE, rounds=1, **PREFIX)
    start = next(seen.letter for seen in done.log if seen.client == "c0").body
    bases = [dict(start[f"b{k}"]) for k in range(3)]
    gradient = slope(done, {name: sum(b[name] for b in bases) / 3 for name in bases[0]})
    sent = next(seen.reply for seen in done.log if seen.client == "c0").body["bases"]
    for k in range(3):
        stepped = {n: t - WHOLE.lr * gradient[n] / 3 for n, t in bases[k].items()}
        assert distance({n: t + sent[f"b{k}"][n] for n, t in bases[k].items()}, stepped) < 1e-6
    a = torch.full((3,), 1 / 3)
    for name, scores in done.own["c0"]["scores"].items():
        by_coefficient = torch.stack([(gradient[name] * b[name]).sum() for b in bases])
        by_score = (torch.diag(a) - torch.outer(a, a)) @ by_coefficient / 0.5
        torch.testing.assert_close(scores, -WHOLE.lr * by_score, rtol=1e-3, atol=1e-7)


def test_equal_bases_never_part(federation: Federation) -> None:
    """Which is why they begin as draws of their own."""
    done = federation("fedbasis", options={"spread": 0.0}, plan=WHOLE, rounds=2, **PREFIX)
    first, *others = done.state["params"].values()
    assert all(distance(first, other) < 1e-6 for other in others)
    assert all(float(s.abs().max()) < 1e-6 for s in done.own["c0"]["scores"].values())
    apart = federation("fedbasis", plan=WHOLE, rounds=1, **PREFIX).state["params"]
    assert distance(apart["b0"], apart["b1"]) > 0.1


def test_lora_bases_are_combined_as_products(federation: Federation) -> None:
    done = federation("fedbasis", rounds=2)
    bases, scores = done.state["params"], done.own["c1"]["scores"]
    mine = combined(bases, scores, 1.0)
    pairs = lora_pairs(dict(bases["b0"]))
    assert not {down for down, _ in pairs.values()} & scores.keys()
    for down, up in pairs.values():
        a = scores[up].softmax(0)
        by_hand = sum(a[k] * tree[up] @ tree[down] for k, tree in enumerate(bases.values()))
        torch.testing.assert_close(mine[up] @ mine[down], by_hand, rtol=1e-5, atol=1e-6)
    assert max(float(s.abs().max()) for s in scores.values()) > 1e-5


def test_one_coefficient_for_the_whole_tree(federation: Federation) -> None:
    done = federation("fedbasis", options={"per": "tree"}, **PREFIX)
    assert {name: tuple(s.shape) for name, s in done.own["c0"]["scores"].items()} == {"tree": (3,)}


def test_weights_may_be_examples_times_coefficients(federation: Federation) -> None:
    done = federation("fedbasis", options={"weights": "coefficients"}, rounds=1, plan=WHOLE, **PREFIX)
    replies = {s.client: s.reply for s in done.log if s.reply.verb == "update"}
    start = next(seen.letter for seen in done.log).body
    for k in range(3):
        heavy = {c: r.info["n"] * float(r.body["share"][k]) for c, r in replies.items()}
        for name, t in done.state["params"][f"b{k}"].items():
            mean = sum(w * replies[c].body["bases"][f"b{k}"][name] for c, w in heavy.items()) / sum(heavy.values())
            torch.testing.assert_close(t, start[f"b{k}"][name] + mean, rtol=1e-5, atol=1e-6)


def test_the_wire_is_as_many_trees(federation: Federation) -> None:
    done = federation("fedbasis", options={"bases": 2}, rounds=1, **PREFIX)
    tree, row = dict(done.world.technique.init), done.ledger.clients["c0"]
    told = next(seen.reply for seen in done.log if seen.client == "c0").info
    assert row["bytes_down"] == len(wire.encode(Message("train", {"b0": tree, "b1": {n: t + 1 for n, t in tree.items()}})))
    twice = {"bases": {"b0": tree, "b1": {n: t + 1 for n, t in tree.items()}}}
    assert row["bytes_up"] == len(wire.encode(Message("update", twice, told)))


def test_bases_go_by_their_numbers_whatever_order_they_came_in() -> None:
    """b10 stands before b2 in what has crossed the wire."""
    bases = {f"b{k}": {"t": torch.full((2,), float(k))} for k in range(12)}
    scores = {"t": torch.zeros(12).index_fill(0, torch.tensor([2]), 1e4)}
    received = wire.decode(wire.encode(Message("train", bases))).body
    assert list(received) != list(bases)
    assert same(combined(received, scores, 1.0), combined(bases, scores, 1.0))
    assert combined(bases, scores, 1.0)["t"].tolist() == [2.0, 2.0]


def test_a_basis_in_which_nobody_has_a_share_stays(world: Callable[..., World]) -> None:
    here = world("fedbasis", options={"weights": "coefficients", "bases": 2}, **PREFIX)
    state = here.algorithm.init(here.technique.init)
    moves = {name: {n: torch.ones_like(t) for n, t in tree.items()} for name, tree in state["params"].items()}
    talk = here.algorithm.round(state, ["c0"])
    next(talk)
    with pytest.raises(StopIteration) as end:
        talk.send({"c0": Message("update", {"bases": moves, "share": torch.tensor([1.0, 0.0])}, {"n": 6.0})})
    after = end.value.value["params"]
    assert same(after["b1"], state["params"]["b1"])
    assert distance(after["b0"], {n: t + 1 for n, t in state["params"]["b0"].items()}) < 1e-6


@pytest.mark.parametrize(
    ("share", "right"), [([0.3, 0.7], True), ([-1.0, 2.0], False), ([9.0, 9.0], False), ([torch.nan, 0.5], False)]
)
def test_a_stranger_has_one_vote_over_all_bases(share: list[float], right: bool, world: Callable[..., World]) -> None:
    here = world("fedbasis", options={"weights": "coefficients", "bases": 2}, **PREFIX)
    letter = Message("train", here.algorithm.init(here.technique.init)["params"])
    reply = Message("update", {"bases": letter.body, "share": torch.tensor(share)}, {"n": 6.0})
    assert (here.algorithm.check(letter, reply) == "") is right


@pytest.mark.parametrize("options", [{"bases": 0}, {"tau": 0.0}, {"per": "row"}, {"phases": "both"}, {"weights": "rows"}])
def test_what_cannot_be_is_refused(options: dict[str, Any], world: Callable[..., World]) -> None:
    with pytest.raises(ConfigError):
        world("fedbasis", options=options)
