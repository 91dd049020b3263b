"""Personal algorithms against something independent: steps written out in plain torch, and the algorithms that they are in their limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import grad, vmap

from federations import Outcome, World
from fedtailor import wire
from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.apfl import Held
from fedtailor.cases import cases
from fedtailor.config import load
from fedtailor.core import Message, Plan, Tree
from fedtailor.data.examples import Subset
from fedtailor.errors import ConfigError
from fedtailor.losses import classification
from fedtailor.techniques.peft import of_head
from tiny import distance, rows_of, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]

WHOLE = Plan(epochs=1, batch=16, lr=0.1, optimizer="sgd")  # all of a client's rows in one step
RATE = WHOLE.lr


def slope(done: Outcome, params: Tree, rest: Tree | None = None, client: int = 0) -> Tree:
    """Gradient of the plain loss over all of a client's rows, by the model's own backward."""
    data = Subset(rows_of("bert"), range(10 * client, 10 * client + 6 + client))
    batch = data.batch(range(len(data)), int(data.lengths.max()), len(data))
    moving = {name: t.clone().requires_grad_() for name, t in params.items()}
    classification(done.world.technique.bind(False), {**(rest or {}), **moving}, batch, {}).backward()
    return {name: t.grad for name, t in moving.items()}


def stepped(params: Tree, gradient: Tree, rate: float = RATE) -> Tree:
    return {name: t - rate * gradient[name] for name, t in params.items()}


def head(tree: Tree) -> Tree:
    return {name: t for name, t in tree.items() if of_head(name)}


def body(tree: Tree) -> Tree:
    return {name: t for name, t in tree.items() if not of_head(name)}


def letter(done: Outcome, client: str, round: int) -> Tree:
    return dict(next(seen.letter for seen in done.log if seen.client == client and seen.round == round).body)


@pytest.mark.parametrize("kind", ["apfl", "ditto"])
def test_what_is_averaged_beside_personal_trees_is_fedavg_bit_for_bit(kind: str, federation: Federation) -> None:
    personal, plain = federation(kind, rounds=2), federation("fedavg", rounds=2)
    assert same(personal.state, plain.state)
    bytes_of = [{c: row["bytes_up"] + row["bytes_down"] for c, row in o.ledger.clients.items()} for o in (personal, plain)]
    assert bytes_of[0] == bytes_of[1]


# Ditto


def test_dittos_second_step_is_pulled_to_what_the_server_sent(federation: Federation) -> None:
    one, two = (federation("ditto", options={"lam": 0.7}, plan=WHOLE, rounds=rounds) for rounds in (1, 2))
    v, w = one.own["c0"]["params"], letter(two, "c0", 2)
    pulled = {name: g + 0.7 * (v[name] - w[name]) for name, g in slope(two, v).items()}
    assert distance(two.own["c0"]["params"], stepped(v, pulled)) < 1e-6
    assert distance(v, w) > 1e-3


def test_ditto_without_pull_is_training_alone(federation: Federation) -> None:
    alone, free = (federation(kind, options=options, plan=WHOLE) for kind, options in (("local", {}), ("ditto", {"lam": 0.0})))
    for client in ("c0", "c1", "c2"):
        assert distance(free.own[client]["params"], alone.own[client]["params"]) < 1e-6


# APFL


def test_apfls_three_steps_are_those_of_the_paper(federation: Federation) -> None:
    one, two = (federation("apfl", options={"alpha": 0.3}, plan=WHOLE, rounds=rounds) for rounds in (1, 2))
    v, alpha, w = one.own["c0"]["own"], float(one.own["c0"]["alpha"]), letter(two, "c0", 2)
    assert alpha == pytest.approx(0.3)  # in the first round v is w, and alpha has no slope
    mixture = slope(two, {name: alpha * v[name] + (1 - alpha) * w[name] for name in v})
    assert distance(two.own["c0"]["own"], stepped(v, mixture, RATE * alpha)) < 1e-6
    by_hand = alpha - RATE * sum(float(((v[name] - w[name]) * mixture[name]).sum()) for name in v)
    assert abs(by_hand - alpha) > 1e-5
    assert float(two.own["c0"]["alpha"]) == pytest.approx(by_hand, abs=1e-7)


def test_apfls_ends_are_the_global_tree_and_training_alone(federation: Federation) -> None:
    alone = federation("local", plan=WHOLE)
    fixed = [federation("apfl", options={"alpha": alpha, "adaptive": False}, plan=WHOLE) for alpha in (0.0, 1.0)]
    assert same({n: dict(m.body["test"]) for n, m in fixed[0].answers.items()}, judged(federation("fedavg", plan=WHOLE), "c"))
    assert distance(fixed[1].own["c1"]["own"], alone.own["c1"]["params"]) < 1e-6


def judged(done: Outcome, prefix: str) -> Tree:
    return {name: dict(m.body["test"]) for name, m in done.answers.items() if name.startswith(prefix)}


# FedRep


def test_fedrep_fits_the_head_to_the_body_and_then_the_body_to_the_head(federation: Federation) -> None:
    done = federation("fedrep", options={"head_epochs": 2}, plan=WHOLE, rounds=1)
    start = dict(done.world.technique.init)
    mine = head(start)
    for _ in range(2):
        mine = stepped(mine, slope(done, mine, body(start)))
    assert distance(done.own["c0"], mine) < 1e-6
    moved = stepped(body(start), slope(done, body(start), mine))
    sent = next(seen.reply for seen in done.log if seen.client == "c0").body
    assert distance({n: start[n] + t for n, t in sent.items()}, moved) < 1e-6


# FedAvg and then fine-tuning, FedBABU


def test_the_last_rounds_are_everybodys_own(federation: Federation) -> None:
    plan = WHOLE._replace(rounds=4)
    done = federation("finetune", options={"personal": 2}, plan=plan, rounds=4)
    assert same(done.state["params"], federation("fedavg", plan=plan, rounds=2).state["params"])
    mine = dict(done.state["params"])
    for _ in range(2):
        mine = stepped(mine, slope(done, mine))
    assert distance(done.own["c0"]["mine"], mine) < 1e-6
    assert [bool(seen.letter.body) for seen in done.log if seen.client == "c0"][:4] == [True, True, True, False]
    assert not any(seen.reply.body for seen in done.log if seen.reply.verb == "tuned")


def test_fedbabu_is_fedavg_under_a_frozen_head_and_then_heads(federation: Federation) -> None:
    plan = WHOLE._replace(rounds=3)
    done = federation("fedbabu", plan=plan, rounds=3)
    frozen = federation("fedavg", topts={"rank": 2, "head": "frozen"}, plan=plan, rounds=2)
    assert same(body(done.state["params"]), frozen.state["params"])
    assert same(head(done.state["params"]), head(done.world.technique.init))
    crossed = [message.body for seen in done.log for message in (seen.letter, seen.reply)]
    assert not any(head(tree) for tree in crossed)
    start = head(done.world.technique.init)
    assert distance(done.own["c0"]["mine"], stepped(start, slope(done, start, frozen.state["params"]))) < 1e-6
    everything = federation("fedbabu", options={"tune": "all"}, plan=plan, rounds=3).own["c0"]
    assert set(everything["mine"]) == set(done.world.technique.init)


def test_a_client_that_missed_its_personal_round_has_the_global_tree(federation: Federation) -> None:
    plan = WHOLE._replace(rounds=2)
    done = federation("finetune", plan=plan, cohorts={2: ["c0", "c1"]})
    plain = federation("fedavg", plan=plan, rounds=1)
    assert done.state["tuned"] == ["c0", "c1"]
    assert same(judged(done, "c2"), judged(plain, "c2"))
    assert not same(judged(done, "c0"), judged(plain, "c0"))


# Bytes and bad input


@pytest.mark.parametrize(("kind", "part"), [("ditto", None), ("apfl", None), ("fedrep", body), ("fedbabu", body)])
def test_bytes_by_formula(kind: str, part: Callable[[Tree], Tree] | None, federation: Federation) -> None:
    done = federation(kind, plan=WHOLE._replace(rounds=9), rounds=1)
    tree = dict(done.world.technique.init)
    tree = part(tree) if part else tree
    info = next(seen.reply for seen in done.log if seen.client == "c0").info
    row = done.ledger.clients["c0"]
    assert row["bytes_down"] == len(wire.encode(Message("train", tree)))
    assert row["bytes_up"] == len(wire.encode(Message("update", tree, info)))


@pytest.mark.parametrize(
    ("kind", "options", "plan", "line"),
    [
        ("ditto", {"lam": -1.0}, WHOLE, "algorithm.lam"),
        ("apfl", {"alpha": 1.5}, WHOLE, "from 0 to 1"),
        ("apfl", {}, WHOLE._replace(clip=1.0), "train.clip"),
        ("fedrep", {"head_epochs": 0}, WHOLE, "head_epochs"),
        ("finetune", {"personal": 3}, WHOLE._replace(rounds=3), "fewer than rounds"),
        ("fedbabu", {"tune": "heads"}, WHOLE._replace(rounds=3), "head"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, options: dict[str, Any], plan: Plan, line: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=line):
        world(kind, options=options, plan=plan)


@pytest.mark.parametrize("kind", ["fedbabu", "fedrep"])
def test_without_a_head_and_something_else(kind: str, world: Maker) -> None:
    here = world(kind, technique="head", plan=WHOLE._replace(rounds=3))
    with pytest.raises(ConfigError, match="tells heads from the rest"):
        here.algorithm.init(here.technique.init)


def test_alpha_can_leave_its_border_and_goes_no_further() -> None:
    """At 1.02, 1, 0 and -0.1, pulled inwards and outwards."""
    at, slopes = torch.tensor([1.02, 1.0, 0.5, 0.0, -0.1]), torch.tensor([3.0, 3.0, 3.0, 3.0, 3.0])
    moved = vmap(grad(lambda a, w: w * Held.apply(a)))
    assert moved(at, slopes).tolist() == [3.0, 3.0, 3.0, 0.0, 0.0]
    assert moved(at, -slopes).tolist() == [0.0, 0.0, -3.0, -3.0, -3.0]
    assert Held.apply(at).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]  # type: ignore[no-untyped-call]


def test_the_mixture_is_kept_where_it_belongs(federation: Federation) -> None:
    """A rate that throws alpha out of [0, 1]."""
    done = federation("apfl", plan=WHOLE._replace(lr=30.0), rounds=3)
    assert all(0 <= float(own["alpha"]) <= 1 for own in done.own.values())
    assert all(torch.isfinite(own["alpha"]) for own in done.own.values())


def test_every_personal_system_stands_in_the_leaderboard() -> None:
    """Split learning and distillation have tables of their own, FedSA is a rule for LoRA's factors."""
    elsewhere = {"distil", "fedsa", "flexp", "pfsl", "phsfl"}
    personal = {kind for kind, factory in ALGORITHMS.items() if factory.card.gives == "personal"}  # type: ignore[attr-defined]
    experiment = Path(__file__).parents[1] / "experiments" / "personal.toml"
    found = {case.values["algorithm"]["kind"] for case in cases(load(experiment, preset="small"))}
    assert found - personal == {"local", "fedavg", "pooled"}
    assert personal - found == elsewhere


