"""A run folder as the report needs it. Every number may be missing: an interrupted run has no summary yet."""

from __future__ import annotations

import csv
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtailor.errors import ConfigError, DataError

LOWER_IS_BETTER = ("ece", "perplexity")  # as in metrics.py, which needs torch; a report does not


@dataclass(frozen=True)
class Run:
    folder: Path
    label: str  # what tells it from the other runs on the page
    toml: str
    experiment: dict[str, Any]
    environment: str
    rounds: list[dict[str, Any]]
    clients: list[dict[str, str]]
    summary: dict[str, Any]  # empty while the run is not finished
    expected: str = "metric"  # what an unfinished run on the same data as finished ones will be judged by

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def metric(self) -> str:
        asked = str(self.experiment.get("data", {}).get("metric", "auto"))
        return str(self.summary.get("metric") or (self.expected if asked == "auto" else asked))

    @property
    def scores(self) -> list[tuple[str, float, float | None]]:
        """(client, metric on its own test split, metric on the global test set), worst client first."""
        found = [(c["client"], number(c.get("metric")), number(c.get("metric_global"))) for c in self.clients]
        known = [(client, own, wide) for client, own, wide in found if own is not None]
        return sorted(known, key=lambda row: row[1], reverse=self.metric in LOWER_IS_BETTER)

    @property
    def clock(self) -> str:
        """What the clock's seconds are: of members who are elsewhere real ones."""
        return "between server and members" if self.summary.get("served") else "simulated"

    def kind(self, section: str) -> str:
        return str(self.summary.get(section) or self.experiment.get(section, {}).get("kind", "?"))

    def summed(self, *names: str) -> float:
        return sum(number(line.get(name)) or 0.0 for line in self.rounds for name in names)

    def value(self, name: str) -> float | None:
        """A number of the summary; for a run that has none, what its rounds add up to."""
        if self.finished:
            return number(self.summary.get(name))
        examples = self.summed("examples")
        sums = {
            "bytes_total": self.summed("bytes_up", "bytes_down"),
            "bytes_up_per_client_round": _ratio(self.summed("bytes_up"), self.summed("replies")),
            "bytes_down_per_client_round": _ratio(self.summed("bytes_down"), self.summed("letters")),
            "flops_per_example": _ratio(self.summed("flops"), examples),
            "flops_total": self.summed("flops"),
            "example_passes": examples,
            "seconds": self.summed("seconds"),
            "peak_memory_bytes": max((number(r.get("peak_memory_bytes")) or 0.0 for r in self.rounds), default=None),
            "simulated_seconds": number(self.rounds[-1].get("clock")) if self.rounds else None,
        }
        return sums.get(name) if self.rounds else None


def number(value: Any) -> float | None:
    """A finite number, or None: CSV cells are text, may be empty, and a diverged run holds NaN."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders.

    Raises:
        ConfigError: no folder given, or one that holds no run. DataError: a file of a run cannot be read.
    """
    if not folders:
        raise ConfigError("report: name at least one run folder")
    names = []
    for folder in folders:
        path = folder / "experiment.toml"
        if not path.is_file():
            raise ConfigError(f"'{folder}' is not a run folder (no experiment.toml in it)")
        try:
            names.append(str(tomllib.loads(_text(path)).get("name", folder.name)))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    runs = [_read(folder, label) for folder, label in zip(folders, _labels(names, folders), strict=True)]
    metrics = {_data(run): run.metric for run in runs if run.finished}
    return [replace(run, expected=metrics.get(_data(run), "metric")) for run in runs]


def _data(run: Run) -> str:
    return json.dumps(run.experiment.get("data"), sort_keys=True, default=str)


def _read(folder: Path, label: str) -> Run:
    toml = _text(folder / "experiment.toml")
    table = list(csv.DictReader(_text(folder / "clients.csv").splitlines()))
    return Run(
        folder=folder,
        label=label,
        toml=toml,
        experiment=tomllib.loads(toml),
        environment=_text(folder / "environment.json"),
        rounds=_lines(_text(folder / "rounds.jsonl")),
        clients=[row for row in table if row.get("client")],
        summary=summary_of(folder),
    )


def summary_of(folder: Path) -> dict[str, Any]:
    """A run's summary; {} while it is not finished.

    Raises:
        DataError: the file is no JSON object.
    """
    path = folder / "summary.json"
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a summary but a {type(found).__name__}: run it again with --resume")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read '{path}': {error}") from error


def _lines(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            one = json.loads(line)
            one["round"]
        except (ValueError, KeyError, TypeError):
            break  # a kill cut this line short
        found.append(one)
    return found


def _labels(names: list[str], folders: Sequence[Path]) -> list[str]:
    """The experiments' names where they differ, else what differs of the paths, else numbered."""
    if len(set(names)) == len(names):
        return names
    paths = [list(folder.absolute().parts) for folder in folders]
    while all(len(p) > 1 for p in paths) and len({p[0] for p in paths}) == 1:
        paths = [p[1:] for p in paths]
    while all(len(p) > 1 for p in paths) and len({p[-1] for p in paths}) == 1:
        paths = [p[:-1] for p in paths]
    words = ["/".join(p).split("_") for p in paths]  # cases of one task: TASK_CASE
    while all(len(w) > 1 for w in words) and len({w[0] for w in words}) == 1:
        words = [w[1:] for w in words]
    labels = ["_".join(w) for w in words]
    return labels if len(set(labels)) == len(labels) else [f"{label} ({i})" for i, label in enumerate(labels, 1)]


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
