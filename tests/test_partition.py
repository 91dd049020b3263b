"""Partitions: every row has one owner, the seed decides, and each kind does what it is named for."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtailor.config import ClientsSection, PartitionSection
from fedtailor.data import partition
from fedtailor.data.partition import GIVEN, NEEDS_LABELS, PARTITIONS, describe, digest, split
from fedtailor.data.sources import Rows
from fedtailor.errors import ConfigError, DataError

KINDS = sorted(set(PARTITIONS) - {"natural"})
COUNTS = {"exponential": 4}  # of more clients the smallest would be empty
DROPS = {"shard"}  # shards are of equal size, so that a few rows may be left over


def rows(count: int = 600, classes: int = 6) -> Rows:
    labels = np.random.default_rng(7).permutation(np.arange(count) % classes)
    users = [f"user {k * k % 11}" for k in range(count)]
    return Rows({"text": [f"t{k}" for k in range(count)], "label": labels.tolist(), "user": users})


def section(kind: str, count: int = 8, **options: Any) -> ClientsSection:
    return ClientsSection(count=count, partition=PartitionSection(kind=kind, **options))


@pytest.fixture(autouse=True)
def drawn_anew() -> None:
    partition.printed.cache_clear()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw in this process: what is drawn is the same (a test below says so), and a start of Python less a test."""

    def run(command: list[str], input: str, **options: Any) -> Any:
        assert command[-1] == partition.__name__
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return SimpleNamespace(returncode=0, stdout=json.dumps(partition.draw(**json.loads(input))), stderr="")
        except Exception as error:
            return SimpleNamespace(returncode=1, stdout="", stderr=str(error))

    known = set(sys.modules)
    monkeypatch.setattr(partition.subprocess, "run", run)
    yield
    for name in set(sys.modules) - known:  # only its parts were loaded: whoever wants the whole package shall get it
        if name.split(".")[0] == "flwr_datasets":
            del sys.modules[name]


def drawn(kind: str, seed: int = 0, data: Rows | None = None, count: int | None = None, **options: Any) -> dict[str, np.ndarray]:
    return split(data or rows(), section(kind, count or COUNTS.get(kind, 8), **options), seed)


# --------------------------------------------------------------------------------------------------------------- all kinds


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_one_owner(kind: str) -> None:
    parts = drawn(kind)
    held = np.concatenate(list(parts.values()))
    assert len(held) == len(set(held.tolist()))
    assert set(held.tolist()) <= set(range(600))
    assert len(held) == 600 or kind in DROPS
    assert min(map(len, parts.values())) > 0
    assert list(parts) == [f"client-{k}" for k in range(len(parts))]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    assert digest(drawn(kind)) == digest(drawn(kind)) != digest(drawn(kind, seed=1))


@pytest.mark.usefixtures("here")
def test_names_sort_in_order() -> None:
    names = list(drawn("iid", count=12))
    assert (names[0], names[-1]) == ("client-00", "client-11")
    assert names == sorted(names)
    assert list(drawn("iid", count=1)) == ["client-0"]


