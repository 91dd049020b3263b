"""The server's end where FLARE carries the parcels: a thread a member brings it one parcel after the other and fetches the replies."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor.core import ClientId
from fedtailor.errors import RunError
from fedtailor.federation.carriers import Attached, Event
from fedtailor.federation.frames import Header, Parcel
from fedtailor.flare.cargo import packed, unpacked
from fedtailor.flare.desk import OVER, REPLY, UNKNOWN

SECONDS = 10.0
"""How long a call waits at the member for a reply, before it comes back without one: so a call that is lost is noticed."""
PATIENCE = 60.0
"""Seconds on top of that in which a call must be back, and for every `RATE` bytes that it carries one more."""
RATE = 200_000
PAUSE = 2.0


class Site(NamedTuple):
    """One member's machine: its two calls, each with the seconds in which it must be back as the last argument."""

    deliver: Callable[[str, Header, Any, float, float], Mapping[str, Any]]
    collect: Callable[[str, float, float], Mapping[str, Any]]


class Lane:
    """The way to one member."""

    def __init__(self, member: ClientId, site: Site, folder: Path, limit: int, post: Calls) -> None:
        self.bytes_in = self.bytes_out = 0
        self.over: str | None = None  # why the member has ended
        self._member, self._site, self._folder, self._limit, self._post = member, site, folder, limit, post
        self._waiting: dict[str, tuple[Parcel, bool]] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"lane-{member}", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        return not self._waiting

    def send(self, parcel: Parcel, reply: bool) -> None:
        with self._changed:
            self._waiting[parcel.id] = parcel, reply
            self._changed.notify_all()

    def drop(self, id: str) -> None:
        with self._changed:
            self._waiting.pop(id, None)

    def end(self, why: str) -> None:
        """This member is not asked for anything any more."""
        with self._changed:
            self.over = why
            self._waiting.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while self.over is None and not self._post.aborted():
            with self._changed:
                if not self._waiting:
                    self._changed.wait(1.0)
                    continue
                parcel, reply = next(iter(self._waiting.values()))
            try:
                self._carry(parcel, reply)
            except RunError as error:  # what it sent is no parcel
                self.end(str(error))
                self._post.away(self._member)

    def _carry(self, parcel: Parcel, reply: bool) -> None:
        """Bring it until it has arrived, and fetch what it is answered, unless nobody waits for that any more.

        Raises:
            RunError: the answer is no parcel.
        """
        brought = False
        while parcel.id in self._waiting and not self._post.aborted():
            try:
                if brought:
                    answer = self._site.collect(parcel.id, SECONDS, SECONDS + PATIENCE + self._limit / RATE)
                else:
                    patience = SECONDS + PATIENCE + parcel.size / RATE
                    answer = self._site.deliver(parcel.id, dict(parcel.note), packed(parcel.content), SECONDS, patience)
                    self.bytes_out += parcel.size
            except Exception:  # whatever it is, the way to this member is cut, now
                self._post.away(self._member)
                brought = False
                time.sleep(PAUSE)
                continue
            self._post.there(self._member)
            brought = answer["is"] != UNKNOWN
            if answer["is"] == OVER:
                self._ended(str(answer["why"]))
            if answer["is"] == REPLY:
                self._answered(parcel, answer, reply)

    def _answered(self, parcel: Parcel, answer: Mapping[str, Any], wanted: bool) -> None:
        content = unpacked(answer["cargo"], self._folder, self._limit)
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        self.bytes_in += size
        with self._changed:
            awaited = self._waiting.pop(parcel.id, None) is not None
        if awaited and wanted:
            self._post.events.put(Event("parcel", self._member, Parcel(parcel.id, dict(answer["note"]), content)))
        elif isinstance(content, Path):
            content.unlink(missing_ok=True)

    def _ended(self, why: str) -> None:
        self.end(why)
        if why:
            self._post.away(self._member)


class Heard(queue.SimpleQueue[Event]):
    """Events; who waits for one is told when there is nothing to wait for any more."""

    def __init__(self) -> None:
        super().__init__()
        self.hopeless: Callable[[], str] = str

    def get(self, block: bool = True, timeout: float | None = None) -> Event:
        """Raises:
        RunError: the job is aborted, or too few members are left. queue.Empty: nothing came in time.
        """
        try:
            return super().get(block, timeout)
        except queue.Empty:
            if why := self.hopeless():
                raise RunError(why) from None
            raise


class Calls:
    """Takes the place of `Post`. All members are there when it begins: FLARE sees to that."""

    def __init__(
        self,
        sites: Mapping[ClientId, Site],
        folder: Path,
        limit: int,
        least: int,
        aborted: Callable[[], bool] = lambda: False,
    ) -> None:
        """`least`: without so many members the run ends."""
        self.session, self.events, self.aborted = secrets.token_hex(8), Heard(), aborted
        self.events.hopeless = self._hopeless
        self._least, self._closed = least, False
        self._lanes = {name: Lane(name, site, folder, limit, self) for name, site in sorted(sites.items())}
        now = time.monotonic()
        self.members = {name: Attached(lane, now, 0.0) for name, lane in self._lanes.items()}
        for name in self.members:
            self.events.put(Event("attached", name, None, {"fresh": True}))

    def send(self, member: ClientId, parcel: Parcel, reply: bool = True) -> None:
        if member in self._lanes and self._lanes[member].over is None:
            self._lanes[member].send(parcel, reply)

    def recall(self, member: ClientId, id: str) -> None:
        if member in self._lanes:
            self._lanes[member].drop(id)

    def tell(self, member: ClientId, header: Header) -> None:
        """The one thing that members are told this way is that they are refused."""
        if header["is"] == "bye" and member in self._lanes:
            self._lanes[member].end(str(header["why"]))
            self.away(member)

    def attached(self, member: ClientId) -> bool:
        return member in self.members and self.members[member].since is not None

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.end("")

    # From the lanes' threads

    def there(self, member: ClientId) -> None:
        if not self.attached(member) and self._lanes[member].over is None:
            self.members[member] = Attached(self._lanes[member], time.monotonic(), 0.0)
            self.events.put(Event("attached", member, None, {"fresh": False}))

    def away(self, member: ClientId) -> None:
        if self.attached(member):
            self.members[member] = Attached(self._lanes[member], None, time.monotonic())
            self.events.put(Event("detached", member))

    def _hopeless(self) -> str:
        if self.aborted():
            return "FLARE has aborted the job: submit it again, and it goes on from its last checkpoint"
        ended = {name: lane.over for name, lane in self._lanes.items() if lane.over}
        if len(self._lanes) - len(ended) < self._least:
            told = "; ".join(f"{name}: {why}" for name, why in ended.items())
            return f"too few members are left, {self._least} are needed ({told})"
        return ""
