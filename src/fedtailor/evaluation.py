"""What a state of an algorithm is worth: validation, the global test set, every client's own test split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtailor.core import SERVER, ClientId, Letters, Part, Tree
from fedtailor.engines.answering import Crew, Workers
from fedtailor.engines.engine import Engine
from fedtailor.engines.local import Local
from fedtailor.engines.splitting import Steps
from fedtailor.engines.training import Flops, no_flops
from fedtailor.equip import Model
from fedtailor.filters import chain
from fedtailor.folder import checkpoint, defined, writing
from fedtailor.ledger import Ledger
from fedtailor.metrics import mean_loss, total
from fedtailor.part_costs import costs
from fedtailor.simulation import World, build
from fedtailor.techniques import TECHNIQUES, Technique
from fedtailor.techniques.parts import on_part


def workers(model: Model, flops: Flops = no_flops, looks: Flops = no_flops) -> Workers | Crew:
    """One single-threaded worker a core on a CPU, one worker on a GPU."""
    engine, device = model.experiment.engine, model.job.device
    cores = torch.get_num_threads()
    count = engine.workers or (1 if device != "cpu" or model.experiment.train.dropout else max(1, min(cores, 8)))
    group = engine.group or (64 if device != "cpu" else 0)
    section = model.experiment.technique

    def on(part: Part) -> Technique:
        return on_part(model.technique, part, lambda b: TECHNIQUES[section.kind](b, **section.options))

    steps = Steps(lambda part, drops: on(part).bind(drops), device, lambda part, inward: costs(on(part), part, model.job, inward))
    server = Workers(model.technique.bind, count, device, flops, group, looks, steps)
    if not model.kits:
        return server
    pools = [Workers(kit.technique.bind, count, device, kit.flops, group, kit.looks) for kit in model.kits]
    return Crew(server, {client: pools[i % len(pools)] for i, client in enumerate(model.facts.everybody)})


def broadcast_of(model: Model, state: Tree, client: ClientId) -> Tree:
    """What the server would send this client for it to build its personal tree."""
    if model.algorithm.said:
        return model.algorithm.said(state, client)
    talk = model.algorithm.answer(state, [client])
    letters = next(talk)
    talk.close()
    return dict((letters.to if isinstance(letters, Letters) else letters)[client].body)


def validate(world: World, engine: Engine, state: Tree, number: int) -> dict[str, Any]:
    """The metric and the loss on validation data: what choices and early looks may use."""
    # The server has everybody's validation rows in a simulation, and nobody's where data is with its owners. Where clients have models
    # of their own these are what is chosen, and what the server has beside them (a student) is not.
    by_clients = world.algorithm.personal or not engine.own_states_here
    replies = engine.converse(world.algorithm.answer(state, world.facts.clients if by_clients else []), number, world.valid_sites)
    if by_clients:
        replies.pop(SERVER, None)
    sums = total(r.body["test"] for r in replies.values() if "test" in r.body)
    return {"valid": world.metric.value(sums), "valid_loss": mean_loss(sums)} if sums else {}


def evaluate(world: World, engine: Engine, state: Tree, number: int) -> dict[str, Any]:
    """Metrics on the global test set and on every client's own test split."""
    replies = engine.converse(world.algorithm.answer(state, world.facts.clients), number, world.sites)
    value = world.metric.value
    own = {c: value(r.body["test"]) for c, r in sorted(replies.items()) if c != SERVER and "test" in r.body}
    wide = {c: value(r.body["global"]) for c, r in sorted(replies.items()) if "global" in r.body}
    everything = [r.body["global"] for r in replies.values() if "global" in r.body]
    whole = replies[SERVER].body.get("test") if SERVER in replies else total(everything) if everything else None
    scores = sorted(own.values(), reverse=world.metric.better(0.0, 1.0))
    # What an algorithm measures beside the metric (retrieval) is in the information about the judged.
    told = {name: v for name, v in replies[SERVER].info.items() if name != "n"} if SERVER in replies else {}
    if SERVER in replies and "without" in replies[SERVER].body:
        told["without_retrieval"] = value(replies[SERVER].body["without"])
    cited = {c: r.info["cited"] for c, r in sorted(replies.items()) if "cited" in r.info}
    decile = scores[: max(1, round(len(scores) / 10))]
    return {
        "metric": world.metric.name,
        "global_test": value(whole) if whole else None,
        "global_test_loss": mean_loss(whole) if whole else None,
        "clients_mean": float(np.mean(scores)) if scores else None,
        "clients_worst_decile": float(np.mean(decile)) if decile else None,
        "clients": own,
        "clients_on_global": wide,
        **told,
        **({"cited": cited} if cited else {}),
    }


def judge_again(out: Path) -> dict[str, Any]:
    """`evaluate` for the last checkpoint of a finished or interrupted run.

    Raises:
        ConfigError, RunError: as `reopen`; RunError also where the temporary folder is full. DataError: the data cannot be read.
    """
    with gathered(out) as (world, engine, state):
        scores: dict[str, Any] = defined(evaluate(world, engine, state, world.experiment.rounds))
        return scores


@contextlib.contextmanager
def gathered(out: Path) -> Iterator[tuple[World, Local, Tree]]:
    """The clients of a run again, with their data, an engine to converse with them, and the last checkpoint's state.

    Raises: as `judge_again`.
    """
    experiment, state, states = checkpoint(out)
    world, nothing = build(experiment), chain([])
    with writing():
        engine = Local(
            world.algorithm, world.sites, workers(world), states, Ledger(), nothing, nothing, experiment.seed,
            stacked=experiment.engine.stacked,
        )  # fmt: skip
        try:
            yield world, engine, state
        finally:
            engine.close()
