"""Clients that join after the last round: what they are given as they come, and what they have after rounds of their own.

As it comes a newcomer has no state: it is judged with what the algorithm gives somebody who never trained. Where the server says nothing to such
a client (its models are all with their owners) that is the tree that a newcomer gets, `Algorithm.model`.

Joining is the algorithm's own conversation, with the newcomers as its cohort, at the rate of the first round, in rounds that are numbered on
from the last: algorithms that train personal parts at the end do that here. What these rounds make of the server's state is used in the next
of them and then given up, but for what stands in it under a newcomer's name: a newcomer is judged with its own state and the federation's.
So a model that is everybody's is the same before and after, as it is in a federation that is large.

All of it happens beside the run: in an engine and in a store that go when it is done.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtailor.core import SERVER, ClientId, Letters, Message, Site, State, Talk, Tree, answer_with
from fedtailor.data.examples import Subset
from fedtailor.engines.local import Local
from fedtailor.engines.states import States
from fedtailor.evaluation import broadcast_of, workers
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.simulation import World
from fedtailor.trees import tensors

SHARED = "shared"
"""The verb of a look at a tree that is nobody's own."""


@contextlib.contextmanager
def beside(world: World, notice: Callable[[str], None] = lambda line: None) -> Iterator[Local]:
    """An engine whose clients have never taken part; nothing that happens in it is kept."""
    experiment, algorithm = world.experiment, world.joining
    _, look = answer_with(world.job, lambda state: {})
    with tempfile.TemporaryDirectory(prefix="fedtailor-") as folder:
        engine = Local(
            algorithm._replace(client={**algorithm.client, SHARED: look}),
            world.sites,
            workers(world, world.flops, world.looks),
            States(Path(folder)),
            Ledger(),
            up=chain(experiment.filters.up),
            down=chain(experiment.filters.down),
            seed=experiment.seed,
            stacked=experiment.engine.stacked,
            notice=notice,
            server=world.job.server,
        )
        try:
            yield engine
        finally:
            engine.close()


def judged(world: World, engine: Local, state: State) -> dict[ClientId, dict[str, float]]:
    """Every newcomer's metric on its own test rows: "metric" as it comes, "joined" after `clients.joining` rounds."""
    here, number = world.facts.newcomers, world.experiment.rounds
    joined = come = _values(world, coming(world, engine, state))
    if world.algorithm.personal:  # else they have nothing of their own
        after = state
        for further in range(1, world.experiment.clients.joining + 1):
            after = engine.converse(among(world.joining.round(after, list(here)), here), number + further)
        joined = _values(world, answers(world, engine, remembering(state, after, here), here))
    return {c: {"metric": come[c], "joined": joined[c]} for c in here if c in come and c in joined}


def coming(world: World, engine: Local, state: State) -> dict[ClientId, Message]:
    """What each newcomer's test rows say of what it is given as it comes."""
    here = world.facts.newcomers
    silent = [c for c in here if world.algorithm.personal and fits(world) and not broadcast_of(world, state, c)]
    return answers(world, engine, state, [c for c in here if c not in silent]) | looks(world, engine, state, silent)


def answers(world: World, engine: Local, state: State, clients: list[ClientId]) -> dict[ClientId, Message]:
    """What each client's own test rows say of what it has in this engine."""
    if not clients:
        return {}
    talk = among(world.joining.answer(state, clients), clients)
    found: dict[ClientId, Message] = engine.converse(talk, world.experiment.rounds, own_rows(world))
    return found


def looks(world: World, engine: Local, state: State, clients: list[ClientId]) -> dict[ClientId, Message]:
    """The same with the tree that a newcomer gets, whatever a client has; {} where it does not fit."""
    if not clients or not fits(world):
        return {}
    letter = Message(SHARED, world.algorithm.model(state))

    def talk() -> Talk:
        return (yield dict.fromkeys(clients, letter))

    found: dict[ClientId, Message] = engine.converse(talk(), world.experiment.rounds, own_rows(world))
    return found


def with_shared(world: World, engine: Local, state: State) -> dict[ClientId, float]:
    """The metric of the federation's own model at each client that trained; {} where nothing is shared, or where it does not fit."""
    model = world.algorithm.model(state)
    if not fits(world) or same(model, world.technique.init):
        return {}
    return _values(world, looks(world, engine, state, world.facts.clients))


def fits(world: World) -> bool:
    """Whether everybody's tree is like the server's."""
    return not world.kits and len(set(world.job.sizes)) < 2


def among(talk: Talk, here: Collection[ClientId]) -> Talk:
    """The same conversation, of these clients and the server alone: whom the state still has letters for is elsewhere."""
    replies: Any = None
    while True:
        try:
            asked = talk.send(replies)
        except StopIteration as end:
            return end.value
        letters = asked if isinstance(asked, Letters) else Letters(asked)
        replies = yield letters._replace(to={c: m for c, m in letters.to.items() if c in here or c == SERVER})


def remembering(state: Mapping[str, Any], after: Mapping[str, Any], newcomers: Collection[ClientId]) -> Tree:
    """The federation's state with what `after` has under names of newcomers, or under names that it lacks."""
    out = dict(state)
    for name, value in after.items():
        if name in newcomers or name not in state:
            out[name] = value
        elif isinstance(value, Mapping) and isinstance(state[name], Mapping):
            out[name] = remembering(state[name], value, newcomers)
    return out


def own_rows(world: World) -> Callable[[ClientId, int], Site]:
    """Sites that are judged on their own test rows alone."""

    def sites(client: ClientId, round: int) -> Site:
        site = world.sites(client, round)
        data = {name: rows for name, rows in site.data.items() if name != "global"}
        return site._replace(data={**data, "test": Subset(world.test, np.arange(0))} if client == SERVER else data)

    return sites


def same(a: Tree, b: Tree) -> bool:
    """Whether the tensors of two trees are equal."""
    ours, theirs = dict(tensors(a)), dict(tensors(b))
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def _values(world: World, replies: Mapping[ClientId, Message]) -> dict[ClientId, float]:
    found = {c: reply.body["test"] for c, reply in sorted(replies.items()) if c != SERVER and "test" in reply.body}
    return {c: world.metric.value(sums) for c, sums in found.items()}
