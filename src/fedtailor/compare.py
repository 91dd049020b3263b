"""Many runs, one honest table: any keys over any values and seeds, baselines at equal example passes, intervals."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor import wire
from fedtailor.config import Experiment, assign, parse
from fedtailor.errors import ConfigError
from fedtailor.run import EXPERIMENT, SUMMARY, Watch, plain, run

COMPARISON = "compare.json"
MEASURES = (
    "global_test",
    "clients_mean",
    "clients_worst_decile",
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
    "bytes_total",
    "trainable_parameters",
    "flops_per_example",
    "peak_memory_bytes",
    "seconds",
    "simulated_seconds",
)


class Case(NamedTuple):
    name: str  # what distinguishes it: "technique.kind=lora", "pooled"
    seed: int
    experiment: Experiment


def cases(experiment: Experiment) -> Iterator[Case]:
    """Every combination of `compare.vary` (or each table of `compare.sets`) and of the seeds, then the baselines of each.

    Raises:
        ConfigError: a varied key that does not exist, or a value that it cannot have.
    """
    section = experiment.compare
    for key, options in section.vary.items():
        if not options:
            raise ConfigError(f"compare.vary: '{key}' has no values: list some or leave it out")
    grid = [dict(zip(section.vary, values, strict=True)) for values in itertools.product(*section.vary.values())]
    variants = [{**one, **other} for one in section.sets or [{}] for other in grid]
    seen: set[tuple[str, int]] = set()
    for changes in variants:
        for algorithm in (None, *(b for b in section.baselines if b in ("pooled", "local"))):
            if algorithm and any(key.startswith(("algorithm", "filters", "clients.devices")) for key in changes):
                changes = {k: v for k, v in changes.items() if not k.startswith(("algorithm", "filters", "clients.devices"))}
            for seed in section.seeds:
                values = copy.deepcopy(plain(experiment))
                values.pop("compare")
                values["seed"] = seed
                for key, value in changes.items():
                    assign(values, key.split("."), value)
                if algorithm:
                    values["algorithm"] = {"kind": algorithm}
                    values["filters"] = {}
                    values["clients"].pop("devices", None)
                    values["clients"].pop("deadline", None)
                title = ", ".join([algorithm or "", *(f"{k}={_short(v)}" for k, v in changes.items())]).strip(", ")
                title = title or str(experiment.algorithm.kind)
                if (title, seed) not in seen:
                    seen.add((title, seed))
                    yield Case(title, seed, parse(values, where=f"compare case '{title}'"))


def compare(experiment: Experiment, out: Path, watch: Callable[[Case], Watch] = lambda case: Watch()) -> list[dict[str, Any]]:
    """Run what is missing, resume what was cut, keep what is done; returns a row a case and writes compare.json and compare.md."""
    todo = list(cases(experiment))
    summaries: dict[str, list[dict[str, Any]]] = {}
    for case in todo:
        folder = out / re.sub(r"[^\w.=\-]+", "_", case.name) / f"seed-{case.seed}"
        summary = finished(folder, case.experiment)
        if summary is None:
            stale = (folder / EXPERIMENT).exists()
            summary = run(case.experiment, folder, resume=stale, watch=watch(case))
        summaries.setdefault(case.name, []).append({**summary, "run": str(folder)})
    rows = [row(name, runs) for name, runs in summaries.items()]
    rows += [flat(name, summaries) for name in experiment.compare.baselines if name == "majority"]
    wire.atomically(out / COMPARISON, lambda path: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"))
    wire.atomically(out / "compare.md", lambda path: path.write_text(markdown(rows), encoding="utf-8"))
    return rows


def finished(folder: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The summary of a run that is done, if it is of this very experiment.

    Raises:
        ConfigError: the folder holds the same case under other settings.
    """
    from fedtailor.config import load

    path = folder / SUMMARY
    if not path.is_file():
        return None
    if plain(load(folder / EXPERIMENT)) != plain(experiment):
        raise ConfigError(f"'{folder}' holds this case with other settings: remove it or name another --out")
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One case over its seeds: {measure: {mean, low, high}}."""
    measures = {}
    for measure in MEASURES:
        values = [r[measure] for r in runs if r.get(measure) is not None]
        if values:
            measures[measure] = interval(values)
    return {"name": name, "metric": runs[0]["metric"], "seeds": len(runs), "runs": [r["run"] for r in runs], **measures}


def flat(name: str, summaries: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A baseline that needs no training: always the commonest class."""
    first = next(iter(summaries.values()))
    values = [r[name] for r in first if r.get(name) is not None]
    measured = {"global_test": interval(values)} if values else {}
    return {"name": name, "metric": first[0]["metric"], "seeds": len(first), "runs": [], **measured}


def interval(values: list[float]) -> dict[str, float]:
    """Mean with a 95 % t-interval over seeds; one seed has no interval (low = high = mean)."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return {"mean": mean, "low": mean, "high": mean}
    from scipy.stats import t

    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    head, body = table(rows)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in body)]) + "\n"


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(column heads, cells) for people."""
    metric = rows[0]["metric"] if rows else "metric"
    head = ["case", f"global test ({metric})", "clients' mean", "worst decile", "kB up", "kB down", "MB in all", "trained", "s"]
    body = []
    for r in rows:
        scores = [_score(r.get(m)) for m in MEASURES[:3]]
        sizes = [_number(r.get(m), f) for m, f in zip(MEASURES[3:6], (1e3, 1e3, 1e6), strict=True)]
        body.append([r["name"], *scores, *sizes, _number(r.get("trainable_parameters"), 1, 0), _number(r.get("seconds"), 1)])
    return head, body


def _score(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "-"
    half = cell["high"] - cell["mean"]
    return f"{cell['mean']:.4f}" + (f" ± {half:.4f}" if half else "")


def _number(cell: dict[str, float] | None, unit: float, digits: int = 1) -> str:
    return "-" if cell is None else f"{cell['mean'] / unit:,.{digits}f}"


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
