"""Dropout in split training: masks are replayed wherever a part is made again, and are those of the uncut model under the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from federations import Outcome, World, run_world
from fedtailor.algorithms.split_client import order_of
from fedtailor.core import HIDDEN, Part, Plan, Slope, Through, seed_of
from fedtailor.cut import parts
from fedtailor.engines.splitting import Steps, slope
from fedtailor.optimizers import stepped
from tiny import batch_of, distance, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]

SGD = Plan(epochs=1, batch=4, lr=1e-1, optimizer="sgd", dropout=True)
ADAM = Plan(epochs=1, batch=2, lr=1e-2, dropout=True, rounds=4)
CUT = {"front": 0, "back": 1}
LAYERS = ("BertLayer", "GPT2Block")


@contextmanager
def reseeded(seeds: list[int]) -> Iterator[None]:
    """The whole model inside draws from the first seed until its first layer, from the next from there on, and so on."""
    left = list(seeds)
    torch.manual_seed(left.pop(0))

    def before(module: nn.Module, given: Any) -> None:
        if type(module).__name__ in LAYERS:
            torch.manual_seed(left.pop(0))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
    assert not left


@pytest.mark.parametrize(("family", "technique"), [("bert", "full"), ("bert", "lora"), ("gpt2", "lora")])
def test_it_is_the_uncut_models_dropout(family: str, technique: str, federation: Federation) -> None:
    """A pass of a client, uncut: each layer of the whole model, embeddings and head draw from the seed of the part that has them."""
    topts = {"rank": 2} if technique == "lora" else {}
    options = {**CUT, "alignment": 0.0}
    done = federation("flexp", family=family, technique=technique, topts=topts, options=options, plan=SGD, rounds=1)
    forward, init, job = done.world.technique.bind(True), dict(done.world.technique.init), done.world.job
    assert job.layers
    for client in done.world.clients:
        site, tree = done.world.sites(client, 1), init
        data = site.data["train"]
        for step, rows in enumerate(order_of(job, site, 1)):
            batch = data.batch(rows, int(data.lengths[rows].max()), len(rows))
            with reseeded([seed_of(0, "dropout", client, 1, step, place) for place in ("front", "middle", "back")]):
                _, slopes, _ = slope(job.loss, forward, tree, batch, {})
            tree = stepped(SGD, tree, slopes, {}, SGD.lr)[0]
        own, middle = done.own[client], done.state["middles"][client]["params"]
        ours = job.layers.whole([own["front"], middle, own["back"]])
        assert distance(ours, tree) < 1e-4
        assert distance(tree, init) > 1e-2


@pytest.mark.parametrize("kind", ["flexp", "pfsl", "phsfl", "splitfed", "splitlora"])
def test_what_is_dropped_is_drawn_from_the_seed(kind: str, federation: Federation) -> None:
    plan = ADAM._replace(rounds=2, steps=2 if kind == "pfsl" else 0)
    case: dict[str, Any] = {"options": CUT, "plan": plan, "rounds": 2}
    one, again = federation(kind, **case), federation(kind, **case)
    off = federation(kind, **{**case, "plan": plan._replace(dropout=False)})
    assert one.hash == again.hash
    assert all(same(one.own[c], again.own[c]) for c in one.world.clients)
    assert not same(one.state["middles"], off.state["middles"])


@pytest.mark.parametrize("technique", ["full", "lora"])
def test_a_way_that_is_gone_is_gone_again_under_the_same_masks(
    technique: str, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, front and middle; stacked as well: steps with masks are not."""
    case: dict[str, Any] = {"technique": technique, "options": CUT, "plan": ADAM, "rounds": 2, "stacked": True}
    held = federation("flexp", **case)
    monkeypatch.setattr("fedtailor.engines.splitting.KEPT", 0)
    lost = federation("flexp", **case)
    assert lost.hash == held.hash
    assert all(same(lost.own[c], held.own[c]) for c in held.world.clients)


def test_a_kill_changes_no_mask(world: Maker, tmp_path: Any) -> None:
    def here() -> World:
        return world("flexp", options=CUT, plan=ADAM)

    straight = run_world(here(), tmp_path / "straight", 4)
    first = run_world(here(), tmp_path / "killed", 2)
    assert first.state["under_way"] or first.state["busy"] or first.state["post"]
    resumed = run_world(here(), tmp_path / "killed", 2, start=2)
    assert resumed.hash == straight.hash


def test_a_frozen_front_that_drops_is_not_kept(federation: Federation) -> None:
    """Every step sends what it says this time, which is something else in the next pass."""
    options = {"front": 1, "back": 0, "train_front": False}
    done = federation("flexp", options=options, plan=ADAM, rounds=2)
    assert not any("kept" in own for own in done.own.values())
    assert not done.world.steps.cache.dump()["entries"]
    said: dict[int, dict[int, torch.Tensor]] = {1: {}, 2: {}}  # pass -> row -> what the front said of its first token
    for seen in done.log:
        if seen.reply.verb == "sent" and seen.client == "c0" and seen.reply.info["pass"] < 3:
            number, step = int(seen.reply.info["pass"]), int(seen.reply.info["step"])
            rows = order_of(done.world.job, done.world.sites("c0", 1), number)[step].tolist()
            said[number] |= dict(zip(rows, seen.reply.body[HIDDEN][:, 0], strict=True))
    assert len(said[1]) == len(said[2]) == 6
    assert not any(torch.equal(said[1][row], said[2][row]) for row in range(6))


def test_threads_draw_one_after_the_other(world: Maker) -> None:
    """Masks and the random state outside do not depend on who works beside."""
    here = world("flexp", options=CUT, plan=ADAM)
    first, _, last = parts(2, 0, 1)
    assert here.job.layers
    params = here.job.layers.part(here.technique.init, last)
    batch = batch_of("bert", extra=1)

    def asked(steps: Steps, name: int, part: Part) -> Any:
        if part.first:
            return steps.answer({0: Through(part, {}, batch, f"{name}", back=False, seed=name)}, True)[0]
        torch.manual_seed(1)
        given = {HIDDEN: torch.randn(3, 8, 32), "labels": torch.tensor([0, 2, 1])}
        return steps.answer({0: Slope(here.job.loss, part, params, given, seed=name)}, True)[0].hidden

    expected = [asked(here.steps, name, first) for name in range(24)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: asked(here.steps, name, first), range(24)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(expected[0], expected[1])
    assert torch.equal(asked(here.steps, 7, last), asked(here.steps, 7, last))
    assert not torch.equal(asked(here.steps, 7, last), asked(here.steps, 8, last))
