"""PFSL, PHSFL, SplitFed and SplitLoRA: what each averages and when, against the uncut model trained by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federations import Outcome, World
from fedtailor.algorithms.split_client import order_of
from fedtailor.core import HIDDEN, Plan, Tree, stream
from fedtailor.cut import parts
from fedtailor.engines.splitting import slope
from fedtailor.errors import ConfigError
from fedtailor.optimizers import stepped
from fedtailor.techniques.peft import of_head
from fedtailor.trees import select, weighted_mean
from tiny import distance, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")
ADAM = Plan(epochs=1, batch=4, lr=1e-2)
CUT = {"front": 0, "back": 1}


def trained(world: World, tree: Tree, client: str, round: int, plan: Plan = SGD, names: list[str] | None = None) -> Tree:
    """The uncut model after a client's pass of this round, with fresh SGD; `names`: only these move."""
    site, forward = world.sites(client, round), world.technique.bind(False)
    data = site.data["train"]
    for rows in order_of(world.job, site, round):
        batch = data.batch(rows, int(data.lengths[rows].max()), len(rows))
        _, slopes, _ = slope(world.job.loss, forward, tree, batch, {})
        moving = list(tree) if names is None else names
        tree = {**tree, **stepped(plan, select(tree, moving), select(slopes, moving), {}, plan.lr)[0]}
    return tree


def examples(world: World, client: str) -> int:
    return len(world.sites(client, 1).data["train"])


def within(world: World, tree: Tree, place: int) -> Tree:
    assert world.job.layers
    return world.job.layers.part(tree, parts(2, CUT["front"], CUT["back"])[place])


@pytest.mark.parametrize("technique", ["lora", "full"])
def test_splitfed_v1_is_fedavg(technique: str, federation: Federation) -> None:
    """Middles, fronts and backs are all averaged: nothing but the place where it is computed differs."""
    topts = {"rank": 2} if technique == "lora" else {}
    done = federation("splitfed", technique=technique, topts=topts, options=CUT, plan=SGD, rounds=2)
    world, tree = done.world, dict(done.world.technique.init)
    for round in (1, 2):
        each = [trained(world, tree, c, round) for c in world.clients]
        tree = weighted_mean(each, [examples(world, c) for c in world.clients])
    assert distance(done.state["params"], tree) < 1e-4
    assert distance(done.state["params"], dict(world.technique.init)) > 1e-3


def test_splitfed_v2_hands_one_middle_from_client_to_client(federation: Federation) -> None:
    done = federation("splitfed", options={**CUT, "version": "v2"}, plan=SGD, rounds=1)
    world, start = done.world, dict(done.world.technique.init)
    order = torch.randperm(3, generator=stream(world.job.seed, "turns", 1)).tolist()
    middle, ends = within(world, start, 1), {}
    for client in (world.clients[i] for i in order):
        after = trained(world, {**start, **middle}, client, 1)
        middle, ends[client] = within(world, after, 1), within(world, after, 2)
    assert distance(within(world, done.state["params"], 1), middle) < 1e-4
    mean = weighted_mean([ends[c] for c in world.clients], [examples(world, c) for c in world.clients])
    assert distance(within(world, done.state["params"], 2), mean) < 1e-4


def test_splitlora_takes_one_step_for_all_batches_together(federation: Federation) -> None:
    """One step a client: the server's is that of the joined batch, the clients' factors become their plain mean."""
    plan = SGD._replace(steps=1)
    done = federation("splitlora", options=CUT, plan=plan, rounds=1)
    world, start = done.world, dict(done.world.technique.init)
    slopes, backs, sizes = [], [], []
    for client in world.clients:
        site = world.sites(client, 1)
        rows = order_of(world.job, site, 1)[0]
        data = site.data["train"]
        batch = data.batch(rows, int(data.lengths[rows].max()), len(rows))
        slopes.append(slope(world.job.loss, world.technique.bind(False), start, batch, {})[1])
        backs.append(within(world, stepped(plan, start, slopes[-1], {}, plan.lr)[0], 2))
        sizes.append(float(len(rows)))
    middle = stepped(plan, within(world, start, 1), within(world, weighted_mean(slopes, sizes), 1), {}, plan.lr)[0]
    assert distance(within(world, done.state["params"], 1), middle) < 1e-5
    assert distance(within(world, done.state["params"], 2), weighted_mean(backs, [1.0] * 3)) < 1e-5


def test_splitlora_wants_lora(world: Maker) -> None:
    here = world("splitlora", technique="full", topts={}, options=CUT)
    with pytest.raises(ConfigError, match=r"set technique\.kind to 'lora'"):
        here.algorithm.init(here.technique.init)


PFSL = ADAM._replace(steps=3, rounds=3)


def test_pfsl_takes_plain_means_of_middles_and_backs(federation: Federation) -> None:
    plan = SGD._replace(steps=3, rounds=1)
    done = federation("pfsl", options=CUT, plan=plan, rounds=1)
    world, start = done.world, dict(done.world.technique.init)
    each = [trained(world, start, c, 1, plan) for c in world.clients]
    assert distance(done.state["params"], weighted_mean(each, [1.0] * 3)) < 1e-4


def test_pfsl_gives_equal_work_and_sends_three_tensors_a_step(federation: Federation) -> None:
    done = federation("pfsl", technique="full", topts={}, options={**CUT, "cache_mb": 0}, plan=PFSL, rounds=1)
    shapes: dict[str, list[Any]] = {}
    for seen in done.log:
        tensors = [*seen.letter.body.items(), *seen.reply.body.items()]
        shapes.setdefault(seen.client, []).extend(t.shape for name, t in tensors if name in (HIDDEN, "gradient"))
    for client in done.world.clients:
        assert len(shapes[client]) == 3 * 3  # steps x tensors: the front is frozen, though the technique would train it
        assert done.ledger.clients[client]["examples"] <= 3 * 4
    init = dict(done.world.technique.init)
    assert same(within(done.world, done.state["params"], 0), within(done.world, init, 0))


