"""The server's end of all lines: members attach over one port and stay; the conversation sends them letters and is told what comes.

The network has a thread of its own, in which everything here runs but what says "from any thread"."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from fedtailor.core import ClientId
from fedtailor.errors import FedtailorError, RunError
from fedtailor.federation import network
from fedtailor.federation.carriers import Attached, Event
from fedtailor.federation.frames import MAX_FRAME, Header, LineError, Parcel, pack, unpack
from fedtailor.federation.line import Line

SERVICE = "fedtailor.Federation"
NAME = "fedtailor-name"  # metadata: who one says one is, where there are no certificates
HELLO = 30.0
"""Seconds in which a connection must have said who it is: others cost nothing for long."""
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", MAX_FRAME),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small frame must not become a large one
]
NAMES = 10_000
"""Names that are known at a time, where whoever says one comes in."""
NAMED = re.compile(r"[\w.\-@+][\w.\-@+ ]{0,63}", re.ASCII)
AT_ONCE = 32
"""Connections of one name that read nothing, and so cannot be told that they end: only where a member is hostile are there any."""
BURST, PACE = 20.0, 1.0
"""Connections of one name: so many at once, and so many a second after that. An honest member waits longer between two."""


class Keys:
    """Who may come in: certificates of an authority, or, where `--insecure` was typed, whoever says a name."""

    def __init__(
        self,
        credentials: grpc.ServerCredentials | None = None,
        admit: Callable[[bytes], ClientId] | None = None,
        enrol: Callable[[bytes, bytes], bytes] | None = None,
        look: Callable[[bytes], str] | None = None,
    ) -> None:
        """Each is given a peer's certificate (PEM): whether it may attach, be enrolled, or ask for the status."""
        self.credentials, self.admit, self.enrol, self.look = credentials, admit, enrol, look


