"""Many runs, one honest table: any keys over any values and seeds, baselines at equal example passes, intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedtailor import wire
from fedtailor.cases import Case, cases, titled
from fedtailor.config import Experiment
from fedtailor.errors import ConfigError, RunError
from fedtailor.folder import EXPERIMENT, ROUNDS, SUMMARY, plain, stored
from fedtailor.metrics import LOWER_IS_BETTER
from fedtailor.run import Watch, run

COMPARISON = "compare.json"
SCORES = (
    "global_test",
    "clients_mean",
    "clients_worst_decile",
    "clients_mean_shared",
    "newcomers_mean",
    "newcomers_joined_mean",
)
MEASURES = (
    *SCORES,
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
    "bytes_total",
    "bytes_to_99",
    "trainable_parameters",
    "flops_per_example",
    "forward_flops_per_example",
    "flops_total",
    "peak_memory_bytes",
    "seconds",
    "simulated_seconds",
)


def compare(
    experiment: Experiment,
    out: Path,
    watch: Callable[[str, int], Watch] = lambda title, rounds: Watch(),
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run what is missing, resume what was cut, keep what is done; returns a row a case and writes compare.json and compare.md.

    What `compare.choose` leaves open is chosen for each case by the validation data of its first seed, the baselines' too:
    test data are not looked at, and the other seeds run with what was chosen. A value with which every client diverges is noted
    and counts as the worst.

    Raises:
        ConfigError, DataError, RunError: as `cases` and `run`; RunError also where a case diverges with all its values.
    """
    todo = list(cases(experiment, only))
    summaries: dict[str, list[dict[str, Any]]] = {}
    chosen: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}

    def done(case: Case, choice: dict[str, Any], candidate: bool = False) -> dict[str, Any] | None:
        """Its summary; None for a candidate that diverged from the start."""
        folder, wanted = out / case.folder(choice), case.experiment(choice)
        summary = finished(folder, wanted)
        if summary is None:
            title = f"{case.name}{', ' if choice else ''}{titled(choice)} (seed {case.seed})"
            watched = watch(title, wanted.rounds)
            try:
                summary = run(wanted, folder, resume=(folder / EXPERIMENT).exists(), watch=watched)
            except RunError as error:
                if not candidate or not _unheard(folder, wanted.rounds):
                    raise
                watched.notice(f"{error}: counted as the worst value")
                return None
        points = curve(folder)
        return {**summary, "bytes_to_99": bytes_to(0.99, points, summary["metric"]), "curve": points, "run": str(folder)}

    def told() -> list[dict[str, Any]]:
        rows = []
        for name, runs in summaries.items():
            case = next(case for case in todo if case.name == name)
            pooled = summaries.get(case.pooled or "", [])
            tried = {"changes": case.changes, "chosen": chosen[name][0], "tried": chosen[name][1]}
            seeds = {"values": [_each(r) for r in runs], "curves": [r["curve"] for r in runs]}
            rows.append({**row(name, runs), **_to_pooled(runs, pooled), "pooled": case.pooled, **tried, **seeds})
        if "majority" in experiment.compare.baselines:
            firsts = {case.task: summaries[case.name] for case in reversed(todo) if case.name in summaries}
            rows += [flat("majority", task, firsts[task]) for task in reversed(firsts)]
        wire.atomically(out / COMPARISON, lambda path: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"))
        wire.atomically(out / "compare.md", lambda path: path.write_text(markdown(rows), encoding="utf-8"))
        return rows

    rows: list[dict[str, Any]] = []
    for case in todo:
        if case.name not in chosen:
            candidates = case.choices if len(case.choices) > 1 else []
            tried = [{**choice, **_validation(done(case, choice, candidate=True))} for choice in candidates]
            if tried and not any(t["rank"] for t in tried):
                names = "; ".join(map(titled, candidates))
                raise RunError(f"compare case '{case.name}': every value of compare.choose diverges ({names}): list others")
            best = max(range(len(tried)), key=lambda i: tried[i]["rank"]) if tried else 0
            chosen[case.name] = case.choices[best], [{k: v for k, v in t.items() if k != "rank"} for t in tried]
        summary = done(case, chosen[case.name][0])
        assert summary
        summaries.setdefault(case.name, []).append(summary)
        rows = told()  # after each case: who looks before the end sees a table of what is done
    return rows


def _unheard(folder: Path, rounds: int) -> bool:
    """Whether all rounds are there and no client was heard in any: other failures leave rounds undone, or had a loss."""
    path = folder / ROUNDS
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return len(lines) == rounds and all(line["loss"] is None for line in lines)


def _validation(summary: dict[str, Any] | None) -> dict[str, Any]:
    """The last round's validation metric, and how it ranks: by the metric, then by the loss; [] is below everything."""
    if summary is None:
        return {"valid": None, "valid_loss": None, "rank": []}
    last = json.loads((Path(summary["run"]) / ROUNDS).read_text(encoding="utf-8").splitlines()[-1])
    sign = -1.0 if summary["metric"] in LOWER_IS_BETTER else 1.0
    told = [(s, last.get(name)) for s, name in ((sign, "valid"), (-1.0, "valid_loss"))]
    # What diverged has no value, and is worse than anything.
    return {**{k: last.get(k) for k in ("valid", "valid_loss")}, "rank": [-math.inf if v is None else s * v for s, v in told]}


def finished(folder: Path, experiment: Experiment) -> dict[str, Any] | None:
    """The summary of a run that is done, if it is of this very experiment.

    Raises:
        ConfigError: the folder holds the same case under other settings.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return None
    if plain(stored(folder)) != plain(experiment):
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


def _each(summary: dict[str, Any]) -> dict[str, Any]:
    """What one seed gave, for who pairs seeds."""
    return {"seed": summary["seed"], **{m: summary[m] for m in SCORES if summary.get(m) is not None}}


def _to_pooled(runs: list[dict[str, Any]], pooled: list[dict[str, Any]]) -> dict[str, Any]:
    """The difference to pooled training on the global test set, seed by seed."""
    there = {r["seed"]: r["global_test"] for r in pooled if r.get("global_test") is not None}
    differences = [r["global_test"] - there[r["seed"]] for r in runs if r["seed"] in there and r.get("global_test") is not None]
    return {"to_pooled": interval(differences)} if differences else {}


def curve(folder: Path) -> list[dict[str, float]]:
    """What was known of the model after which bytes of all clients and which time: a point for each round that was validated."""
    size, points = 0, []
    for line in map(json.loads, (folder / ROUNDS).read_text(encoding="utf-8").splitlines()):
        size += line["bytes_up"] + line["bytes_down"]
        if line.get("valid") is not None:
            points.append({"round": line["round"], "bytes": size, "clock": line["clock"], "valid": line["valid"]})
    return points


def bytes_to(share: float, points: list[dict[str, float]], metric: str) -> float | None:
    """Bytes up and down, of all clients, until the validation metric was first within `share` of the run's own best."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = max((sign * p["valid"] for p in points), default=0.0)
    return next((p["bytes"] for p in points if sign * p["valid"] >= (best * share if sign > 0 else best / share)), None)


def flat(name: str, task: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A baseline that needs no training: always the commonest class. `runs`: of any case of its task."""
    values = [r[name] for r in runs if r.get(name) is not None]
    measured = {"global_test": interval(values)} if values else {}
    title = f"{task}, {name}" if task else name
    return {"name": title, "metric": runs[0]["metric"], "seeds": len(runs), "runs": [], **measured}


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
    paired = any("to_pooled" in r for r in rows)
    scores = {f"global test ({metric})": "global_test", **({"to pooled": "to_pooled"} if paired else {})}
    scores |= {"clients' mean": "clients_mean", "worst decile": "clients_worst_decile"}
    late = {"newcomers": "newcomers_mean", "newcomers, joined": "newcomers_joined_mean"}
    scores |= {title: measure for title, measure in late.items() if any(measure in r for r in rows)}
    sizes = {"kB up": ("bytes_up_per_client_round", 1e3), "kB down": ("bytes_down_per_client_round", 1e3)}
    sizes |= {"MB in all": ("bytes_total", 1e6)} | (
        {"MB to 99 %": ("bytes_to_99", 1e6)} if any("bytes_to_99" in r for r in rows) else {}
    )
    body = []
    for r in rows:
        name = f"{r['name']} ({titled(r['chosen'])} chosen)" if r.get("chosen") else r["name"]
        cells = [*(_score(r.get(m)) for m in scores.values()), *(_number(r.get(m), unit) for m, unit in sizes.values())]
        body.append([name, *cells, _number(r.get("trainable_parameters"), 1, 0), _number(r.get("seconds"), 1)])
    return ["case", *scores, *sizes, "trained", "s"], body


def _score(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "-"
    half = cell["high"] - cell["mean"]
    return f"{cell['mean']:.4f}" + (f" ± {half:.4f}" if half else "")


def _number(cell: dict[str, float] | None, unit: float, digits: int = 1) -> str:
    return "-" if cell is None else f"{cell['mean'] / unit:,.{digits}f}"
