"""Two hosts and the line between them, on one machine: network namespaces, and IP packets that wait, come late and get lost on their
way, so that TCP itself feels how bad the line is. Needs root and /dev/net/tun, and no queueing discipline of the kernel's."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000
ADDRESSES = "10.99.0.1", "10.99.0.2"
PACKET = 1500  # bytes, with the headers of IP and TCP


class Bad(NamedTuple):
    """How bad the line is, each way. Zero: not at all."""

    latency: float = 0.0  # seconds, one way
    rate: float = 0.0  # bytes of packets a second
    queue: int = 500_000  # bytes that may wait for the rate; packets that find it full are lost
    loss: float = 0.0  # of packets: each alone, from a stream of its own each way; they have taken their time on the line
    cut: int = 0  # bytes from the second host after which nothing passes, once
    dead: float = 0.0  # seconds for which it does not


class Way:
    """Packets on their way from one host to the other."""

    def __init__(self, bad: Bad, seed: int) -> None:
        self.packets = self.bytes = self.lost = self.full = 0  # that were sent; and of them lost by chance, or at the full queue
        self._bad, self._draw = bad, random.Random(seed)
        self._free = 0.0  # when the line has sent what waits
        self._under_way: deque[tuple[float, bytes]] = deque()

    def send(self, packet: bytes, now: float, dead: bool) -> None:
        size, bad = len(packet), self._bad
        self.packets += 1
        self.bytes += size
        lost = self._draw.random() < bad.loss
        if dead:
            return
        begins = max(now, self._free)
        if bad.rate:
            if (begins - now) * bad.rate + size > bad.queue:
                self.full += 1
                return
            self._free = begins + size / bad.rate
        self.lost += lost
        if not lost:
            self._under_way.append((max(now, self._free) + bad.latency, packet))

    def due(self, now: float) -> list[bytes]:
        found = []
        while self._under_way and self._under_way[0][0] <= now:
            found.append(self._under_way.popleft()[1])
        return found

    @property
    def next(self) -> float:
        return self._under_way[0][0] if self._under_way else float("inf")


class Host:
    """A network namespace, which lives as long as its thread and what was started in it."""

    def __init__(self, number: int, control: str) -> None:
        self.address, self._other = ADDRESSES[number], ADDRESSES[1 - number]
        self._thread = ThreadPoolExecutor(1)
        try:
            self.device: int = self.do(self._made, control).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def do(self, work: Callable[..., T], *args: Any, **options: Any) -> Future[T]:
        """Do this in the namespace: what it opens and starts stays there."""
        return self._thread.submit(work, *args, **options)

    def close(self) -> None:
        os.close(self.device)
        self._thread.shutdown()

    def _made(self, control: str) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"no network namespace: {os.strerror(number)}")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"line", IFF_TUN | IFF_NO_PI))
        for words in (
            "ip link set lo up",
            f"ip address add {self.address} dev line",
            f"ip link set line mtu {PACKET} up",
            f"ip route add {self._other} dev line congctl {control}",  # a sysctl would need the machine's leave for some
        ):
            subprocess.run(words.split(), check=True, capture_output=True)
        return device


class Tunnel:
    """The hosts and the line, which a thread carries."""

    def __init__(self, bad: Bad, control: str = "cubic", seed: int = 0) -> None:
        """`control`: TCP's congestion control at both hosts.

        Raises:
            OSError, CalledProcessError: there can be no namespaces or devices here.
        """
        self.dead_since = 0.0  # monotonic, when the line was cut
        self.ways = Way(bad, 2 * seed), Way(bad, 2 * seed + 1)  # from the first host, from the second
        self._bad, self._over = bad, False
        self.hosts: list[Host] = []
        try:
            for number in range(2):
                self.hosts.append(Host(number, control))
        except BaseException:
            self._close()
            raise
        self._thread = ThreadPoolExecutor(1)
        self._carrying = self._thread.submit(self._carry)

    def __enter__(self) -> Tunnel:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._carrying.result()
        self._thread.shutdown()
        self._close()

    def _close(self) -> None:
        for host in self.hosts:
            host.close()

    def _carry(self) -> None:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)  # of this thread: the line is not slow because the machine is busy
        ends = [host.device for host in self.hosts]
        while not self._over:
            wait = min(way.next for way in self.ways) - time.monotonic()
            ready, _, _ = select.select(ends, [], [], min(max(wait, 0.0), 0.1))
            for end in ready:
                self._take(ends.index(end))
            now = time.monotonic()
            for way, end in zip(self.ways, reversed(ends), strict=True):
                for packet in way.due(now):
                    with contextlib.suppress(BlockingIOError):
                        os.write(end, packet)

    def _take(self, number: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(self.hosts[number].device, 2 * PACKET)
            except BlockingIOError:
                return
            if packet[0] >> 4 != 4:  # of IPv6, which looks for neighbours that there are none of
                continue
            now, cut = time.monotonic(), self._bad.cut
            if cut and number == 1 and not self.dead_since and self.ways[1].bytes >= cut:
                self.dead_since = now
            self.ways[number].send(packet, now, bool(self.dead_since) and now < self.dead_since + self._bad.dead)
