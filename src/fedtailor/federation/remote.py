"""The engine of a federation: the conversation, held with members on machines of their own. What a letter does there, member.py says."""

from __future__ import annotations

import math
import queue
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor import memory, wire
from fedtailor.core import LOST, SERVER, Algorithm, ClientId, Letters, Message, Talk, Tree, seed_of
from fedtailor.engines.answering import Crew, Workers
from fedtailor.engines.cache import Cache
from fedtailor.engines.clients import Clients, Place, Sites
from fedtailor.engines.engine import hold
from fedtailor.engines.states import States
from fedtailor.errors import RunError
from fedtailor.federation.carriers import ServerEnd
from fedtailor.federation.frames import LETTER, READY, TEST, VALID, Header, Parcel, said
from fedtailor.federation.replies import complaint, spent
from fedtailor.filters import NOTHING, Filter
from fedtailor.ledger import Ledger
from fedtailor.trees import nbytes

LARGE = 16 << 20
"""Bytes from which a letter is sent from a file."""
TICK = 0.2
"""Seconds after which the wait for a reply looks whether somebody is late or gone."""


class Rules(NamedTuple):
    """Whom a round waits for."""

    least: int = 1  # replies without which a deadline does not end a round, and members without which none begins
    deadline: float = 0.0  # seconds; 0: none
    grace: float = 30.0  # seconds that a member may be cut off before its letter counts as lost
    ordered: bool = False  # replies as they come are taken when all are there, as in a simulation without a clock


class Owed(NamedTuple):
    """A letter to which there is no reply yet."""

    id: str
    message: Message
    content: bytes | Path  # the message as it is sent, once for all who are sent the same; a large one on disk
    at: Place
    view: str  # "" for work, else whose rows are judged
    since: float


