"""The experiment of arXiv 2601.00526: its files are what the docs say of them, and its tables say what the rows say."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedtailor.cases import cases
from fedtailor.compare import interval
from fedtailor.config import load
from fedtailor.run import run

FOLDER = Path(__file__).parents[1] / "experiments" / "paper-2601.00526"
FILES = sorted(path.stem for path in FOLDER.glob("*.toml"))


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", FOLDER / "table.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("preset", ["small", None])
def test_every_file_makes_cases_of_three_seeds_or_more(name: str, preset: str | None) -> None:
    if name == "fedpetuning" and preset:
        return
    found = list(cases(load(FOLDER / f"{name}.toml", preset=preset)))
    seeds = {case.seed for case in found}
    assert len(seeds) >= 3
    assert len(found) == len(seeds) * len({case.name for case in found})


def test_a_small_preset_changes_sizes_and_no_case() -> None:
    for name in (n for n in FILES if n != "fedpetuning"):
        small, whole = (list(cases(load(FOLDER / f"{name}.toml", preset=preset))) for preset in ("small", None))
        assert [(c.name, c.choices) for c in small] == [(c.name, c.choices) for c in whole]


def test_pooled_and_federated_make_the_same_passes() -> None:
    for case in cases(load(FOLDER / "sst2.toml", preset="small")):
        asked = case.experiment(case.choices[0])
        if case.pooled and "distil" not in case.name and asked.technique.kind not in ("template", "retriever"):
            assert (asked.rounds, asked.train.epochs, asked.clients.per_round) == (12, 0.5, None)


# FedPETuning


def test_the_setting_of_fedpetuning_is_the_published_one() -> None:
    asked = load(FOLDER / "fedpetuning.toml")
    assert (asked.clients.count, asked.clients.per_round, asked.rounds) == (100, 10, 100)
    assert (asked.train.epochs, asked.train.batch, asked.data.max_length) == (1.0, 32, 128)
    assert asked.algorithm.options == {"weighting": "uniform"}
    assert len(asked.compare.seeds) == 5
    found = {c.name: c.experiment(c.choices[0]) for c in cases(asked)}
    prefix = found["prefix, clients.partition=dirichlet 1.0"]
    assert (prefix.technique.options, prefix.train.lr) == ({"length": 64}, 1e-4)
    lora = found["lora, clients.partition=dirichlet 0.1"]
    assert (lora.technique.options, lora.train.lr) == ({"rank": 8, "alpha": 8.0}, 1e-3)
    assert found["full, clients.partition=dirichlet 10.0"].train.lr == 5e-5


def test_it_runs_where_its_model_and_data_are_local(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The same file: a RoBERTa in a folder, GLUE's columns in a data set on disk."""
    import datasets

    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names, "idx": datasets.Value("int32")})
    rows = {"sentence": [f"w{k % 9} fine" if k % 2 else f"w{k % 7} bad" for k in range(80)], "label": [k % 2 for k in range(80)]}
    train = datasets.Dataset.from_dict({**rows, "idx": range(80)}, features)
    hidden = datasets.Dataset.from_dict({**rows, "label": [-1] * 80, "idx": range(80)}, features)
    splits = {"train": train, "validation": train.select(range(10)), "test": hidden}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "glue")
    smaller = ["clients.count=4", "clients.per_round=2", "rounds=2", "technique.length=3", "data.max_length=32"]
    where = [f"model.name={folders('roberta')}", f"data.name={tmp_path / 'glue'}"]
    summary = run(load(FOLDER / "fedpetuning.toml", [*smaller, *where]), tmp_path / "run")
    assert summary["metric"] == "accuracy"
    assert summary["train_rows"] < 80
    assert summary["partition"]["labels"] == ["negative", "positive"]


# The tables


def made(name: str, partition: dict[str, Any] | None, values: list[float], **more: Any) -> dict[str, Any]:
    changes = {"clients.partition": partition} if partition else {}
    each = [{"seed": seed, "global_test": value} for seed, value in enumerate(values)]
    curves = [[{"round": 1, "bytes": 10, "clock": 5.0, "valid": value}] for value in values]
    sizes = {"bytes_up_per_client_round": interval([1000.0]), "bytes_down_per_client_round": interval([3000.0])}
    return {
        "name": name, "metric": "accuracy", "changes": changes, "pooled": None, "global_test": interval(values),
        "values": each, "curves": curves, **sizes, **more,
    }  # fmt: skip


def test_tables_say_what_the_rows_say(table: ModuleType, tmp_path: Path) -> None:
    iid, skew = table.PARTITIONS["iid"], table.PARTITIONS["alpha 0.1"]
    rows = [
        made("full, x", iid, [0.9, 0.9, 0.9], forward_flops_per_example=interval([2.0]), flops_per_example=interval([6.0])),
        made("prefix, x", iid, [0.8, 0.7, 0.9], pooled="pooled, prefix", to_pooled=interval([-0.1, -0.1, -0.1])),
        made("prefix, y", skew, [0.6, 0.5, 0.8]),
        made("pooled, prefix", None, [0.9, 0.8, 1.0]),
        {"name": "majority", "metric": "accuracy", "global_test": interval([0.5])},
    ]
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.task_table(rows)}
    half = interval([-0.2, -0.2, -0.1])["high"] - interval([-0.2, -0.2, -0.1])["mean"]
    assert lines["prefix"][0] == "0.900 ± 0.248"
    assert lines["prefix"][3] == "-10.0 ± 0.0"
    assert lines["prefix"][5] == f"-16.7 ± {100 * half:.1f}"
    assert lines["majority"][0] == "0.500"
    costs = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in table.cost_table(rows, {"full": 5e8})
    }
    assert costs["full"][5:] == ["3.00", "0.0", "500"]
    assert costs["prefix"][1:4] == ["1.0", "3.0", "1 x"]
    assert table.until(rows[1], 0.75) == "5 s (2 of 3)"
    assert table.until(rows[1], 0.95) == "never"
    table.pictures({"sst2": rows}, tmp_path)
    assert "<svg" in (tmp_path / "quality.svg").read_text(encoding="utf-8")


def test_summaries_of_the_paper_stand_there_as_unverified(table: ModuleType) -> None:
    rows = [made("prefix, x", table.PARTITIONS["iid"], [0.8, 0.7], to_pooled=interval([-0.1, -0.2]))]
    head, _, line = table.mean_table({"sst2": rows})
    assert head.count("reported by a summary, unverified") == 2
    assert "| -15.0 |" in line
    assert "| -0.2 | 120 MB |" in line
