"""One run, from an experiment to its folder: rounds, checkpoints, evaluation, export, report."""

from __future__ import annotations

import csv
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedtailor import memory, newcomers, wire
from fedtailor.config import Experiment
from fedtailor.core import SERVER, ClientId, Tree, stream
from fedtailor.engines.engine import Engine
from fedtailor.engines.states import States
from fedtailor.errors import RunError
from fedtailor.evaluation import broadcast_of, evaluate, validate
from fedtailor.folder import CLIENTS, ROUNDS, SUMMARY, check_folder, defined, keep_rounds, make_folder, record, writing
from fedtailor.launch import check_engine, engine_for
from fedtailor.ledger import COLUMNS, Ledger
from fedtailor.simulation import BASELINES, Split, World, build
from fedtailor.tracking import check_trackers, tracker
from fedtailor.trees import numel

Members = Mapping[ClientId, Mapping[str, Any]]  # what `fedtailor status` tells of each


class Watch(NamedTuple):
    """Where a run tells how it goes; the command line shows it, a library user may ignore it."""

    notice: Callable[[str], None] = lambda line: None
    stage: Callable[[str], None] = lambda name: None
    client: Callable[[ClientId], None] = lambda client: None
    round: Callable[[dict[str, Any]], None] = lambda line: None
    members: Callable[[Callable[[], Members]], None] = lambda ask: None  # of a run that is served: who is attached may be asked


def run(experiment: Experiment, out: Path, resume: bool = False, watch: Watch = Watch()) -> dict[str, Any]:
    """Run an experiment into the folder `out` and return its summary. With `resume` it goes on from the last checkpoint.

    Raises:
        ConfigError: `out` holds another run, or the experiment to be resumed differs.
        DataError, RunError: see errors.py.
    """
    check_folder(experiment, out, resume)
    check_trackers(experiment)
    check_engine(experiment)
    watch.stage("loading data and model")
    memory.keep()
    memory.forget_peak()
    world = build(experiment)
    make_folder(experiment, out)  # only now: a mistake in the experiment leaves nothing behind
    with writing(out):
        record(world.facts, out)
        return conduct(world, out, watch, functools.partial(engine_for, world, watch.notice, watch.client))


