"""A line between two ports that is cut now and then. One that is slow and far, and loses packets: tunnels.py."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any


class Proxy:
    """Carries bytes from its port to another."""

    def __init__(self, to: int, cuts: tuple[int, ...]) -> None:
        """`cuts`: bytes from members after which all connections are cut, once each."""
        self.port, self.cut, self.carried = 0, 0, 0
        self._to, self._left = to, sorted(cuts)
        self._open: set[Any] = set()
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
        while piece := await source.read(16 << 10):
            sink.write(piece)
            await sink.drain()
            if up:
                self.carried += len(piece)
                if self._left and self.carried >= self._left[0]:
                    self._cut()
                    return
        sink.close()

    def _cut(self) -> None:
        self.cut += 1
        self._left.pop(0)
        for each in self._open:
            each.transport.abort()


def every(step: int, count: int) -> tuple[int, ...]:
    return tuple(step * (i + 1) for i in range(count))
