"""The local engine: one process, many clients, simulated devices and network, real messages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedtailor import wire
from fedtailor.core import (
    LOST,
    SERVER,
    Algorithm,
    Ask,
    ClientId,
    Device,
    Fit,
    Fitted,
    Letters,
    Message,
    Predict,
    Site,
    Step,
    Talk,
    Tree,
    seed_of,
    stream,
)
from fedtailor.engines.answering import Answers, Crew, Workers, answer, drive, looked
from fedtailor.engines.cache import Cache
from fedtailor.engines.clock import is_lost, seconds
from fedtailor.engines.states import States
from fedtailor.errors import RunError
from fedtailor.filters import NOTHING, Filter
from fedtailor.ledger import Ledger
from fedtailor.trees import is_finite, nbytes

SPOOL = 1 << 20
"""Bytes from which a reply waits on disk instead of in memory."""
WAVE = 32
"""Clients whose handlers are open at a time; large trees go in smaller waves."""


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

    def __init__(
        self,
        algorithm: Algorithm,
        sites: Callable[[ClientId, int], Site],
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
    ) -> None:
        self.algorithm, self.sites, self.workers, self.states, self.ledger = algorithm, sites, workers, states, ledger
        self.up, self.down, self.seed, self.stacked, self.deadline = up, down, seed, stacked, deadline
        self.server = server
        self.notice, self.progress = notice, progress
        steps = workers.of(SERVER).steps
        self._cache = steps.cache if steps else Cache()
        self._cache.lie(states.folder)
        self.clock = 0.0
        self.under_way: dict[ClientId, Reply] = {}
        self._steps = 0  # yields since the round began: part of what names a letter
        self._spool = tempfile.TemporaryDirectory(prefix="fedtailor-")

    def converse(self, talk: Talk, round: int, sites: Callable[[ClientId, int], Site] | None = None) -> Any:
        """Drive a conversation to its end and return its value.

        With `sites` it is an evaluation among those sites: nothing is filtered, charged to the ledger, lost or late.
        """
        self._steps = 0
        inbox: dict[ClientId, Message] | None = None
        while True:
            try:
                letters = talk.send(inbox) if inbox is not None else next(talk)
            except StopIteration as end:
                return end.value
            if not isinstance(letters, Letters):
                letters = Letters(letters)
            self._steps += 1
            if letters.note:
                self.notice(f"round {round}: {letters.note}")
            if sites is not None:
                inbox = {r.client: r.message for r in self._work(letters.to, round, sites, free=True)}
            else:
                inbox = self._exchange(letters, round)

    def _exchange(self, letters: Letters, round: int) -> dict[ClientId, Message]:
        sent, silent = self.clock, set(letters.to) - {SERVER}
        for reply in self._work(letters.to, round, self.sites, free=False):
            self.under_way[reply.client] = reply
            silent.discard(reply.client)
        if letters.wait == "any":
            for client in silent:  # a line that is cut is noticed
                noticed = self.deadline or 2 * self.sites(client, round).device.latency
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
            self.notice(f"round {round}: no reply in time from {', '.join(missing)}")
        arrivals = [reply.arrives for c, reply in awaited.items() if c not in late]
        # The server cannot know that a reply is lost: it waits until the deadline, where there is one.
        self.clock = limit if self.deadline and len(arrivals) < len(letters.to) else max(arrivals, default=sent)
        return self._take(lambda reply: reply.client in letters.to)

    def _take(self, wanted: Callable[[Reply], bool]) -> dict[ClientId, Message]:
        taken = {c: self.under_way[c] for c in sorted(self.under_way) if wanted(self.under_way[c])}
        for client in taken:
            del self.under_way[client]
        return {client: reply.message for client, reply in taken.items()}

    def _work(
        self, letters: Mapping[ClientId, Message], round: int, sites: Callable[[ClientId, int], Site], free: bool
    ) -> Iterator[Reply]:
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
            site = sites(client, round)
            charged = not free and client != SERVER
            if charged:
                self.ledger.add(client, letters=1, bytes_down=size)
            if charged and is_lost(site.device, self.seed, client, round, self._steps):
                self.progress(client)
                continue
            wave.append(client)
            if len(wave) >= self._wave(message):
                yield from self._wave_of(wave, letters, opened, round, sites, free)
                wave = []
        if wave:
            yield from self._wave_of(wave, letters, opened, round, sites, free)

    def _wave(self, message: Message) -> int:
        return WAVE if nbytes(message.body) < 16 * SPOOL else self.workers.count

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
        round: int,
        sites: Callable[[ClientId, int], Site],
        free: bool,
    ) -> Iterator[Reply]:
        flows, stored, arrived = {}, {}, {}
        for client in clients:
            message = letters[client]
            arrived[client] = opened[_name(client, message)]
            stored[client] = self.states.read_own(client)
            own = stored[client].get("algorithm")
            flows[client] = self.algorithm.client[message.verb](own, arrived[client][1], sites(client, round))
        spent, passed = dict.fromkeys(clients, 0.0), dict.fromkeys(clients, 0.0)
        asked = dict.fromkeys(clients, 0)

        def answered(asks: dict[ClientId, Ask | list[Step]]) -> dict[ClientId, Any]:
            for client in asks:
                asked[client] += 1

            def random(client: ClientId) -> torch.Generator:
                return stream(self.seed, "fit", client, round, self._steps, asked[client])

            results = self._answered(asks, random, round)
            for client, result in results.items():
                if isinstance(result, Fitted):
                    spent[client] += result.seen["flops"]
                    passed[client] += result.seen["examples"]
            if not free:
                for client, ask in asks.items():
                    if isinstance(ask, Predict):
                        spent[client] += looked(ask, self.workers.of(client).looks)
                    elif not isinstance(ask, Fit):
                        for flops, rows in map(self.workers.of(client).work, ask if isinstance(ask, list) else [ask]):
                            spent[client] += flops
                            passed[client] += rows
            return results

        for client, (own, reply) in sorted(drive(flows, answered).items()):
            if free:
                yield Reply(self.clock, client, reply)
                continue
            yield from self._reply(
                client, own, reply, stored[client], arrived[client][0], (spent[client], passed[client]), sites(client, round)
            )

    def _answered(
        self, asks: dict[ClientId, Ask | list[Step]], random: Callable[[ClientId], torch.Generator], round: int
    ) -> Answers:
        asks = {c: a._replace(plan=a.plan.at(round)) if isinstance(a, Fit) else a for c, a in asks.items()}
        pace = seed_of(self.seed, "pace", round, self._steps)
        if self.stacked:
            try:
                return self._by_kind(asks, random, True, pace)
            except RuntimeError as error:
                # Some PEFT methods write in place or through an autograd.Function of their own, which vmap refuses.
                if not any(word in str(error) for word in ("vmap", "functorch")):
                    raise
                self.stacked = False
                self.notice(f"round {round}: this technique cannot be stacked: clients are trained one by one")
        return self._by_kind(asks, random, False, pace)

    def _by_kind(
        self, asks: dict[ClientId, Ask | list[Step]], random: Callable[[ClientId], torch.Generator], stacked: bool, pace: int
    ) -> Answers:
        """Clients with the same model together."""
        kinds: dict[int, dict[ClientId, Ask | list[Step]]] = {}
        for client, ask in asks.items():
            kinds.setdefault(id(self.workers.of(client)), {})[client] = ask
        done: Answers = {}
        for part in kinds.values():
            done |= answer(part, self.workers.of(next(iter(part))), random, stacked, pace)
        return done

    def _reply(
        self, client: ClientId, own: Tree | None, reply: Message, stored: Tree, down: int, work: tuple[float, float], site: Site
    ) -> Iterator[Reply]:
        """Filter, encode and charge a reply; `work` is (operations, example passes)."""
        flops, examples = work
        self.progress(client)
        if not (is_finite(reply.body) and is_finite(own or {})):
            self.notice(f"round {site.round}: {client} set aside: it is not finite (lower train.lr or set train.clip)")
            return
        if client == SERVER:
            # Work beside the server crosses no wire, but it is work: pooled training's passes are counted like a client's.
            self.ledger.add(client, flops=flops, examples=examples)
            if "loss" in reply.info:
                self.ledger.note(client, loss=reply.info["loss"])
            self._keep(client, own, {})
            yield Reply(self.clock + seconds(self.server, 0, flops, 0), client, reply)
            return
        filtered, memory = self.up.apply(reply, stored.get("filter", {}))
        self._keep(client, own, memory)
        size, message = self._spooled(client, filtered)
        took = seconds(site.device, down, flops, size)
        self.ledger.add(client, replies=1, bytes_up=size, flops=flops, simulated_seconds=took, examples=examples)
        if "loss" in reply.info:
            self.ledger.note(client, loss=reply.info["loss"])
        yield Reply(self.clock + took, client, message)

    def _keep(self, client: ClientId, own: Tree | None, memory: Tree) -> None:
        kept: Tree = {}
        if own is not None:
            kept["algorithm"] = own
        if memory:
            kept["filter"] = memory
        self.states.write_own(client, kept)

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
        self.workers.close()
        self._spool.cleanup()
