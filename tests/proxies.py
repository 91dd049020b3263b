"""A line between two ports that is slow, far, and cut now and then: what a network does to a connection, without a network."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from typing import Any, NamedTuple


class Bad(NamedTuple):
    """How bad a line is. Zero: not at all."""

    latency: float = 0.0  # seconds, one way
    rate: float = 0.0  # bytes a second, each way and connection
    cuts: tuple[int, ...] = ()  # bytes from members after which all connections are cut: once each
    dead: float = 0.0  # seconds after a cut in which nobody gets through
    loss: float = 0.0  # of segments: each comes a round trip later, and what was sent after it waits; no sender slows down for it


SEGMENT = 1448  # bytes
LATE = 0.2  # seconds by which a busy machine may wake this up too late: the line is as fast as it says all the same


class Proxy:
    """Carries bytes from its port to another."""

    def __init__(self, to: int, bad: Bad) -> None:
        self.port, self.cut, self.carried = 0, 0, 0
        self._to, self._bad = to, bad
        self._left = sorted(bad.cuts)
        self._open: set[Any] = set()
        self._dead_until = 0.0
        self._draw = random.Random(0)
        self._loop = asyncio.new_event_loop()
        self._server: Any = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for each in self._open:
            each.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self) -> None:
        self._server = server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._loop.time() < self._dead_until:
            writer.close()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        both = (writer, back)
        self._open |= {*both}
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await asyncio.gather(self._carry(reader, back, True), self._carry(there, writer, False))
        finally:
            for each in both:
                each.close()
            self._open -= {*both}

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, up: bool) -> None:
        """Bytes leave as fast as the rate lets them, and arrive after the latency, in order."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, piece = await waiting.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                if not piece:
                    sink.close()
                    return
                sink.write(piece)
                await sink.drain()

        delivering = asyncio.create_task(deliver())
        free = self._loop.time()
        try:
            while True:
                piece = await source.read(16 << 10)
                now = self._loop.time()
                lost = self._lost(len(piece))
                if self._bad.rate:
                    free = max(free, now - LATE) + (len(piece) + SEGMENT * lost) / self._bad.rate
                    await asyncio.sleep(max(0.0, free - now))
                await waiting.put((self._loop.time() + self._bad.latency * (3 if lost else 1), piece))
                if up:
                    self.carried += len(piece)
                    if self._left and self.carried >= self._left[0]:
                        self._cut()
                        return
                if not piece:
                    return
        finally:
            if sink.is_closing():
                delivering.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await delivering

    def _lost(self, size: int) -> int:
        """Segments of a piece that do not arrive at first."""
        return sum(self._draw.random() < self._bad.loss for _ in range(0, size, SEGMENT)) if self._bad.loss else 0

    def _cut(self) -> None:
        self.cut += 1
        self._left.pop(0)
        self._dead_until = self._loop.time() + self._bad.dead
        for each in self._open:
            each.transport.abort()


def every(step: int, count: int) -> tuple[int, ...]:
    return tuple(step * (i + 1) for i in range(count))