def conduct(
    world: World,
    out: Path,
    watch: Watch,
    engine_of: Callable[[States, Ledger], Engine],
    end: Callable[[Tree, States], None] = lambda state, states: None,
) -> dict[str, Any]:
    """The rounds of a run in its folder, from the last checkpoint where there is one, and its summary. `end` is told of the last state.

    Raises:
        RunError: see errors.py.
    """
    experiment, algorithm = world.experiment, world.algorithm
    started, clients = time.perf_counter(), world.facts.clients
    states, ledger = States(out / "state"), Ledger()
    before = states.resume()
    log = tracker(experiment, out)
    engine = engine_of(states, ledger)
    done, state, earlier = 0, algorithm.init(world.technique.init), 0.0
    try:
        if before:
            done, state, carried, kept = before
            engine.load(carried)
            ledger.load(kept)
            earlier = kept["elapsed"]
            watch.notice(f"resuming after round {done}")
        elapsed = earlier
        keep_rounds(out / ROUNDS, done)
        for number in range(done + 1, experiment.rounds + 1):
            watch.stage(f"round {number}/{experiment.rounds}")
            begun = time.perf_counter()
            cohort = draw(clients, experiment.clients.per_round, experiment.seed, number)
            state = engine.converse(algorithm.round(state, cohort), number)
            line: dict[str, Any] = {"round": number, **_costs(ledger, engine, len(cohort))}
            if "aggregation_error" in state and line["replies"]:  # else it is that of an earlier round
                line["aggregation_error"] = state["aggregation_error"]
            if algorithm.tells and line["replies"]:
                line |= algorithm.tells(state)
            if experiment.evaluate.every and (number % experiment.evaluate.every == 0 or number == experiment.rounds):
                line |= validate(world, engine, state, number)
            line = defined({**line, "seconds": time.perf_counter() - begun, "peak_memory_bytes": memory.peak()})
            with (out / ROUNDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            elapsed += line["seconds"]
            states.commit(number, state, engine.dump(), {**ledger.dump(), "elapsed": elapsed})
            log(line, number)
            watch.round(line)
        asks = algorithm.client.keys() - {"answer"}  # zero-shot asks for nothing
        if asks and SERVER not in ledger.clients and not ledger.total("replies"):
            raise RunError(
                f"no client was heard in {experiment.rounds} rounds: every reply was not finite or lost; "
                "lower train.lr, set train.clip, or lower the dropout of clients.devices"
            )
        watch.stage("evaluating on the test sets")
        summary: dict[str, Any] = defined(_finish(world, engine, state, states, ledger, elapsed, out, watch))
        end(state, states)
        engine.finish()
        summary["seconds_total"] = earlier + time.perf_counter() - started
    finally:
        engine.close()
        log(None, 0)
    wire.atomically(out / SUMMARY, lambda path: path.write_text(json.dumps(summary, indent=1, allow_nan=False), "utf-8"))
    return summary


def draw(clients: list[ClientId], size: int | None, seed: int, round: int) -> list[ClientId]:
    """The cohort of a round: `size` clients drawn without replacement from a stream of its own, in client order."""
    if size is None or size >= len(clients):
        return list(clients)
    picked = torch.randperm(len(clients), generator=stream(seed, "cohort", round))[:size]
    return [clients[i] for i in sorted(picked.tolist())]


def _costs(ledger: Ledger, engine: Engine, cohort: int) -> dict[str, Any]:
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
    weights = [line["examples"] or 1.0 for line in heard]  # who only looked at losses made no example passes
    return sum(line["loss"] * weight for line, weight in zip(heard, weights, strict=True)) / sum(weights) if heard else None


def _finish(
    world: World, engine: Engine, state: Tree, states: States, ledger: Ledger, elapsed: float, out: Path, watch: Watch
) -> dict[str, Any]:
    experiment, algorithm = world.experiment, world.algorithm
    scores = evaluate(world, engine, state, experiment.rounds)
    late: dict[ClientId, dict[str, float]] = {}
    shared: dict[ClientId, float] = {}
    if world.facts.newcomers or (algorithm.personal and engine.own_states_here):
        with newcomers.beside(world, watch.notice) as other:
            if algorithm.personal:
                shared = newcomers.with_shared(world, other, state)
            if world.facts.newcomers:
                watch.stage("judging newcomers")
                late = newcomers.judged(world, other, state)
    world.technique.save(algorithm.model(state), out / "adapter")
    if algorithm.personal and engine.own_states_here:
        save_personal(world, states, state, out / "adapter" / "personal")
    own, wide = scores.pop("clients"), scores.pop("clients_on_global")
    _write_clients(world, ledger, own, wide, shared, late, out / CLIENTS)
    flops, examples = ledger.total("flops"), ledger.total("examples")
    pooled = experiment.algorithm.kind in BASELINES
    lengths = next((store.lengths for store in (world.store, world.test) if store.rows), [experiment.data.max_length])
    usual = int(np.mean(lengths))
    return {
        "name": experiment.name,
        "algorithm": experiment.algorithm.kind,
        "technique": experiment.technique.kind,
        "seed": experiment.seed,
        **scores,
        **({"clients_mean_shared": float(np.mean(list(shared.values())))} if shared else {}),
        **_of_newcomers(late),
        "bytes_up_per_client_round": 0 if pooled else ledger.per_client_round("bytes_up", "replies"),
        "bytes_down_per_client_round": 0 if pooled else ledger.per_client_round("bytes_down", "letters"),
        "bytes_total": int(ledger.total("bytes_up") + ledger.total("bytes_down")),
        **_per_query(ledger, int(state.get("queries", 0))),
        "trainable_parameters": numel(world.technique.init),
        "flops_per_example": flops / examples if examples else world.flops(1, usual),
        "forward_flops_per_example": world.looks(1, usual),
        "flops_total": flops,
        "example_passes": examples,
        "peak_memory_bytes": memory.peak(),
        "seconds": elapsed,
        "simulated_seconds": engine.clock,
        "served": not engine.own_states_here,  # then these seconds are real ones
        "rounds": experiment.rounds,
        "clients": len(world.facts.clients),
        "train_rows": int(sum(len(s.train) for s in world.clients.values())),
        **world.without_training(),
        "partition": {"clients": world.facts.clients, "labels": world.facts.labels, "counts": world.counts.tolist()},
        **(algorithm.tells(state) if algorithm.tells else {}),
        **({"prompt": algorithm.model(state)} if experiment.technique.kind == "template" else {}),
        "state_hash": states.hash(state),
    }


def _per_query(ledger: Ledger, queries: int) -> dict[str, float]:
    """Bytes a query, all clients together, where an algorithm counts its queries."""
    if not queries:
        return {}
    return {"queries": queries, **{f"{way}_per_query": ledger.total(way) / queries for way in ("bytes_up", "bytes_down")}}


def save_personal(world: World, states: States, state: Tree, folder: Path) -> None:
    """A PEFT folder for each client's personal tree (in a deployment it never leaves the client)."""
    assert world.algorithm.personal
    for client in sorted(world.clients):
        own = states.read_own(client).get("algorithm")
        tree = world.algorithm.personal(own, broadcast_of(world, state, client), world.sites(client, 0))
        world.kit(client).technique.save(tree, folder / client)


def _of_newcomers(late: dict[ClientId, dict[str, float]]) -> dict[str, Any]:
    """Means over newcomers as they come and after they have joined, and each one's own."""
    if not late:
        return {}
    come, joined = (float(np.mean([line[name] for line in late.values()])) for name in ("metric", "joined"))
    return {"newcomers_mean": come, "newcomers_joined_mean": joined, "newcomers": late}


def _write_clients(
    world: World,
    ledger: Ledger,
    own: dict[str, float],
    wide: dict[str, float],
    shared: dict[ClientId, float],
    late: dict[ClientId, dict[str, float]],
    path: Path,
) -> None:
    """A line a client; then, where there are any, one a newcomer, whose metrics have columns of their own."""
    columns = ["client", "device", "train", "valid", "test", "metric", "metric_global", *COLUMNS]

    def begun(client: ClientId, device: str, rows: Split) -> dict[str, Any]:
        sizes = {"train": len(rows.train), "valid": len(rows.valid), "test": len(rows.test)}
        return {"client": client, "device": device, **sizes, **dict.fromkeys(COLUMNS, 0), **ledger.clients.get(client, {})}

    lines = []
    for client, rows in sorted(world.clients.items()):
        found = {"metric": own, "metric_global": wide, "metric_shared": shared}
        values = {name: scores[client] for name, scores in found.items() if client in scores}
        lines.append({**begun(client, world.site(client, 0).device.name, rows), **values})
    for client, rows in sorted(world.newcomers.items()):
        values = {"metric_newcomer": late[client]["metric"], "metric_joined": late[client]["joined"]} if client in late else {}
        lines.append({**begun(client, "newcomer", rows), **values})
    more = [name for name in ("metric_shared", "metric_newcomer", "metric_joined") if any(name in line for line in lines)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *more], restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)


__all__ = ["Watch", "conduct", "draw", "run", "save_personal"]
