"""Clients spread over the actors of a Ray cluster. The conversation, the ledger, the virtual clock and all states stay with the engine
(local.py); an actor is sent letters with the own states of their clients, so a lost one takes nothing along."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
os.environ.setdefault(
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
)  # what Ray's warning asks for: an actor without a GPU is told so by us

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from fedtailor import wire
from fedtailor.core import SERVER, ClientId, Message
from fedtailor.engines.clients import Clients, Done, Place, Sites
from fedtailor.engines.deals import Answer, Deal, Dealer, Task, own_bytes, raised, taken
from fedtailor.errors import RunError, first_line

STARTING = 600.0
"""Seconds in which actors must have loaded model and data."""
KNOCK = 10.0
LOSSES = 3
"""Actors lost in a row after which nobody is put into their place."""
LOST = (RayActorError, ObjectLostError, WorkerCrashedError)


class Wanted(NamedTuple):
    address: str = ""  # of a cluster that is there; "" starts one on this machine
    actors: int = 0  # 0: one a GPU of the cluster, or where it has none one for every two cores
    gpus: bool = True  # use those that there are


class Shares(NamedTuple):
    """How many actors there are, and what of the cluster each takes."""

    actors: int
    threads: int
    cpus: float
    gpus: float


class Sent(NamedTuple):
    """A task on its way to an actor."""

    place: int
    actor: Any
    task: Task
    letters: list[Any]  # Ray's references


def shares(wanted: Wanted, cpus: float, gpus: float) -> Shares:
    """Actors and their parts of a cluster with so many cores and GPUs. Parts of one are whole divisions of it, so that they fit."""
    gpus = gpus if wanted.gpus else 0
    count = wanted.actors or int(gpus) or max(1, int(cpus) // 2)

    def part(of: float) -> float:
        return 0.0 if of < 1 else 1.0 if of >= count else 1 / math.ceil(count / int(of))

    return Shares(count, max(1, int(cpus) // count), part(cpus), part(gpus))


def join(address: str) -> bool:
    """Be on a cluster; whether it was started here and is to be shut down. A process that is on one already stays there.

    Raises:
        RunError: there is none at this address, or none could be started.
    """
    if ray.is_initialized():
        return False
    here = {} if address else {"include_dashboard": False}
    try:
        if address not in ("", "auto"):
            _knock(address)
        ray.init(address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **here)
    except (RayError, OSError, ValueError, OverflowError, RuntimeError) as error:
        where = f"engine.address '{address}': no Ray cluster answers there" if address else "Ray could not be started here"
        raise RunError(f"{where}: {first_line(error)}") from error
    return not address


class Spread:
    """Works like `Clients` does, in actors. `hand` is the actor's class: `hand(*given, threads, gpu)` with the methods
    ready() -> Answer and work(task, *letters) -> Answer. The cluster is joined when the first letters come."""

    def __init__(self, here: Clients, hand: type, given: tuple[Any, ...], named: Callable[[Sites], str], wanted: Wanted) -> None:
        self._here, self._hand, self._given, self._named, self._wanted = here, hand, given, named, wanted
        self._actors: dict[int, Any] = {}
        self._losses: dict[int, int] = {}
        self._said: set[str] = set()
        self._ours = False

    @property
    def lanes(self) -> int:
        """How many machines' worth of letters are worked on at a time."""
        self._start()
        return len(self._actors)

    def work(self, letters: Mapping[ClientId, Message], at: Place, sites: Sites, free: bool = False) -> Iterator[Done]:
        """As `Clients.work`; the server's own work is done here meanwhile.

        Raises:
            FedtailorError: a client's, as it was raised. RunError: actors are lost again and again.
        """
        self._start()
        name = self._named(sites)
        self._dealer.begin((at.round, free, name))
        rows = {c: len(sites(c, at.round).data.get("train", ())) for c in letters if c != SERVER}
        waiting = self._deal(letters, rows, Task((), at, name, free))
        done = list(self._here.work({SERVER: letters[SERVER]}, at, sites, free)) if SERVER in letters else []
        answers = self._answers(waiting, rows)
        for answer in answers:
            self._tell(answer.notices)
        if errors := [answer.error for answer in answers if answer.error]:
            raise raised(min(errors))  # the same one each time
        results = {result.client: result for answer in answers for result in answer.results}
        at_home = {each.client: each for each in done}
        for client in sorted(letters):  # own states are written in client order, as one machine writes them
            if client in at_home:
                yield at_home[client]
                continue
            if not free:
                self._here.progress(client)
            yield taken(results[client], self._here.owner)

    def _deal(self, letters: Mapping[ClientId, Message], rows: Mapping[ClientId, int], empty: Task) -> dict[Any, Sent]:
        """The letters on their way, by Ray's reference to the answer. A letter to many is put into the cluster once."""
        put: dict[int, Any] = {}
        waiting: dict[Any, Sent] = {}
        for place, clients in self._dealer.deal(rows).items():
            ids = list(dict.fromkeys(id(letters[c]) for c in clients))
            for client in clients:
                if id(letters[client]) not in put:
                    put[id(letters[client])] = ray.put(wire.encode(letters[client]))
            owns = {c: own_bytes(self._here.owner.read_own(c)) for c in clients}
            deals = tuple(Deal(c, ids.index(id(letters[c])), owns[c]) for c in clients)
            waiting |= self._send(place, empty._replace(deals=deals), [put[i] for i in ids])
        return waiting

    def _send(self, place: int, task: Task, letters: list[Any]) -> dict[Any, Sent]:
        actor = self._actors[place]
        return {actor.work.remote(task, *letters): Sent(place, actor, task, letters)}

    def _answers(self, waiting: dict[Any, Sent], rows: Mapping[ClientId, int]) -> list[Answer]:
        """What came back; what an actor took along is asked of others."""
        answers: list[Answer] = []
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            sent = waiting.pop(ready[0])
            try:
                answers.append(ray.get(ready[0]))
                self._losses[sent.place] = 0
            except RayTaskError:  # somebody's mistake, not a lost machine: as it is
                raise
            except LOST as error:
                self._replace(sent, error)
                waiting |= self._move(sent, rows)
        return answers

    def _move(self, sent: Sent, rows: Mapping[ClientId, int]) -> dict[Any, Sent]:
        deals = {deal.client: deal for deal in sent.task.deals}
        moved: dict[Any, Sent] = {}
        for place, clients in self._dealer.deal({c: rows[c] for c in deals}, without=sent.place).items():
            moved |= self._send(place, sent.task._replace(deals=tuple(deals[c] for c in clients)), sent.letters)
        return moved

    def _replace(self, sent: Sent, error: BaseException) -> None:
        """Another actor in the place of a lost one, unless too many were lost there.

        Raises:
            RunError: there is no place left.
        """
        place = sent.place
        if self._actors.get(place) is not sent.actor:  # another task of the same actor told so
            return
        many = f"{len(sent.task.deals)} client" + ("s" if len(sent.task.deals) > 1 else "")
        self._here.notice(f"round {sent.task.at.round}: a Ray actor was lost: {many} go to another ({_why(error)})")
        _kill(sent.actor)
        self._losses[place] = self._losses.get(place, 0) + 1
        if self._losses[place] <= LOSSES:
            self._actors[place] = self._new()
            return
        del self._actors[place]
        if not self._actors:
            raise RunError(f"Ray actors are lost again and again, the last one so: {_why(error)}")
        self._dealer.close(place)

    def _start(self) -> None:
        """Join the cluster and start the actors, once.

        Raises:
            RunError: no cluster, or its actors do not start. FedtailorError: what an actor says of the experiment.
        """
        if self._actors:
            return
        self._ours = join(self._wanted.address)
        found = ray.cluster_resources()
        self._shares = shares(self._wanted, found.get("CPU", 1.0), found.get("GPU", 0.0))
        actors = {place: self._new() for place in range(self._shares.actors)}
        count = f"{len(actors)} actor" + ("s" if len(actors) > 1 else "")
        asked = f"{count} with {self._shares.cpus:g} cores and {self._shares.gpus:g} GPUs each"
        try:
            for answer in ray.get([actor.ready.remote() for actor in actors.values()], timeout=STARTING):
                if answer.error:
                    raise raised(answer.error)
        except GetTimeoutError as error:
            raise RunError(
                f"Ray started no {asked} in {STARTING:g} s: set engine.actors to fewer, or free the cluster"
            ) from error
        except RayError as error:
            raise RunError(f"Ray could not start {asked}: {_why(error)}") from error
        self._actors, self._dealer = actors, Dealer(actors)

    def _new(self) -> Any:
        own = self._shares
        kind = ray.remote(self._hand).options(num_cpus=own.cpus, num_gpus=own.gpus, scheduling_strategy="SPREAD")
        return kind.remote(*self._given, own.threads, own.gpus > 0)

    def _tell(self, lines: tuple[str, ...]) -> None:
        for line in lines:  # all actors may say the same
            if line not in self._said:
                self._said.add(line)
                self._here.notice(line)

    def close(self) -> None:
        self._here.close()
        if self._ours:
            ray.shutdown()
        elif ray.is_initialized():
            for actor in self._actors.values():
                _kill(actor)
        self._actors, self._ours = {}, False


def _knock(address: str) -> None:
    """
    Raises:
        OSError, ValueError: nobody answers there. Ray itself would try for many minutes.
    """
    host, found, port = address.rpartition(":")
    if not found or not port.isdigit() or "/" in host:
        raise ValueError("write it as host:port, or auto")
    socket.create_connection((host, int(port)), KNOCK).close()


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayError):
        ray.kill(actor)


def _why(error: BaseException) -> str:
    """What Ray says, without the paragraphs around it."""
    cause = getattr(error, "cause", None)
    return first_line(cause if isinstance(cause, BaseException) else error)
