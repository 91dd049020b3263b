"""The cases of a comparison: any keys over any values, each with its baselines, for each seed."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor.config import Experiment, assign, parse
from fedtailor.errors import ConfigError, nearest
from fedtailor.folder import written

EXCHANGED = ("algorithm", "filters", "clients.devices")
TRAINED = ("technique", "train", "rounds", "clients.ranks", "clients.lengths", "clients.kinds")
NOT_FOR = {  # keys that mean nothing to a baseline
    "pooled": (*EXCHANGED, "clients.kinds", "clients.partition"),
    "local": EXCHANGED,
    "zero-shot": (*EXCHANGED, *TRAINED, "clients.partition"),
}
WITHOUT_GRADIENTS = ("prompt-search", "rag")  # pooled, they are the same algorithm with one client that has everything
ONE_CLIENT = ("filters", "clients.devices", "clients.partition", "clients.per_round", "clients.count")
WORDS = ("name", "choose", "baselines", "tasks")  # of a table of compare.sets or compare.tasks, beside dotted keys


class Case(NamedTuple):
    name: str  # what distinguishes it: "technique.kind=lora", "pooled"
    seed: int
    values: dict[str, Any]  # the experiment
    choices: list[dict[str, Any]]  # dotted keys and values, one of which validation data chooses; [{}] without `choose`
    changes: dict[str, Any] = {}  # dotted keys and values that make it this case
    pooled: str | None = None  # the case that trains the same where the data is pooled
    task: str = ""  # what it is run on, where there are several

    def experiment(self, choice: dict[str, Any]) -> Experiment:
        values = copy.deepcopy(self.values)
        for key, value in choice.items():
            assign(values, key.split("."), value)
        return parse(values, where=f"compare case '{self.name}'")

    def folder(self, choice: dict[str, Any]) -> Path:
        parts = [self.name, *([titled(choice)] if choice else []), f"seed-{self.seed}"]
        return Path(*(re.sub(r"[^\w.=\-]+", "_", part) for part in parts))


def cases(experiment: Experiment, only: Sequence[str] = ()) -> Iterator[Case]:
    """Every combination of `compare.vary` (or each table of `compare.sets`) on every table of `compare.tasks`, each followed by its
    baselines, for the first seed; then the same for the other seeds. Cases may share a baseline: it comes once.

    `only`: those of these sets and of these tasks.

    Raises:
        ConfigError: a varied key that does not exist, or a value that it cannot have; no set or task of that name.
    """
    section = experiment.compare
    grid = _grid(section.vary, "vary")
    tasks, sets = (_asked(tables, only) for tables in (section.tasks, section.sets))
    names = [str(table["name"]) for table in (*section.sets, *section.tasks) if "name" in table]
    of_tasks = [str(task.get("name")) for task in section.tasks]
    for name in itertools.chain.from_iterable(table.get("tasks", []) for table in section.sets):
        if name not in of_tasks:
            hint = nearest(name, of_tasks) if of_tasks else "compare.tasks has none"
            raise ConfigError(f"compare.sets: there is no task '{name}': {hint}")
    for name in only:
        if name not in names:
            hint = nearest(name, names) if names else "compare.sets and compare.tasks name nothing"
            raise ConfigError(f"--only {name}: {hint}")
    for seed in section.seeds or [experiment.seed]:
        known: dict[str, Case] = {}  # by what is run
        for task, one, other in itertools.product(tasks or [{}], sets or [{}], grid):
            if task and task.get("name") not in one.get("tasks", [task.get("name")]):
                continue
            found = {kind: known.get(_content(case), case) for kind, case in _variant(experiment, one, task, other, seed).items()}
            own, pooled = found.pop(""), found.get("pooled")
            for case in (own._replace(pooled=pooled.name if pooled else None), *found.values()):
                if _content(case) in known:
                    continue
                if any(case.name == other.name for other in known.values()):
                    raise ConfigError(f"compare.sets: two cases would be called '{case.name}': give them a name each")
                known[_content(case)] = case
                for choice in case.choices:
                    case.experiment(choice)  # a bad key is known before the first run
                yield case


def _content(case: Case) -> str:
    return json.dumps([case.values, case.choices], sort_keys=True)


def _asked(tables: list[dict[str, Any]], only: Sequence[str]) -> list[dict[str, Any]]:
    """The tables of these names; all where none of them is named."""
    return [table for table in tables if table.get("name") in only] or tables


def _variant(
    experiment: Experiment, one: dict[str, Any], task: dict[str, Any], other: dict[str, Any], seed: int
) -> dict[str, Case]:
    """The case of one table of `compare.sets` on one of `compare.tasks` with one combination of `compare.vary`, under "", and its
    baselines by kind. What a set says comes after what a task says."""
    section = experiment.compare
    changes = {**{k: v for table in (task, one) for k, v in table.items() if k not in WORDS}, **other}
    chosen, baselines = [table.get("choose", {}) for table in (task, one)], one.get("baselines", section.baselines)
    if "seed" in changes:
        raise ConfigError("compare: seeds are varied by compare.seeds, a list, so that each case has them all")
    if not all(isinstance(choose, dict) and all(isinstance(v, list) for v in choose.values()) for choose in chosen):
        raise ConfigError('compare.sets and compare.tasks: write choose as { "train.lr" = [0.001, 0.01] }')
    if not isinstance(baselines, list) or not set(baselines) <= set(section.baselines):
        raise ConfigError("compare.sets: baselines is a list of some of compare.baselines")
    choices = _grid({**section.choose, **chosen[0], **chosen[1]}, "choose")
    if len(choices) > 1 and not (experiment.evaluate.every and experiment.clients.valid):
        raise ConfigError("compare.choose needs validation data: set clients.valid above 0 and evaluate.every to 1 or more")
    found = {}
    for kind in ("", *(b for b in baselines if b in NOT_FOR)):
        alone = kind == "pooled" and str(changes.get("algorithm.kind", experiment.algorithm.kind)) in WITHOUT_GRADIENTS
        if alone and changes.get("clients.newcomers", experiment.clients.newcomers):
            raise ConfigError(
                f"compare: algorithm {changes.get('algorithm.kind', experiment.algorithm.kind)} is pooled by one client that has everything, "
                "also the newcomers' rows: leave out clients.newcomers, or 'pooled' in compare.baselines"
            )
        drop = ONE_CLIENT if alone else NOT_FOR.get(kind, ())
        own = {k: v for k, v in changes.items() if not k.startswith(drop)}
        options = _unlike({k: v for k, v in c.items() if not k.startswith(drop)} for c in choices)
        said = {
            k: v for k, v in own.items() if k in other or (k in one and "name" not in one) or (k in task and "name" not in task)
        }
        whose = str(one.get("name", "")) if not kind or any(k in own for k in one) else ""  # a baseline that all sets share
        words = [str(task.get("name", "")), kind, whose, titled(said)]
        title = ", ".join(word for word in words if word) or str(experiment.algorithm.kind)
        values = _values(experiment, own, seed, kind, alone)
        made = {**own, "algorithm.kind": kind} if kind and not alone else own
        found[kind] = Case(title, seed, values, options, made, task=str(task.get("name", "")))
    return found


def _values(experiment: Experiment, own: dict[str, Any], seed: int, baseline: str, alone: bool) -> dict[str, Any]:
    """The experiment of a case; `alone`: the baseline is the same algorithm with one client."""
    values = written(experiment)
    values.pop("compare")
    values["seed"] = seed
    for key, value in own.items():
        assign(values, key.split("."), value)
    if not baseline:
        return values
    values["filters"] = {}
    for key in ("devices", "deadline"):
        values["clients"].pop(key, None)
    if alone:
        values["clients"] |= {"count": 1, "partition": {"kind": "iid"}}
        values["clients"].pop("per_round", None)
        return values
    values["algorithm"] = {"kind": baseline}
    if baseline in ("pooled", "zero-shot"):
        values["clients"]["kinds"] = []
    if baseline == "zero-shot":
        ours = values["technique"] if values["technique"]["kind"] == "template" else {"kind": "template"}
        values |= {"technique": ours, "rounds": 1}
        values["clients"] |= {"ranks": [], "lengths": []}
    return values


def _grid(values: dict[str, list[Any]], where: str) -> list[dict[str, Any]]:
    for key, options in values.items():
        if not options:
            raise ConfigError(f"compare.{where}: '{key}' has no values: list some or leave it out")
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def _unlike(choices: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for choice in choices:
        if choice not in out:
            out.append(choice)
    return out


def titled(changes: dict[str, Any]) -> str:
    """Dotted keys and values as a title."""
    return ", ".join(f"{key}={_short(value)}" for key, value in changes.items())


def _short(value: Any) -> str:
    """A value as a part of a title: partitions by kind and options, devices by name."""
    if isinstance(value, dict) and ("kind" in value or "name" in value):
        return str(value["name"]) if "name" in value else " ".join(str(v) for v in value.values())
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return " + ".join(map(_short, value))
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
