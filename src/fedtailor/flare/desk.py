"""A member's end where FLARE carries the parcels: the server's calls bring letters and take replies, the member works in a thread."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

from fedtailor.errors import RunError
from fedtailor.federation.frames import Parcel
from fedtailor.flare.cargo import packed, unpacked

REPLY, WAIT, UNKNOWN, OVER = "reply", "wait", "unknown", "over"
"""What a call is answered: with the reply; not yet; no such letter came; the member has ended, and why."""


class Desk:
    """What came and what is to be fetched. The same letter may be brought again: it is put into the inbox once."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Parcel | RunError] = queue.SimpleQueue()
        self._folder, self._limit = Path(), 0  # known when the site's file is read: until then nothing is taken
        self._at = ""  # the id of the letter that came last
        self._reply: Parcel | None = None  # to that letter
        self._over: str | None = None  # why the member has ended; "": all is done
        self._changed = threading.Condition()

    # The member's

    def open(self, folder: Path, limit: int) -> None:
        """Take parcels of so many bytes; large ones wait in this folder."""
        with self._changed:
            self._folder, self._limit = folder, limit
            self._changed.notify_all()

    def send(self, parcel: Parcel) -> None:
        with self._changed:
            if parcel.id == self._at:  # else nobody waits for it any more
                self._reply = parcel
                self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Nothing is sent from here: replies are fetched, also after the member has ended."""

    def end(self, why: str) -> None:
        with self._changed:
            self._over = why
            self._changed.notify_all()

    # The server's calls

    def deliver(self, id: str, note: dict[str, Any], cargo: Any, seconds: float) -> dict[str, Any]:
        """Raises:
        RunError: it is no parcel, or too large.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._limit or self._over is not None, seconds):
                return {"is": UNKNOWN}
            if id != self._at and self._over is None:
                content = unpacked(cargo, self._folder, self._limit)
                self._at, self._reply = id, None
                self.inbox.put(Parcel(id, note, content))
        return self.collect(id, seconds)

    def collect(self, id: str, seconds: float) -> dict[str, Any]:
        """The reply, if there is one within so many seconds."""
        until = time.monotonic() + seconds
        with self._changed:
            while id == self._at and self._reply is None and self._over is None:
                left = until - time.monotonic()
                if left <= 0:
                    return {"is": WAIT}
                self._changed.wait(left)
            if id == self._at and self._reply is not None:
                return {"is": REPLY, "note": dict(self._reply.note), "cargo": packed(self._reply.content)}
            return {"is": UNKNOWN} if self._over is None else {"is": OVER, "why": self._over}
