"""Who holds which rows: flwr-datasets' partitioners, seeded. `PARTITIONS` is the one registry; a signature is the configuration."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtailor.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:  # at run time they load torch, which the process that draws has no use for
    from fedtailor.config import ClientsSection
    from fedtailor.data.sources import Rows


def _flwr() -> Any:
    """flwr_datasets.partitioner without its package's __init__, which draws in seaborn and matplotlib: half the time and memory."""
    spec = importlib.util.find_spec("flwr_datasets")
    if spec and "flwr_datasets" not in sys.modules:
        sys.modules["flwr_datasets"] = importlib.util.module_from_spec(spec)  # knows where its parts are; its own code never runs
    import flwr_datasets.partitioner

    return flwr_datasets.partitioner


def iid(count: int, seed: int) -> Any:
    """Every client a random part of equal size."""
    return _flwr().IidPartitioner(count)


def dirichlet(count: int, seed: int, alpha: float = 0.5, min_size: int = 2, balanced: bool = False) -> Any:
    """Label skew: each class is shared out by Dirichlet(alpha); small alpha, few classes a client."""
    return _flwr().DirichletPartitioner(count, "label", alpha, min_size, balanced, seed=seed)


def pathological(count: int, seed: int, classes: int = 2) -> Any:
    """Each client has examples of so many classes only."""
    return _flwr().PathologicalPartitioner(count, "label", classes, "first-deterministic", seed=seed)


def shard(count: int, seed: int, shards: int = 2) -> Any:
    """Rows sorted by label, cut into shards; each client gets so many (McMahan et al. 2017)."""
    return _flwr().ShardPartitioner(count, "label", num_shards_per_partition=shards, seed=seed)


def inner_dirichlet(count: int, seed: int, alpha: float = 0.5, rows: int | None = None) -> Any:
    """Label skew with equal sizes: each client draws its own class mix from Dirichlet(alpha) (Acar et al. 2021)."""
    sizes = [len(part) for part in np.array_split(np.arange(rows or 0), count)]
    return _flwr().InnerDirichletPartitioner(sizes, "label", alpha, seed=seed)


def linear(count: int, seed: int) -> Any:
    """Sizes grow linearly from client to client."""
    return _flwr().LinearPartitioner(count)


def square(count: int, seed: int) -> Any:
    """Sizes grow with the square of the client's number."""
    return _flwr().SquarePartitioner(count)


def exponential(count: int, seed: int) -> Any:
    """Sizes grow exponentially; for few clients."""
    return _flwr().ExponentialPartitioner(count)


def natural(count: int, seed: int, column: str = "client") -> Any:
    """Clients are the values of a column (domain, user, module); of more values than clients.count, the largest are kept."""
    return _flwr().NaturalIdPartitioner(column)


PARTITIONS: Mapping[str, Callable[..., Any]] = {
    "dirichlet": dirichlet,
    "exponential": exponential,
    "iid": iid,
    "inner_dirichlet": inner_dirichlet,
    "linear": linear,
    "natural": natural,
    "pathological": pathological,
    "shard": shard,
    "square": square,
}
NEEDS_LABELS = ("dirichlet", "inner_dirichlet", "pathological", "shard")
GIVEN = ("count", "seed", "rows")  # what the data and the experiment say; a builder's other parameters are its options