def test_a_process_of_its_own_draws_the_same(
    request: pytest.FixtureRequest, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the working directory is no place for libraries')")
    monkeypatch.chdir(tmp_path)
    apart = digest(drawn("dirichlet"))
    request.getfixturevalue("here")
    assert digest(drawn("dirichlet")) == apart


def test_drawing_loads_neither_torch_nor_plots() -> None:
    code = (
        "import sys, fedtailor.data.partition as p; p.draw('iid', 2, 0, {}, 10, None);"
        "print([m for m in ('torch', 'matplotlib', 'seaborn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_registry_describes_itself() -> None:
    for name, builder in PARTITIONS.items():
        assert builder.__name__ == name
        assert (builder.__doc__ or "").strip().endswith(".")
        options = {n: p for n, p in inspect.signature(builder).parameters.items() if n not in GIVEN}
        assert all(p.default is not p.empty for p in options.values())
    assert set(NEEDS_LABELS) < set(PARTITIONS)


# --------------------------------------------------------------------------------------------------------------- each kind


def skew(parts: dict[str, np.ndarray], labels: np.ndarray) -> float:
    """Mean total variation between a client's mix of classes and everybody's: 0 is the same, 1 is apart."""
    counts = describe(parts, labels).astype(float)
    whole = counts.sum(0) / counts.sum()
    return float(np.abs(counts / counts.sum(1, keepdims=True) - whole).sum(1).mean() / 2)


@pytest.mark.usefixtures("here")
def test_iid_parts_are_equal() -> None:
    parts = drawn("iid", count=7)
    assert {len(part) for part in parts.values()} == {85, 86}
    assert skew(parts, np.asarray(rows()["label"])) < 0.2


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["dirichlet", "inner_dirichlet"])
def test_alpha_is_the_skew(kind: str) -> None:
    labels = np.asarray(rows()["label"])
    found = [skew(drawn(kind, alpha=alpha), labels) for alpha in (0.1, 1, 1000.0)]
    assert found[0] > 0.4 > found[1] > found[2]
    assert found[2] < 0.15  # what drawing 75 rows at random leaves


@pytest.mark.usefixtures("here")
def test_options_of_dirichlet() -> None:
    assert min(map(len, drawn("dirichlet", alpha=0.3, min_size=20).values())) >= 20
    sizes = [np.std([len(p) for p in drawn("dirichlet", alpha=0.3, balanced=b).values()]) for b in (True, False)]
    assert sizes[0] < sizes[1]


@pytest.mark.usefixtures("here")
def test_inner_dirichlet_parts_are_equal_even_where_class_numbers_have_gaps() -> None:
    data = rows()
    data.columns["label"] = [3 * label for label in data["label"]]
    parts = drawn("inner_dirichlet", data=data, count=7)
    assert {len(part) for part in parts.values()} == {85, 86}
    assert digest(parts) == digest(drawn("inner_dirichlet", count=7))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("classes", [1, 3, 6])
def test_pathological_clients_have_so_many_classes(classes: int) -> None:
    counts = describe(drawn("pathological", classes=classes), np.asarray(rows()["label"]))
    assert ((counts > 0).sum(1) == classes).all()


@pytest.mark.usefixtures("here")
def test_shards_are_runs_of_the_sorted_rows() -> None:
    """McMahan et al.: two shards of 600 / 12 = 50 rows; each shard has rows of one class, as 50 divides the 100 of a class."""
    counts = describe(drawn("shard", count=6, shards=2), np.asarray(rows()["label"]))
    assert set(counts.flatten().tolist()) <= {0, 50, 100}
    assert (counts.sum(1) == 100).all()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("kind", "weight"), [("linear", lambda k: k), ("square", lambda k: k * k), ("exponential", np.exp)])
def test_sizes_grow_as_they_are_named(kind: str, weight: Any) -> None:
    sizes = [len(part) for part in drawn(kind, count=4).values()]
    weights = weight(np.arange(1.0, 5))
    np.testing.assert_allclose(sizes, 600 * weights / weights.sum(), atol=4)
    assert sum(sizes) == 600


def test_natural_clients_are_the_values() -> None:
    data = rows()
    parts = drawn("natural", count=6, column="user")
    assert {client: part.tolist() for client, part in parts.items()} == {
        user: [k for k, u in enumerate(data["user"]) if u == user] for user in sorted(set(data["user"]))
    }
    two = drawn("natural", count=2, column="user")
    assert set(two) <= {user for user, _ in Counter(data["user"]).most_common(5)}
    assert min(len(p) for p in two.values()) >= sorted(Counter(data["user"]).values())[-2]
    assert set(drawn("natural", count=6, column="label")) == set("012345")


# ---------------------------------------------------------------------------------------------------- picture and fingerprint


def test_describe_counts() -> None:
    labels = np.asarray([0, 2, 2, 1, 0, 3])
    found = describe({"b": np.asarray([0, 1, 2]), "a": np.asarray([5])}, labels)
    assert found.tolist() == [[0, 0, 0, 1], [1, 0, 2, 0]]  # clients in sorted order
    assert describe({"a": np.asarray([1])}, np.zeros(3, dtype=int)).tolist() == [[1]]


