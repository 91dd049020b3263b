"""Clients that join after the last round: judged beside the run, which ends as if they were nowhere."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import csv_of, lines
from fedtailor import newcomers
from fedtailor.algorithms import ALGORITHMS
from fedtailor.cases import cases
from fedtailor.compare import markdown, row
from fedtailor.config import Experiment, parse
from fedtailor.core import Fit, Letters, Message
from fedtailor.data.examples import Subset
from fedtailor.engines.states import States
from fedtailor.engines.training import fit
from fedtailor.errors import ConfigError
from fedtailor.folder import checkpoint
from fedtailor.predict import predict
from fedtailor.run import Watch, run
from fedtailor.simulation import build, federates
from test_contract import CASES
from tiny import LABELS

MEASURED = ("seconds", "seconds_total", "peak_memory_bytes")
USERS = 5


def texts(users: int) -> list[tuple[str, str, str]]:
    """Each user has a word of its own, and labels that one word of the text gives away."""
    return [(f"{LABELS[k % 3]} w{k % 7} w{k // 15} fox", LABELS[k % 3], f"u{k // 15}") for k in range(15 * users)]


@pytest.fixture
def made(tmp_path: Path, folders: Callable[[str], Path]) -> Callable[..., Experiment]:
    (tmp_path / "all.csv").write_text(csv_of(texts(USERS)), encoding="utf-8")
    (tmp_path / "fewer.csv").write_text(csv_of(texts(USERS - 1)), encoding="utf-8")
    (tmp_path / "test.csv").write_text(csv_of([(t, label, "") for t, label, _ in texts(1)]), encoding="utf-8")

    def experiment(late: Any = ("u4",), **more: Any) -> Experiment:
        """Of all users but the late ones, or where nobody is late of all that there are in the smaller file."""
        clients = {"count": USERS if late else USERS - 1, "partition": {"kind": "natural", "column": "user"}, "test": 0.4}
        values: dict[str, Any] = {
            "name": "n",
            "rounds": 2,
            "model": {"name": str(folders("bert"))},
            "data": {"name": str(tmp_path / ("all.csv" if late else "fewer.csv")), "test": str(tmp_path / "test.csv")},
            "clients": {**clients, "newcomers": list(late) if isinstance(late, tuple) else late},
            "technique": {"kind": "lora", "rank": 2},
            "train": {"batch": 4, "lr": 0.05},
        }
        for key, value in more.items():
            values[key] = {**values[key], **value} if isinstance(values.get(key), dict) and "kind" not in value else value
        return parse(values)

    return experiment


def told(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """What a run says of its rounds, and of the clients that trained."""
    table = list(csv.DictReader((folder / "clients.csv").read_text(encoding="utf-8").splitlines()))
    both = ("metric_newcomer", "metric_joined")
    there = [{k: v for k, v in line.items() if k not in both} for line in table if line["device"] != "newcomer"]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(folder)], there


@pytest.mark.parametrize(
    "changes",
    [
        {"filters": {"up": ["int8"]}, "clients": {"per_round": 3}},
        {"algorithm": {"kind": "fedper"}},
        {"algorithm": {"kind": "pooled"}},
        {"algorithm": {"kind": "local"}, "train": {"decay": "cosine"}},
        {"algorithm": {"kind": "pfedpg"}, "technique": {"kind": "prompt", "length": 2}},
    ],
    ids=lambda changes: changes.get("algorithm", {}).get("kind", "int8"),
)
def test_a_run_with_newcomers_ends_as_one_whose_data_lacks_them(
    made: Callable[..., Experiment], tmp_path: Path, changes: dict[str, Any]
) -> None:
    alone = run(made((), **changes), tmp_path / "alone")
    watched = run(made(**changes), tmp_path / "watched")
    assert told(tmp_path / "alone") == told(tmp_path / "watched")
    extra = watched.keys() - alone.keys()
    assert extra == {"newcomers", "newcomers_mean", "newcomers_joined_mean"}
    assert {k: v for k, v in watched.items() if k not in (*extra, *MEASURED)} == {
        k: v for k, v in alone.items() if k not in MEASURED
    }
    assert watched["newcomers"].keys() == {"u4"}


def test_a_resumed_run_ends_as_one_that_was_not(made: Callable[..., Experiment], tmp_path: Path) -> None:
    experiment = made(algorithm={"kind": "fedrep"}, rounds=3)
    whole = run(experiment, tmp_path / "whole")

    def cut(line: dict[str, Any]) -> None:
        if line["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(experiment, tmp_path / "cut", watch=Watch(round=cut))
    for _ in range(2):  # the second time nothing is left to train
        again = run(experiment, tmp_path / "cut", resume=True)
        assert again["state_hash"] == whole["state_hash"]
        assert again["newcomers"] == whole["newcomers"]
        assert told(tmp_path / "whole") == told(tmp_path / "cut")


@pytest.mark.parametrize("kind", sorted(set(ALGORITHMS) - {"rag"}))
def test_judging_newcomers_leaves_every_algorithms_run_as_it_was(
    made: Callable[..., Experiment], tmp_path: Path, kind: str
) -> None:
    case = CASES[kind]
    plan = {k: v for k, v in case.plan._asdict().items() if k in ("epochs", "steps", "batch", "optimizer", "lr")}
    technique = {"kind": case.technique, **(case.topts or ({"rank": 2} if case.technique == "lora" else {}))}
    changes: dict[str, Any] = {
        "rounds": max(2, min(case.plan.rounds, 4)),
        "algorithm": {"kind": kind, **case.options},
        "technique": technique,
        "train": {**plan, "decay": "linear"},
    }
    if case.sizes:
        name = "ranks" if case.technique == "lora" else "lengths"
        changes["clients"] = {name: sorted(set(case.sizes.values()))}
    if kind == "distil":
        changes["data"] = {"public": 0.2}
    before: dict[str, Any] = {}

    def stage(name: str) -> None:
        if name == "judging newcomers":
            states = States(tmp_path / "run" / "state")
            found = states.resume()
            assert found is not None
            before.update(hash=states.hash(found[1]), files=sorted(p.name for p in (tmp_path / "run" / "state").iterdir()))

    summary = run(made(**changes), tmp_path / "run", watch=Watch(stage=stage))
    assert before["hash"] == summary["state_hash"]
    left = sorted(p.name for p in (tmp_path / "run" / "state").iterdir())
    assert set(left) <= set(before["files"])  # what split learning kept for going on is gone
    assert not any("u4" in name for name in left)
    assert summary["newcomers"].keys() == {"u4"}
    assert 0 <= summary["newcomers_mean"] <= 1
    assert 0 <= summary["newcomers_joined_mean"] <= 1
    if not build(made(**changes)).algorithm.personal:
        assert summary["newcomers_joined_mean"] == summary["newcomers_mean"]


def test_as_it_comes_a_newcomer_has_what_predict_says(made: Callable[..., Experiment], tmp_path: Path) -> None:
    experiment = made(late=2)
    summary = run(experiment, tmp_path / "run")
    world, every = build(experiment), texts(USERS)
    assert set(summary["newcomers"]) == set(world.newcomers)
    assert not set(world.newcomers) & set(world.clients)
    assert len(world.newcomers) == 2
    for client, rows in world.newcomers.items():
        found = predict(tmp_path / "run", [every[i][0] for i in rows.test])
        right = [one["label"] == every[i][1] for one, i in zip(found, rows.test, strict=True)]
        assert {every[i][2] for i in rows.test} == {client}
        assert summary["newcomers"][client] == {"metric": sum(right) / len(right), "joined": sum(right) / len(right)}


def test_joining_is_the_personal_round_at_the_first_rate(made: Callable[..., Experiment], tmp_path: Path) -> None:
    """Full batches, so that no order matters: two fits by hand from the federation's tree."""
    experiment = made(algorithm={"kind": "finetune"}, train={"batch": 64, "epochs": 3, "decay": "linear"}, clients={"joining": 2})
    summary = run(experiment, tmp_path / "run")
    world, (_, state, _) = build(experiment), checkpoint(tmp_path / "run")
    site, params = world.sites("u4", 0), state["params"]
    plan = world.job.plan._replace(decay="constant")
    metrics = [value(world, params, site)]
    for _ in range(2):
        ask = Fit(world.job.loss, params, site.data["train"], {}, plan)
        params = fit([ask], [torch.Generator()], world.technique.bind(False))[0].params
        metrics.append(value(world, params, site))
    assert summary["newcomers"]["u4"] == {"metric": metrics[0], "joined": metrics[-1]}
    assert metrics[-1] > metrics[0]


