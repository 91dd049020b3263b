"""What crosses between the engine and clients elsewhere on its own machines: letters, own states and replies as bytes of the wire format,
and who goes where."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fedtailor import wire
from fedtailor.core import ClientId, Message, Tree
from fedtailor.engines.clients import Clients, Done, Owner, Place, Sites
from fedtailor.errors import FedtailorError, RunError
from fedtailor.trees import tree_map


class Deal(NamedTuple):
    """A letter for a client, with the client's own state: it is kept where the engine is."""

    client: ClientId
    letter: int  # which of the letters beside it
    own: bytes


class Task(NamedTuple):
    """Letters that are worked on together."""

    deals: tuple[Deal, ...]
    at: Place
    sites: str  # which sites the clients have, by name
    free: bool


class Result(NamedTuple):
    """A `Done`, and what the client's own state is now; None: it stays as it was."""

    client: ClientId
    reply: bytes | None
    own: bytes | None
    flops: float
    examples: float
    why: str


class Answer(NamedTuple):
    results: tuple[Result, ...] = ()
    notices: tuple[str, ...] = ()
    error: tuple[str, str] | None = None  # (class, line) of a failure that a user can act on


def own_bytes(own: Tree) -> bytes:
    """A client's own state; nothing for none."""
    return wire.encode(Message("own", own)) if own else b""


class Carried:
    """The owner of own states that came with their letters and go back with the replies."""

    def __init__(self, deals: Iterable[Deal]) -> None:
        self._given = {deal.client: deal.own for deal in deals}
        self.written: dict[ClientId, bytes] = {}

    def read_own(self, client: ClientId) -> Tree:
        return dict(wire.decode(self._given[client]).body) if self._given[client] else {}

    def write_own(self, client: ClientId, own: Tree) -> None:
        self.written[client] = own_bytes(own)


def worked(make: Callable[[Owner, Callable[[str], None]], Clients], sites: Sites, task: Task, letters: Sequence[bytes]) -> Answer:
    """The answer to a task; `make` gives the clients from the owner of their states and the listener to their notices."""
    owner, notices = Carried(task.deals), list[str]()
    # A letter to many is decoded once: what everybody received is one object, and is stacked as one.
    opened = [wire.decode(letter) for letter in letters]
    if task.free:  # nothing of an evaluation crosses a wire: its tensors lie in memory as the engine's own do
        opened = [message._replace(body=tree_map(lambda t: t.clone(), message.body)) for message in opened]
    try:
        messages = {deal.client: opened[deal.letter] for deal in task.deals}
        done = list(make(owner, notices.append).work(messages, task.at, sites, task.free))
    except FedtailorError as error:
        return Answer(notices=tuple(notices), error=told(error))
    results = tuple(
        Result(
            d.client, wire.encode(d.reply) if d.reply else None, owner.written.get(d.client), d.flops, d.examples, d.why
        )
        for d in done
    )  # fmt: skip
    return Answer(results, tuple(notices))


def taken(result: Result, owner: Owner) -> Done:
    """The `Done` of a result, its own state written where it belongs."""
    if result.own is not None:
        owner.write_own(result.client, dict(wire.decode(result.own).body) if result.own else {})
    reply = wire.decode(result.reply) if result.reply is not None else None
    return Done(result.client, reply, result.flops, result.examples, result.why)


def told(error: FedtailorError) -> tuple[str, str]:
    return type(error).__name__, str(error)


def raised(error: tuple[str, str]) -> FedtailorError:
    """The failure again: the same class with the same line."""
    name, line = error
    return {kind.__name__: kind for kind in _kinds(FedtailorError)}.get(name, RunError)(line)


def _kinds(kind: type[FedtailorError]) -> Iterator[type[FedtailorError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)


class Dealer:
    """Who works where: clients with the most rows first, each to the place with the fewest rows so far. While a round lasts a client stays
    where it is: what going back through its part of a model needs is there. No timing enters, so a run has the same groups each time."""

    def __init__(self, places: Iterable[int]) -> None:
        self._load = dict.fromkeys(places, 0)
        self._at: dict[ClientId, int] = {}
        self._now: Hashable = None

    def begin(self, now: Hashable) -> None:
        """A round or an evaluation: when it is another one than before, all are dealt anew, as in a run that is resumed there."""
        if now != self._now:
            self._now, self._at, self._load = now, {}, dict.fromkeys(self._load, 0)

    def deal(self, rows: Mapping[ClientId, int], without: int | None = None) -> dict[int, list[ClientId]]:
        """Clients by place, in client order; those at the place `without` are moved, where there is another."""
        free = [place for place in self._load if place != without] or list(self._load)
        for client in sorted(rows, key=lambda c: (-rows[c], c)):
            if self._at.get(client) not in free:
                self._at[client] = min(free, key=lambda place: (self._load[place], place))
                self._load[self._at[client]] += max(1, rows[client])
        out: dict[int, list[ClientId]] = {}
        for client in sorted(rows):
            out.setdefault(self._at[client], []).append(client)
        return out

    def close(self, place: int) -> None:
        """Nobody goes there any more."""
        del self._load[place]
