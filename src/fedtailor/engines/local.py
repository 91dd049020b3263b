"""The local engine: one process, many clients, simulated devices and network, real messages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fedtailor import wire
from fedtailor.core import (
    LOST,
    SERVER,
    Algorithm,
    ClientId,
    Device,
    Letters,
    Message,
    Talk,
    Tree,
    seed_of,
)
from fedtailor.engines.answering import Crew, Workers
from fedtailor.engines.cache import Cache
from fedtailor.engines.clients import Clients, Done, Place, Sites
from fedtailor.engines.clock import is_lost, seconds
from fedtailor.engines.engine import hold
from fedtailor.engines.states import States
from fedtailor.errors import RunError
from fedtailor.filters import NOTHING, Filter
from fedtailor.ledger import Ledger
from fedtailor.trees import nbytes

SPOOL = 1 << 20
"""Bytes from which a reply waits on disk instead of in memory."""
WAVE = 32
"""Clients whose handlers are open at a time; large trees go in smaller waves."""


class Hands(Protocol):
    """Who works: `Clients`, or what spreads them over machines."""

    @property
    def lanes(self) -> int:
        """How many waves' worth of letters go to work at a time."""
        ...

    def work(self, letters: Mapping[ClientId, Message], at: Place, sites: Sites, free: bool = False) -> Iterator[Done]:
        """As `Clients.work`."""
        ...

    def close(self) -> None: ...


class Reply(NamedTuple):
    """A reply on its way: it arrives when the virtual clock says so."""

    arrives: float
    client: ClientId
    message: Message


def _name(client: ClientId, message: Message) -> tuple[Any, ...]:
    """Equal for letters that are carried as one."""
    return client == SERVER, message.verb, id(message.body), tuple(message.info.items())


