"""FedFomo: the authors' rule on paper, whom a client asks for, what crosses the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federations import Outcome, world_of
from fedtailor.algorithms.fedfomo import OWN, combined, credited, distance, fedfomo, picked, score
from fedtailor.core import Fit, Fitted, Message, Plan, Predict, Tree, stream
from fedtailor.errors import ConfigError
from fedtailor.trees import nbytes, weighted_mean
from fedtailor.wire import encode
from tiny import distance as apart
from tiny import randomized, same

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")


def vector(*values: float) -> Tree:
    return {"w": torch.tensor(values, dtype=torch.float64)}


BASE, TREES = vector(0, 0), [vector(0.2, 0), vector(0.5, -0.5), vector(1, 1)]
LOSSES = [0.9, 0.6, 1.4]  # where the baseline has 1.0


@pytest.mark.parametrize(
    ("norm", "scores", "new"),
    [
        ("l1", [0.5, 0.4, -0.2], (0.3333, -0.2222)),
        ("l2", [0.499975, 0.565677, -0.282841], (0.359248, -0.265414)),
        ("l2-squared", [2.5, 0.8, -0.2], (0.272727, -0.121212)),
    ],
)
def test_the_rule_on_paper(norm: str, scores: list[float], new: tuple[float, float]) -> None:
    found = [score(1.0 - loss, distance(tree, BASE, norm)) for tree, loss in zip(TREES, LOSSES, strict=True)]
    assert found == pytest.approx(scores, abs=1e-6)
    assert combined(BASE, TREES, found, BASE)["w"].tolist() == pytest.approx(new, abs=5e-5)


def test_affinities_are_signed_and_relative_to_the_sum() -> None:
    info = {OWN: 0.5, "0": 0.4, "1": -0.2}
    told = credited({"me": 0.1, "b": 1.0}, "me", ["a", "b"], info)
    assert told == pytest.approx({"me": 0.1 + 0.7143, "a": 0.5714, "b": 1 - 0.2857}, abs=1e-4)
    assert credited({"me": 0.1}, "me", ["a"], {"n": 3.0}) == {"me": 0.1}  # it could not judge


def test_no_positive_score_goes_back_or_stays() -> None:
    assert same(combined(BASE, TREES, [-1.0, 0.0, -2.0], BASE), BASE)
    assert same(combined(BASE, TREES, [-1.0, 0.0, -2.0], TREES[0]), TREES[0])


def test_the_distance_of_products_does_not_know_how_they_are_factored() -> None:
    a, b = "x.lora_A.weight", "x.lora_B.weight"
    one = {a: torch.randn(3, 5).double(), b: torch.randn(4, 3).double(), "head": torch.randn(2).double()}
    turn = torch.randn(3, 3).double()
    same_product = {a: turn @ one[a], b: one[b] @ turn.inverse(), "head": one["head"]}
    assert distance(same_product, one, "product") == pytest.approx(0, abs=1e-5)
    assert distance(same_product, one, "l1") > 1
    other = {name: t + torch.randn(t.shape).double() for name, t in one.items()}
    exact = ((other[b] @ other[a] - one[b] @ one[a]).square().sum() + (other["head"] - one["head"]).square().sum()).sqrt()
    assert distance(other, one, "product") == pytest.approx(float(exact))


def test_whom_a_client_asks_for() -> None:
    affinity = {"a": 0.5, "b": -0.1, "c": 2.0}
    others = ["a", "b", "c", "d"]
    assert picked(affinity, others, 3, 0.0, stream(0)) == ["c", "a", "d"]
    assert sorted(picked(affinity, others, 9, 1.0, stream(0))) == others
    ties = {picked({}, others, 1, 0.0, stream(seed))[0] for seed in range(40)}
    lots = {picked(affinity, others, 1, 1.0, stream(seed))[0] for seed in range(40)}
    assert ties == lots == set(others)


def judged(world: Any, own: Tree | None, letter: Message, losses: list[float], trained: Tree) -> tuple[list[Tree], Any, Any]:
    """A client's handler whose trees have these validation losses, in the order in which it asks."""
    flow, asked, result = world.algorithm.client["train"](own, letter, world.sites("c0", 2)), [], None
    while True:
        try:
            ask = flow.send(result)
        except StopIteration as end:
            return asked, *end.value
        if isinstance(ask, Predict):
            asked += ask.params.values()
            assert ask.passes == len(losses) == len(ask.params)
            rows = len(ask.data)
            nothing = torch.zeros(rows, len(losses))
            result = {"nll": torch.tensor(losses).expand(rows, -1), "predicted": nothing, "label": nothing}
        else:
            assert isinstance(ask, Fit)
            asked.append(ask.params)
            result = Fitted(trained, {"n": 6.0}, {})


