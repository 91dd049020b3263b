"""The thread in which all lines of this process are spoken over. gRPC's asyncio has one poller for a process: one loop serves it best."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """The loop; it runs as long as the process does."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, name="network", daemon=True).start()
    return made


def begin(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Start this in the network's thread."""
    return asyncio.run_coroutine_threadsafe(work, loop())
