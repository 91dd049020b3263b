"""The experiment file: every key survives TOML; what is wrong is named with its line and the nearest right key."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import BaseModel

from fedtailor.config import Experiment, OpenSection, Section, load, override, parse
from fedtailor.core import Plan
from fedtailor.errors import ConfigError
from fedtailor.folder import plain

# One value a key, none of them the default: a key that is missing here fails a test below.
FULL: dict[str, Any] = {
    "name": "full-1.0_x",
    "seed": 7,
    "rounds": 3,
    "model": {"name": "some/model", "revision": "v2", "labels": 4},
    "data": {
        "name": "/somewhere/d.csv",
        "subset": "sub",
        "kind": "text",
        "text": "sentence",
        "pair": ["a", "b"],
        "label": "y",
        "labels": ["a", "b"],
        "test": "dev.tsv",
        "public": "/somewhere/others.csv",
        "public_limit": 40,
        "limit": 100,
        "test_limit": 50,
        "max_length": 64,
        "metric": "f1",
    },
    "clients": {
        "count": 4,
        "per_round": 2,
        "partition": {"kind": "dirichlet", "alpha": 0.3},
        "test": 0.3,
        "newcomers": ["a", "b"],
        "joining": 2,
        "valid": 0.2,
        "devices": [
            {
                "name": "phone",
                "share": 2.0,
                "gflops": 1.5,
                "memory_mb": 512.0,
                "uplink_mbps": 5.0,
                "downlink_mbps": 20.0,
                "latency_ms": 40.0,
                "dropout": 0.1,
                "packet_loss": 0.01,
            },
            {"name": "laptop"},
        ],
        "deadline": 12.5,
        "min_clients": 2,
        "grace": 5.0,
        "ranks": [2, 4],
        "lengths": [3, 5],
        "kinds": [
            {
                "model": {"name": "/somewhere/model", "revision": "v1", "labels": 4},
                "technique": {"kind": "lora", "rank": 2},
            },
        ],
    },
    "technique": {"kind": "lora", "rank": 4, "target": ["query"]},
    "algorithm": {"kind": "fedadam", "lr": 0.05},
    "train": {
        "epochs": 0.5,
        "steps": 9,
        "batch": 8,
        "optimizer": "sgd",
        "lr": 0.125,
        "weight_decay": 0.1,
        "momentum": 0.9,
        "decay": "linear",
        "schedule": "cosine",
        "clip": 1.0,
        "dropout": True,
    },
    "filters": {"up": ["int8", "bf16"], "down": ["bf16"]},
    "engine": {
        "kind": "ray",
        "address": "auto",
        "actors": 2,
        "ordered": True,
        "stacked": False,
        "group": 3,
        "workers": 2,
        "device": "cpu",
        "precision": "bf16",
        "server_gflops": 50,
    },
    "evaluate": {"every": 2, "valid_limit": 10, "sample": 5},
    "track": {"to": ["tensorboard"], "project": "p"},
    "compare": {
        "vary": {"technique.kind": ["prefix", "lora"], "train.lr": [0.1, 0.2]},
        "seeds": [0, 1],
        "choose": {"train.batch": [4, 8]},
        "baselines": ["pooled", "majority"],
        "sets": [{"train.batch": 4}],
        "tasks": [{"name": "short", "data.max_length": 32}],
    },
}


def sections(
    model: type[BaseModel] = Experiment, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """(path, section) of the whole file; a list of tables stands for its first table."""
    yield path, model
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section | OpenSection):
                yield from sections(kind, (*path, name))


SECTIONS = {".".join(path): section for path, section in sections()}


def at(values: dict[str, Any], path: str) -> dict[str, Any]:
    found: Any = values
    for part in path.split(".") if path else ():
        found = found[part]
        found = found[0] if isinstance(found, list) else found
    assert isinstance(found, dict)
    return found


def copy(values: dict[str, Any]) -> dict[str, Any]:
    return tomllib.loads(tomli_w.dumps(values))


# ------------------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("path", SECTIONS)
def test_the_full_file_holds_every_key_and_no_default(path: str) -> None:
    given = at(FULL, path)
    fields = SECTIONS[path].model_fields
    assert set(fields) <= set(given)
    for name, field in fields.items():
        if not isinstance(given[name], dict) and name != "kind":
            assert given[name] != field.get_default(call_default_factory=True), name


def test_every_key_round_trips(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(tomli_w.dumps(FULL), encoding="utf-8")
    experiment = load(tmp_path / "e.toml")
    resolved = plain(experiment)
    laptop = {"name": "laptop", "share": 1.0, "dropout": 0.0, "packet_loss": 0.0, "latency_ms": 0.0}
    laptop |= dict.fromkeys(("gflops", "memory_mb", "uplink_mbps", "downlink_mbps"), 0.0)
    wanted = copy(FULL)
    wanted["clients"]["devices"][1] = laptop
    assert resolved == wanted
    (tmp_path / "resolved.toml").write_text(tomli_w.dumps(resolved), encoding="utf-8")
    assert load(tmp_path / "resolved.toml") == parse(resolved) == experiment


def test_the_defaults_round_trip(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text("", encoding="utf-8")
    assert load(tmp_path / "e.toml") == Experiment() == parse(plain(Experiment()))
    assert tomllib.loads(tomli_w.dumps(plain(Experiment()))) == plain(Experiment())


def test_the_plan_is_the_train_section() -> None:
    assert parse(FULL).train.plan(3) == Plan(**FULL["train"], rounds=3)
    assert parse({}).train.plan(1) == Plan(**plain(Experiment())["train"])


def test_options_are_everything_but_the_kind() -> None:
    experiment = parse(FULL)
    assert experiment.technique.options == {"rank": 4, "target": ["query"]}
    assert experiment.algorithm.options == {"lr": 0.05}
    assert experiment.clients.partition.options == {"alpha": 0.3}


# ------------------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("item", "path", "value"),
    [
        ("rounds=5", "rounds", 5),
        ("train.lr=1e-3", "train.lr", 0.001),
        ("train.dropout=false", "train.dropout", False),
        ("engine.device=cuda:1", "engine.device", "cuda:1"),
        ('data.name="a b"', "data.name", "a b"),
        ("data.name=a b=c", "data.name", "a b=c"),
        ("filters.up=['bf16']", "filters.up", ["bf16"]),
        ("clients.partition={kind='natural',column='user'}", "clients.partition", {"kind": "natural", "column": "user"}),
        ("clients.partition.alpha=2", "clients.partition.alpha", 2),
        (" train . lr =1", "train.lr", 1),
        ("name=", "name", ""),
    ],
)
def test_overrides(item: str, path: str, value: Any) -> None:
    values = copy(FULL)
    override(values, item)
    section, _, key = path.rpartition(".")
    assert at(values, section)[key] == value
    at(values, section)[key] = at(FULL, section)[key]
    assert values == FULL  # and nothing else


def test_overrides_come_in_order_and_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text("rounds = 2\n", encoding="utf-8")
    experiment = load(tmp_path / "e.toml", ["rounds=3", "rounds=4", "train.batch=2"])
    assert (experiment.rounds, experiment.train.batch) == (4, 2)


def test_another_kind_starts_with_its_own_defaults() -> None:
    values = copy(FULL)
    override(values, "technique.kind=prefix")
    assert values["technique"] == {"kind": "prefix"}
    override(values, "technique.length=3")
    override(values, "technique.kind=prefix")
    assert values["technique"] == {"kind": "prefix", "length": 3}


@pytest.mark.parametrize("item", ["rounds", "=1", ".a=1", "a.=1", "a..b=1", ""])
def test_overrides_that_are_none(item: str) -> None:
    with pytest.raises(ConfigError, match=r"write it as section\.key=value"):
        override({}, item)


# ------------------------------------------------------------------------------------------------------------------- wrong keys


def misspelt(values: dict[str, Any], path: str) -> tuple[str, str]:
    """(a key of this section, the same with a letter doubled); the values hold the wrong one."""
    section = at(values, path)
    right = next(name for name in section if name not in ("kind", "name") and name in SECTIONS[path].model_fields)
    section[right + right[-1]] = section.pop(right)
    return right, right + right[-1]


@pytest.mark.parametrize("path", [path for path, section in SECTIONS.items() if issubclass(section, Section)])
def test_an_unknown_key_names_the_nearest_and_the_line(path: str, tmp_path: Path) -> None:
    values = copy(FULL)
    if path.endswith("devices"):  # the second table of the list has only a name
        values["clients"]["devices"].pop()
    right, wrong = misspelt(values, path)
    text = "# a comment\n\n" + tomli_w.dumps(values)
    (tmp_path / "e.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "e.toml")
    message = str(caught.value)
    lines = [n for n, line in enumerate(text.splitlines(), 1) if line.strip(" {").startswith((f"{wrong} =", f"[{wrong}"))]
    if lines:
        assert message.startswith(f"{tmp_path / 'e.toml'}:{lines[0]}: unknown key ")
    assert f"{wrong}': did you mean '{right}'?" in message
    assert "\n" not in message


def test_a_far_off_key_lists_them_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'evaluate.zzz': choose one of: every, sample, valid_limit$"):
        parse({"evaluate": {"zzz": 1}})


def test_the_line_of_a_key_that_stands_in_two_sections(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text('name = "x"\n[model]\nname = "minilm"\n[data]\nname = 3\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"e.toml:5: 'data.name' should be a valid string \(got 3\)"):
        load(tmp_path / "e.toml")


# ----------------------------------------------------------------------------------------------------------------- wrong values

WRONG = {
    "": {"name": ["", "a/b", "a b", 3], "seed": [-1, 1.5, "x"], "rounds": [0, -1, "many", 2.5]},
    "model": {"name": [3], "labels": [1, 0, "two"]},
    "data": {
        "kind": ["texts"],
        "pair": [["a"], ["a", "b", "c"], "a"],
        "test": [[1]],
        "limit": [0, -5],
        "public": [[1]],
        "public_limit": [0],
        "test_limit": [0],
        "max_length": [1, 0],
        "metric": ["auc", 3],
    },
    "clients": {
        "count": [0, -1, 1.5],
        "per_round": [0, -2],
        "partition": ["iid", {"kind": 3}],
        "test": [-0.1, 1, 1.5],
        "valid": [-0.1, 1],
        "deadline": [-1],
        "ranks": [[0], [-1], [1.5], 3],
        "lengths": [[0], ["a"]],
        "kinds": [["lora"], [{"technique": "lora"}], [{"techniq": {"kind": "lora"}}]],
        "devices": [["phone"], [{"share": 1}]],
    },
    "clients.devices": {
        "share": [0, -1],
        "gflops": [-1],
        "memory_mb": [-1],
        "uplink_mbps": [-1],
        "downlink_mbps": [-1],
        "latency_ms": [-1],
        "dropout": [1, -0.1, 1.5],
        "packet_loss": [1, -0.1],
    },
    "technique": {"kind": [3]},
    "algorithm": {"kind": [3]},
    "train": {
        "epochs": [0, -1],
        "steps": [-1, 0.5],
        "batch": [0, -1],
        "optimizer": ["adamx"],
        "lr": [0, -0.1, "fast"],
        "weight_decay": [-1],
        "momentum": [-0.1, 1],
        "schedule": ["step"],
        "clip": [-1],
        "dropout": ["perhaps"],
    },
    "filters": {"up": ["int8", [3]], "down": [3]},
    "engine": {
        "kind": ["dask"],
        "address": [3],
        "actors": [-1],
        "stacked": ["perhaps"],
        "group": [-1],
        "workers": [-1],
        "device": [3],
        "precision": ["fp8"],
        "server_gflops": [-1],
    },
    "evaluate": {"every": [-1], "valid_limit": [0], "sample": [-1]},
    "track": {"to": [["paper"], "tensorboard"]},
    "compare": {
        "vary": [3, {"a": 3}],
        "seeds": [[-1], ["x"]],
        "choose": [3, {"a": 3}],
        "baselines": [["poold"]],
        "sets": [[3]],
        "tasks": [[3]],
    },
}


@pytest.mark.parametrize(("path", "key", "value"), [(p, k, v) for p, keys in WRONG.items() for k, vs in keys.items() for v in vs])
def test_impossible_values_are_named(path: str, key: str, value: Any) -> None:
    values = copy(FULL)
    at(values, path)[key] = value
    with pytest.raises(ConfigError) as caught:
        parse(values, tomli_w.dumps(values), "e.toml")
    message = str(caught.value)
    assert message.startswith("e.toml")
    assert "\n" not in message
    assert f"{path.replace('devices', 'devices.0')}.{key}".lstrip(".") in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["train.lr", "train.epochs", "train.clip", "clients.deadline"])
def test_numbers_that_are_none(path: str, bad: float) -> None:
    values = copy(FULL)
    section, _, key = path.rpartition(".")
    at(values, section)[key] = bad
    with pytest.raises(ConfigError, match=path):
        parse(values)


@pytest.mark.parametrize(("text", "line"), [("a = = 1\n", 1), ("rounds = 1\nrounds = 2\n", 2), ("[model]\nname = 'x\n", 0)])
def test_not_toml(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigError, match="e.toml: not valid TOML: .*" + (f"line {line}" if line else "end of document")
    ) as caught:
        load(tmp_path / "e.toml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "sst2.toml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'.*sst3.toml' does not exist: did you mean 'sst2.toml'\?"):
        load(tmp_path / "sst3.toml")
    with pytest.raises(ConfigError, match=r"'.*none/sst2.toml' does not exist$"):
        load(tmp_path / "none" / "sst2.toml")


PRESETS = """
rounds = 50
[train]
lr = 0.5
[presets.small]
rounds = 2
"train.lr" = 0.25
"clients.partition" = { kind = "dirichlet", alpha = 0.1 }
[presets.tiny]
rounds = 1
"""


def test_a_preset_is_applied_before_overrides(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(PRESETS, encoding="utf-8")
    plain, small = load(path), load(path, ["train.lr=0.125"], preset="small")
    assert (plain.rounds, plain.train.lr, plain.clients.partition.kind) == (50, 0.5, "iid")
    assert (small.rounds, small.train.lr, small.clients.partition.options) == (2, 0.125, {"alpha": 0.1})


@pytest.mark.parametrize(
    ("text", "preset", "line"),
    [
        (PRESETS, "smal", "no preset 'smal': did you mean 'small'"),
        ("rounds = 3", "small", "has no preset 'small'$"),
        ("[presets]\nsmall = 3", "small", "write presets as"),
        ('[presets.small]\n"train.rate" = 3', "small", "unknown key 'train.rate'"),
    ],
)
def test_presets_that_are_not_there(text: str, preset: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=line):
        load(path, preset=preset)