class Remote:
    """Holds conversations with members. Work beside the server is done here."""

    own_states_here = False

    def __init__(
        self,
        algorithm: Algorithm,
        sites: Sites,
        valid_sites: Sites,
        workers: Workers | Crew,
        states: States,
        ledger: Ledger,
        post: ServerEnd,
        up: Filter,
        down: Filter,
        seed: int,
        rules: Rules,
        greet: Callable[[ClientId], None],
        agree: Callable[[ClientId, Header], bool],
        notice: Callable[[str], None] = lambda line: None,
        progress: Callable[[ClientId], None] = lambda client: None,
        rows: Callable[[ClientId], float] = lambda client: math.inf,
    ) -> None:
        """`greet` sends the experiment to a member that attaches; `agree` looks at what it answers, and says whether it can take part;
        `rows`: for how many training rows a member can count."""
        self.algorithm, self.sites, self.valid_sites, self.workers = algorithm, sites, valid_sites, workers
        self.states, self.ledger, self.post, self.up, self.down, self.rules = states, ledger, post, up, down, rules
        self.greet, self.agree, self.notice, self.progress, self.rows = greet, agree, notice, progress, rows
        self._clients = Clients(algorithm, workers, states, up, seed, stacked=False, notice=notice)
        steps = workers.of(SERVER).steps
        self._cache = steps.cache if steps else Cache()
        self._cache.lie(states.folder)
        self._started = time.monotonic()
        self._count = 0
        self._agreed: set[ClientId] = set()
        self._letters = tempfile.TemporaryDirectory(prefix="fedtailor-")  # large ones, until the next
        self._owed: dict[ClientId, Owed] = {}
        self._came: dict[ClientId, Message] = {}  # and not taken yet
        self._again: dict[ClientId, Owed] = {}  # of a checkpoint: to be sent once more
        self._kept: dict[ClientId, str] = {}  # digests of own states at the last checkpoint

    @property
    def clock(self) -> float:
        return time.monotonic() - self._started

    @property
    def ready(self) -> set[ClientId]:
        """Members that work on what they are sent."""
        return {member for member in self._agreed if self.post.attached(member)}

    def owed(self) -> dict[ClientId, tuple[int, float]]:
        """From any thread: members whose reply is awaited, the round of the letter, and the seconds since it was written."""
        now = time.monotonic()
        return {client: (owed.at.round, now - owed.since) for client, owed in list(self._owed.items())}

    def converse(self, talk: Talk, round: int, sites: Sites | None = None) -> Any:
        """Drive a conversation to its end and return its value; with `sites` it is an evaluation."""
        view = "" if sites is None else VALID if sites is self.valid_sites else TEST
        before: dict[ClientId, Message] = {}
        if view:
            # A member does one thing after the other: its reply to what is under way comes first, and stays for the next round.
            self.wait(lambda: not self._owed, self._missing)
            before, self._came = self._came, {}
        value = hold(talk, round, self.notice, lambda letters, at: self._exchange(letters, at, view, sites or self.sites))
        self._came |= before
        return value

    def wait(self, enough: Callable[[], bool], tick: Callable[[], None] = lambda: None) -> None:
        """Listen until there is enough."""
        while not enough():
            self._listen(TICK)
            tick()

    def dump(self) -> Tree:
        self._kept = dict(self.states.elsewhere)
        owed = {c: o for c, o in self._owed.items() if not o.view}
        return {
            "clock": self.clock,
            "cache": self._cache.dump(),
            "came": {c: {"verb": m.verb, "info": dict(m.info), "body": m.body} for c, m in self._came.items()},
            "owed": {
                c: {"verb": o.message.verb, "info": dict(o.message.info), "body": o.message.body, "at": list(o.at)}
                for c, o in owed.items()
            },
        }

    def load(self, dumped: Tree) -> None:
        self._started = time.monotonic() - float(dumped["clock"])
        self._cache.load(dumped["cache"])
        self._kept = dict(self.states.elsewhere)
        self._came = {c: Message(m["verb"], m["body"], m["info"]) for c, m in dumped["came"].items()}
        for client, kept in dumped["owed"].items():
            message = Message(kept["verb"], kept["body"], kept["info"])
            self._again[client] = Owed("", message, b"", Place(*kept["at"]), "", 0.0)

    def finish(self) -> None:
        self._cache.remove()

    def close(self) -> None:
        self.workers.close()
        self._letters.cleanup()

    # One exchange

    def _exchange(self, letters: Letters, at: Place, view: str, sites: Sites) -> dict[ClientId, Message]:
        if not view:
            for client, owed in self._again.items():
                self._send({client: owed.message}, owed.at, "")
            self._again = {}
        members = {c: m for c, m in sorted(letters.to.items()) if c != SERVER}
        if letters.wait == "all" and not view:
            self._quorum(members)
        self._send(members, at, view)
        if SERVER in letters.to:
            self._here(letters.to[SERVER], at, view, sites)
        begun = time.monotonic()
        if letters.wait == "any":
            self.wait(lambda: (bool(self._came) and not (self.rules.ordered and self._owed)) or not self._owed, self._missing)
            taken, self._came = self._came, {}
            return {c: taken[c] for c in sorted(taken)}
        limit = self.rules.deadline if self.rules.deadline and not view else float("inf")

        def enough() -> bool:
            open_ = [c for c in members if c in self._owed]
            late = time.monotonic() - begun > limit
            return not open_ or (late and len(members) - len(open_) >= self.rules.least)

        self.wait(enough, self._missing)
        missing = [c for c in members if c in self._owed or self._came.get(c, Message(LOST)).verb == LOST]
        for client in missing:
            self._give_up(client)
            self._came.pop(client, None)
        if missing:
            self.notice(f"round {at.round}: no reply in time from {', '.join(missing)}")
        replies = {c: self._came.pop(c) for c in sorted(letters.to) if c in self._came}
        if any(isinstance(reply.body, wire.LazyTree) for reply in replies.values()):
            memory.trim()  # before a sum of them takes as much again
        return replies

    def _quorum(self, members: Mapping[ClientId, Message]) -> None:
        """A round begins with as many members as it needs."""
        least, ready = min(self.rules.least, len(members)), len(self.ready & members.keys())
        if ready < least:
            self.notice(f"waiting for members: {ready} of {least} that a round needs are attached")
            self.wait(lambda: len(self.ready & members.keys()) >= least)

    def _send(self, members: Mapping[ClientId, Message], at: Place, view: str) -> None:
        encoded: dict[Any, bytes | Path] = {}
        for client, message in members.items():
            if message.verb not in self.algorithm.client:
                raise RunError(f"letter with verb '{message.verb}', which no client handler answers")
            key = message.verb, id(message.body), tuple(message.info.items())
            self._count += 1
            if key not in encoded:  # what all are sent is encoded once and exists once
                encoded[key] = self._encoded(message if view else self.down.apply(message, {})[0])
            owed = Owed(f"{self.post.session}-{self._count}", message, encoded[key], at, view, time.monotonic())
            self._owed[client] = owed
            if not view:
                self.ledger.add(client, letters=1, bytes_down=Parcel(owed.id, {}, owed.content).size)
            if client in self._agreed:  # also while it is cut off: its line has the letter when it is back
                self._write(client, owed)

    def _write(self, client: ClientId, owed: Owed) -> None:
        own, kept = self.states.elsewhere.get(client, ""), self._kept.get(client, "")
        note = {"is": LETTER, "round": owed.at.round, "step": owed.at.step, "view": owed.view, "own": own, "kept": kept}
        self.post.send(client, Parcel(owed.id, note, owed.content))

    def _encoded(self, message: Message) -> bytes | Path:
        """The bytes of a message, in a file where they are many: the server has one copy of the model for itself, and none to send."""
        wanted = {owed.content for owed in self._owed.values() if isinstance(owed.content, Path)}
        for path in Path(self._letters.name).iterdir():
            if path not in wanted:
                path.unlink(missing_ok=True)
        if nbytes(message.body) < LARGE:
            return wire.encode(message)
        path = Path(self._letters.name) / f"letter-{self._count}.safetensors"
        wire.write(message, path)
        return path

    def _here(self, letter: Message, at: Place, view: str, sites: Sites) -> None:
        """What stays beside the server crosses no wire."""
        for done in self._clients.work({SERVER: letter}, at, sites, bool(view)):
            if done.reply is None:
                self.notice(f"round {at.round}: {SERVER} set aside: {done.why}")
                continue
            self._came[SERVER] = done.reply
            if not view:
                self.ledger.add(SERVER, flops=done.flops, examples=done.examples)

    def _listen(self, seconds: float) -> None:
        try:
            event = self.post.events.get(timeout=seconds)
        except queue.Empty:
            return
        if event.kind == "attached":
            if event.header["fresh"]:  # else its line goes on where it stopped
                self._agreed.discard(event.member)
                self.greet(event.member)
        elif event.kind == "detached":
            self.notice(f"{event.member} is cut off")
        elif event.parcel and event.parcel.note.get("is") == READY:
            event.parcel.discard()
            if self.agree(event.member, event.parcel.note):
                self._agreed.add(event.member)
                if event.member in self._owed:  # it was written before the member came, or the member has forgotten it
                    self._write(event.member, self._owed[event.member])
        elif event.parcel:
            self._reply(event.member, event.parcel)

    def _missing(self) -> None:
        now = time.monotonic()
        for client in list(self._owed):
            known = self.post.members.get(client)
            if known and known.since is not None:
                continue
            away = now - max(known.left if known else 0.0, self._owed[client].since)
            if away > self.rules.grace:
                self._give_up(client)
                self._came[client] = Message(LOST)

    def _give_up(self, client: ClientId) -> None:
        owed = self._owed.pop(client, None)
        if owed:
            self.post.recall(client, owed.id)

    def _reply(self, client: ClientId, parcel: Parcel) -> None:
        owed = self._owed.get(client)
        if owed is None or owed.id != parcel.id:
            parcel.discard()
            return
        del self._owed[client]
        note, size = parcel.note, parcel.size
        try:
            message = self._opened(client, parcel, owed)
        except OSError:  # this machine's trouble, not the member's
            raise
        except Exception as error:  # a reply may be anything, and what filters and checks make of it cannot be listed
            parcel.discard()
            self._came[client] = Message(LOST)
            self.notice(f"round {owed.at.round}: {client} set aside: {said(error) or type(error).__name__}")
            return
        self._came[client] = message
        if owed.view:
            return
        self.progress(client)
        took = time.monotonic() - owed.since
        flops, examples = (spent(note, name) for name in ("flops", "examples"))
        self.ledger.add(client, replies=1, bytes_up=size, flops=flops, simulated_seconds=took, examples=examples)
        if "loss" in message.info:
            self.ledger.note(client, loss=message.info["loss"])
        own = str(note.get("own", ""))
        if re.fullmatch("[0-9a-f]{64}", own):
            self.states.elsewhere[client] = own
        else:
            self.states.elsewhere.pop(client, None)

    def _opened(self, client: ClientId, parcel: Parcel, owed: Owed) -> Message:
        """The message in a reply; a large one stays on disk and is read tensor by tensor.

        Raises:
            WireError, RunError: it is not one, not what the letter asked for, or the member refused the letter. Any error that a filter
                makes of what it does not expect.
        """
        if "why" in parcel.note:
            raise RunError(said(parcel.note["why"]))
        free = bool(owed.view)
        undo = NOTHING.undo if free else self.up.undo
        if isinstance(parcel.content, Path):
            if not free and self.up is not NOTHING:
                wire.write(undo(wire.read(parcel.content)), parcel.content)
            message = wire.read(parcel.content, lazy=True)
        else:
            message = undo(wire.decode(parcel.content))
        if why := complaint(self.algorithm, owed.message, message, math.inf if free else self.rows(client)):
            raise RunError(why)
        if isinstance(parcel.content, Path):  # one a member stays
            path = parcel.content.replace(parcel.content.with_name(f"reply-{seed_of(0, client)}.safetensors"))
            message = wire.read(path, lazy=True)
        return message