def value(world: Any, params: Any, site: Any) -> float:
    """A tree's metric on this site's test rows, in one batch."""
    rows = site.data["test"]
    batch = rows.batch(range(len(rows)), int(max(rows.lengths)), len(rows))
    with torch.no_grad():
        return world.metric.value(world.metric.tally(world.job.judge(world.technique.bind(False), params, batch)))  # type: ignore[no-any-return]


def test_alone_a_newcomer_gets_as_far_as_a_client_in_as_many_rounds(made: Callable[..., Experiment], tmp_path: Path) -> None:
    train = {"batch": 64, "epochs": 4}
    late = run(made(algorithm={"kind": "local"}, train={**train, "decay": "cosine"}, clients={"joining": 3}), tmp_path / "late")
    everybody = made(algorithm={"kind": "local"}, rounds=3, train=train, clients={"newcomers": 0})
    run(everybody, tmp_path / "everybody")
    table = csv.DictReader((tmp_path / "everybody" / "clients.csv").read_text(encoding="utf-8").splitlines())
    own = {line["client"]: float(line["metric"]) for line in table}
    assert late["newcomers"]["u4"]["joined"] == own["u4"]
    assert late["newcomers"]["u4"]["metric"] < own["u4"]


def test_the_pool_and_the_servers_validation_rows_are_of_those_who_train(made: Callable[..., Experiment]) -> None:
    world = build(made())
    theirs = {int(i) for rows in world.newcomers["u4"] for i in rows}
    assert len(theirs) == 15
    for sites in (world.sites, world.valid_sites):
        for part in sites("server", 0).data.values():
            assert isinstance(part, Subset)
            assert part.source is world.test or not theirs & set(part.rows.tolist())
    assert world.counts.sum() == sum(len(rows.train) for rows in world.clients.values())
    assert world.job.clients == USERS - 1
    assert world.facts.clients == ["u0", "u1", "u2", "u3"]


