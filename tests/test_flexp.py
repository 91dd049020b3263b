"""Personalised split learning: unsplit training where nothing is aligned, one middle where everything is, and nobody's ends averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federations import Outcome, World
from fedtailor.algorithms.flexp import aligned, mean_of
from fedtailor.core import HIDDEN, Device, Layers, Message, Part, Plan, Tree
from fedtailor.cut import parts
from fedtailor.engines.batches import batches
from fedtailor.engines.splitting import slope
from fedtailor.errors import ConfigError
from fedtailor.evaluation import costs
from fedtailor.optimizers import fresh, stepped
from fedtailor.techniques import TECHNIQUES
from fedtailor.techniques.parts import on_part
from tiny import distance, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]
Techniques = Callable[..., Any]

ADAM = Plan(epochs=1, batch=4, lr=1e-2)
CASES = [("bert", "lora", {"rank": 2}), ("vit", "prefix", {"length": 2}), ("bert", "full", {}), ("vit", "lora", {"rank": 2})]


def over(world: World) -> Layers:
    assert world.job.layers
    return world.job.layers


def joined(done: Outcome, client: str) -> Tree:
    """A client's personal tree."""
    own, middle = done.own[client], done.state["middles"][client]["params"]
    return over(done.world).whole([own["front"], middle, own["back"]])


@pytest.mark.parametrize(("family", "kind", "topts"), CASES)
def test_without_alignment_it_is_unsplit_training(family: str, kind: str, topts: dict[str, Any], federation: Federation) -> None:
    """Each client's personal tree after two rounds is that of the uncut model, trained on the same batches."""
    options = {"front": 0, "back": 1, "alignment": 0.0}
    done = federation("flexp", family=family, technique=kind, topts=topts, options=options, plan=ADAM, rounds=2)
    forward, init = done.world.technique.bind(False), done.world.technique.init
    loss = done.world.job.loss
    for client in done.world.clients:
        tree, states = dict(init), {}
        for round in (1, 2):
            site = done.world.sites(client, round)
            data = site.data["train"]
            for rows in batches(ADAM, data.lengths, site.random("split")):
                batch = data.batch(rows, int(data.lengths[rows].max()), len(rows))
                _, slopes, _ = slope(loss, forward, tree, batch, {})
                tree, states = stepped(ADAM, tree, slopes, states or fresh(ADAM, tree), ADAM.lr)
        assert distance(joined(done, client), tree) < 1e-3
        assert distance(tree, dict(init)) > 1e-3


def test_a_large_alignment_makes_one_middle(federation: Federation) -> None:
    runs = {pull: federation("flexp", options={"front": 0, "alignment": pull}, plan=ADAM, rounds=2) for pull in (0.0, 100.0, 1e9)}
    apart = {
        pull: max(
            float((run.state["middles"]["c0"]["params"][n] - run.state["middles"]["c1"]["params"][n]).abs().max())
            for n in run.state["middles"]["c0"]["params"]
        )
        for pull, run in runs.items()
    }
    assert apart[0.0] > apart[100.0] > apart[1e9]
    # Each is set to the mean as it steps, and the mean moves with the next one's step.
    assert apart[1e9] < ADAM.lr


def test_ends_are_nobodys_but_their_clients(federation: Federation) -> None:
    done = federation("flexp", options={"front": 0, "alignment": 1e9}, plan=ADAM, rounds=2)
    init = done.world.technique.init
    assert same(done.state["params"], init)
    _, middle, last = parts(2, 0, 1)
    held = set(over(done.world).part(init, middle))
    assert all(set(m["params"]) == held for m in done.state["middles"].values())
    for seen in done.log:
        if seen.client != "server" and seen.reply.verb != "judged":
            assert set(seen.reply.body) <= {HIDDEN, "attention_mask", "gradient"}
    backs = [done.own[c]["back"] for c in done.world.clients]
    assert set(backs[0]) == set(over(done.world).part(init, last))
    assert not same(backs[0], backs[1])
    # What is exported for a newcomer: the ends as they began.
    model = done.world.algorithm.model(done.state)
    assert all(same(model[n], init[n]) == (n not in held) for n in init)


def test_three_tensors_a_step_where_the_front_is_frozen_and_four_where_it_trains(
    federation: Federation, techniques: Techniques
) -> None:
    """Each is batch x tokens x width numbers, up or down; the mask goes up with the first."""
    for topts, back in (({"rank": 2}, 0), ({}, 1)):
        kind = "lora" if topts else "full"  # full trains the embeddings, which are the front
        done = federation("flexp", technique=kind, topts=topts, options={"front": 0}, plan=ADAM, rounds=1)
        sent = [s for s in done.log if s.reply.verb == "sent"]
        turned = [s for s in done.log if s.reply.verb == "turned"]
        gone = [s for s in done.log if s.letter.verb == "go" and "gradient" in s.letter.body]
        assert len(sent) == len(turned) > 3
        assert len(gone) == back * len(turned)
        for a, b in zip(sent, turned, strict=True):
            shape = a.reply.body[HIDDEN].shape
            assert a.client == b.client
            assert b.letter.body[HIDDEN].shape == b.reply.body["gradient"].shape == shape
            assert a.reply.body["attention_mask"].shape == shape[:2]
            assert a.reply.body["attention_mask"].dtype == torch.uint8


