"""Split learning when things go wrong: lost letters, numbers that are not finite, late servers, kills in the middle of stacked steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from federations import Outcome, World, run_world, world_of
from fedtailor.core import HIDDEN, Device, Plan, Tree
from fedtailor.cut import parts
from fedtailor.engines import local
from fedtailor.engines.cache import Cache
from fedtailor.engines.local import Local
from fedtailor.engines.splitting import Steps
from fedtailor.errors import ConfigError
from fedtailor.techniques import TECHNIQUES
from tiny import LABELS, distance, same, tiny

Federation = Callable[..., Outcome]

ADAM = Plan(epochs=1, batch=4, lr=1e-2)
SGD = Plan(epochs=1, batch=2, lr=1e-2, optimizer="sgd")


@pytest.fixture(autouse=True)
def _rounds_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that goes round in circles is a failure, not a hang."""
    exchange, count = Local._exchange, [0]

    def counted(self: Local, letters: Any, round: int) -> Any:
        count[0] += 1
        assert count[0] < 1500, "this round does not end"
        return exchange(self, letters, round)

    monkeypatch.setattr(Local, "_exchange", counted)


def middle_of(world: World, tree: Tree) -> Tree:
    assert world.job.layers
    return world.job.layers.part(tree, parts(2, 0, 1)[1])