def split(rows: Rows, clients: ClientsSection, seed: int) -> dict[str, np.ndarray]:
    """client -> its row numbers in `rows`.

    Raises:
        ConfigError: unknown kind or option, or an option of a wrong type or size, or no such column.
        DataError: too few rows, a split that leaves a client empty, a natural column with gaps.
    """
    kind = clients.partition.kind
    if kind not in PARTITIONS:
        raise ConfigError(f"unknown clients.partition.kind '{kind}': {nearest(kind, PARTITIONS)}")
    options = _checked(kind, clients.partition.options)
    if kind in NEEDS_LABELS and "label" not in rows.column_names:
        raise ConfigError(f"partition '{kind}' needs class labels, which this data has not: choose iid or natural")
    if kind == "natural":
        return _natural(rows, options["column"], clients.count)
    if clients.count > len(rows):
        raise DataError(
            f"clients.count = {clients.count}, but there are only {len(rows)} training rows: set it to {len(rows)} or less"
        )
    parts = _drawn(rows, kind, clients.count, seed, options)
    empty = [k for k, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise DataError(
            f"partition '{kind}' leaves {len(empty)} of {clients.count} clients without rows: use fewer clients or another partition"
        )
    width = len(str(clients.count - 1))
    return {f"client-{k:0{width}d}": part for k, part in enumerate(parts)}


def _checked(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The builder's options with its defaults; every number among them is positive."""
    parameters = inspect.signature(PARTITIONS[kind]).parameters
    out = {name: p.default for name, p in parameters.items() if name not in GIVEN}
    for name, value in given.items():
        key = f"clients.partition.{name}"
        if name not in out:
            raise ConfigError(f"unknown key '{key}' for partition '{kind}': {nearest(name, out) if out else 'it has no options'}")
        wanted = type(out[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ConfigError(
                f"'{key}' should be {'a whole number' if wanted is int else f'a {wanted.__name__}'} (got {value!r})"
            )
        if wanted in (int, float) and not 0 < value < math.inf:
            raise ConfigError(f"'{key}' must be positive (got {value})")
        out[name] = value
    return out


def _drawn(rows: Rows, kind: str, count: int, seed: int, options: dict[str, Any]) -> list[np.ndarray]:
    from fedtailor.core import seed_of

    asked = {
        "kind": kind,
        "count": count,
        "seed": seed_of(seed, "partition") % 2**31,
        "options": options,
        "rows": len(rows),
        "labels": [int(k) for k in rows["label"]] if "label" in rows.column_names else None,
    }
    code, said, failed = printed(json.dumps(asked))
    if code:
        last = (failed.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"partition '{kind}' cannot be drawn for {count} clients and {len(rows)} rows: {last}")
    return [np.asarray(part, dtype=np.int64) for part in json.loads(said)]


@functools.lru_cache(maxsize=64)
def printed(asked: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a process of its own that draws: flwr-datasets loads table libraries (90 MB) that
    nothing else here needs, and takes two seconds. The cases of a comparison ask for few different draws."""
    # -P: a file that happens to lie in the working directory must not stand in for a library.
    command = [sys.executable, "-P", "-W", "ignore", "-m", "fedtailor.data.partition"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def draw(kind: str, count: int, seed: int, options: Mapping[str, Any], rows: int, labels: list[int] | None) -> list[list[int]]:
    """The partitioner itself: the sorted rows of each client."""
    from datasets import Dataset

    # Rows in a random order of our own: some partitioners cut in order.
    order = np.random.default_rng(seed).permutation(rows)
    table = {"row": order}
    if labels is not None:  # numbered without gaps: one partitioner counts classes and takes them for 0..n-1
        table["label"] = np.unique(labels, return_inverse=True)[1][order]
    given = {"count": count, "seed": seed, "rows": rows}
    needed = inspect.signature(PARTITIONS[kind]).parameters
    partitioner = PARTITIONS[kind](**{name: given[name] for name in GIVEN if name in needed}, **options)
    partitioner.dataset = Dataset.from_dict(table)
    return [sorted(partitioner.load_partition(k)["row"]) for k in range(count)]


def _natural(rows: Rows, column: str, count: int) -> dict[str, np.ndarray]:
    if column not in rows.column_names:
        raise ConfigError(f"clients.partition.column '{column}' is no column: {nearest(column, rows.column_names)}")
    for row, value in enumerate(rows[column], 1):
        if value is None or value == "":
            raise DataError(f"clients.partition.column '{column}' is empty in training row {row}: every row needs its owner")
    values = np.asarray([str(v) for v in rows[column]])
    names, sizes = np.unique(values, return_counts=True)
    if count > len(names):
        raise ConfigError(
            f"clients.count = {count}, but column '{column}' has {len(names)} values: set clients.count to {len(names)} or less"
        )
    largest = sorted(names[np.argsort(-sizes, kind="stable")[:count]])
    return {str(name): np.flatnonzero(values == name) for name in largest}


def describe(parts: Mapping[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
    """(clients, classes) counts, clients in sorted order, for the picture of the partition."""
    classes = int(labels.max()) + 1 if len(labels) else 1
    if not parts:
        return np.zeros((0, classes), dtype=np.int64)
    return np.stack([np.bincount(labels[parts[c]], minlength=classes) for c in sorted(parts)])


def digest(parts: Mapping[str, np.ndarray]) -> str:
    """sha256 of a partition: publish it with results."""
    sha = hashlib.sha256()
    for client in sorted(parts):
        sha.update(client.encode() + b"\0" + np.asarray(parts[client], dtype="<i8").tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    try:
        print(json.dumps(draw(**json.load(sys.stdin))))
    except Exception as error:  # any failure of a partitioner becomes the caller's one line
        sys.exit(str(error).split("\n")[0] or type(error).__name__)