def test_a_draw_is_of_the_seed(made: Callable[..., Experiment]) -> None:
    drawn = [tuple(build(made(late=2, seed=seed)).newcomers) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clients": {"newcomers": 5}}, "leaves none of 5 clients to train: name 4 or fewer"),
        ({"clients": {"newcomers": 9}}, "leaves none of 5 clients to train"),
        ({"clients": {"newcomers": ["u9"]}}, "clients.newcomers: there is no client 'u9': did you mean"),
        ({"clients": {"test": 0.0}}, "judged on their own test rows: set clients.test above 0"),
        ({"clients": {"newcomers": "u4"}}, "'clients.newcomers' should be a number of clients, or a list of their names"),
        ({"clients": {"newcomers": -1}}, "'clients.newcomers' should be a number of clients"),
        ({"clients": {"joining": 0}}, "'clients.joining' should be greater than or equal to 1"),
        (
            {"algorithm": {"kind": "rag"}, "technique": {"kind": "retriever"}},
            "algorithm rag answers from the rows of whoever is asked, and has nothing for clients that join: leave clients.newcomers out",
        ),
    ],
)
def test_what_cannot_be_is_refused(made: Callable[..., Experiment], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(made(**changes))


def test_a_federation_between_owners_has_none(made: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match=r"clients.newcomers are judged in a simulation only: use run, or leave it out"):
        federates(made())
    federates(made(()))


def test_what_searches_prompts_is_not_pooled_with_newcomers(made: Callable[..., Experiment]) -> None:
    changes = {"algorithm": {"kind": "prompt-search"}, "technique": {"kind": "template"}, "compare": {"baselines": ["pooled"]}}
    with pytest.raises(ConfigError, match="pooled by one client that has everything, also the newcomers' rows"):
        list(cases(made(**changes)))
    assert [case.name for case in cases(made((), **changes))] == ["prompt-search", "pooled"]


def test_a_table_shows_newcomers_only_where_there_are_any() -> None:
    one: dict[str, Any] = {"metric": "accuracy", "seed": 0, "run": "r", "global_test": 0.5, "clients_mean": 0.25}
    without = row("a", [one])
    late = row("b", [{**one, "newcomers_mean": 0.125, "newcomers_joined_mean": 0.375}])
    assert "newcomers" not in markdown([without])
    assert late["newcomers_joined_mean"] == {"mean": 0.375, "low": 0.375, "high": 0.375}
    head, _, *body = markdown([without, late]).splitlines()
    assert "| newcomers | newcomers, joined |" in head
    assert "| - | - |" in body[0]
    assert "| 0.1250 | 0.3750 |" in body[1]


def test_the_servers_state_is_given_up_but_for_what_is_the_newcomers() -> None:
    state = {"params": {"w": 1}, "clients": {"a": {"n": 1}}, "round": 3, "tuned": ["a"]}
    after = {"params": {"w": 2}, "clients": {"a": {"n": 2}, "z": {"n": 9}}, "round": 4, "tuned": ["a", "z"]}
    assert newcomers.remembering(state, after, ["z"]) == {**state, "clients": {"a": {"n": 1}, "z": {"n": 9}}}
    assert state["clients"] == {"a": {"n": 1}}


def test_letters_to_others_are_not_sent() -> None:
    def talk() -> Any:
        first = yield {"a": Message("x"), "z": Message("y")}
        second = yield Letters({"a": Message("x"), "server": Message("y")}, "any", "said")
        return first, second

    held = newcomers.among(talk(), ["z"])
    assert next(held) == Letters({"z": Message("y")})
    assert held.send({"z": Message("1")}) == Letters({"server": Message("y")}, "any", "said")
    with pytest.raises(StopIteration) as end:
        held.send({})
    assert end.value.value == ({"z": Message("1")}, {})


def test_the_shared_model_is_judged_at_every_client_that_trained(made: Callable[..., Experiment], tmp_path: Path) -> None:
    experiment = made(algorithm={"kind": "ditto", "lam": 0.5}, train={"lr": 0.2})
    summary = run(experiment, tmp_path / "run")
    world, (_, state, _) = build(experiment), checkpoint(tmp_path / "run")
    table = csv.DictReader((tmp_path / "run" / "clients.csv").read_text(encoding="utf-8").splitlines())
    told = {line["client"]: line["metric_shared"] for line in table}
    found = {c: value(world, state["params"], world.sites(c, 0)) for c in world.clients}
    assert told == {**{c: str(x) for c, x in found.items()}, "u4": ""}
    assert summary["clients_mean_shared"] == pytest.approx(sum(found.values()) / len(found))
    assert summary["clients_mean_shared"] != summary["clients_mean"]


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"kind": "fedavg"}},  # everybody's model is the shared one
        {"algorithm": {"kind": "local"}},  # nothing is shared
        {"algorithm": {"kind": "ditto"}, "clients": {"ranks": [1, 2]}},  # it does not fit everybody
    ],
    ids=["fedavg", "local", "ranks"],
)
def test_where_there_is_no_shared_model_beside_ones_own_nothing_is_said(
    made: Callable[..., Experiment], tmp_path: Path, changes: dict[str, Any]
) -> None:
    summary = run(made((), **changes), tmp_path / "run")
    assert "clients_mean_shared" not in summary
    assert "metric_shared" not in (tmp_path / "run" / "clients.csv").read_text(encoding="utf-8")


def test_the_summary_is_json_and_says_each_newcomers_values(made: Callable[..., Experiment], tmp_path: Path) -> None:
    summary = run(made(late=2, algorithm={"kind": "fedper"}), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert stored["newcomers"] == summary["newcomers"]
    for name, mean in (("metric", "newcomers_mean"), ("joined", "newcomers_joined_mean")):
        assert stored[mean] == pytest.approx(sum(line[name] for line in stored["newcomers"].values()) / 2)
    table = csv.DictReader((tmp_path / "run" / "clients.csv").read_text(encoding="utf-8").splitlines())
    late = {line["client"]: line for line in table if line["device"] == "newcomer"}
    for client, line in late.items():
        assert float(line["metric_newcomer"]) == stored["newcomers"][client]["metric"]
        assert float(line["metric_joined"]) == stored["newcomers"][client]["joined"]
        assert line["metric"] == ""
        assert float(line["letters"]) == 0
    assert late.keys() == stored["newcomers"].keys()
