"""The table of laws: every algorithm of the registry has one line in it and keeps every law below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from federations import PLAN, Outcome, Seen, World, by_hand
from fedtailor import wire
from fedtailor.algorithms import ALGORITHMS
from fedtailor.core import SERVER, Message, Plan, Tree
from fedtailor.engines import local
from fedtailor.techniques import TECHNIQUES
from fedtailor.trees import leaves
from tiny import distance, same

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")


class Case(NamedTuple):
    options: Mapping[str, Any] = {}
    technique: str = "lora"
    topts: Mapping[str, Any] = {}
    plan: Plan = PLAN
    sizes: Mapping[str, int] | None = None  # ranks or lengths by client
    redundant: tuple[str, ...] = ()  # parts of the state that only the exact bits determine: factors up to a rotation, and
    # moments of differences of nearly equal numbers


CASES: dict[str, Case] = {
    "adaptive-prefix": Case({"lengths": [1, 3], "pilot": 2}, technique="prefix", topts={"length": 3}, plan=SGD),
    "apfl": Case(plan=SGD),
    "asynchronous": Case({"buffer": 2}),
    "ddome": Case({"experts": 3, "k": 2, "width": 8}, plan=SGD),
    "distil": Case({"rows": 8, "top": 2, "weights": "confidence"}, plan=SGD),
    "ditto": Case({"lam": 0.5}, technique="prefix", topts={"length": 2}, plan=SGD),
    "dypfl": Case(plan=SGD),
    "fed_influence": Case({"samples": 2, "every": 2}, plan=SGD),
    "fedadagrad": Case({"tau": 0.1}, technique="prefix", topts={"length": 2}, plan=SGD, redundant=("optimizer",)),
    "fedadam": Case(technique="prompt", topts={"length": 2}),
    "fedala": Case({"layers": 2, "eta": 10.0, "most": 3}, technique="prefix", topts={"length": 2}, plan=SGD),
    "fedavg": Case(technique="full", plan=SGD),
    "fedavgm": Case(technique="head"),
    "fedbabu": Case({"personal": 1}, plan=SGD._replace(rounds=3)),
    "fedbasis": Case({"bases": 2}, technique="prefix", topts={"length": 2}, plan=SGD),
    "fedex": Case(redundant=("log",)),
    "fedfomo": Case({"m": 2}),
    "fedit": Case(topts={"rank": 3}),
    "fedlc": Case({"rule": "prior", "tau": 0.5}, technique="prefix", topts={"length": 2}, plan=SGD),
    "fedmosaic": Case({"samples": 2}, plan=SGD),
    "fedper": Case(technique="colora", topts={"rank": 2, "blocks": 1}),
    "fedppa": Case({"lam": 0.8, "stages": 2, "depths": [1, 2]}, plan=SGD),
    "fedprox": Case({"mu": 0.1}, technique="ia3"),
    "fedrep": Case({"head_epochs": 2}, plan=SGD),
    "fedsa": Case(),
    "fedyogi": Case(
        {"weighting": "uniform"}, technique="peft", topts={"peft_type": "LOHA", "r": 2, "target_modules": ["query", "value"]}
    ),
    "ffa": Case(),
    "finetune": Case({"personal": 1}, plan=SGD._replace(rounds=3)),
    "flexp": Case({"front": 0, "alignment": 0.5}, plan=SGD),
    "flora": Case(topts={"rank": 2}, sizes={"c0": 1, "c1": 2, "c2": 3}),
    "fml": Case({"alpha": 0.6, "beta": 0.3}, sizes={"c0": 1, "c1": 2, "c2": 2}),
    "hetlora": Case({"gamma": 0.7, "r_min": 1, "lam": 0.1}, topts={"rank": 3}, sizes={"c0": 1, "c1": 3, "c2": 3}),
    "local": Case(),
    "pac_pfl": Case({"particles": 2, "draws": 2, "exchanges": 2}, technique="head", plan=SGD),
    "pfedpg": Case({"server_lr": 0.1, "server_optimizer": "sgd", "width": 4}, technique="prompt", topts={"length": 2}, plan=SGD),
    "pfedpt": Case({"prompt_epochs": 2, "prompt_lr": 0.1}, technique="prompt", sizes={"c0": 1, "c1": 2, "c2": 2}, plan=SGD),
    "pfsl": Case({"front": 0, "personal": 1}, plan=SGD._replace(steps=2, rounds=3)),
    "phsfl": Case({"front": 0, "edges": 2, "edge_rounds": 2, "personal": 1}, plan=SGD._replace(rounds=4)),
    "pooled": Case(),
    "prompt-search": Case({"candidates": 5, "keep": 2, "rows": 4}, technique="template"),
    "rag": Case({"access": "answers", "train": True, "queries": 4}, technique="retriever", topts={"rank": 2}),
    "scaffold": Case(plan=SGD),
    "splitfed": Case({"front": 0, "version": "v2"}, technique="full", plan=SGD),
    "splitlora": Case({"front": 0}, plan=SGD),
    "zero-shot": Case(technique="template"),
    "zeroth-order": Case({"seeds": 8, "steps": 2}, technique="prompt", topts={"length": 2}),
    "zoopfl": Case({"code": 2, "features": 8, "steps": 2}, technique="prompt", topts={"length": 2}, plan=SGD),
}
WAITS = ("asynchronous", "fedbabu", "finetune", "pfsl", "zero-shot")
"""Where a third round after an empty one need not move the model: who was lost is still waited for, or the round is the personal one."""
COUNTS = ("judged", "scored")  # replies of sums over rows: each is one number
UNTRAINED = ("template",)  # techniques without a tensor: nothing to average


def test_the_table_is_complete() -> None:
    assert set(CASES) == set(ALGORITHMS)
    assert {case.technique for case in CASES.values()} == set(TECHNIQUES)


Federation = Callable[..., Outcome]
Maker = Callable[..., World]
every_algorithm = pytest.mark.parametrize("kind", sorted(CASES))


def arguments(kind: str) -> dict[str, Any]:
    case = CASES[kind]
    topts = case.topts or ({"rank": 2} if case.technique == "lora" else {})
    return {"technique": case.technique, "topts": topts, "options": case.options, "plan": case.plan, "sizes": case.sizes}


def valid(state: Tree) -> None:
    """A plain value: it comes back from the wire as it was, bit for bit and type for type, and is finite."""
    back = wire.decode(wire.encode(Message("state", state))).body
    assert same(state, back)
    for name, leaf in leaves(state):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            assert torch.isfinite(leaf).all(), name


def occurs(needle: torch.Tensor, tensor: torch.Tensor) -> bool:
    flat = tensor.detach().double().reshape(-1)
    if flat.numel() < needle.numel():
        return False
    return bool((flat.unfold(0, needle.numel(), 1) == needle).all(1).any())


def holds_no_example(seen: Seen, examples: list[torch.Tensor]) -> None:
    for name, leaf in leaves(seen.reply.body):
        assert isinstance(leaf, torch.Tensor), f"{name}: a reply holds tensors only"
        # Tallies are counts; seeds of directions and classes by rank say nothing of a text; all else is learned, hence real.
        if leaf.is_floating_point():
            assert not any(occurs(example, leaf) for example in examples), name
        elif (seen.reply.verb, name) not in (
            ("moved", "seed"),
            ("said", "classes"),
            ("chosen", "experts"),
            ("sent", "attention_mask"),
            ("shown", "attention_mask"),
            ("sent", "rows"),
        ):
            assert seen.reply.verb in COUNTS, name
            assert leaf.numel() == 1, name


@every_algorithm
def test_laws_of_one_run(kind: str, federation: Federation, world: Maker, tmp_path: Path) -> None:
    """State is plain; handlers change nothing; replies hold no example; resumed == straight; same seed, same hash; all answer."""
    case = arguments(kind)
    straight = federation(kind, rounds=3, **case)
    valid(straight.state)
    assert straight.log or kind == "zero-shot"
    assert all(seen.unchanged for seen in straight.log), [s.client for s in straight.log if not s.unchanged]

    rows = world(kind, **case).rows
    ids, offsets = torch.from_numpy(rows.ragged["input_ids"]).double(), rows.offsets
    examples = [ids[a:b] for a, b in pairwise(offsets)]
    for seen in straight.log:
        if seen.client != SERVER:  # what the server tells itself crosses no wire
            holds_no_example(seen, examples)

    # New objects from the checkpoint of round 2.
    federation(kind, rounds=2, folder=tmp_path / "killed", **case)
    resumed = federation(kind, rounds=1, start=2, folder=tmp_path / "killed", **case)
    assert resumed.hash == straight.hash
    assert same(resumed.state, straight.state)
    assert resumed.ledger.dump() == straight.ledger.dump()
    assert federation(kind, rounds=3, **case).hash == straight.hash

    assert {"c0", "c1", "c2"} <= set(straight.answers)
    for client in ("c0", "c1", "c2"):
        assert int(straight.answers[client].body["test"]["n"]) == 3
        assert float(straight.answers[client].body["test"]["nll"]) > 0
    made = ALGORITHMS[kind](world(kind, **case).job, **case["options"])
    personal, gives = made.personal, ALGORITHMS[kind].card.gives  # type: ignore[attr-defined]
    # Clients of a cut model judge their own part of it, be it everybody's.
    assert gives == "baseline" or (gives == "personal") == (personal is not None) or made.splits
    # A student of the server's beside personal models.
    assert (SERVER in straight.answers) == (personal is None or kind in ("distil", "fml"))
    if personal:
        assert int(straight.answers["c0"].body["global"]["n"]) == 8


@every_algorithm
def test_another_seed_is_another_run(kind: str, federation: Federation) -> None:
    case = arguments(kind)
    if kind == "zero-shot":
        return  # nothing is drawn
    if kind == "local":  # its server state holds nothing learned, but the hash covers what clients keep
        assert federation(kind, rounds=1, **case).own["c0"]
    assert federation(kind, rounds=1, seed=1, **case).hash != federation(kind, rounds=1, **case).hash


@every_algorithm
def test_by_hand_is_through_the_wire_in_any_order(kind: str, federation: Federation, world: Maker) -> None:
    """Letters handed over in memory, replies in reverse order: the same bits as encoded and decoded, in order."""
    case = arguments(kind)
    engine = federation(kind, rounds=2, **case)
    for backwards in (False, True):
        here, own = world(kind, **case), {}
        state = here.algorithm.init(here.technique.init)
        for round in (1, 2):
            state = by_hand(here, state, round, own, backwards=backwards)
        assert same(state, engine.state)
        assert same({c: own.get(c) or {} for c in here.clients}, engine.own)


def comparable(state: Tree, redundant: tuple[str, ...]) -> Tree:
    return {name: value for name, value in state.items() if name not in redundant}


@every_algorithm
def test_stacked_is_one_by_one(kind: str, federation: Federation) -> None:
    case = arguments(kind)
    one, many = (federation(kind, rounds=1, stacked=stacked, **case) for stacked in (False, True))
    assert distance(comparable(one.state, CASES[kind].redundant), comparable(many.state, CASES[kind].redundant)) < 1e-5
    assert distance(one.own, many.own) < 1e-5


@every_algorithm
def test_lost_clients_leave_a_valid_state(kind: str, world: Maker) -> None:
    """A round whose inbox is a part of its outbox, then one with an empty inbox, then one where all are back."""
    here, own = world(kind, **arguments(kind)), {}
    start = here.algorithm.init(here.technique.init)
    valid(start)
    some = by_hand(here, start, 1, own, lost=("c1",))
    valid(some)
    everyone = (*here.clients, SERVER)
    none = by_hand(here, some, 2, own, lost=everyone)
    valid(none)
    assert same(here.algorithm.model(none), here.algorithm.model(some))
    back = by_hand(here, none, 3, own)
    valid(back)
    if kind == "local":
        assert set(own) == set(here.clients)
    elif kind == "prompt-search":  # the best may stay the best
        assert not same(back, some)
    elif kind not in WAITS:
        assert not same(here.algorithm.model(back), here.algorithm.model(some))
    # No tree that was given to the round is changed by it.
    assert same(start, here.algorithm.init(here.technique.init))


@every_algorithm
def test_replies_that_wait_on_disk_are_the_same(kind: str, federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large trees do: every reply is a file, read tensor by tensor when the server asks for it."""
    case = arguments(kind)
    held = federation(kind, **case)
    monkeypatch.setattr(local, "SPOOL", 1)
    assert federation(kind, **case).hash == held.hash