def test_pfsl_fits_own_backs_at_the_end(federation: Federation) -> None:
    """In the personal phase middles stand still, no gradient goes up, and nobody's back is averaged."""
    common = federation("pfsl", options={**CUT, "personal": 1}, plan=PFSL, rounds=2)
    done = federation("pfsl", options={**CUT, "personal": 1}, plan=PFSL, rounds=3)
    assert same(done.state["params"], common.state["params"])
    for client in done.world.clients:
        assert same(done.state["middles"][client]["params"], within(done.world, common.state["params"], 1))
        assert distance(done.own[client]["back"], within(done.world, common.state["params"], 2)) > 1e-4
    assert not same(done.own["c0"]["back"], done.own["c1"]["back"])
    last = [seen for seen in done.log if seen.round == 3 and seen.reply.verb == "turned"]
    assert last
    assert all(not seen.reply.body for seen in last)


@pytest.mark.parametrize("kind", ["pfsl", "phsfl"])
def test_who_comes_late_to_the_personal_phase_gets_what_was_averaged(kind: str, federation: Federation) -> None:
    """c2 takes part in the first round and then in the last personal one only: its body is that of the others, not its old one."""
    plan = ADAM._replace(steps=2, rounds=4)
    cohorts = {1: ["c0", "c1", "c2"], 2: ["c0", "c1"], 3: ["c0", "c1"], 4: ["c2"]}
    done = federation(kind, options={**CUT, "personal": 2}, plan=plan, rounds=4, cohorts=cohorts)
    common = federation(kind, options={**CUT, "personal": 2}, plan=plan, rounds=2, cohorts=cohorts)
    assert same(done.state["params"], common.state["params"])
    assert same(done.state["middles"]["c2"]["params"], within(done.world, common.state["params"], 1))
    go = next(seen for seen in done.log if seen.client == "c2" and seen.round == 4)
    wanted = within(done.world, common.state["params"], 2)
    assert same(go.letter.body["back"], wanted if kind == "pfsl" else body(wanted))


@pytest.mark.parametrize(
    ("kind", "options", "plan", "line"),
    [
        ("pfsl", {}, ADAM, r"set train\.steps"),
        ("pfsl", {"personal": 3}, PFSL, "fewer than rounds = 3"),
        ("phsfl", {"personal": 1}, ADAM, "fewer than rounds = 1"),
        ("phsfl", {"edges": 0}, PFSL, "must be at least 1"),
    ],
)
def test_what_the_phases_do_not_fit(kind: str, options: dict[str, Any], plan: Plan, line: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=line):
        world(kind, options={**CUT, **options}, plan=plan)


FOUR = SGD._replace(rounds=4)


def heads(tree: Tree) -> Tree:
    return {name: t for name, t in tree.items() if of_head(name)}


def body(tree: Tree) -> Tree:
    return {name: t for name, t in tree.items() if not of_head(name)}


def test_phsfl_averages_bodies_under_a_head_that_stands_still(federation: Federation) -> None:
    options = {**CUT, "personal": 1, "edges": 1}
    done = federation("phsfl", options=options, plan=FOUR, rounds=2)
    world = done.world
    tree = start = world.algorithm.init(world.technique.init)["params"]
    for round in (1, 2):
        each = [trained(world, tree, c, round, names=list(body(tree))) for c in world.clients]
        tree = weighted_mean(each, [examples(world, c) for c in world.clients])
    assert distance(done.state["params"], tree) < 1e-4
    assert same(heads(done.state["params"]), heads(start))  # to the bit
    assert float(max(t.abs().max() for t in heads(start).values())) > 0.1  # He's scale, where the model's own is 0.02
    for seen in done.log:  # and it never travels
        for end in ("front", "back"):
            assert not any(of_head(name) for message in (seen.letter, seen.reply) for name in message.body.get(end, {}))


def test_phsfl_fits_heads_at_the_end(federation: Federation) -> None:
    options = {**CUT, "personal": 1, "edges": 2}
    before = federation("phsfl", options=options, plan=FOUR, rounds=3)
    done = federation("phsfl", options=options, plan=FOUR, rounds=4)
    assert same(done.state["params"], before.state["params"])
    for client in done.world.clients:
        own = done.own[client]
        assert same(body(own["back"]), body(within(done.world, done.state["params"], 2)))
        wanted = trained(done.world, done.state["params"], client, 4, names=list(heads(own["back"])))
        assert distance(heads(own["back"]), heads(wanted)) < 1e-4
    last = [seen for seen in done.log if seen.round == 4 and seen.reply.verb == "turned"]
    assert last
    assert all(not seen.reply.body for seen in last)


def test_two_tiers_are_one_where_edges_meet_each_round(federation: Federation) -> None:
    one, two, apart = (
        federation("phsfl", options={**CUT, "edges": edges, "edge_rounds": every}, plan=FOUR, rounds=2)
        for edges, every in ((1, 1), (2, 1), (2, 2))
    )
    assert distance(one.state["params"], two.state["params"]) < 1e-6
    # Edges that meet every second round go ways of their own in between.
    half = federation("phsfl", options={**CUT, "edges": 2, "edge_rounds": 2}, plan=FOUR, rounds=1)
    assert not same(half.state["edges"]["0"], half.state["edges"]["1"])
    assert same(apart.state["edges"]["0"], apart.state["edges"]["1"])
    assert distance(apart.state["params"], one.state["params"]) > 1e-6
