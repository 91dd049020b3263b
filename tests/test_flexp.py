"""Personalised split learning: unsplit training where nothing is aligned, one middle where everything is, and nobody's ends averaged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from federations import Outcome, World, run_world
from fedtailor.algorithms.flexp import aligned, mean_of
from fedtailor.algorithms.split_rules import MASK
from fedtailor.core import HIDDEN, Device, Layers, Letters, Message, Part, PartCost, Plan, Tree
from fedtailor.cut import parts
from fedtailor.engines.batches import batches
from fedtailor.engines.cache import Cache
from fedtailor.engines.splitting import slope
from fedtailor.errors import ConfigError, RunError
from fedtailor.ledger import Ledger
from fedtailor.optimizers import fresh, stepped
from fedtailor.part_costs import costs
from fedtailor.techniques import TECHNIQUES
from fedtailor.techniques.parts import layers, on_part
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
        if seen.client != "server" and seen.reply.verb not in ("judged", "shown"):
            assert set(seen.reply.body) <= {"rows", "said", "gradient"}
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
        options = {"front": 0, "cache_mb": 0}
        done = federation("flexp", technique=kind, topts=topts, options=options, plan=ADAM, rounds=1)
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


@pytest.mark.parametrize(("family", "kind"), [("bert", "lora"), ("gpt2", "lora"), ("vit", "head")])
def test_what_a_frozen_front_said_is_sent_once(family: str, kind: str, federation: Federation) -> None:
    """With the cache: each row's hidden states once, whatever the passes, and the same training to rounding."""
    case = {"family": family, "technique": kind, "topts": {"rank": 2} if kind == "lora" else {}, "plan": ADAM, "rounds": 3}
    options = {"front": 1, "back": 0, "train_front": False}
    whole = federation("flexp", options={**options, "cache_mb": 0}, **case)
    once = federation("flexp", options=options, **case)
    for client in once.world.clients:
        said = [row for seen in once.log if seen.client == client for row in seen.reply.body.get("said", {})]
        assert sorted(map(int, said)) == list(range(len(once.world.sites(client, 1).data["train"])))
        assert distance(joined(once, client), joined(whole, client)) < 1e-3
    assert once.ledger.total("bytes_up") < 0.7 * whole.ledger.total("bytes_up")


def test_a_lost_cache_is_filled_again_with_the_same_bits(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is aligned: who is asked again is later, and clients that pull at each other would do so in another order.
    options = {"front": 1, "back": 0, "train_front": False, "alignment": 0.0}
    straight = federation("flexp", options=options, plan=ADAM, rounds=3)
    found = Cache.recall
    asked: list[int] = []

    def forgetful(self: Cache, names: list[str]) -> Tree:
        asked.append(1)
        if len(asked) % 5 == 0:
            self._places.clear()
        return found(self, names)

    monkeypatch.setattr(Cache, "recall", forgetful)
    forgot = federation("flexp", options=options, plan=ADAM, rounds=3)
    assert any("again" in seen.letter.info for seen in forgot.log)
    assert forgot.hash == straight.hash


def test_a_full_cache_keeps_what_it_has(federation: Federation) -> None:
    options = {"front": 1, "back": 0, "train_front": False}
    straight = federation("flexp", options=options, plan=ADAM, rounds=3)
    small = federation("flexp", options={**options, "cache_mb": 0.008}, plan=ADAM, rounds=3)
    kept = [int(own["kept"].sum()) for own in small.own.values()]
    assert 0 < sum(kept) < sum(len(own["kept"]) for own in small.own.values())
    assert same(small.state["middles"], straight.state["middles"])
    assert small.ledger.total("bytes_up") > straight.ledger.total("bytes_up")


def test_a_head_alone_reads_one_token(federation: Federation) -> None:
    """back = 0: an encoder's head reads the first token, so no other comes down, and no other gradient goes up."""
    for family, first in (("bert", True), ("gpt2", False)):
        done = federation("flexp", family=family, options={"front": 1, "back": 0, "cache_mb": 0}, plan=ADAM, rounds=1)
        for seen in done.log:
            if seen.letter.verb == "turn":
                tokens = seen.letter.body[HIDDEN].shape[1]
                assert (tokens == 1) == first
                assert seen.reply.body["gradient"].shape == seen.letter.body[HIDDEN].shape


def test_a_layer_is_averaged_over_who_has_it() -> None:
    one, two = {"a": torch.tensor([2.0]), "b": torch.tensor([8.0])}, {"b": torch.tensor([2.0])}
    middles = {"c0": {"params": one, "n": 1.0}, "c1": {"params": two, "n": 3.0}}
    mean = mean_of(middles)
    assert (float(mean["a"]), float(mean["b"])) == (2.0, 3.5)
    pulled = aligned(middles, {"c0": 1.0})
    assert {name: float(t) for name, t in pulled["c0"]["params"].items()} == {"a": 2.0, "b": (8 + 3.5) / 2}
    assert pulled["c1"] is middles["c1"]
    # One after the other: the second is pulled towards a mean that the first has moved.
    both = aligned(middles, {"c0": 1.0, "c1": 1.0})
    assert float(both["c1"]["params"]["b"]) == pytest.approx((2 + (5.75 + 3 * 2) / 4) / 2)
    assert same(aligned(middles, {"c0": 0.0, "c1": 0.0}), middles)


def test_cuts_may_differ(world: Maker, federation: Federation) -> None:
    """Two layers: c0 and c2 have both at the server but the last, c1 would leave none: refused. With front 0 all fit."""
    with pytest.raises(ConfigError, match="leave one or more between"):
        world("flexp", options={"front": [0, 1], "back": 1})
    done = federation("flexp", options={"front": [0, 0, 0], "back": [1]}, plan=ADAM)
    assert {c["number"] for c in done.state["clients"].values()} == {0, 1, 2}


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
    with pytest.raises(ConfigError, match="clients need 1 layers at the front"):
        world("flexp", technique="prefix", topts={"length": 2}, options={"front": 0})


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"technique": "prompt", "topts": {"length": 2}}, "technique lora, prefix, full, ia3 or head"),
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
        ({"alignment": -1.0}, "must not be negative"),
        ({"front": -1}, "algorithm.front = -1"),
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


