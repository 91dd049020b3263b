"""A member's end of its line: it dials out, stays attached, and dials again, without end, when it is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc

from fedtailor.errors import RunError
from fedtailor.federation import network
from fedtailor.federation.frames import Header, LineError, Parcel, pack, said, unpack
from fedtailor.federation.line import Line, unknown
from fedtailor.federation.post import NAME, OPTIONS, SERVICE

SERVER_NAME = "fedtailor-server"
"""What the server's certificate is made out to: members know it by its authority, whatever address it has."""
FIRST, LONGEST = 0.5, 30.0
"""Seconds between two attempts: doubled each time, up to."""
WAITING = 4
"""Parcels that may wait to be worked on; while so many do, nothing more is read, so that a server cannot fill this disk."""
FINAL = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ABORTED,  # two that take each other's place would do so for ever
)
"""What another attempt would not change."""

REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION)


class Credentials:
    """PEM bytes of who one is and of the authority that one trusts; none where `--insecure` was typed."""

    def __init__(self, key: bytes, certificate: bytes, authority: bytes) -> None:
        self.channel = grpc.ssl_channel_credentials(authority, key, certificate)


def channel(address: str, credentials: Credentials | None) -> Any:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    options = [*OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME)]
    return grpc.aio.secure_channel(address, credentials.channel, options=options)


def ask(
    address: str, credentials: Credentials | None, method: str, request: bytes, name: str = "", seconds: float = 10.0
) -> bytes:
    """One question and its answer.

    Raises:
        RunError: nobody answers there, or the answer is no.
    """

    async def asked() -> bytes:
        async with channel(address, credentials) as open_:
            call = open_.unary_unary(f"/{SERVICE}/{method}")
            answer: bytes = await call(request, timeout=seconds, metadata=((NAME, name),) if name else None)
            return answer

    try:
        return network.begin(asked()).result()
    except grpc.aio.AioRpcError as error:
        raise RunError(explained(address, error)) from error


def explained(address: str, error: grpc.aio.AioRpcError) -> str:
    """Why there is no connection, in one line."""
    told = said(error.details() or "")
    low = told.lower()
    if error.code() in REFUSED:
        return f"the server at {address} refuses: {told}"
    if any(word in low for word in ("certificate", "handshake", "ssl", "tls")):
        return (
            f"no secure connection with {address}: one side does not know the other's authority, or a certificate or a clock is "
            f"out of date ({told[:200]})"
        )
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return f"what answers at {address} is no fedtailor server"
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"nobody answers at {address}: is the address right, and does a firewall let it through?"
    return f"cannot reach {address}: is the server started, and the address right? ({told[:160]})"


class Dial:
    """The line to the server, in a thread of its own; what comes is put into `inbox`: parcels, and RunErrors that end it."""

    def __init__(
        self, address: str, name: str, credentials: Credentials | None, folder: Path, limit: int, notice: Callable[[str], None]
    ) -> None:
        self.inbox: queue.SimpleQueue[Parcel | RunError] = queue.SimpleQueue()
        self.attached = False
        self._address, self._name, self._credentials, self._notice = address, name, credentials, notice
        self._session = ""
        self._line = Line(folder, limit, self.inbox.put, told=self._told)
        self._bye = ""
        self._staying: Future[None] | None = None
        self._ended = threading.Event()

    def open(self) -> None:
        self._staying = network.begin(self._run())

    def send(self, parcel: Parcel) -> None:
        network.loop().call_soon_threadsafe(self._line.send, parcel)

    def drain(self, seconds: float) -> None:
        """Wait until the other side has everything, but not for longer."""
        until = time.monotonic() + seconds
        time.sleep(0.05)  # what was just handed over is taken by the line's own thread
        while not self._line.idle and self._staying and not self._staying.done() and time.monotonic() < until:
            time.sleep(0.02)

    def close(self, patience: float = 2.0) -> None:
        """Hang up."""
        if self._staying and self._staying.cancel():
            self._ended.wait(patience)

    def _told(self, header: Header) -> None:
        if header["is"] != "bye":
            unknown(header)
        self._bye = said(header.get("why", "it gave no reason"), 500)
        raise LineError(self._bye)  # ends the connection

    async def _run(self) -> None:
        try:
            await self._stay()
        finally:
            self._ended.set()

    async def _stay(self) -> None:
        pause, last = FIRST, ""
        while True:
            try:
                await self._once()
                why = "the server hung up"
            except grpc.aio.AioRpcError as error:
                why = explained(self._address, error)
                if error.code() in FINAL and not self._bye:
                    self._bye = why
            except (ConnectionError, OSError, asyncio.InvalidStateError) as error:
                why = f"cut off from the server: dialling again ({said(error, 160)})"
            except LineError as error:
                self._bye = self._bye or f"the server at {self._address} does not keep to the protocol: {error}"
            if self._bye:
                self.inbox.put(RunError(self._bye))
                return
            if self.attached:
                pause, last, self.attached = FIRST, "", False
                why = "cut off from the server: dialling again"
            if why != last:
                self._notice(f"{why}; trying again, Ctrl-C ends" if "dialling" not in why else why)
                last = why
            await asyncio.sleep(pause * random.uniform(0.7, 1.3))
            pause = min(2 * pause, LONGEST)

    async def _once(self) -> None:
        async with channel(self._address, self._credentials) as open_:
            call = open_.stream_stream(f"/{SERVICE}/Attach")(metadata=((NAME, self._name),))

            async def read() -> bytes | None:
                while self.inbox.qsize() >= WAITING:
                    await asyncio.sleep(0.05)
                frame = await call.read()
                return None if frame is grpc.aio.EOF else frame

            await call.write(pack({"is": "hello", "session": self._session, "held": self._line.held()}))
            first = await read()
            if first is None:
                await call  # raises why
                return
            welcome = unpack(first).header
            if welcome["is"] != "welcome":
                raise LineError("it does not say welcome")
            if welcome.get("session") != self._session:
                self._line.reset()
                self._session = said(welcome.get("session"), 64)
            if not self.attached:
                self._notice(f"attached to {self._address} as {self._name}")
            self.attached = True
            await self._line.run(read, call.write, welcome.get("held"))
            if not self._bye:
                with contextlib.suppress(asyncio.CancelledError):
                    await call.code()
