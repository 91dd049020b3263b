"""Federations that take a moment: on the local engine, or by hand without engine and wire."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedtailor.algorithms import ALGORITHMS
from fedtailor.backbone import Backbone, hidden_width
from fedtailor.core import (
    SERVER,
    Algorithm,
    Device,
    Fit,
    Forward,
    Job,
    Letters,
    Message,
    Part,
    Plan,
    Predict,
    Site,
    Tree,
    seed_of,
    stream,
)
from fedtailor.data.examples import Store, Subset
from fedtailor.engines.answering import Workers, answer
from fedtailor.engines.local import Local
from fedtailor.engines.splitting import Steps
from fedtailor.engines.states import States
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.losses import classification, language
from fedtailor.metrics import metric
from fedtailor.techniques import Technique
from fedtailor.techniques.parts import layers, on_part
from tiny import CAUSAL, KINDS, rows_of, same

PUBLIC = 12  # rows that everybody has
PLAN = Plan(epochs=1, batch=4, lr=1e-2)


class Seen(NamedTuple):
    """What one client handler was given and what it replied."""

    client: str
    round: int
    letter: Message
    reply: Message
    unchanged: bool  # own, letter and initial tree are what they were before


def watched(algorithm: Algorithm, log: list[Seen]) -> Algorithm:
    """The same algorithm; every handled letter is written to `log`."""

    def watch(handler: Any) -> Any:
        def handle(own: Tree | None, msg: Message, site: Site) -> Generator[Any, Any, Any]:
            given = (own, msg.body, dict(msg.info), site.init)
            before = copy.deepcopy(given)
            new, reply = yield from handler(own, msg, site)
            log.append(Seen(site.id, site.round, msg, reply, same(list(given), list(before))))
            return new, reply

        return handle

    return algorithm._replace(client={verb: watch(handler) for verb, handler in algorithm.client.items()})


class World(NamedTuple):
    """A federation that is ready to run: clients c0, c1, ... hold unequal numbers of rows."""

    algorithm: Algorithm
    technique: Technique
    sites: Callable[[str, int], Site]
    clients: list[str]
    job: Job
    log: list[Seen]
    rows: Store
    steps: Steps


class Outcome(NamedTuple):
    state: Tree
    own: dict[str, Tree]
    hash: str
    ledger: Ledger
    answers: dict[str, Message]
    clock: list[float]  # after each round
    notices: list[str]
    log: list[Seen]
    world: World


def world_of(
    technique: Technique,
    family: str,
    kind: str,
    options: Mapping[str, Any] | None = None,
    plan: Plan = PLAN,
    clients: int = 3,
    sizes: Mapping[str, int] | None = None,
    devices: Mapping[str, Device] | None = None,
    equal: bool = False,
    empty: tuple[str, ...] = (),
    seed: int = 0,
    make: Callable[[Backbone], Technique] | None = None,
) -> World:
    """`sizes`: LoRA rank or prefix length by client; `equal`: all clients hold the same rows; `empty`: those hold none."""
    data = rows_of(family)
    judged = metric("auto", KINDS[family], 3)
    loss = technique.loss or (language if family in CAUSAL else classification)
    job = Job(
        loss,
        judged.judge,
        judged.tally,
        plan,
        clients=clients,
        names=[f"c{i}" for i in range(clients)],
        sizes=tuple((sizes or {}).values()),
        seed=seed,
        passes=technique.passes,
        layers=layers(technique),
        classes=3 if KINDS[family] != "language" else 0,
        pixels=(3, 32, 32) if KINDS[family] == "image" else (),
        public=PUBLIC if KINDS[family] != "language" else 0,
        hidden=hidden_width(technique.backbone),
        reader=technique.reader,
    )
    log: list[Seen] = []
    algorithm = watched(ALGORITHMS[kind](job, **(options or {})), log)
    names = list(job.names)
    train = {
        c: np.arange(0) if c in empty else np.arange(8) if equal else np.arange(i * 10, i * 10 + 6 + i)
        for i, c in enumerate(names)
    }
    everybody = np.concatenate([train[c] for c in names])
    inits = {c: technique.resized(sizes[c]) for c in names} if sizes else dict.fromkeys(names, technique.init)

    public = {"public": Subset(data, np.arange(52 - PUBLIC, 52))}

    def sites(client: str, round: int) -> Site:
        if client == SERVER:
            parts = {"train": Subset(data, everybody), "test": Subset(data, np.arange(52, 60)), **public}
            return Site(SERVER, parts, technique.init, round, seed)
        parts = {"train": Subset(data, train[client]), "test": Subset(data, train[client][:3]), **public}
        if client not in empty:
            parts["valid"] = Subset(data, np.arange(2) + 40 + 2 * names.index(client))
        if algorithm.personal:
            parts["global"] = Subset(data, np.arange(52, 60))
        return Site(client, parts, inits[client], round, seed, (devices or {}).get(client, Device()), names.index(client))

    def bind(part: Part, dropout: bool) -> Forward:
        assert make
        return on_part(technique, part, make).bind(dropout)

    return World(algorithm, technique, sites, names, job, log, data, Steps(bind))


def run_world(
    world: World,
    folder: Path,
    rounds: int = 2,
    start: int = 0,
    cohorts: Mapping[int, list[str]] | None = None,
    stacked: bool = False,
    up: tuple[str, ...] = (),
    seed: int = 0,
    flops: Callable[[int, int], float] = lambda rows, width: 0.0,
    deadline: float = 0.0,
) -> Outcome:
    """`rounds` rounds on the local engine, from the checkpoint in `folder` where `start` says that it holds so many."""
    states, ledger, notices, clock = States(folder), Ledger(), [], []
    workers = Workers(world.technique.bind, 1, flops=flops, steps=world.steps)
    engine = Local(
        world.algorithm, world.sites, workers, states, ledger, chain(up), chain(()), seed, stacked, deadline, notices.append
    )
    try:
        state = world.algorithm.init(world.technique.init)
        if start:
            found = states.resume()
            assert found is not None
            done, state, carried, kept = found
            assert done == start
            engine.load(carried)
            ledger.load(kept)
        for round in range(start + 1, start + rounds + 1):
            cohort = (cohorts or {}).get(round, world.clients)
            state = engine.converse(world.algorithm.round(state, cohort), round)
            states.commit(round, state, engine.dump(), ledger.dump())
            clock.append(engine.clock)
        answers = engine.converse(world.algorithm.answer(state, world.clients), start + rounds, world.sites)
        own = {c: states.read_own(c).get("algorithm", {}) for c in world.clients}
        return Outcome(state, own, states.hash(state), ledger, answers, clock, notices, world.log, world)
    finally:
        engine.close()


def by_hand(
    world: World,
    state: Tree,
    round: int,
    own: dict[str, Tree | None],
    cohort: list[str] | None = None,
    lost: tuple[str, ...] = (),
    backwards: bool = False,
    seed: int = 0,
) -> Tree:
    """A round without engine and wire: letters are handed over, clients work one by one; `own` is updated in place."""
    workers = Workers(world.technique.bind, 1, steps=world.steps)
    talk = world.algorithm.round(state, world.clients if cohort is None else cohort)
    inbox: dict[str, Message] | None = None
    step = 0
    while True:
        try:
            letters = next(talk) if inbox is None else talk.send(inbox)
        except StopIteration as end:
            return end.value
        step += 1
        to = letters.to if isinstance(letters, Letters) else letters
        inbox = {}
        for client in sorted(to, reverse=backwards):
            if client in lost:
                continue
            flow = world.algorithm.client[to[client].verb](own.get(client), to[client], world.sites(client, round))
            asked, result = 0, None
            while True:
                try:
                    ask: Fit | Predict = flow.send(result)
                except StopIteration as end:
                    own[client], inbox[client] = end.value
                    break
                asked += 1
                random = stream(seed, "fit", client, round, step, asked)
                pace = seed_of(seed, "pace", round, step)
                result = answer({client: ask}, workers, lambda c, random=random: random, False, pace)[client]