class Local:
    """Holds conversations. What it carries from round to round (clock, replies under way) is `dump`ed into checkpoints."""

    own_states_here = True

    def __init__(
        self,
        algorithm: Algorithm,
        sites: Sites,
        workers: Workers | Crew,
        states: States,
        ledger: Ledger,
        up: Filter,
        down: Filter,
        seed: int = 0,
        stacked: bool = True,
        deadline: float = 0.0,
        notice: Callable[[str], None] = lambda line: None,
        progress: Callable[[ClientId], None] = lambda client: None,
        server: Device = Device(),
        spread: Callable[[Clients], Hands] = lambda clients: clients,
    ) -> None:
        self.algorithm, self.sites, self.workers, self.ledger = algorithm, sites, workers, ledger
        self.up, self.down, self.seed, self.deadline = up, down, seed, deadline
        self.server = server
        self.notice, self.progress = notice, progress
        self._clients = spread(Clients(algorithm, workers, states, up, seed, stacked, notice, progress))
        steps = workers.of(SERVER).steps
        self._cache = steps.cache if steps else Cache()
        self._cache.lie(states.folder)
        self.clock = 0.0
        self.under_way: dict[ClientId, Reply] = {}
        self._spool = tempfile.TemporaryDirectory(prefix="fedtailor-")

    def converse(self, talk: Talk, round: int, sites: Sites | None = None) -> Any:
        """Drive a conversation to its end and return its value.

        With `sites` it is an evaluation among those sites: nothing is filtered, charged to the ledger, lost or late.
        """

        def judged(letters: Letters, at: Place) -> dict[ClientId, Message]:
            assert sites
            return {r.client: r.message for r in self._work(letters.to, at, sites, free=True)}

        return hold(talk, round, self.notice, judged if sites else self._exchange)

    def _exchange(self, letters: Letters, at: Place) -> dict[ClientId, Message]:
        sent, silent = self.clock, set(letters.to) - {SERVER}
        for reply in self._work(letters.to, at, self.sites, free=False):
            self.under_way[reply.client] = reply
            silent.discard(reply.client)
        if letters.wait == "any":
            for client in silent:  # a line that is cut is noticed
                noticed = self.deadline or 2 * self.sites(client, at.round).device.latency
                self.under_way[client] = Reply(sent + noticed, client, Message(LOST))
            if not self.under_way:
                return {}
            self.clock = max(self.clock, min(reply.arrives for reply in self.under_way.values()))
            return self._take(lambda reply: reply.arrives <= self.clock)
        awaited = {c: self.under_way[c] for c in letters.to if c in self.under_way}
        limit = sent + self.deadline if self.deadline else float("inf")
        late = [c for c, reply in awaited.items() if reply.arrives > limit and c != SERVER]  # the server waits for its own work
        for client in late:
            del self.under_way[client]
        if late or len(awaited) < len(letters.to):
            missing = sorted(set(letters.to) - set(awaited) | set(late))
            self.notice(f"round {at.round}: no reply in time from {', '.join(missing)}")
        arrivals = [reply.arrives for c, reply in awaited.items() if c not in late]
        # The server cannot know that a reply is lost: it waits until the deadline, where there is one.
        self.clock = limit if self.deadline and len(arrivals) < len(letters.to) else max(arrivals, default=sent)
        return self._take(lambda reply: reply.client in letters.to)

    def _take(self, wanted: Callable[[Reply], bool]) -> dict[ClientId, Message]:
        taken = {c: self.under_way[c] for c in sorted(self.under_way) if wanted(self.under_way[c])}
        for client in taken:
            del self.under_way[client]
        return {client: reply.message for client, reply in taken.items()}

    def _work(self, letters: Mapping[ClientId, Message], at: Place, sites: Sites, free: bool) -> Iterator[Reply]:
        """Deliver letters, let the clients work in waves, and give their replies; `free`: nothing is charged or lost."""
        opened: dict[Any, tuple[int, Message]] = {}
        wave: list[ClientId] = []
        for client in sorted(letters):
            message = letters[client]
            if message.verb not in self.algorithm.client:
                raise RunError(f"letter with verb '{message.verb}', which no client handler answers")
            # One broadcast is encoded and decoded once; what everybody received stays one object (and is stacked as one).
            key = _name(client, message)
            if key not in opened:
                opened[key] = self._carry(message, free or client == SERVER)  # what stays beside the server crosses no wire
            size, _ = opened[key]
            site = sites(client, at.round)
            charged = not free and client != SERVER
            if charged:
                self.ledger.add(client, letters=1, bytes_down=size)
            if charged and is_lost(site.device, self.seed, client, at.round, at.step):
                self.progress(client)
                continue
            wave.append(client)
            if len(wave) >= self._wave(message):
                yield from self._wave_of(wave, letters, opened, at, sites, free)
                wave = []
        if wave:
            yield from self._wave_of(wave, letters, opened, at, sites, free)

    def _wave(self, message: Message) -> int:
        return self._clients.lanes * (WAVE if nbytes(message.body) < 16 * SPOOL else self.workers.count)

    def _carry(self, message: Message, free: bool) -> tuple[int, Message]:
        if free:
            return 0, message
        blob = wire.encode(self.down.apply(message, {})[0])
        return len(blob), self.down.undo(wire.decode(blob))

    def _wave_of(
        self,
        clients: list[ClientId],
        letters: Mapping[ClientId, Message],
        opened: Mapping[Any, tuple[int, Message]],
        at: Place,
        sites: Sites,
        free: bool,
    ) -> Iterator[Reply]:
        arrived = {client: opened[_name(client, letters[client])] for client in clients}
        messages = {client: message for client, (_, message) in arrived.items()}
        for done in self._clients.work(messages, at, sites, free):
            if done.reply is None:
                self.notice(f"round {at.round}: {done.client} set aside: {done.why}")
            elif free:
                yield Reply(self.clock, done.client, done.reply)
            else:
                yield self._reply(done.client, done.reply, arrived[done.client][0], done, sites(done.client, at.round).device)

    def _reply(self, client: ClientId, reply: Message, down: int, done: Done, device: Device) -> Reply:
        """Encode and charge a reply."""
        if "loss" in reply.info:
            self.ledger.note(client, loss=reply.info["loss"])
        if client == SERVER:
            # Work beside the server crosses no wire, but it is work: pooled training's passes are counted like a client's.
            self.ledger.add(client, flops=done.flops, examples=done.examples)
            return Reply(self.clock + seconds(self.server, 0, done.flops, 0), client, reply)
        size, message = self._spooled(client, reply)
        took = seconds(device, down, done.flops, size)
        self.ledger.add(client, replies=1, bytes_up=size, flops=done.flops, simulated_seconds=took, examples=done.examples)
        return Reply(self.clock + took, client, message)

    def _spooled(self, client: ClientId, filtered: Message) -> tuple[int, Message]:
        """(bytes on the wire, the message as the server reads it): large ones on disk, tensor by tensor."""
        if nbytes(filtered.body) < SPOOL:
            blob = wire.encode(filtered)
            return len(blob), self.up.undo(wire.decode(blob))
        path = Path(self._spool.name) / f"{seed_of(0, client)}.safetensors"
        size = wire.write(filtered, path)
        if self.up is not NOTHING:
            wire.write(self.up.undo(wire.read(path)), path)
        return size, wire.read(path, lazy=True)

    def dump(self) -> Tree:
        """What must survive a kill between rounds."""
        return {
            "clock": self.clock,
            "cache": self._cache.dump(),
            "under_way": {
                c: {"arrives": r.arrives, "verb": r.message.verb, "info": dict(r.message.info), "body": r.message.body}
                for c, r in self.under_way.items()
            },
        }

    def load(self, dumped: Tree) -> None:
        self.clock = float(dumped["clock"])
        self._cache.load(dumped["cache"])
        self.under_way = {
            c: Reply(float(r["arrives"]), c, Message(r["verb"], r["body"], r["info"])) for c, r in dumped["under_way"].items()
        }

    def finish(self) -> None:
        """The run is done, not interrupted: what is only of use while it goes on can go."""
        self._cache.remove()

    def close(self) -> None:
        self._clients.close()
        self._spool.cleanup()
