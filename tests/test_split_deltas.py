"""Changes in the place of hidden states: both sides hold the same rows to the bit, whatever is lost, killed or without room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from federations import Outcome, World, run_world
from fedtailor.algorithms import ALGORITHMS, split_deltas, split_server
from fedtailor.core import HIDDEN, Device, Plan, Tree
from fedtailor.engines.clients import Clients, Done
from fedtailor.equip import Facts, equip
from fedtailor.errors import ConfigError
from fedtailor.trees import nbytes
from test_rag import written
from tiny import LABELS, distance, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd", rounds=4)
CUT = {"front": 1, "back": 0}  # LoRA's factors in the front's layer move
KINDS = ["flexp", "splitfed", "splitlora", "phsfl"]


def ends(done: Outcome) -> Tree:
    """What has been trained, at the server and at the clients."""
    own = {c: {end: tree[end] for end in ("front", "back")} for c, tree in done.own.items()}
    return {"own": own, "middles": {who: m["params"] for who, m in done.state["middles"].items()}}


def sent(done: Outcome) -> list[Any]:
    return [seen.reply for seen in done.log if seen.reply.verb == "sent"]


@pytest.mark.parametrize(("kind", "family"), [*((kind, "bert") for kind in KINDS), ("flexp", "gpt2"), ("flexp", "vit")])
def test_all_changes_are_all_there_is(kind: str, family: str, federation: Federation) -> None:
    case: dict[str, Any] = {"family": family, "plan": SGD, "rounds": 4}
    whole = federation(kind, options=CUT, **case)
    changes = federation(kind, options={**CUT, "delta": 1.0}, **case)
    assert distance(ends(changes), ends(whole)) < 1e-5
    assert distance(ends(federation(kind, options={**CUT, "delta": 0.1}, **case)), ends(whole)) > 1e-5
    again = [message for message in sent(changes) if message.info["pass"] > 1]
    assert again
    assert all(not message.body["said"] for message in again)  # nothing is whole a second time


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenth_of_the_numbers_is_a_fifth_of_the_bytes(kind: str, federation: Federation) -> None:
    """Four bytes a number and a bit for each that there is: 0.1 + 1/32 of what whole rows take, and some for their names."""
    whole, changes = (federation(kind, options={**CUT, "delta": share}, plan=SGD, rounds=4) for share in (0.0, 0.1))
    first, later = ([nbytes(m.body) for m in sent(changes) if (m.info["pass"] > 1) == after] for after in (False, True))
    assert sum(later) / len(later) < 0.2 * sum(first) / len(first)
    assert changes.ledger.total("bytes_up") < 0.75 * whole.ledger.total("bytes_up")  # the gradients are as large as ever
    assert changes.ledger.total("bytes_down") < 1.01 * whole.ledger.total("bytes_down")


@pytest.mark.parametrize("lost", [0, 4])
def test_both_sides_hold_the_same_rows(lost: int, federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each exchange, to the bit, also where letters are lost, and every fourth reply: then whole rows come again."""
    work, keep, changed = Clients.work, Clients._keep, split_server.changed
    ours: dict[str, Tree] = {}
    met: list[str] = []
    count = [0]

    def kept(self: Clients, client: str, own: Any, memory: Tree) -> None:
        if own and "bases" in own:
            ours[client] = own["bases"]
        keep(self, client, own, memory)

    def told(self: Clients, *letters: Any) -> Iterator[Done]:
        for done in work(self, *letters):
            sent = done.reply is not None and done.reply.verb == "sent"
            count[0] += sent
            if not (sent and lost and count[0] % lost == 0):
                yield done

    def taken(desk: Any, client: str, body: Tree, given: Tree) -> None:
        changed(desk, client, body, given)
        if client in desk.sent:
            met.append(client)
            for row, hidden in zip(body["rows"].tolist(), desk.sent[client][HIDDEN], strict=True):
                base = desk.bases[client][str(row)]
                assert torch.equal(base, ours[client][str(row)])
                assert torch.equal(base, hidden[: len(base)])
                assert not hidden[len(base) :].any()

    monkeypatch.setattr(Clients, "_keep", kept)
    monkeypatch.setattr(Clients, "work", told)
    monkeypatch.setattr(split_server, "changed", taken)
    devices = dict.fromkeys(("c0", "c1", "c2"), Device(latency=0.01, dropout=0.05 if lost else 0.0))
    options = {**CUT, "delta": 0.1}
    done = federation("splitfed", options=options, plan=SGD, rounds=3, devices=devices)
    assert len(met) >= 3 * 6
    assert sum(seen.reply.verb == "rested" for seen in done.log) >= 9
    again = [seen for seen in done.log if "again" in seen.letter.info]
    assert bool(again) == bool(lost)
    assert all(len(seen.reply.body["said"]) == len(seen.reply.body["rows"]) for seen in again)
    for client in done.world.clients:
        assert same(done.state["bases"][client], done.own[client]["bases"])
        assert len(done.state["bases"][client]) == len(done.world.sites(client, 1).data["train"])


