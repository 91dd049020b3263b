"""A line between a member and the server, the same at both ends. Connections come and go; what was not acknowledged goes again, from
the byte that the other side has; what was received once takes effect once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fedtailor.federation.frames import Arriving, Frame, Header, LineError, Parcel, frames, pack, said, unpack

Read = Callable[[], Awaitable[bytes | None]]  # None: the other side has hung up
Write = Callable[[bytes], Awaitable[None]]
WHOLE = -1
WINDOW = 4
"""Frames of a parcel that may be on their way at a time."""
REMEMBERED = 64
"""Parcels whose ids are remembered, so that one that comes again is only acknowledged."""
UNREAD = 256
"""Small frames that may wait for one who does not read them."""
UNACKNOWLEDGED = 16
"""Parcels that may wait to be acknowledged: the oldest go first."""
SPEAKS = 1.0
"""Seconds in which a connection that cannot be written to may still say why."""


class Line:
    """What is to be sent and what has been received, across connections."""

    def __init__(
        self,
        folder: Path,
        limit: int,
        received: Callable[[Parcel], None],
        awaited: Callable[[Header], bool] = lambda header: True,
        told: Callable[[Header], None] | None = None,
    ) -> None:
        """`awaited` says whether a parcel that is announced is one that this side asked for; `told` takes frames of other kinds."""
        self._folder, self._limit = folder, limit
        self._received, self._awaited, self._told = received, awaited, told or unknown
        self._outbox: OrderedDict[str, Parcel] = OrderedDict()
        self._small: list[Header] = []
        self._arriving: Arriving | None = None
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._wake: asyncio.Event | None = None
        self._connection = 0
        self._had = ("", 0)  # of the parcel that is being sent: frames that the other side has, on this connection
        self._frames = 0  # of the parcel that arrives, on this connection
        self._has: Header | None = None  # what is still to be said of them
        self.bytes_in = self.bytes_out = 0  # of frames: what parcels take with their headers

    def send(self, parcel: Parcel) -> None:
        """Send it, now or when there is a connection, until it is acknowledged."""
        self._outbox[parcel.id] = parcel
        while len(self._outbox) > UNACKNOWLEDGED:
            self._outbox.popitem(last=False)
        self._nudge()

    def tell(self, header: Header) -> None:
        """A small frame, lost where the connection is."""
        self._small.append(header)
        self._nudge()

    def drop(self, id: str) -> None:
        """Nobody waits for this parcel any more."""
        self._outbox.pop(id, None)

    def refuse(self, id: str) -> None:
        """What is here of this parcel is not wanted any more."""
        if self._arriving and self._arriving.id == id:
            self._arriving.drop()
            self._arriving = None

    def reset(self) -> None:
        """The other side has begun anew: what was half sent or half received is nothing."""
        if self._arriving:
            self._arriving.drop()
        self._arriving = None
        self._seen.clear()
        self._outbox.clear()

    @property
    def idle(self) -> bool:
        """Whether everything has been sent, and parcels acknowledged."""
        return not self._outbox and not self._small

    def held(self) -> dict[str, int]:
        """What the other side need not send again: {id: bytes that are here, WHOLE for all}."""
        return dict.fromkeys(self._seen, WHOLE) | ({self._arriving.id: self._arriving.held} if self._arriving else {})

    async def run(self, read: Read, write: Write, held: Any, displaced: asyncio.Event | None = None) -> None:
        """Speak over a connection until it ends, or is displaced by another; `held` is what the other side has of parcels that it has not
        acknowledged.

        Raises:
            LineError: the other side does not keep to the protocol. ConnectionError: nothing can be sent any more.
        """
        self._connection += 1
        mine, wake = self._connection, asyncio.Event()
        self._wake = wake
        self._small.clear()
        self._had, self._frames, self._has = ("", 0), 0, None
        offsets = {k: v for k, v in held.items() if type(v) is int} if isinstance(held, dict) else {}
        for id in [id for id in self._outbox if offsets.get(id) == WHOLE]:  # its acknowledgement was lost
            self.drop(id)
        sending = asyncio.create_task(self._send(write, offsets, mine, wake))
        reading = asyncio.create_task(self._read(read))
        ending = asyncio.create_task((displaced or asyncio.Event()).wait())
        try:
            await asyncio.wait({sending, reading, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                return
            if not reading.done():
                # Who cannot send must not go on as if it could; the reader often knows why a moment later.
                await asyncio.wait({reading}, timeout=SPEAKS if sending.exception() else 0.0)
            if reading.done():
                reading.result()
            elif error := sending.exception():
                raise error if isinstance(error, LineError) else ConnectionError(f"nothing can be sent: {error}") from error
        finally:
            if self._connection == mine:
                self._connection += 1
            wake.set()
            reading.cancel()
            ending.cancel()
            try:
                # A write that is only cancelled is still under way in gRPC, and then nothing else can be said over the call.
                await asyncio.wait({sending}, timeout=SPEAKS)
            finally:
                sending.cancel()
                await asyncio.gather(sending, reading, ending, return_exceptions=True)

    async def _read(self, read: Read) -> None:
        while (frame := await read()) is not None:
            self.bytes_in += len(frame)
            self._take(unpack(frame))

    async def _send(self, write: Write, offsets: dict[str, int], connection: int, wake: asyncio.Event) -> None:
        sent: set[str] = set()
        while connection == self._connection:
            wake.clear()
            await self._speak(write)
            parcel = next((p for i, p in self._outbox.items() if i not in sent), None)
            if parcel is None:
                sent &= self._outbox.keys()
                await wake.wait()
                continue
            sent.add(parcel.id)
            try:
                pieces = frames(parcel, min(max(offsets.pop(parcel.id, 0), 0), parcel.size))
                first = next(pieces)
            except OSError:  # its file has made room for a newer one: nobody waits for it
                self.drop(parcel.id)
                continue
            await self._write(write, first)
            for count, frame in enumerate(pieces, 2):
                if not await self._room(write, parcel.id, count, wake, connection):
                    break
                await self._write(write, frame)

    async def _room(self, write: Write, id: str, count: int, wake: asyncio.Event, connection: int) -> bool:
        """Wait until the other side has so much of a parcel that this many of its frames may go; False where it wants no more of it.
        gRPC takes whatever it is given into memory."""
        while True:
            wake.clear()
            await self._speak(write)  # what this side has meanwhile, so that two who send do not wait for each other
            if id not in self._outbox or connection != self._connection:
                return False
            if self._had[0] != id:
                self._had = (id, 0)
            if count - self._had[1] <= WINDOW:
                return True
            await wake.wait()

    async def _speak(self, write: Write) -> None:
        while self._small or self._has:
            if self._has:
                frame, self._has = pack(self._has), None
            else:
                frame = pack(self._small.pop(0))
            await self._write(write, frame)

    async def _write(self, write: Write, frame: bytes) -> None:
        await write(frame)
        self.bytes_out += len(frame)

    def _take(self, frame: Frame) -> None:
        kind = frame.header["is"]
        if kind == "got":
            self.drop(str(frame.header.get("id")))
            self._nudge()
        elif kind == "have":
            count = frame.header.get("frames")
            if frame.header.get("id") == self._had[0] and type(count) is int:
                self._had = (self._had[0], max(self._had[1], count))
                self._nudge()
        elif kind == "part":
            self._part(frame)
        else:
            self._told(frame.header)

    def _part(self, frame: Frame) -> None:
        id = frame.header.get("id")
        if not isinstance(id, str):
            raise LineError("part of a parcel without a name refused")
        if id in self._seen:  # it has come before: say so again, and pass over what follows
            if "size" in frame.header:
                if len(self._small) >= UNREAD:
                    raise LineError("it sends the same again and again, and reads nothing")
                self.tell({"is": "got", "id": id})
            return
        begins = "size" in frame.header and (self._arriving is None or self._arriving.held != frame.header.get("at"))
        if self._arriving is None or self._arriving.id != id or begins:
            if not self._awaited(frame.header):
                raise LineError(f"parcel '{said(id, 60)}' refused: nobody asked for it")
            if self._arriving:
                self._arriving.drop()
            self._arriving = None
            self._arriving = Arriving(frame.header, self._folder, self._limit)
        if not self._arriving.add(frame.header, frame.payload):
            self._frames = 1 if "size" in frame.header else self._frames + 1
            if self._frames % (WINDOW // 2) == 0:
                self._has = {"is": "have", "id": id, "frames": self._frames}  # the newest is enough
                self._nudge()
            return
        whole, self._arriving = self._arriving.parcel(), None
        self._seen[id] = None
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        self.tell({"is": "got", "id": id})
        self._received(whole)

    def _nudge(self) -> None:
        if self._wake:
            self._wake.set()


def unknown(header: Header) -> None:
    """Raises:
    LineError: whatever it is.
    """
    raise LineError(f"frame of kind '{said(header['is'], 60)}' refused: there is none such")