class Post:
    """Attach members, carry parcels, answer who asks how it goes."""

    def __init__(
        self,
        address: str,
        folder: Path,
        limit: int,
        keys: Keys,
        status: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.members: dict[ClientId, Attached] = {}
        self.port, self.session = 0, secrets.token_hex(8)
        self._address, self._folder, self._limit = address, folder, limit
        self._keys, self._status = keys, status
        self._awaited: dict[ClientId, str] = {}  # the id of the reply that a member owes
        self._calls: dict[ClientId, tuple[int, asyncio.Event]] = {}
        self._lines: dict[ClientId, Line] = {}
        self._stuck = Counter[ClientId]()
        self._paces: dict[ClientId, tuple[float, float]] = {}  # connections that a name may still make, and when that was counted
        self._count = 0
        self._server: Any = None

    # From any thread

    def open(self) -> None:
        """Listen.

        Raises:
            RunError: the port is taken, or the address is no address of this machine.
        """
        network.begin(self._open()).result()

    def send(self, member: ClientId, parcel: Parcel, reply: bool = True) -> None:
        """Send it until it is acknowledged; with `reply`, one parcel of the same id is awaited in return."""
        self._soon(self._post, member, parcel, reply)

    def recall(self, member: ClientId, id: str) -> None:
        """Nobody waits for the reply to this letter any more."""
        self._soon(self._recall, member, id)

    def tell(self, member: ClientId, header: Header) -> None:
        self._soon(lambda: self._line(member).tell(header) if member in self.members else None)

    def close(self, grace: float = 5.0) -> None:
        with contextlib.suppress(Exception):
            network.begin(self._close(grace)).result(grace + 5)

    def attached(self, member: ClientId) -> bool:
        known = self.members.get(member)
        return known is not None and known.since is not None

    # In the network's thread

    def _soon(self, work: Callable[..., Any], *args: Any) -> None:
        network.loop().call_soon_threadsafe(work, *args)

    def _line(self, member: ClientId) -> Line:
        if member not in self._lines:

            def received(parcel: Parcel) -> None:
                if self._awaited.get(member) == parcel.id:
                    del self._awaited[member]
                    self.events.put(Event("parcel", member, parcel))
                else:
                    parcel.discard()

            line = Line(self._folder, self._limit, received, lambda header: header.get("id") == self._awaited.get(member))
            self._lines[member] = line
            self.members[member] = Attached(line, None, time.monotonic())
        return self._lines[member]

    def _post(self, member: ClientId, parcel: Parcel, reply: bool) -> None:
        if reply:
            self._awaited[member] = parcel.id
        self._line(member).send(parcel)

    def _recall(self, member: ClientId, id: str) -> None:
        if self._awaited.get(member) == id:
            del self._awaited[member]
        self._line(member).drop(id)
        self._line(member).refuse(id)

    def _room(self, member: ClientId) -> str:
        """Why this name has to wait; "" if it has not. Names that are nobody any more make room."""
        if member not in self._paces and len(self._paces) >= NAMES:
            for name in [n for n in self._paces if n not in self._calls and n not in self._awaited]:
                del self._paces[name]
                known = self.members.get(name)
                if known and known.since is None and known.line.idle:
                    del self.members[name], self._lines[name]
            if len(self._paces) >= NAMES:
                return "too many names are known here"
        left, counted = self._paces.get(member, (BURST, 0.0))
        now = time.monotonic()
        left = min(BURST, left + PACE * (now - counted)) - 1
        if left < 0:
            return "too many connections in a short time"
        self._paces[member] = left, now
        return "too many connections at once" if self._stuck[member] >= AT_ONCE else ""

    async def _open(self) -> None:
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=4096)
        raw = {"request_deserializer": None, "response_serializer": None}
        handlers = {
            "Attach": grpc.stream_stream_rpc_method_handler(self._attach, **raw),
            "Enrol": grpc.unary_unary_rpc_method_handler(self._enrolled, **raw),
            "Status": grpc.unary_unary_rpc_method_handler(self._told, **raw),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            if self._keys.credentials:
                self.port = self._server.add_secure_port(self._address, self._keys.credentials)
            else:
                self.port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise RunError(f"cannot listen on {self._address}: the port is taken, or it is no address of this machine") from error
        if not self.port:
            raise RunError(f"cannot listen on {self._address}: the port is taken, or it is no address of this machine")
        await self._server.start()

    async def _close(self, grace: float) -> None:
        if self._server:
            await self._server.stop(grace)

    def _peer(self, context: Any, admit: Callable[[bytes], ClientId] | None) -> ClientId:
        """Raises:
        RunError: no certificate that is admitted.
        """
        if admit is None:
            name = dict(context.invocation_metadata() or ()).get(NAME, "")
            if not isinstance(name, str) or not NAMED.fullmatch(name):
                raise RunError("it did not say who it is: a name has 1 to 64 of a-z, A-Z, 0-9 and _ . - @ + or a space")
            return name
        found = context.auth_context().get("x509_pem_cert", [])
        if not found:
            raise RunError("it showed no certificate")
        return admit(found[0])

    async def _attach(self, requests: AsyncIterator[bytes], context: Any) -> None:
        try:
            member = self._peer(context, self._keys.admit)
        except FedtailorError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        if why := self._room(member):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        try:
            frame = await asyncio.wait_for(context.read(), HELLO)
            if frame is grpc.aio.EOF:
                return
            hello = unpack(frame).header
            if hello["is"] != "hello":
                raise LineError("the first frame should say hello")
        except (TimeoutError, LineError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error) or "no hello in time")
        line = self._line(member)
        self._count += 1
        mine = self._count
        if member in self._calls:  # a connection that this side does not know to be dead: the newer one counts
            self._calls[member][1].set()
        displaced = asyncio.Event()
        self._calls[member] = mine, displaced
        fresh = hello.get("session") != self.session
        if fresh:
            line.reset()
        end: tuple[Any, str] | None = None
        try:
            await context.write(pack({"is": "welcome", "session": self.session, "held": line.held()}))
            self.members[member] = Attached(line, time.monotonic(), 0.0)
            self.events.put(Event("attached", member, None, {"fresh": fresh}))

            async def read() -> bytes | None:
                frame = await context.read()
                return None if frame is grpc.aio.EOF else frame

            await line.run(read, context.write, hello.get("held"), displaced)
            if displaced.is_set():
                end = grpc.StatusCode.ABORTED, f"a newer connection of '{member}' counts: was it started twice?"
        except LineError as error:
            end = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except (ConnectionError, OSError) as error:  # it is gone, or there is no room for what it sends
            end = grpc.StatusCode.UNAVAILABLE, str(error)
        finally:
            if self._calls.get(member, (0, None))[0] == mine:
                del self._calls[member]
                self.members[member] = Attached(line, None, time.monotonic())
                self.events.put(Event("detached", member))
        if end:
            try:
                await context.abort(*end)
            except grpc.aio.AbortError:
                raise
            except Exception:
                self._stuck[member] += 1
                raise

    async def _enrolled(self, request: bytes, context: Any) -> bytes:
        found = context.auth_context().get("x509_pem_cert", [])
        if not self._keys.enrol or not found or len(request) > 64 << 10:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "nobody is enrolled here")
        try:
            return self._keys.enrol(found[0], request)  # type: ignore[misc]
        except FedtailorError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise

    async def _told(self, request: bytes, context: Any) -> bytes:
        try:
            self._peer(context, self._keys.look)
        except FedtailorError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return json.dumps(self._status()).encode()