def test_a_kill_loses_no_row(world: Maker, tmp_path: Path) -> None:
    def here() -> World:
        return world("flexp", options={**CUT, "delta": 0.1}, plan=SGD._replace(batch=2, optimizer="adamw"))

    straight = run_world(here(), tmp_path / "straight", 4)
    first = run_world(here(), tmp_path / "killed", 2)
    assert first.state["bases"]
    resumed = run_world(here(), tmp_path / "killed", 2, start=2)
    assert resumed.hash == straight.hash
    assert not any("again" in seen.letter.info for seen in resumed.log)


def test_rows_are_forgotten_after_the_last_pass(federation: Federation) -> None:
    options = {**CUT, "delta": 0.1}
    for rounds, left in ((3, True), (4, False)):
        done = federation("splitfed", options=options, plan=SGD, rounds=rounds)
        assert bool(done.state["bases"]) == left
        assert all(("bases" in own) == left for own in done.own.values())


def test_what_does_not_fit_is_sent_whole(federation: Federation) -> None:
    """Nobody is asked again: a client is told what the server holds."""
    case: dict[str, Any] = {"plan": SGD, "rounds": 3}
    options = {**CUT, "delta": 1.0}
    whole = federation("splitfed", options=CUT, **case)
    for room, some in ((0.0, False), (0.008, True)):
        done = federation("splitfed", options={**options, "cache_mb": room}, **case)
        assert 0 <= nbytes(done.state["bases"]) <= 1e6 * room
        assert any(done.state["bases"].values()) == some
        assert not any("again" in seen.letter.info for seen in done.log)
        assert all(same(done.state["bases"].get(c, {}), done.own[c]["bases"]) for c in done.world.clients)
        assert distance(ends(done), ends(whole)) < 1e-5
    last = [message for message in sent(done) if message.info["pass"] == 3]
    assert {bool(message.body["said"]) for message in last} == {True, False}


ROWS = [torch.arange(6.0).view(2, 3), torch.ones(1, 3)]


def test_the_largest_changes_are_sent() -> None:
    bases, body = split_deltas.said(0.3, {}, [4, 7], ROWS, False)
    assert sorted(body["said"]) == ["4", "7"]
    found = split_deltas.received({}, body, 36)
    assert found
    assert (found.kept, found.free) == (True, 0)
    assert same(found.bases, bases)
    moved = [ROWS[0] + torch.tensor([[0.0, -3.0, 0.1], [0.2, 2.0, 0.0]]), ROWS[1] + torch.tensor([[0.0, 0.0, -0.5]])]
    bases, body = split_deltas.said(0.3, bases, [4, 7], moved, False)
    assert not body["said"]
    after = split_deltas.received(found.bases, body, 0)
    assert after
    assert same(after.bases, bases)
    assert after.rows["4"].tolist() == [[0.0, -2.0, 2.0], [3.0, 6.0, 5.0]]
    assert after.rows["7"].tolist() == [[1.0, 1.0, 0.5]]
    # What was not sent is still owed.
    bases, _ = split_deltas.said(1.0, bases, [4], moved[:1], False)
    assert torch.equal(bases["4"], moved[0])


def test_changes_of_other_rows_are_not_taken() -> None:
    bases, _ = split_deltas.said(0.5, {}, [4, 7], ROWS, False)
    _, body = split_deltas.said(0.5, bases, [4, 7], [row + 1 for row in ROWS], False)
    assert split_deltas.received({}, body, 1e9) is None
    assert split_deltas.received({**bases, "7": bases["7"] + 1e-6}, body, 1e9) is None
    _, whole = split_deltas.said(0.5, bases, [4, 7], ROWS, True)
    assert sorted(whole["said"]) == ["4", "7"]
    for wrong in ({"values": torch.zeros(2)}, {"at": torch.tensor([0, 1, 2, 3, 99], dtype=torch.int32)}):
        with pytest.raises(ConfigError, match="its changes are"):
            split_deltas.received(bases, {**body, **wrong}, 1e9)
    with pytest.raises(ConfigError, match="names no rows"):
        split_deltas.received(bases, {"rows": torch.zeros(0), "said": {}, "of": ""}, 1e9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_do_not_go_with(kind: str, world: Maker) -> None:
    job = world(kind, options=CUT, plan=SGD).job
    with pytest.raises(ConfigError, match=r"algorithm\.delta = 1\.5: the share"):
        ALGORITHMS[kind](job, **CUT, delta=1.5)
    with pytest.raises(ConfigError, match="only filters that end in @gradient"):
        ALGORITHMS[kind](job._replace(exact_up=False), **CUT, delta=0.1)


def test_filters_of_gradients_may_stay(folders: Callable[[str], Path], tmp_path: Path) -> None:
    facts = Facts("text", LABELS, False, ["a", "b", "c"])
    sections = {"technique": {"kind": "lora"}, "algorithm": {"kind": "flexp", **CUT, "delta": 0.1}}
    for number, (names, fits) in enumerate([(["topk-plain=0.25@gradient"], True), (["topk-plain=0.25@gradient", "bf16"], False)]):
        experiment = written(tmp_path / f"{number}", folders("bert"), **sections, filters={"up": names, "down": ["int8-plain"]})
        if fits:
            assert equip(experiment, facts).algorithm.splits
            continue
        with pytest.raises(ConfigError, match="only filters that end in @gradient"):
            equip(experiment, facts)