def test_a_middle_that_is_not_finite_sets_its_client_aside(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """c1 sends numbers that are finite and too large: the others train as if it were not there."""
    reply = Local._reply

    def huge(self: Local, client: str, message: Any, *rest: Any) -> Any:
        if client == "c1" and HIDDEN in message.body:
            message = message._replace(body={**message.body, HIDDEN: (message.body[HIDDEN] * 1e38).clamp(-3e38, 3e38)})
        return reply(self, client, message, *rest)

    options = {"front": 0, "alignment": 0.0, "cache_mb": 0}
    alone = federation("flexp", options=options, plan=ADAM, rounds=2, cohorts={1: ["c0", "c2"], 2: ["c0", "c2"]})
    monkeypatch.setattr(Local, "_reply", huge)
    done = federation("flexp", options=options, plan=ADAM, rounds=2)
    assert any("c1 set aside: what its numbers give at the server is not finite" in line for line in done.notices)
    for client in ("c0", "c2"):
        assert same(done.own[client], alone.own[client])
        assert same(done.state["middles"][client], alone.state["middles"][client])


def test_a_rate_that_is_too_large_ends_the_run(federation: Federation) -> None:
    done = federation("flexp", options={"front": 0}, plan=SGD._replace(lr=1e30), rounds=2)
    assert done.notices


def test_the_deadline_is_not_the_servers(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Local.__init__

    def slow(self: Local, *args: Any, **more: Any) -> None:
        begin(self, *args, **more)
        self.server = Device("server", flops=1e4)

    monkeypatch.setattr(Local, "__init__", slow)
    monkeypatch.setattr(Steps, "work", lambda self, step: (1e5, 0.0))
    done = federation("flexp", options={"front": 0}, plan=ADAM, rounds=1, deadline=5.0)
    assert done.clock[0] > 5
    assert sum(seen.reply.verb == "rested" for seen in done.log) == 3


@pytest.mark.parametrize("kind", ["flexp", "pfsl", "splitfed"])
def test_a_lost_letter_is_written_again(kind: str, federation: Federation) -> None:
    """A tenth of the letters is lost: every client ends every pass all the same."""
    devices = dict.fromkeys(("c0", "c1", "c2"), Device(latency=0.01, dropout=0.1))
    plan = ADAM._replace(rounds=4, steps=3 if kind == "pfsl" else 0)
    done = federation(kind, options={"front": 0}, plan=plan, rounds=4, devices=devices)
    ended = [seen for seen in done.log if seen.reply.verb == "rested"]
    assert len(ended) == 12
    if kind != "flexp":  # what was averaged comes with the first letter that arrives, whichever it is
        firsts = {(s.client, s.round): s for s in reversed(done.log) if s.letter.verb == "go"}
        assert len(firsts) == 12
        assert all("back" in seen.letter.body for (_, round), seen in firsts.items() if round > 1)
        assert all(seen.letter.info["pass"] == round for (_, round), seen in firsts.items())


def test_who_is_lost_for_good_is_named(federation: Federation) -> None:
    devices = {"c1": Device(latency=0.01, dropout=1.0)}
    done = federation("splitfed", options={"front": 0}, plan=ADAM, rounds=1, devices=devices)
    assert any("no reply from c1" in line for line in done.notices)
    assert {seen.client for seen in done.log if seen.reply.verb == "rested"} == {"c0", "c2"}


def test_a_step_that_was_taken_is_not_taken_again(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """c0's letters are lost for good after its second step: in the next round it goes on with the third."""
    went: list[int] = []

    def lost(device: Device, seed: int, client: str, round: int, step: int) -> bool:
        return client == "c0" and round == 1 and step > 8

    monkeypatch.setattr(local, "is_lost", lost)
    done = federation("flexp", options={"front": 0, "alignment": 0.0}, plan=SGD._replace(rounds=2), rounds=2)
    turned = [seen for seen in done.log if seen.client == "c0" and seen.reply.verb == "turned"]
    went = [(int(s.reply.info["pass"]), int(s.reply.info["step"])) for s in turned]  # type: ignore[misc]
    assert len(went) == len(set(went)) > 3


def test_a_round_in_which_all_are_lost_changes_nothing(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round after it starts from what was averaged, not from middles that went on alone."""
    straight = federation("splitfed", options={"front": 0}, plan=SGD, rounds=2)
    monkeypatch.setattr(local, "is_lost", lambda device, seed, client, round, step: round == 2 and step >= 7)
    done = federation("splitfed", options={"front": 0}, plan=SGD, rounds=2)
    assert not [seen for seen in done.log if seen.round == 2 and seen.reply.verb == "rested"]
    monkeypatch.setattr(local, "is_lost", lambda device, seed, client, round, step: round == 2 and step >= 7)
    third = federation("splitfed", options={"front": 0}, plan=SGD, rounds=3)
    go = next(seen for seen in third.log if seen.round == 3 and seen.letter.verb == "go")
    assert same(go.letter.body["back"], third.world.job.layers.part(done.state["params"], parts(2, 0, 1)[2]))  # type: ignore[union-attr]
    assert distance(done.state["params"], straight.state["params"]) > 0


def test_a_kill_while_stacked_steps_are_under_way(tmp_path: Path) -> None:
    """A graph made of many clients at once is gone after a kill, and alone the last bits differ: so no graph outlives a round."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from fedtailor.backbone import load
    from fedtailor.config import ModelSection

    folder = str(tmp_path / "model")
    torch.manual_seed(0)
    small: Any = tiny("vit").config.to_dict()
    wide = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 2}
    ViTForImageClassification(ViTConfig(**{**small, **wide})).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    backbone = load(ModelSection(name=folder), "image", LABELS)

    def here() -> World:
        plan = Plan(epochs=1, batch=2, lr=1e-2, rounds=4)

        def make(b: Any) -> Any:
            return TECHNIQUES["lora"](b, rank=4)

        return world_of(make(backbone), "vit", "flexp", {"front": 0, "back": 1}, plan, clients=4, make=make)

    straight = run_world(here(), tmp_path / "straight", 4, stacked=True)
    first = run_world(here(), tmp_path / "killed", 2, stacked=True)
    assert first.state["under_way"] or first.state["busy"] or first.state["post"]
    resumed = run_world(here(), tmp_path / "killed", 2, start=2, stacked=True)
    assert resumed.hash == straight.hash


def test_threads_share_the_cache(tmp_path: Path) -> None:
    cache = Cache()
    cache.lie(tmp_path)
    items = {f"{i}": torch.full((64, 96), float(i)) for i in range(200)}
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda name: cache.keep({name: items[name]}, 1e9), items))
        found = list(pool.map(lambda name: cache.recall([name])[name], list(items) * 3))
    assert all(torch.equal(t, items[name]) for t, name in zip(found, list(items) * 3, strict=True))


def test_clipping_is_refused(world: Callable[..., World]) -> None:
    with pytest.raises(ConfigError, match=r"no side knows the whole gradient that train\.clip is about"):
        world("flexp", options={"front": 0}, plan=ADAM._replace(clip=1.0))


def test_two_tiers_are_one_where_clients_are_drawn(federation: Federation) -> None:
    cohorts = {1: ["c0", "c1"], 2: ["c1", "c2"], 3: ["c0", "c2"]}
    plan = SGD._replace(batch=4, rounds=4)
    one, two = (
        federation("phsfl", options={"front": 0, "edges": edges}, plan=plan, rounds=3, cohorts=cohorts) for edges in (1, 2)
    )
    assert distance(one.state["params"], two.state["params"]) < 1e-5


def test_who_never_took_part_is_judged_all_the_same(federation: Federation) -> None:
    options = {"front": 1, "back": 0}
    done = federation("flexp", family="vit", technique="lora", options=options, plan=ADAM, rounds=1, cohorts={1: ["c0"]})
    assert set(done.answers) == {"c0", "c1", "c2"}


def test_who_is_drawn_seldom_makes_few_passes(federation: Federation) -> None:
    cohorts = {1: ["c0"], 2: ["c1"], 3: ["c0"], 4: ["c2"]}
    done = federation("flexp", options={"front": 0}, plan=ADAM._replace(rounds=4), rounds=4, cohorts=cohorts)
    ended = [seen.client for seen in done.log if seen.reply.verb == "rested"]
    assert sorted(ended) == ["c0", "c0", "c1", "c2"]
