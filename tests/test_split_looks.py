"""Evaluation through the cut says what the whole model says, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federations import Outcome, World
from fedtailor.algorithms import split_looks
from fedtailor.algorithms.split_server import UNUSABLE
from fedtailor.core import SERVER, Message, Plan, Predict, Tree, stream
from fedtailor.engines.answering import Workers, answer
from tiny import distance, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]
PLAN = Plan(epochs=1, batch=4, lr=1e-2)
CASES: dict[str, dict[str, Any]] = {
    "flexp": {"options": {"front": [0, 1], "back": 0}},
    "pfsl": {"options": {"front": 0, "personal": 1}, "plan": PLAN._replace(steps=2, rounds=2)},
    "phsfl": {"options": {"front": 0, "edges": 2, "personal": 1}, "plan": PLAN._replace(rounds=2)},
    "splitfed": {"options": {"front": 1, "back": 0}},
    "splitlora": {"options": {"front": 0}},
}


def whole(world: World, state: Tree, client: str, own: Tree | None) -> dict[str, Tree]:
    """The client's whole tree on its rows, without any cut."""
    assert world.algorithm.personal
    assert world.algorithm.said
    site = world.sites(client, 1)
    tree = world.algorithm.personal(own, world.algorithm.said(state, client), site)
    found = {}
    for split in ("test", "global"):
        ask = Predict(world.job.judge, tree, site.data[split])
        found[split] = world.job.tally(
            answer({client: ask}, Workers(world.technique.bind, 1), lambda c: stream(0), False)[client]
        )
    return found


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("kind", sorted(CASES))
def test_the_cut_model_is_judged_as_the_whole(
    kind: str, rounds: int, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_looks, "ROWS", 3)
    done = federation(kind, rounds=rounds, **CASES[kind])
    for client in done.world.clients:
        told, wanted = done.answers[client].body, whole(done.world, done.state, client, done.own[client])
        assert told.keys() == wanted.keys()
        for split, sums in wanted.items():
            assert {n: int(told[split][n]) for n in ("n", "correct")} == {n: int(sums[n]) for n in ("n", "correct")}
            assert float(told[split]["nll"]) == pytest.approx(float(sums["nll"]), rel=1e-5)
    assert SERVER not in done.answers
    looks = [seen for seen in done.log if seen.reply.verb in ("shown", "judged")]
    assert len(looks) == 2 * 3 * (1 + 3)  # two letters for each of: one piece of 3 own rows, three of 8 rows of the global set
    assert all("labels" not in seen.reply.body for seen in looks)


def test_language_models_are_judged_through_the_cut(federation: Federation) -> None:
    done = federation("flexp", family="gpt2", options={"front": 1, "back": 0}, plan=PLAN, rounds=1)
    for client in done.world.clients:
        wanted = whole(done.world, done.state, client, done.own[client])
        assert distance(done.answers[client].body, wanted) < 1e-3


def talk_of(world: World, replies: Callable[[str, Message], Message | None]) -> tuple[dict[str, Message], list[str]]:
    """An evaluation by hand: what comes of it, and its notes."""
    talk, inbox, notes = world.algorithm.answer(world.algorithm.init(world.technique.init), world.clients), None, []
    while True:
        try:
            letters: Any = next(talk) if inbox is None else talk.send(inbox)
        except StopIteration as end:
            return end.value, notes
        notes.append(getattr(letters, "note", ""))
        inbox = {}
        for client, letter in getattr(letters, "to", letters).items():
            flow = world.algorithm.client[letter.verb](None, letter, world.sites(client, 1))
            result = None
            while True:
                try:
                    ask = flow.send(result)
                except StopIteration as end:
                    own, reply = end.value
                    break
                result = answer({client: ask}, Workers(world.technique.bind, 1, steps=world.steps), lambda c: stream(0), False)[
                    client
                ]
            assert own is None
            if (kept := replies(client, reply)) is not None:
                inbox[client] = kept


def test_who_is_not_heard_to_the_end_is_not_judged(world: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """c1 falls silent after its first rows; c2 sends what does not fit; c0 is judged as it would be alone."""
    monkeypatch.setattr(split_looks, "ROWS", 3)
    here = world("flexp", options={"front": 0}, plan=PLAN)
    judged = {"c1": 0}

    def faulty(client: str, reply: Message) -> Message | None:
        if client == "c1" and reply.verb == "judged":
            judged["c1"] += 1
            return reply if judged["c1"] == 1 else None
        if client == "c2" and reply.verb == "shown":
            return reply._replace(body={**reply.body, "states": torch.zeros(2, 3)})
        return reply

    whole_, _ = talk_of(here, lambda client, reply: reply)
    found, notes = talk_of(here, faulty)
    assert set(found) == {"c0"}
    assert same(found["c0"].body, whole_["c0"].body)
    assert any("c2 is not judged: its hidden states have shape [2, 3]" in note for note in notes)
    assert not any(UNUSABLE in note for note in notes)