@every_algorithm
def test_clients_without_examples_change_nothing(kind: str, federation: Federation) -> None:
    """One of three holds no row; then nobody in the cohort does."""
    case, empty = arguments(kind), ("c1",)
    some = federation(kind, rounds=2, empty=empty, **case)
    valid(some.state)
    assert set(some.answers) >= {"c0", "c1", "c2"}
    assert not some.answers["c1"].body.get("test")
    if kind != "pooled":
        nobody = federation(kind, rounds=1, empty=empty, cohorts={1: ["c1"]}, **case)
        valid(nobody.state)
        here = ALGORITHMS[kind](nobody.world.job, **case["options"])
        start, end = here.model(here.init(nobody.world.technique.init)), here.model(nobody.state)
        if kind not in ("flora", "hetlora"):  # their factors are cut or start anew, their product is the same
            assert distance({n: start[n] for n in end}, dict(end)) == 0


@pytest.mark.parametrize("technique", sorted(TECHNIQUES.keys() - set(UNTRAINED)))
def test_every_technique_is_averaged_stacked_and_alone(technique: str, federation: Federation) -> None:
    """FedAvg of each technique: stacked == one by one, every tensor of the tree is trained and travels."""
    case = next(case for case in CASES.values() if case.technique == technique)
    topts = case.topts or ({"rank": 2} if technique == "lora" else {})
    one, many = (
        federation("fedavg", technique=technique, topts=topts, plan=SGD._replace(epochs=2), stacked=stacked, rounds=1)
        for stacked in (False, True)
    )
    assert distance(one.state, many.state) < 1e-5
    assert same(sorted(one.log[0].reply.body), sorted(one.state["params"]))


@pytest.mark.parametrize(
    ("options", "stacks"),
    [
        ({"peft_type": "LOHA", "r": 2, "target_modules": ["query"]}, False),  # an autograd.Function of PEFT's own
        ({"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["query"]}, False),  # writes in place
        ({"peft_type": "VERA", "r": 2, "target_modules": ["query", "value"]}, True),
        ({"peft_type": "LORA", "r": 2, "target_modules": ["query"], "use_dora": True}, True),
    ],
)
def test_what_cannot_be_stacked_is_trained_one_by_one_and_said(
    options: dict[str, Any], stacks: bool, federation: Federation
) -> None:
    many, one = (federation("fedavg", technique="peft", topts=options, stacked=stacked, plan=SGD) for stacked in (True, False))
    assert [line.startswith("round 1: this technique cannot be stacked") for line in many.notices] == ([] if stacks else [True])
    assert distance(many.state, one.state) < 1e-5
