"""Choosing on validation data: what was tried, what was kept, and that the test set had no say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtailor.cases import cases
from fedtailor.compare import bytes_to, compare
from fedtailor.config import Experiment, parse
from fedtailor.errors import ConfigError, RunError
from fedtailor.run import Watch


@pytest.fixture(scope="module")
def experiment(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Experiment]:
    data = tmp_path_factory.mktemp("data") / "d.csv"
    rows = [f"w{k % 7} the {word} fox,{word}" for k, word in enumerate(["good", "bad", "fine"] * 30)]
    data.write_text("\n".join(["text,label", *rows]), encoding="utf-8")

    def made(compare: dict[str, Any], **more: Any) -> Experiment:
        return parse(
            {
                "name": "c",
                "rounds": 2,
                "model": {"name": str(folders("bert"))},
                "data": {"name": str(data)},
                "clients": {"count": 2, "valid": 0.2},
                "technique": {"kind": "lora", "rank": 2},
                "train": {"batch": 8},
                "compare": compare,
                **more,
            }
        )

    return made


def test_each_case_and_baseline_chooses_by_its_own_validation(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    asked = experiment({"seeds": [0, 1], "baselines": ["pooled"], "choose": {"train.lr": [1e-9, 3e-2]}})
    rows = compare(asked, tmp_path)
    assert [row["name"] for row in rows] == ["fedavg", "pooled"]
    for row in rows:
        assert row["chosen"] == {"train.lr": 3e-2}
        assert [t["train.lr"] for t in row["tried"]] == [1e-9, 3e-2]
        for tried in row["tried"]:
            lines = (tmp_path / row["name"] / f"train.lr={tried['train.lr']}" / "seed-0" / "rounds.jsonl").read_text("utf-8")
            assert json.loads(lines.splitlines()[-1])["valid"] == tried["valid"]
        assert [Path(run).parts[-2:] for run in row["runs"]] == [("train.lr=0.03", f"seed-{seed}") for seed in (0, 1)]
        # The rate that was not chosen ran with the first seed alone.
        assert not (tmp_path / row["name"] / "train.lr=1e-09" / "seed-1").exists()
    assert "(train.lr=0.03 chosen)" in (tmp_path / "compare.md").read_text(encoding="utf-8")


def test_a_value_that_diverges_is_the_worst(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    told: list[str] = []

    def watch(title: str, rounds: int) -> Watch:
        return Watch(notice=lambda line: told.append(f"{title}: {line}"))

    choose = {"train.lr": [1e30, 3e-2]}
    asked = experiment({"baselines": ["pooled", "local"], "choose": choose}, train={"batch": 8, "epochs": 3})
    for _ in range(2):  # also where it is there already
        told.clear()
        rows = compare(asked, tmp_path, watch)
        assert [row["name"] for row in rows] == ["fedavg", "pooled", "local"]
        for row in rows:
            assert row["chosen"] == {"train.lr": 3e-2}
            assert row["tried"][0] == {"train.lr": 1e30, "valid": None, "valid_loss": None}
            assert row["tried"][1]["valid"] is not None
            title = f"{row['name']}, train.lr=1e+30 (seed 0): no client was heard in 2 rounds"
            assert [line.startswith(title) for line in told if "counted as the worst" in line].count(True) == 1
        assert sum("counted as the worst" in line for line in told) == 3


def test_values_that_all_diverge_are_an_error(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    asked = experiment({"choose": {"train.lr": [1e30, 1e29]}}, train={"batch": 8, "epochs": 3})
    with pytest.raises(RunError, match=r"'fedavg': every value .* diverges \(train.lr=1e\+30; train.lr=1e\+29\)") as caught:
        compare(asked, tmp_path)
    assert "\n" not in str(caught.value)


def test_another_failure_of_a_candidate_stops_the_comparison(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtailor.run.evaluate", full)
    with pytest.raises(RunError, match="No space left"):
        compare(experiment({"choose": {"train.lr": [1e-2, 3e-2]}}), tmp_path)


def test_a_length_that_nobody_asked_for_gives_way(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    """The model has 64 positions; the other tests here leave the usual 128 open."""
    with pytest.raises(ConfigError, match=r"data.max_length = 128: .* to 64 or less"):
        compare(experiment({"sets": [{"data.max_length": 128}]}), tmp_path)


def test_without_seeds_the_experiments_own_is_used(experiment: Callable[..., Experiment]) -> None:
    assert [case.seed for case in cases(experiment({}, seed=7))] == [7]
    assert [case.seed for case in cases(experiment({"seeds": [1, 2]}, seed=7))] == [1, 2]


def test_a_set_may_choose_among_its_own_values(experiment: Callable[..., Experiment]) -> None:
    sets = [{"technique.rank": 1, "choose": {"train.lr": [1e-3]}}, {"technique.rank": 2}]
    found = list(cases(experiment({"sets": sets, "choose": {"train.lr": [1e-2, 1e-1]}})))
    assert [case.choices for case in found] == [[{"train.lr": 1e-3}], [{"train.lr": 1e-2}, {"train.lr": 1e-1}]]
    assert [case.name for case in found] == ["technique.rank=1", "technique.rank=2"]


def test_a_baseline_does_not_choose_what_it_does_not_have(experiment: Callable[..., Experiment]) -> None:
    asked = experiment({"baselines": ["pooled"], "choose": {"algorithm.weighted": [True, False], "train.lr": [1e-3]}})
    found = {case.name: case.choices for case in cases(asked)}
    assert len(found["fedavg"]) == 2
    assert found["pooled"] == [{"train.lr": 1e-3}]


@pytest.mark.parametrize(
    ("section", "more", "line"),
    [
        ({"vary": {"seed": [0, 1]}}, {}, "compare.seeds"),
        ({"choose": {"train.lr": []}}, {}, "compare.choose: 'train.lr' has no values"),
        ({"choose": {"train.rate": [1, 2]}}, {}, "unknown key 'train.rate'"),
        ({"sets": [{"choose": ["train.lr"]}]}, {}, "write choose as"),
        ({"sets": [{"baselines": ["pooled"]}]}, {}, "some of compare.baselines"),
        ({"sets": [{"tasks": ["lnog"]}], "tasks": [{"name": "long"}]}, {}, "no task 'lnog': did you mean 'long'"),
        ({"sets": [{"name": "a"}, {"name": "a", "technique.rank": 3}]}, {}, "two cases would be called 'a'"),
        ({"choose": {"train.lr": [1e-3, 1e-2]}}, {"evaluate": {"every": 0}}, "needs validation data"),
        ({"choose": {"train.lr": [1e-3, 1e-2]}}, {"clients": {"count": 2, "valid": 0}}, "needs validation data"),
    ],
)
def test_what_cannot_be_chosen_is_said_before_the_first_run(
    section: dict[str, Any], more: dict[str, Any], line: str, experiment: Callable[..., Experiment]
) -> None:
    with pytest.raises(ConfigError, match=line):
        list(cases(experiment(section, **more)))


def test_a_baseline_takes_nothing_from_another() -> None:
    """In whatever order they are named: zero-shot knows no technique and no rate, pooled keeps both."""
    found = {}
    for baselines in (["zero-shot", "pooled"], ["pooled", "zero-shot"]):
        compare = {"vary": {"technique.kind": ["head", "lora"]}, "baselines": baselines, "choose": {"train.lr": [0.1, 0.2]}}
        values = {"compare": compare, "clients": {"kinds": [{"technique": {"kind": "ia3"}}]}, "algorithm": {"kind": "local"}}
        found[baselines[0]] = {case.name: case for case in cases(Experiment.model_validate(values))}
    assert set(found["pooled"]) == set(found["zero-shot"])
    assert set(found["pooled"]) == {
        "technique.kind=head", "technique.kind=lora", "pooled, technique.kind=head", "pooled, technique.kind=lora", "zero-shot",
    }  # fmt: skip
    for table in found.values():
        assert len(table["pooled, technique.kind=lora"].choices) == 2
        assert table["zero-shot"].choices == [{}]
        zero = table["zero-shot"].experiment({})
        assert (zero.technique.kind, zero.algorithm.kind, zero.rounds) == ("template", "zero-shot", 1)
        assert zero.clients.kinds == table["pooled, technique.kind=head"].experiment({}).clients.kinds == []
        assert len(table["technique.kind=head"].experiment({}).clients.kinds) == 1


def test_sets_may_have_names_and_share_a_baseline(experiment: Callable[..., Experiment]) -> None:
    sets = [
        {"name": "small", "technique.rank": 1, "choose": {"train.lr": [1e-3, 1e-2]}},
        {"name": "prox", "technique.rank": 1, "algorithm.kind": "fedprox", "choose": {"train.lr": [1e-3, 1e-2]}},
        {"name": "alone", "technique.rank": 2, "baselines": []},
    ]
    vary = {"clients.partition": [{"kind": "iid"}, {"kind": "dirichlet", "alpha": 0.1}]}
    found = list(cases(experiment({"sets": sets, "vary": vary, "baselines": ["pooled"], "seeds": [4, 3]})))
    names = [(case.name, case.pooled) for case in found if case.seed == 4]
    assert names == [
        ("small, clients.partition=iid", "pooled, small"),
        ("pooled, small", None),
        ("small, clients.partition=dirichlet 0.1", "pooled, small"),
        ("prox, clients.partition=iid", "pooled, small"),
        ("prox, clients.partition=dirichlet 0.1", "pooled, small"),
        ("alone, clients.partition=iid", None),
        ("alone, clients.partition=dirichlet 0.1", None),
    ]
    assert [case.seed for case in found] == [4] * 7 + [3] * 7  # a whole table of one seed before the next


def test_every_set_is_run_on_every_task_that_it_suits(experiment: Callable[..., Experiment]) -> None:
    tasks = [
        {"name": "short", "data.max_length": 16},
        {"name": "long", "data.max_length": 32, "technique.rank": 2, "choose": {"train.lr": [1e-3, 1e-2]}},
    ]
    sets = [{"name": "mean"}, {"name": "prox", "algorithm.kind": "fedprox", "technique.rank": 3, "tasks": ["long"]}]
    asked = experiment({"sets": sets, "tasks": tasks, "baselines": ["pooled", "majority"]})
    found = {case.name: case for case in cases(asked)}
    assert list(found) == ["short, mean", "short, pooled", "long, mean", "long, pooled", "long, prox", "long, pooled, prox"]
    assert [case.task for case in found.values()] == ["short"] * 2 + ["long"] * 4
    assert found["long, mean"].pooled == "long, pooled"  # its name has no set's: no set changes it
    prox = found["long, prox"].experiment({})
    assert (prox.data.max_length, prox.technique.options["rank"]) == (32, 3)  # the set's word comes last
    assert len(found["short, mean"].choices) == 1
    assert len(found["long, prox"].choices) == 2
    assert [case.name for case in cases(asked, ["long", "mean"])] == ["long, mean", "long, pooled"]
    assert [case.name for case in cases(asked, ["short"])] == ["short, mean", "short, pooled"]
    with pytest.raises(ConfigError, match=r"--only porx: did you mean 'prox'\?"):
        list(cases(asked, ["porx"]))
    with pytest.raises(ConfigError, match=r"--only LONG: did you mean 'long'\?"):
        list(cases(asked, ["LONG"]))
    with pytest.raises(ConfigError, match="name nothing"):
        list(cases(experiment({}), ["prox"]))


def test_the_commonest_class_is_that_of_each_task(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    tasks = [{"name": "all", "clients.valid": 0.2}, {"name": "few", "data.limit": 40, "clients.valid": 0.2}]
    rows = compare(experiment({"tasks": tasks, "baselines": ["majority"]}), tmp_path)
    assert [row["name"] for row in rows] == ["all", "few", "all, majority", "few, majority"]
    for row, flat in zip(rows[:2], rows[2:], strict=True):
        summary = json.loads((Path(row["runs"][0]) / "summary.json").read_text("utf-8"))
        assert flat["global_test"]["mean"] == summary["majority"]


def test_pooled_search_is_one_client_that_has_everything(experiment: Callable[..., Experiment]) -> None:
    sets = [{"name": "words", "technique.kind": "template", "algorithm.kind": "prompt-search", "algorithm.rows": 8}]
    clients = {"count": 5, "per_round": 2, "devices": [{"name": "slow", "uplink_mbps": 1}], "deadline": 9.0}
    case = list(cases(experiment({"sets": sets, "baselines": ["pooled"]}, clients=clients)))[1]
    there = case.experiment({})
    assert case.name == "pooled, words"
    assert (there.clients.count, there.clients.per_round, there.clients.devices, there.clients.deadline) == (1, None, [], 0)
    assert (there.algorithm.kind, there.algorithm.options) == ("prompt-search", {"rows": 8})


def test_differences_to_pooled_are_paired_by_seed(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    rows = compare(experiment({"baselines": ["pooled", "majority"], "seeds": [0, 1, 2]}), tmp_path)
    ours, pooled = rows[0], rows[1]
    differences = [a["global_test"] - b["global_test"] for a, b in zip(ours["values"], pooled["values"], strict=True)]
    assert ours["to_pooled"]["mean"] == pytest.approx(sum(differences) / 3)
    assert "to_pooled" not in pooled
    for run, points in zip(ours["runs"], ours["curves"], strict=True):
        lines = [json.loads(line) for line in (Path(run) / "rounds.jsonl").read_text("utf-8").splitlines()]
        assert [p["valid"] for p in points] == [line["valid"] for line in lines]
        assert points[-1]["bytes"] == json.loads((Path(run) / "summary.json").read_text("utf-8"))["bytes_total"]
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "| to pooled |" in text
    assert "| MB to 99 % |" in text


def test_bytes_until_nearly_the_best() -> None:
    points = [{"bytes": 10.0 * k, "valid": v} for k, v in enumerate([0.5, 0.80, 0.79, 0.805], 1)]
    assert bytes_to(0.99, points, "accuracy") == 20
    assert bytes_to(1.0, points, "accuracy") == 40
    assert (
        bytes_to(0.99, [{"bytes": 1.0, "valid": 9.0}, {"bytes": 2.0, "valid": 5.04}, {"bytes": 3.0, "valid": 5.0}], "perplexity")
        == 2
    )
    assert bytes_to(0.99, [], "accuracy") is None