# The leaderboard's tables


def test_the_leaderboards_tables_say_what_the_rows_say(tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "personal_table", Path(__file__).parents[1] / "experiments" / "personal_table.py"
    )
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)

    def row(name: str, scores: list[float], flops: float, **more: float) -> dict[str, Any]:
        measures = {
            "clients_worst_decile": 0.2,
            "bytes_up_per_client_round": 2500.0,
            "bytes_down_per_client_round": 0.0,
            "flops_total": flops,
            **more,
        }
        values = [{"seed": seed, "clients_mean": score} for seed, score in enumerate(scores)]
        each = {m: made.interval([v]) for m, v in measures.items()}
        return {"name": f"T, {name}", "seeds": len(scores), "clients_mean": made.interval(scores), "values": values, **each}

    rows = [
        row("local", [0.5, 0.6, 0.7], 2.0),
        row("fedavg", [0.4, 0.4, 0.4], 4.0),
        row("fedfomo", [0.6, 0.7, 0.8], 10.0, newcomers_mean=0.25),
    ]
    systems = made.bare([*rows, {"name": "T, majority", "global_test": made.interval([0.3])}], "T")
    assert [system["name"] for system in systems] == ["fedfomo", "local", "fedavg"]
    lines = made.table(systems)[2:]
    # Gains are paired: each seed is 0.1 better, without a spread.
    assert lines[0] == "| **fedfomo** | 3 | 0.700 ± 0.248 | +0.100 | 0.200 | 0.250 | - | 2.5 | 0.0 | 2.5 x |"
    assert lines[2].startswith("| fedavg | 3 | 0.400 | -0.200 ± 0.248 |")
    made.picture({"T": rows}, tmp_path)
    assert (tmp_path / "leaderboard.svg").stat().st_size > 5000
    # One system measured again: its row is replaced, the others stay.
    for measured in (rows, [row("fedfomo", [0.9], 10.0) | {"runs": ["/a/path"], "curves": []}]):
        made.keep(tmp_path / "t.json", measured)
    kept = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert [(r["name"], r["seeds"]) for r in kept] == [("T, local", 3), ("T, fedavg", 3), ("T, fedfomo", 1)]
    assert not {"runs", "curves"} & {k for r in kept for k in r}