def test_a_layer_is_averaged_over_who_has_it() -> None:
    one, two = {"a": torch.tensor([2.0]), "b": torch.tensor([8.0])}, {"b": torch.tensor([2.0])}
    middles = {"c0": {"params": one, "n": 1.0}, "c1": {"params": two, "n": 3.0}}
    mean = mean_of(middles)
    assert (float(mean["a"]), float(mean["b"])) == (2.0, 3.5)
    pulled = aligned(middles, "c0", 1.0)
    assert (float(pulled["a"]), float(pulled["b"])) == (2.0, (8 + 3.5) / 2)
    assert aligned(middles, "c0", 0.0) is one


def test_cuts_may_differ(world: Maker, federation: Federation) -> None:
    """Two layers: c0 and c2 have both at the server but the last, c1 would leave none: refused. With front 0 all fit."""
    with pytest.raises(ConfigError, match="leave one or more between"):
        world("flexp", options={"front": [0, 1], "back": 1})
    done = federation("flexp", options={"front": [0, 0, 0], "back": [1]}, plan=ADAM)
    assert {m["number"] for m in done.state["middles"].values()} == {0.0, 1.0, 2.0}


def test_nobody_waits_for_a_slow_client(federation: Federation) -> None:
    """c0's letters take a hundred times as long: the others are done when they would have been without it."""
    quick, slow = Device(latency=0.01), Device(latency=1.0)
    rest: list[list[str]] = []
    for first in (quick, slow):
        devices = {"c0": first, "c1": quick, "c2": quick}
        done = federation("flexp", options={"front": 0}, plan=ADAM, rounds=1, devices=devices)
        order = [seen.client for seen in done.log if seen.letter.verb == "turn"]
        rest.append(order)
        assert order.count("c0") >= 2
    assert rest[1][-1] == "c0"  # it is still at it when the others rest
    assert [c for c in rest[0] if c != "c0"] == [c for c in rest[1] if c != "c0"]


def test_a_prefix_that_counts_as_text_needs_a_layer_at_the_front(world: Maker) -> None:
    with pytest.raises(ConfigError, match="clients need 1 layer at the front"):
        world("flexp", technique="prefix", topts={"length": 2}, options={"front": 0})


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"technique": "prompt", "topts": {"length": 2}}, "technique lora, prefix, full, ia3 or head"),
        ({"plan": ADAM._replace(dropout=True)}, "set train.dropout = false"),
        ({"sizes": {"c0": 1, "c1": 2, "c2": 2}}, "needs the same rank or length"),
    ],
)
def test_what_cannot_be_split_is_said(more: dict[str, Any], line: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=line):
        world("flexp", options={"front": 0}, **more)


def test_a_middle_with_nothing_to_train_hands_gradients_on(federation: Federation) -> None:
    done = federation("flexp", technique="head", topts={}, options={"front": 0}, plan=ADAM, rounds=1)
    assert all(m["params"] == {} for m in done.state["middles"].values())
    assert distance(joined(done, "c0"), dict(done.world.technique.init)) > 1e-3


def test_a_stale_message_is_refused(world: Maker) -> None:
    here = world("flexp", options={"front": 0}, plan=ADAM)
    talk = here.algorithm.round(here.algorithm.init(here.technique.init), ["c0"])
    next(talk)
    stale = Message("turned", {"gradient": torch.zeros(1, 1, 32)}, {"step": 7.0, "steps": 9.0, "n": 6.0})
    letters = talk.send({"c0": stale})
    assert not letters.to  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"alignment": -1.0}, "algorithm.alignment must not be negative"),
        ({"front": 0, "back": 0}, "back must be at least 1"),
        ({"front": [], "back": 1}, "or lists of them"),
        ({"front": 2, "back": 1}, "leave one or more between"),
    ],
)
def test_what_cannot_be_cut_is_said(options: dict[str, Any], line: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=line):
        world("flexp", options=options)


def test_operations_of_the_parts_are_those_of_the_whole(techniques: Techniques, federation: Federation) -> None:
    """Through, and back: nothing is computed twice, and no gradient that nobody wants. A front that trains costs its gradient more."""
    job, whole = federation("flexp", options={"front": 0}, plan=ADAM, rounds=1).world.job, techniques("bert", "lora", rank=2)
    plain = costs(whole, Part(0, 2, True, True), job)
    for inward in (False, True):
        each = [
            costs(on_part(whole, part, lambda b: TECHNIQUES["lora"](b, rank=2)), part, job, inward or part.last)
            for part in parts(2, 0, 1)
        ]
        for width in (8, 13):
            there, both = ([flops(3, width) for flops in way] for way in zip(*each, strict=True))
            assert sum(there) == plain[0](3, width)
            assert there[0] == 0  # embeddings are looked up
            assert (sum(both) > plain[1](3, width)) == inward
            assert inward or sum(both) == plain[1](3, width)


def test_a_newcomers_prefix_has_a_column_for_every_layer(federation: Federation) -> None:
    done = federation("flexp", family="vit", technique="prefix", topts={"length": 2}, options={"front": 0}, plan=ADAM, rounds=1)
    init, model = done.world.technique.init, done.world.algorithm.model(done.state)
    assert {n: t.shape for n, t in model.items()} == {n: t.shape for n, t in init.items()}
    _, middle, last = parts(2, 0, 1)
    assert same(over(done.world).part(model, last), over(done.world).part(init, last))
    assert not same(over(done.world).part(model, middle), over(done.world).part(init, middle))


def test_what_nobody_goes_back_through_is_not_kept(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    done = federation("flexp", options={"front": 0}, plan=ADAM, rounds=2)
    assert not done.world.steps._kept
    monkeypatch.setattr("fedtailor.engines.splitting.KEPT", 0)  # every graph is lost: the way is gone again
    lost = federation("flexp", options={"front": 0}, plan=ADAM, rounds=2)
    assert lost.hash == done.hash
