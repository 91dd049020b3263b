"""One run, from an experiment to its folder: rounds, checkpoints, evaluation, export, report."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
import torch

from fedtailor import wire
from fedtailor.backbone import EMBEDDED as MODELS
from fedtailor.config import Experiment, load, parse
from fedtailor.core import SERVER, ClientId, Letters, Tree, stream
from fedtailor.data.readers import TABLES
from fedtailor.data.sources import EMBEDDED as DATA
from fedtailor.engines.answering import Workers
from fedtailor.engines.local import Local
from fedtailor.engines.states import MANIFEST, States
from fedtailor.engines.training import Flops, no_flops
from fedtailor.errors import ConfigError, DataError, RunError
from fedtailor.filters import chain
from fedtailor.ledger import COLUMNS, Ledger, peak_memory
from fedtailor.metrics import mean_loss, total
from fedtailor.simulation import BASELINES, Facts, Model, World, build, equip
from fedtailor.trees import numel

EXPERIMENT, ENVIRONMENT, FACTS = "experiment.toml", "environment.json", "facts.json"
ROUNDS, CLIENTS, SUMMARY = "rounds.jsonl", "clients.csv", "summary.json"
FILES = (("model", "name"), ("data", "name"), ("data", "test"), ("algorithm", "kind"))  # keys that may name a file or folder


class Watch(NamedTuple):
    """Where a run tells how it goes; the command line shows it, a library user may ignore it."""

    notice: Callable[[str], None] = lambda line: None
    stage: Callable[[str], None] = lambda name: None
    client: Callable[[ClientId], None] = lambda client: None
    round: Callable[[dict[str, Any]], None] = lambda line: None


def run(experiment: Experiment, out: Path, resume: bool = False, watch: Watch = Watch()) -> dict[str, Any]:
    """Run an experiment into the folder `out` and return its summary. With `resume` it goes on from the last checkpoint.

    Raises:
        ConfigError: `out` holds another run, or the experiment to be resumed differs.
        DataError, RunError: see errors.py.
    """
    check_folder(experiment, out, resume)
    check_trackers(experiment)
    watch.stage("loading data and model")
    world = build(experiment)
    make_folder(experiment, out)  # only now: a mistake in the experiment leaves nothing behind
    facts = json.dumps(world.facts._asdict(), indent=1)
    with wire_errors(out):
        wire.atomically(out / FACTS, lambda path: path.write_text(facts, encoding="utf-8"))
        return _run(world, out, watch)


def _run(world: World, out: Path, watch: Watch) -> dict[str, Any]:
    experiment, algorithm = world.experiment, world.algorithm
    started, clients = time.perf_counter(), sorted(world.clients)
    states, ledger = States(out / "state"), Ledger()
    before = states.resume()
    tracker = _tracker(experiment, out)
    engine = Local(
        algorithm,
        world.sites,
        workers(world, world.flops),
        states,
        ledger,
        up=chain(experiment.filters.up),
        down=chain(experiment.filters.down),
        seed=experiment.seed,
        stacked=experiment.engine.stacked,
        deadline=experiment.clients.deadline,
        notice=watch.notice,
        progress=watch.client,
    )
    done, state, earlier = 0, algorithm.init(world.technique.init), 0.0
    try:
        if before:
            done, state, carried, kept = before
            engine.load(carried)
            ledger.load(kept)
            earlier = kept["elapsed"]
            watch.notice(f"resuming after round {done}")
        elapsed = earlier
        _keep_rounds(out / ROUNDS, done)
        for number in range(done + 1, experiment.rounds + 1):
            watch.stage(f"round {number}/{experiment.rounds}")
            begun = time.perf_counter()
            cohort = draw(clients, experiment.clients.per_round, experiment.seed, number)
            state = engine.converse(algorithm.round(state, cohort), number)
            line: dict[str, Any] = {"round": number, **_costs(ledger, engine, len(cohort))}
            if "aggregation_error" in state and line["replies"]:  # else it is that of an earlier round
                line["aggregation_error"] = state["aggregation_error"]
            if experiment.evaluate.every and (number % experiment.evaluate.every == 0 or number == experiment.rounds):
                line |= _validate(world, engine, state, number)
            line = defined({**line, "seconds": time.perf_counter() - begun, "peak_memory_bytes": peak_memory()})
            with (out / ROUNDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            elapsed += line["seconds"]
            states.commit(number, state, engine.dump(), {**ledger.dump(), "elapsed": elapsed})
            tracker(line, number)
            watch.round(line)
        if SERVER not in ledger.clients and not ledger.total("replies"):
            raise RunError(
                f"no client was heard in {experiment.rounds} rounds: every reply was not finite or lost; "
                "lower train.lr, set train.clip, or lower the dropout of clients.devices"
            )
        watch.stage("evaluating on the test sets")
        summary: dict[str, Any] = defined(_finish(world, engine, state, states, ledger, elapsed, out))
        summary["seconds_total"] = earlier + time.perf_counter() - started
    finally:
        engine.close()
        tracker(None, 0)
    wire.atomically(out / SUMMARY, lambda path: path.write_text(json.dumps(summary, indent=1, allow_nan=False), "utf-8"))
    return summary


def draw(clients: list[ClientId], size: int | None, seed: int, round: int) -> list[ClientId]:
    """The cohort of a round: `size` clients drawn without replacement from a stream of its own, in client order."""
    if size is None or size >= len(clients):
        return list(clients)
    picked = torch.randperm(len(clients), generator=stream(seed, "cohort", round))[:size]
    return [clients[i] for i in sorted(picked.tolist())]


def workers(model: Model, flops: Flops = no_flops) -> Workers:
    """One single-threaded worker a core on a CPU, one worker on a GPU."""
    engine, device = model.experiment.engine, model.job.device
    cores = torch.get_num_threads()
    count = engine.workers or (1 if device != "cpu" or model.experiment.train.dropout else max(1, min(cores, 8)))
    group = engine.group or (64 if device != "cpu" else 0)
    return Workers(model.technique.bind, count, device, flops, group)


def check_folder(experiment: Experiment, out: Path, resume: bool) -> None:
    """The folder is free, or it holds this very experiment and is to be resumed. A run without a checkpoint is none yet.

    Raises:
        ConfigError: it is a file, or holds something else. RunError: it holds a corrupt checkpoint.
    """
    path = out / EXPERIMENT
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out '{out}' is a file: name a folder")
    begun = path.exists() and (out / "state" / MANIFEST).exists()
    if begun and not resume:
        raise ConfigError(f"'{out}' already holds a run: add --resume to go on with it, or name another --out")
    if begun:
        ours, theirs = plain(experiment), plain(stored(out))
        changed = [k for k in ours | theirs if ours.get(k) != theirs.get(k) and k not in ("rounds", "track")]
        if changed:
            raise ConfigError(f"'{out}' holds another experiment: section '{changed[0]}' differs; name another --out")
        done = States(out / "state").resume()
        if done and done[0] > experiment.rounds:
            raise ConfigError(f"'{out}' is already at round {done[0]}: set rounds to {done[0]} or more, or name another --out")
    elif out.is_dir() and any(out.iterdir()) and not path.exists():
        raise ConfigError(f"--out '{out}' is not empty and holds no run: name another folder")


def check_trackers(experiment: Experiment) -> None:
    """Accelerate would only warn of a tracker that is not installed, and log nothing."""
    if experiment.track.to:
        from accelerate.tracking import get_available_trackers

        there = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
        missing = [name for name in experiment.track.to if name not in there]
        if missing:
            raise ConfigError(f"track.to: '{missing[0]}' is not installed: pip install {missing[0]}, or leave it out")


def make_folder(experiment: Experiment, out: Path) -> None:
    resolved, here = tomli_w.dumps(plain(experiment)), {**environment(), "folder": str(out.resolve())}
    try:
        out.mkdir(parents=True, exist_ok=True)
        wire.atomically(out / EXPERIMENT, lambda p: p.write_text(resolved, encoding="utf-8"))
        (out / ENVIRONMENT).write_text(json.dumps(here, indent=1), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to '{out}': {error.strerror}") from error


def plain(experiment: Experiment) -> dict[str, Any]:
    """The resolved experiment as plain values: paths are absolute, and no None (TOML has none).

    Equal experiments have equal values whatever directory they are read in; what may be a hub id stays as it is, unless a
    file or folder of that name is there.
    """

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if v is not None}
        return [strip(v) for v in value] if isinstance(value, list | tuple) else value

    values: dict[str, Any] = strip(experiment.model_dump())
    model, data, algorithm = values["model"], values["data"], values["algorithm"]
    folder, rows, test = (Path(str(name)).expanduser() for name in (model["name"], data["name"], data.get("test", "")))
    if model["name"] not in MODELS and (_is_path(model["name"]) or folder.is_dir()):
        model["name"] = _absolute(folder)
    if data["name"] not in DATA and (_is_path(data["name"]) or rows.exists()):
        data["name"] = _absolute(rows)
    if test.suffix.lower() in TABLES and test.is_file():  # else it is beside the data, whose name is absolute
        data["test"] = _absolute(test)
    file, found, function = algorithm["kind"].rpartition(":")
    if found:
        algorithm["kind"] = f"{_absolute(Path(file))}:{function}"
    return values


def stored(out: Path) -> Experiment:
    """The experiment of a run folder; what was moved or copied together with the folder is named where it is now.

    Raises:
        ConfigError: the file is missing or was altered into something that is no experiment.
    """
    values, now = plain(load(out / EXPERIMENT)), str(out.resolve())
    was = now
    with contextlib.suppress(OSError, ValueError, KeyError):  # an earlier version's, or cut by a kill: taken as not moved
        was = json.loads((out / ENVIRONMENT).read_text(encoding="utf-8"))["folder"]
    for section, key in FILES:
        name = str(values[section].get(key))
        if was != now and os.path.isabs(name):
            moved = os.path.normpath(os.path.join(now, os.path.relpath(name, was)))
            if Path(moved.rpartition(":")[0] if section == "algorithm" else moved).exists():
                values[section][key] = moved
    return parse(values)


def _is_path(name: str) -> bool:
    """Whether this names a file or folder even where there is none: one that is gone is to be reported as that."""
    return name.startswith((".", "~")) or Path(name).suffix.lower() in (*TABLES, ".zip")


def _absolute(path: Path) -> str:
    """The last part stays as it is: a link into the hub's cache has the suffix that its target lacks."""
    return str(path.parent.resolve() / path.name)


