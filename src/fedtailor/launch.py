"""The engine that an experiment names, with its clients where it says."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fedtailor import memory
from fedtailor.config import EngineSection, Experiment, parse
from fedtailor.core import ClientId
from fedtailor.engines.answering import Crew, Workers
from fedtailor.engines.clients import Clients, Owner, Sites
from fedtailor.engines.deals import Answer, Task, told, worked
from fedtailor.engines.local import Hands, Local
from fedtailor.engines.states import States
from fedtailor.errors import ConfigError, FedtailorError, RunError
from fedtailor.evaluation import workers
from fedtailor.filters import chain
from fedtailor.folder import written
from fedtailor.ledger import Ledger
from fedtailor.simulation import World, build

EXTRAS = {"ray": "ray"}  # kind of engine -> the package that it needs and the extra that brings it
SITES = ("sites", "valid_sites")


def check_engine(experiment: Experiment) -> None:
    """What the engine needs is there.

    Raises:
        ConfigError: a package is missing, or a key is for another kind of engine.
    """
    kind, name = experiment.engine.kind, EXTRAS.get(experiment.engine.kind)
    if name and importlib.util.find_spec(name) is None:
        raise ConfigError(f"engine.kind '{kind}' needs an extra: pip install 'fedtailor[{name}]'")
    for key in ("address", "actors"):
        if kind != "ray" and getattr(experiment.engine, key) != EngineSection.model_fields[key].default:
            raise ConfigError(f"engine.{key} does nothing with engine.kind '{kind}': set engine.kind to ray, or leave it out")


def engine_for(
    world: World, notice: Callable[[str], None], progress: Callable[[ClientId], None], states: States, ledger: Ledger
) -> Local:
    """The experiment's engine. The conversation is the same whoever works."""
    experiment = world.experiment
    return Local(
        world.algorithm,
        world.sites,
        workers(world, world.flops, world.looks),
        states,
        ledger,
        up=chain(experiment.filters.up),
        down=chain(experiment.filters.down),
        seed=experiment.seed,
        stacked=experiment.engine.stacked,
        deadline=experiment.clients.deadline,
        notice=notice,
        progress=progress,
        server=world.job.server,
        spread=SPREADS[experiment.engine.kind](world),
    )


def _here(world: World) -> Callable[[Clients], Hands]:
    return lambda clients: clients


def _ray(world: World) -> Callable[[Clients], Hands]:
    """Over the actors of a cluster; the package is imported only here."""
    from fedtailor.engines.ray_cluster import Spread, Wanted

    engine = world.experiment.engine
    given = json.dumps(written(world.experiment)), fingerprint(world)

    def named(sites: Sites) -> str:
        return next(name for name in SITES if getattr(world, name) is sites)

    wanted = Wanted(engine.address, engine.actors, engine.device != "cpu")
    return lambda clients: Spread(clients, Hand, given, named, wanted)


SPREADS: dict[str, Callable[[World], Callable[[Clients], Hands]]] = {"local": _here, "ray": _ray}


def fingerprint(world: World) -> str:
    """Equal where the clients hold the same rows of the same lengths."""
    parts = [json.dumps(world.facts._asdict()).encode(), world.store.lengths.tobytes(), world.test.lengths.tobytes()]
    parts += [rows.tobytes() for client in sorted(world.clients) for rows in world.clients[client]]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


class Loaded(NamedTuple):
    world: World
    workers: Workers | Crew


class Hand:
    """The clients of an experiment elsewhere: it loads model and data itself, once, and holds no state of any client."""

    def __init__(self, experiment: str, data: str, threads: int, gpu: bool) -> None:
        self._text, self._data, self._threads, self._gpu = experiment, data, threads, gpu
        self._loaded: Loaded | None = None
        self._stacked = True

    def ready(self) -> Answer:
        """Load what the experiment names; an answer without results."""
        try:
            self._load()
        except FedtailorError as error:
            return Answer(error=told(error))
        return Answer()

    def work(self, task: Task, *letters: bytes) -> Answer:
        if (failed := self.ready()).error:
            return failed
        (world, crew), seen = self._load(), list[Clients]()
        up, seed = chain(world.experiment.filters.up), world.experiment.seed

        def clients(owner: Owner, notice: Callable[[str], None]) -> Clients:
            seen.append(Clients(world.algorithm, crew, owner, up, seed, self._stacked, notice))
            return seen[0]

        answer = worked(clients, getattr(world, task.sites), task, letters)
        self._stacked = seen[0].stacked  # a technique that cannot be stacked is tried once
        return answer

    def _load(self) -> Loaded:
        """
        Raises:
            RunError: this machine reads other data. ConfigError, DataError: as simulation.build.
        """
        if self._loaded is None:
            memory.keep()
            torch.set_num_threads(self._threads)
            values: dict[str, Any] = json.loads(self._text)
            device = values["engine"]["device"]
            if device != "cpu":  # an actor sees only the GPUs that it was given, and counts them from 0
                values["engine"]["device"] = "cuda" if self._gpu or device != "auto" else "cpu"
            world = build(parse(values))
            if fingerprint(world) != self._data:
                raise RunError("an actor reads other data than the machine that runs the experiment: give both the same files")
            self._stacked = world.experiment.engine.stacked
            self._loaded = Loaded(world, workers(world, world.flops, world.looks))
        return self._loaded