def test_a_client_judges_moves_and_trains(world: Callable[..., Any]) -> None:
    here = world("fedfomo", technique="head")
    base, mine, a, b, trained = (randomized(here.technique.init, seed) for seed in range(5))
    letter = Message("train", {"peers": {"0": a, "1": b}})
    own = {"params": mine, "base": base}
    asked, new, reply = judged(here, own, letter, [1.0, 0.9, 0.6, 1.4], trained)
    assert all(same(found, wanted) for found, wanted in zip(asked, [base, mine, a, b], strict=False))
    gains = [0.1 / distance(mine, base, "l1"), 0.4 / distance(a, base, "l1")]
    wanted = {n: (gains[0] * mine[n] + gains[1] * a[n]) / sum(gains) for n in base}  # weights add up to 1: a convex combination
    assert apart(asked[-1], wanted) < 1e-5
    assert same(new, {"params": trained, "base": asked[-1]})
    assert [reply.info[name] for name in (OWN, "0")] == pytest.approx(gains, rel=1e-5)
    assert reply.info["1"] == pytest.approx(-0.4 / distance(b, base, "l1"), rel=1e-5)
    assert same(reply.body, trained)
    worse = [1.0, 1.1, 1.2, 1.4]
    assert same(judged(here, own, letter, worse, trained)[0][-1], base)
    stays = world("fedfomo", technique="head", options={"otherwise": "trained"})
    assert same(judged(stays, own, letter, worse, trained)[0][-1], mine)


def test_alone_a_client_keeps_what_helped_and_else_goes_back(world: Callable[..., Any]) -> None:
    """Only itself as a candidate: there is no peer, or one of the same tree as the baseline, which scores 0."""
    here = world("fedfomo", technique="head")
    base, mine = randomized(here.technique.init, 1), randomized(here.technique.init, 2)
    own = {"params": mine, "base": base}
    for letter, more in ((Message("train", {"peers": {"0": base}}), [1.0]), (Message("train", {"start": base}), [])):
        assert apart(judged(here, own, letter, [1.0, 0.9, *more], mine)[0][-1], mine) < 1e-6
        assert same(judged(here, own, letter, [1.0, 1.1, *more], mine)[0][-1], base)


def test_a_client_alone_in_the_federation_goes_on_or_begins_again(federation: Callable[..., Outcome]) -> None:
    mine, local = (federation(kind, clients=1, plan=SGD, rounds=2) for kind in ("fedfomo", "local"))
    assert same(mine.state["params"], mine.own["c0"]["params"])
    first = federation("local", clients=1, plan=SGD, rounds=1).own["c0"]["params"]
    went_on = next(s.reply.info[OWN] for s in mine.log if s.round == 2 and s.letter.verb == "train") > 0
    assert same(mine.own["c0"]["base"], first if went_on else mine.world.technique.init)
    assert not went_on or apart(mine.own["c0"]["params"], local.own["c0"]["params"]) < 1e-6


def test_what_crosses_and_what_the_server_keeps(federation: Callable[..., Outcome]) -> None:
    done = federation("fedfomo", clients=4, options={"m": 2}, rounds=3, cohorts={2: ["c0", "c1"]})
    size = nbytes(done.world.technique.init)
    for seen in (s for s in done.log if s.letter.verb == "train"):
        first = seen.round == 1
        peers = seen.letter.body.get("peers", {})
        assert nbytes(seen.letter.body) == (size if first else 2 * size), seen.round
        assert nbytes(seen.reply.body) == size
        assert {OWN, *peers} & set(seen.reply.info) == (set() if first else {OWN, "0", "1"})
    turns = [s for s in done.log if s.letter.verb == "train"]
    rounds = {"c0": 3, "c1": 3, "c2": 2, "c3": 2}
    for client, n in rounds.items():
        mine = [s for s in turns if s.client == client]
        assert len(mine) == n
        assert done.ledger.clients[client]["bytes_up"] == sum(len(encode(s.reply)) for s in mine)
        assert done.ledger.clients[client]["bytes_down"] == sum(len(encode(s.letter)) for s in mine)
    state = done.state
    last = {c: next(s.reply for s in reversed(done.log) if s.client == c and s.reply.verb == "tree") for c in rounds}
    assert all(same(state["trees"][c], dict(last[c].body)) for c in rounds)
    assert same(state["params"], weighted_mean([last[c].body for c in sorted(last)], [last[c].info["n"] for c in sorted(last)]))
    assert all(set(row) <= set(rounds) for row in state["affinity"].values())
    assert all(c in row for c, row in state["affinity"].items())


def test_who_has_no_validation_rows_trains_on(techniques: Callable[..., Any]) -> None:
    here = world_of(techniques("bert", "head"), "bert", "fedfomo")
    tree = here.technique.init
    site = here.sites("c0", 2)
    site = site._replace(data={name: rows for name, rows in site.data.items() if name != "valid"})
    ask = next(here.algorithm.client["train"](None, Message("train", {"peers": {"0": tree}}), site))
    assert isinstance(ask, Fit)
    assert same(ask.params, site.init)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"m": 0}, "m >= 1"), ({"epsilon": 2.0}, "epsilon"), ({"norm": "l3"}, "l2"), ({"otherwise": "bases"}, "base")],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], word: str, world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=word):
        world("fedfomo", technique="head", options=options)


def test_it_needs_validation_rows_and_products_need_factors(world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"clients\.valid"):
        fedfomo(world("fedavg").job._replace(valid=0.0))
    here = world("fedfomo", technique="head", options={"norm": "product"})
    with pytest.raises(ConfigError, match="lora"):
        here.algorithm.init(here.technique.init)