def environment() -> dict[str, Any]:
    packages = ("fedtailor", "torch", "transformers", "peft", "datasets", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": {name: metadata.version(name) for name in packages},
    }


def defined(value: Any) -> Any:
    """JSON has no NaN and no infinity: what a diverged model's measures may be is None there."""
    if isinstance(value, dict):
        return {name: defined(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [defined(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class wire_errors:
    """Turns the operating system's complaints (a full disk, also that of the temporary folder) into one line that says how
    to go on. What a run reads is in memory or in its checkpoint by then: all that is left to fail is writing."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            where, why = error.filename or self.out, error.strerror or error
            raise RunError(f"cannot write to '{where}': {why}; free space, then --resume") from error


def _costs(ledger: Ledger, engine: Local, cohort: int) -> dict[str, Any]:
    """The round's line: sums over its clients, and every client's own part."""
    lines = ledger.close_round()
    sums = {name: sum(line.get(name, 0.0) for line in lines.values()) for name in COLUMNS}
    return {
        "cohort": cohort,
        "clock": engine.clock,
        **{name: int(v) if name.startswith("bytes") or name in ("letters", "replies") else v for name, v in sums.items()},
        "clients": lines,
        "loss": _mean_loss(lines),
    }


def _mean_loss(lines: dict[ClientId, dict[str, float]]) -> float | None:
    heard = [line for line in lines.values() if "loss" in line]
    weight = sum(line["examples"] for line in heard)
    return sum(line["loss"] * line["examples"] for line in heard) / weight if weight else None


def _validate(world: World, engine: Local, state: Tree, number: int) -> dict[str, Any]:
    cohort = sorted(world.clients) if world.algorithm.personal else []
    replies = engine.converse(world.algorithm.answer(state, cohort), number, world.valid_sites)
    sums = total(r.body["test"] for r in replies.values() if "test" in r.body)
    return {"valid": world.metric.value(sums), "valid_loss": mean_loss(sums)} if sums else {}


def evaluate(world: World, engine: Local, state: Tree, number: int) -> dict[str, Any]:
    """Metrics on the global test set and on every client's own test split."""
    replies = engine.converse(world.algorithm.answer(state, sorted(world.clients)), number, world.sites)
    value = world.metric.value
    own = {c: value(r.body["test"]) for c, r in sorted(replies.items()) if c != SERVER and "test" in r.body}
    wide = {c: value(r.body["global"]) for c, r in sorted(replies.items()) if "global" in r.body}
    everything = [r.body["global"] for r in replies.values() if "global" in r.body]
    whole = replies[SERVER].body["test"] if SERVER in replies else total(everything) if everything else None
    scores = sorted(own.values(), reverse=world.metric.better(0.0, 1.0))
    decile = scores[: max(1, round(len(scores) / 10))]
    return {
        "metric": world.metric.name,
        "global_test": value(whole) if whole else None,
        "global_test_loss": mean_loss(whole) if whole else None,
        "clients_mean": float(np.mean(scores)) if scores else None,
        "clients_worst_decile": float(np.mean(decile)) if decile else None,
        "clients": own,
        "clients_on_global": wide,
    }


def _finish(
    world: World, engine: Local, state: Tree, states: States, ledger: Ledger, elapsed: float, out: Path
) -> dict[str, Any]:
    experiment, algorithm = world.experiment, world.algorithm
    scores = evaluate(world, engine, state, experiment.rounds)
    world.technique.save(algorithm.model(state), out / "adapter")
    if algorithm.personal:
        save_personal(world, states, state, out / "adapter" / "personal")
    own, wide = scores.pop("clients"), scores.pop("clients_on_global")
    _write_clients(world, ledger, own, wide, out / CLIENTS)
    flops, examples = ledger.total("flops"), ledger.total("examples")
    pooled = experiment.algorithm.kind in BASELINES
    return {
        "name": experiment.name,
        "algorithm": experiment.algorithm.kind,
        "technique": experiment.technique.kind,
        "seed": experiment.seed,
        **scores,
        "bytes_up_per_client_round": 0 if pooled else ledger.per_letter("bytes_up", "replies"),
        "bytes_down_per_client_round": 0 if pooled else ledger.per_letter("bytes_down", "letters"),
        "bytes_total": int(ledger.total("bytes_up") + ledger.total("bytes_down")),
        "trainable_parameters": numel(world.technique.init),
        "flops_per_example": flops / examples if examples else world.flops(1, int(np.mean(world.store.lengths))),
        "flops_total": flops,
        "example_passes": examples,
        "peak_memory_bytes": peak_memory(),
        "seconds": elapsed,
        "simulated_seconds": engine.clock,
        "rounds": experiment.rounds,
        "clients": len(world.clients),
        "train_rows": int(sum(len(s.train) for s in world.clients.values())),
        **world.without_training(),
        "partition": {"clients": world.facts.clients, "labels": world.facts.labels, "counts": world.counts.tolist()},
        "state_hash": states.hash(state),
    }


def save_personal(world: World, states: States, state: Tree, folder: Path) -> None:
    """A PEFT folder for each client's personal tree (in a deployment it never leaves the client)."""
    assert world.algorithm.personal
    for client in sorted(world.clients):
        own = states.read_own(client).get("algorithm")
        tree = world.algorithm.personal(own, broadcast_of(world, state, client), world.sites(client, 0))
        world.technique.save(tree, folder / client)


def broadcast_of(model: Model, state: Tree, client: ClientId) -> Tree:
    """What the server would send this client for it to build its personal tree."""
    talk = model.algorithm.answer(state, [client])
    letters = next(talk)
    talk.close()
    return dict((letters.to if isinstance(letters, Letters) else letters)[client].body)


def _write_clients(world: World, ledger: Ledger, own: dict[str, float], wide: dict[str, float], path: Path) -> None:
    columns = ["client", "device", "train", "valid", "test", "metric", "metric_global", *COLUMNS]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for client, rows in sorted(world.clients.items()):
            line = ledger.clients.get(client, {})
            sizes = [len(rows.train), len(rows.valid), len(rows.test)]
            device = world.site(client, 0).device.name
            writer.writerow(
                [client, device, *sizes, own.get(client, ""), wide.get(client, ""), *(line.get(c, 0) for c in COLUMNS)]
            )


def _keep_rounds(path: Path, done: int) -> None:
    """Drop the lines of rounds after the checkpoint: they will be run again."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["round"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break  # a kill cut this line short
    wire.atomically(path, lambda p: p.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))


def _tracker(experiment: Experiment, out: Path) -> Callable[[dict[str, Any] | None, int], None]:
    """Logs the numbers of a round to accelerate's trackers; called with None it closes them."""
    if not experiment.track.to:
        return lambda line, step: None
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(log_with=list(experiment.track.to), project_dir=str(out / "trackers"), cpu=True)
        flat = {k: str(v) for k, v in plain(experiment).items()}
        accelerator.init_trackers(experiment.track.project, config=flat)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"track.to {experiment.track.to}: {error}; install the tracker or leave it out") from error

    def log(line: dict[str, Any] | None, step: int) -> None:
        if line is None:
            accelerator.end_training()
        else:
            accelerator.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=step)

    return log


def reopen(out: Path) -> tuple[Model, Tree, States]:
    """The model of a finished or interrupted run, without its data: for `predict` and `export`.

    Raises:
        ConfigError: the folder holds no run. RunError: it has no checkpoint yet, or a corrupt one.
    """
    experiment, state, states = _checkpoint(out)
    path = out / FACTS
    if not path.is_file():  # a folder of an earlier version: the data still says it
        return build(experiment), state, states
    try:
        facts = Facts(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: corrupt ({error}): remove it, and the data is read in its place") from error
    return equip(experiment, facts), state, states


def judge_again(out: Path) -> dict[str, Any]:
    """`evaluate` for the last checkpoint of a finished or interrupted run.

    Raises:
        ConfigError, RunError: as `reopen`. DataError: the data cannot be read.
    """
    experiment, state, states = _checkpoint(out)
    world, nothing = build(experiment), chain([])
    engine = Local(
        world.algorithm, world.sites, workers(world), states, Ledger(), nothing, nothing, experiment.seed,
        stacked=experiment.engine.stacked,
    )  # fmt: skip
    try:
        scores: dict[str, Any] = defined(evaluate(world, engine, state, experiment.rounds))
        return scores
    finally:
        engine.close()


def _checkpoint(out: Path) -> tuple[Experiment, Tree, States]:
    if not (out / EXPERIMENT).is_file():
        raise ConfigError(f"'{out}' is not a run folder (no {EXPERIMENT} in it)")
    if not (out / "state" / MANIFEST).is_file():
        raise RunError(f"'{out}' has no checkpoint yet: run it first")
    experiment, states = stored(out), States(out / "state")
    before = states.resume()
    assert before is not None
    return experiment, before[1], states


__all__ = ["DataError", "Watch", "draw", "environment", "evaluate", "judge_again", "reopen", "run", "save_personal"]