def test_digest_is_the_partition_and_nothing_else() -> None:
    one = {"a": np.asarray([1, 2]), "b": np.asarray([3])}
    assert digest(one) == digest(dict(reversed(one.items()))) == digest({k: v.astype(np.int32) for k, v in one.items()})
    assert digest(one) == hashlib.sha256(b"a\0" + bytes([1, *[0] * 7, 2, *[0] * 7]) + b"b\0" + bytes([3, *[0] * 7])).hexdigest()
    for other in ({"a": [1], "b": [2, 3]}, {"a": [1, 2], "c": [3]}, {"a": [1, 2]}):
        assert digest({k: np.asarray(v) for k, v in other.items()}) != digest(one)


# ------------------------------------------------------------------------------------------------------------------- wrong


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (section("dirichle"), r"unknown clients.partition.kind 'dirichle': did you mean 'dirichlet'\?"),
        (
            section("dirichlet", alhpa=1.0),
            r"unknown key 'clients.partition.alhpa' for partition 'dirichlet': did you mean 'alpha'\?",
        ),
        (section("inner_dirichlet", rows=9), r"unknown key 'clients.partition.rows' for partition 'inner_dirichlet'"),
        (section("iid", alpha=1.0), r"unknown key 'clients.partition.alpha' for partition 'iid': it has no options"),
        (section("dirichlet", alpha="small"), r"'clients.partition.alpha' should be a float \(got 'small'\)"),
        (section("dirichlet", alpha=0.0), r"'clients.partition.alpha' must be positive \(got 0.0\)"),
        (section("dirichlet", min_size=1.5), r"'clients.partition.min_size' should be a whole number \(got 1.5\)"),
        (section("dirichlet", balanced=1), r"'clients.partition.balanced' should be a bool \(got 1\)"),
        (section("pathological", classes=True), r"'clients.partition.classes' should be a whole number \(got True\)"),
        (section("shard", shards=0), r"'clients.partition.shards' must be positive \(got 0\)"),
        (section("natural", column="usr"), r"clients.partition.column 'usr' is no column: did you mean 'user'\?"),
        (
            section("natural", 7, column="user"),
            r"clients.count = 7, but column 'user' has 6 values: set clients.count to 6 or less",
        ),
    ],
)
def test_wrong_settings_are_explained(clients: ClientsSection, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(rows(), clients, 0)


@pytest.mark.parametrize("kind", NEEDS_LABELS)
def test_kinds_that_need_labels_say_so(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=f"partition '{kind}' needs class labels, which this data has not: choose iid or natural"
    ):
        split(Rows({"text": ["a"] * 50}), section(kind), 0)


@pytest.mark.parametrize("gap", [None, ""])
def test_rows_without_an_owner_are_found(gap: str | None) -> None:
    data = rows(20)
    data.columns["user"][4] = gap
    with pytest.raises(DataError, match="column 'user' is empty in training row 5: every row needs its owner"):
        split(data, section("natural", 2, column="user"), 0)


def test_more_clients_than_rows() -> None:
    with pytest.raises(DataError, match=r"clients.count = 9, but there are only 5 training rows: set it to 5 or less"):
        split(rows(5), section("iid", 9), 0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        ("dirichlet", {"alpha": 0.01, "min_size": 50}, 10),
        ("exponential", {}, 30),
        ("pathological", {"classes": 7}, 8),
        ("shard", {"shards": 99}, 8),
    ],
)
def test_what_cannot_be_drawn_is_one_line(kind: str, options: dict[str, Any], count: int) -> None:
    with pytest.raises(DataError, match=f"partition '{kind}' cannot be drawn for {count} clients and 600 rows: .") as caught:
        drawn(kind, count=count, **options)
    assert "\n" not in str(caught.value)


def test_a_failure_of_the_drawing_process_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"partition 'pathological' cannot be drawn for 2 clients and 600 rows: .*greater than the number"
    ) as caught:
        drawn("pathological", count=2, classes=7)
    assert "\n" not in str(caught.value)
