"""The clients that work on this machine: all of a simulation, those of one actor of a cluster, or the one that a member of a
federation is. Handlers run, their asks are answered, replies are filtered, own states are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch

from fedtailor.core import (
    SERVER,
    Algorithm,
    Ask,
    ClientId,
    Fit,
    Fitted,
    Message,
    Predict,
    Site,
    Step,
    Tree,
    Work,
    seed_of,
    stream,
)
from fedtailor.engines.answering import Answers, Crew, Workers, answer, drive, looked
from fedtailor.filters import Filter
from fedtailor.trees import is_finite

Sites = Callable[[ClientId, int], Site]


class Owner(Protocol):
    """Where own states lie between letters; {} is none."""

    def read_own(self, client: ClientId) -> Tree: ...

    def write_own(self, client: ClientId, own: Tree) -> None: ...


class Place(NamedTuple):
    """Where in a run a letter belongs: with the seed and the client it names every random stream."""

    round: int
    step: int  # letters of this conversation's so many-th yield


class Done(NamedTuple):
    """What a client made of a letter. `reply` has been filtered; None: client and reply are set aside, for `why`."""

    client: ClientId
    reply: Message | None
    flops: float = 0.0
    examples: float = 0.0  # example passes
    why: str = ""


class Clients:
    """Runs client handlers, alike asks of several clients in one call where `stacked`."""

    lanes = 1

    def __init__(
        self,
        algorithm: Algorithm,
        workers: Workers | Crew,
        owner: Owner,
        up: Filter,
        seed: int = 0,
        stacked: bool = True,
        notice: Callable[[str], None] = lambda line: None,
        progress: Callable[[ClientId], None] = lambda client: None,
    ) -> None:
        self.algorithm, self.workers, self.owner, self.up = algorithm, workers, owner, up
        self.seed, self.stacked, self.notice, self.progress = seed, stacked, notice, progress

    def work(self, letters: Mapping[ClientId, Message], at: Place, sites: Sites, free: bool = False) -> Iterator[Done]:
        """Let these clients work on their letters together; in client order. `free`: an evaluation, of which nothing is kept or filtered."""
        stored = {client: self.owner.read_own(client) for client in letters}
        flows = {
            client: self.algorithm.client[message.verb](stored[client].get("algorithm"), message, sites(client, at.round))
            for client, message in letters.items()
        }
        spent, passed = dict.fromkeys(letters, 0.0), dict.fromkeys(letters, 0.0)
        asked = dict.fromkeys(letters, 0)

        def answered(asks: dict[ClientId, Ask | list[Step]]) -> dict[ClientId, object]:
            for client in asks:
                asked[client] += 1

            def random(client: ClientId) -> torch.Generator:
                return stream(self.seed, "fit", client, at.round, at.step, asked[client])

            results = self._answered(asks, random, at)
            for client, ask in asks.items():
                for flops, rows in self._cost(client, ask, results[client]):
                    spent[client] += flops
                    passed[client] += rows
            return results

        for client, (own, reply) in sorted(drive(flows, answered).items()):
            if free:
                yield Done(client, reply)
                continue
            self.progress(client)
            if not (is_finite(reply.body) and is_finite(own or {})):
                yield Done(client, None, why="it is not finite (lower train.lr or set train.clip)")
                continue
            memory: Tree = {}
            if client != SERVER:  # what stays beside the server crosses no wire
                reply, memory = self.up.apply(reply, stored[client].get("filter", {}))
            self._keep(client, own, memory)
            yield Done(client, reply, spent[client], passed[client])

    def close(self) -> None:
        self.workers.close()

    def _cost(self, client: ClientId, ask: Ask | list[Step], result: object) -> Iterator[tuple[float, float]]:
        """(operations, example passes) of what was asked for."""
        workers = self._who(client, ask)
        if isinstance(result, Fitted):
            yield result.seen["flops"], result.seen["examples"]
        elif isinstance(ask, Predict):
            yield looked(ask, workers.looks), 0.0
        elif isinstance(ask, Work):
            yield ask.flops, 0.0
        elif not isinstance(ask, Fit):
            yield from map(workers.work, ask if isinstance(ask, list) else [ask])

    def _answered(
        self, asks: dict[ClientId, Ask | list[Step]], random: Callable[[ClientId], torch.Generator], at: Place
    ) -> Answers:
        asks = {c: a._replace(plan=a.plan.at(at.round)) if isinstance(a, Fit) else a for c, a in asks.items()}
        pace = seed_of(self.seed, "pace", at.round, at.step)
        if self.stacked:
            try:
                return self._by_kind(asks, random, True, pace)
            except RuntimeError as error:
                # Some PEFT methods write in place or through an autograd.Function of their own, which vmap refuses.
                if not any(word in str(error) for word in ("vmap", "functorch")):
                    raise
                self.stacked = False
                self.notice(f"round {at.round}: this technique cannot be stacked: clients are trained one by one")
        return self._by_kind(asks, random, False, pace)

    def _by_kind(
        self, asks: dict[ClientId, Ask | list[Step]], random: Callable[[ClientId], torch.Generator], stacked: bool, pace: int
    ) -> Answers:
        """What is asked of the same model together."""
        kinds: dict[int, dict[ClientId, Ask | list[Step]]] = {}
        for client, ask in asks.items():
            kinds.setdefault(id(self._who(client, ask)), {})[client] = ask
        done: Answers = {}
        for part in kinds.values():
            done |= answer(part, self._who(*next(iter(part.items()))), random, stacked, pace)
        return done

    def _who(self, client: ClientId, ask: Ask | list[Step]) -> Workers:
        """Those with the model that the ask is about."""
        return self.workers.of(SERVER if isinstance(ask, Fit | Predict) and ask.reference else client)

    def _keep(self, client: ClientId, own: Tree | None, memory: Tree) -> None:
        kept: Tree = {}
        if own is not None:
            kept["algorithm"] = own
        if memory:
            kept["filter"] = memory
        self.owner.write_own(client, kept)
