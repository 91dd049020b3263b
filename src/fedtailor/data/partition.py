"""Who holds which rows: flwr-datasets' partitioners, seeded. `PARTITIONS` is the one registry; a signature is the configuration."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedtailor.config import ClientsSection
from fedtailor.core import seed_of
from fedtailor.data.sources import Rows
from fedtailor.errors import ConfigError, DataError, nearest


def _flwr() -> Any:
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
    "linear": linear,
    "natural": natural,
    "pathological": pathological,
    "shard": shard,
    "square": square,
}
NEEDS_LABELS = ("dirichlet", "pathological", "shard")


def split(rows: Rows, clients: ClientsSection, seed: int) -> dict[str, np.ndarray]:
    """client -> its row numbers in `rows`.

    Raises:
        ConfigError: unknown kind or option. DataError: too few rows, or a split that leaves a client empty.
    """
    kind, options = clients.partition.kind, clients.partition.options
    if kind not in PARTITIONS:
        raise ConfigError(f"unknown clients.partition.kind '{kind}': {nearest(kind, PARTITIONS)}")
    known = [n for n in inspect.signature(PARTITIONS[kind]).parameters if n not in ("count", "seed")]
    for name in options:
        if name not in known:
            hint = nearest(name, known) if known else "it has no options"
            raise ConfigError(f"unknown key 'clients.partition.{name}' for partition '{kind}': {hint}")
    if not float(options.get("alpha", 1)) > 0:
        raise ConfigError(f"clients.partition.alpha must be positive (got {options['alpha']})")
    if kind in NEEDS_LABELS and "label" not in rows.column_names:
        raise ConfigError(f"partition '{kind}' needs class labels, which this data has not: choose iid or natural")
    if kind == "natural":
        return _natural(rows, str(options.get("column", "client")), clients.count)
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


def _drawn(rows: Rows, kind: str, count: int, seed: int, options: Mapping[str, Any]) -> list[np.ndarray]:
    """Drawn in a process of its own: flwr-datasets loads plotting and table libraries (140 MB) that nothing else here needs."""
    asked = {
        "kind": kind,
        "count": count,
        "seed": seed_of(seed, "partition") % 2**31,
        "options": dict(options),
        "rows": len(rows),
        "labels": list(rows["label"]) if "label" in rows.column_names else None,
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fedtailor.data.partition"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"partition '{kind}' cannot be drawn for {count} clients and {len(rows)} rows: {last}")
    return [np.asarray(part, dtype=np.int64) for part in json.loads(done.stdout)]


def draw(kind: str, count: int, seed: int, options: Mapping[str, Any], rows: int, labels: list[int] | None) -> list[list[int]]:
    """The partitioner itself: the sorted rows of each client."""
    from datasets import Dataset

    # Rows in a random order of our own: some partitioners cut in order.
    order = np.random.default_rng(seed).permutation(rows)
    table = {"row": order} | ({"label": np.asarray(labels)[order]} if labels is not None else {})
    partitioner = PARTITIONS[kind](count, seed, **options)
    partitioner.dataset = Dataset.from_dict(table)
    return [sorted(partitioner.load_partition(k)["row"]) for k in range(count)]


def _natural(rows: Rows, column: str, count: int) -> dict[str, np.ndarray]:
    if column not in rows.column_names:
        raise ConfigError(f"clients.partition.column '{column}' is no column: {nearest(column, rows.column_names)}")
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