def costly(layers: Layers) -> Layers:
    """Layers of which each takes 10 bytes and 10 operations of who holds it, and the head 5."""
    return layers._replace(
        cost=lambda part, rows, width: PartCost(
            10.0 * (part.stop - part.start) + 5 * part.last, 0, 1, 10.0 * (part.stop - part.start)
        ),
        hidden=32,
    )


def four_layers(world: Maker, monkeypatch: pytest.MonkeyPatch, **case: Any) -> World:
    """A federation whose algorithm believes that parts have those costs."""
    monkeypatch.setattr("federations.layers", lambda technique: costly(layers(technique)))
    return world("flexp", plan=ADAM, **case)


@pytest.mark.parametrize(("rule", "fronts"), [("optimal", (0, 0)), ("memory", (1, 1))])
def test_each_device_gets_its_cut(
    rule: str, fronts: tuple[int, int], world: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """c0 is slow and small; c1 is quicker than the server; c2 has no room for any part and is told so."""
    slow = Device("slow", flops=1.0, memory=16.0)
    devices = {"c0": slow, "c1": Device("quick", flops=1e6), "c2": Device("thimble", memory=3.0)}
    options = {"front": rule, "back": 0, "least_front": 0}
    here = four_layers(world, monkeypatch, options=options, devices=devices)
    done = run_world(here, tmp_path, 1)
    clients = done.state["clients"]
    assert (clients["c0"]["front"], clients["c1"]["front"]) == fronts
    assert clients["c2"]["unfit"] == 1
    assert "c2" not in done.state["middles"]
    assert any("c2 set aside: device 'thimble'" in line for line in done.notices)
    assert set(done.answers) == {"c0", "c1", "c2"}


def test_where_no_device_has_room_the_run_ends(world: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    devices = dict.fromkeys(("c0", "c1", "c2"), Device("thimble", memory=3.0))
    here = four_layers(world, monkeypatch, options={"front": 0, "back": 0}, devices=devices)
    with pytest.raises(RunError, match=r"no client can take part: .*device 'thimble'"):
        run_world(here, tmp_path, 1)


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (Message("sent", {HIDDEN: torch.zeros(2, 3, 7), MASK: torch.ones(2, 3, dtype=torch.uint8)}), r"shape \[2, 3, 7\]"),
        (Message("sent", {HIDDEN: torch.zeros(2, 3, 32), MASK: torch.ones(2, 9, dtype=torch.uint8)}), r"mask has shape \[2, 9\]"),
        (Message("sent", {}), "hidden_states"),
        (Message("sent", {HIDDEN: torch.zeros(2, 3, 32)}, {"front": 9.0}), "cannot be cut into 9"),
    ],
)
def test_a_message_of_a_wrong_shape_sets_its_client_aside(
    reply: Message, line: str, world: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = four_layers(world, monkeypatch, options={"front": 0})
    talk = here.algorithm.round(here.algorithm.init(here.technique.init), ["c0"])
    next(talk)
    info = {"pass": 1.0, "step": 0.0, "steps": 2.0, "n": 6.0, "front": 0.0, "back": 1.0, "inward": 0.0, **reply.info}
    letters = talk.send({"c0": reply._replace(info=info)})
    assert isinstance(letters, Letters)
    assert not letters.to
    assert re.search(f"c0 set aside: .*{line}", letters.note)


def test_one_slow_and_one_lost_client_delay_nobody(federation: Federation) -> None:
    """c0 takes twenty times as long, then is lost half-way: the others' passes end at the same simulated seconds."""
    quick, slow = Device(latency=0.01), Device(latency=0.2)
    ends: list[dict[tuple[str, float], float]] = []
    for first in (quick, slow, slow._replace(dropout=0.5)):
        devices = {"c0": first, "c1": quick, "c2": quick}
        done = federation("flexp", options={"front": 0}, plan=ADAM._replace(rounds=3), rounds=3, devices=devices)
        counts = {c: sum(seen.client == c for seen in done.log) for c in devices}
        ends.append({c: line["simulated_seconds"] for c, line in done.ledger.clients.items() if c in ("c1", "c2")})  # type: ignore[misc]
        assert counts["c1"] > 12
    assert ends[0] == ends[1] == ends[2]


def test_bytes_a_round_are_those_of_all_its_letters() -> None:
    """Of a client and a round in which it was heard: a round of split steps has many letters, and a lost one counts for what was sent."""
    ledger = Ledger()
    for letters, heard in ((4, 4), (2, 1), (1, 0)):
        for i in range(letters):
            ledger.add("c0", letters=1, bytes_down=10)
            if i < heard:
                ledger.add("c0", replies=1, bytes_up=100)
        ledger.close_round()
    assert ledger.per_client_round("bytes_up", "replies") == 500 / 2
    assert ledger.per_client_round("bytes_down", "letters") == 70 / 3
    again = Ledger()
    again.load(ledger.dump())
    assert again.per_client_round("bytes_up", "replies") == 250
