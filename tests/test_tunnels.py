"""The line between two namespaces: packets come late, in order, as fast as it says, and exactly those are lost that its seed draws."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Callable

import pytest

from tunnels import Bad, Tunnel

HEADERS = 28  # bytes of IP and UDP


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    try:
        with Tunnel(Bad()):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no namespaces and TUN devices here (they need root and /dev/net/tun): {error}")


def arrived(tunnel: Tunnel, send: Callable[[Callable[[int], None]], None], size: int = 100) -> list[tuple[int, float]]:
    """Numbered packets from the second host to the first: (number, seconds on the way), in the order in which they came."""
    here, there = (host.do(socket.socket, socket.AF_INET, socket.SOCK_DGRAM).result() for host in tunnel.hosts)
    with here, there:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        here.bind((tunnel.hosts[0].address, 9))
        here.settimeout(0.6)
        sent: list[float] = []

        def one(number: int) -> None:
            sent.append(time.monotonic())
            there.sendto(number.to_bytes(4, "big").ljust(size - HEADERS, b"\0"), (tunnel.hosts[0].address, 9))

        send(one)
        found = []
        try:
            while True:
                number = int.from_bytes(here.recv(2000)[:4], "big")
                found.append((number, time.monotonic() - sent[number]))
        except TimeoutError:
            return found


def burst(count: int) -> Callable[[Callable[[int], None]], None]:
    def send(one: Callable[[int], None]) -> None:
        for number in range(count):
            one(number)
            if number % 50 == 49:
                time.sleep(0.002)  # a device takes 500 packets at once

    return send


def test_packets_come_late_and_in_order_and_those_of_the_seed_are_lost() -> None:
    with Tunnel(Bad(latency=0.15, loss=0.1), seed=3) as tunnel:
        found = arrived(tunnel, burst(400))
    draw = random.Random(7)
    assert [number for number, _ in found] == [number for number in range(400) if draw.random() >= 0.1]
    assert min(seconds for _, seconds in found) >= 0.15
    assert tunnel.ways[1].lost == 400 - len(found)


def test_what_the_rate_does_not_let_through_waits_and_what_finds_the_queue_full_is_lost() -> None:
    with Tunnel(Bad(rate=50_000, queue=20_000)) as tunnel:
        begun = time.monotonic()
        found = arrived(tunnel, burst(60), size=500)
        took = time.monotonic() - begun - 0.6
    # 20 kB wait and more pass while the burst comes; a packet leaves every 10 ms.
    assert 40 <= len(found) < 60
    assert [number for number, _ in found[:40]] == list(range(40))
    assert took >= len(found) * 0.01
    assert tunnel.ways[1].full == 60 - len(found)


def test_nothing_passes_while_the_line_is_cut() -> None:
    def send(one: Callable[[int], None]) -> None:
        for number in range(30):
            one(number)
            time.sleep(0.02)

    with Tunnel(Bad(cut=1000, dead=0.3)) as tunnel:
        numbers = [number for number, _ in arrived(tunnel, send)]
    assert numbers[:10] == list(range(10))  # 1000 bytes
    gone = set(range(30)) - set(numbers)
    assert 8 <= len(gone) <= 16
    assert gone == set(range(10, 10 + len(gone)))


def test_tcp_goes_through_a_line_that_loses() -> None:
    content = random.Random(0).randbytes(300_000)
    with Tunnel(Bad(latency=0.01, rate=2e6, loss=0.02), "reno") as tunnel:
        listening = tunnel.hosts[0].do(socket.create_server, (tunnel.hosts[0].address, 0)).result()
        dialled = tunnel.hosts[1].do(socket.create_connection, listening.getsockname(), 10)
        with listening, listening.accept()[0] as here, dialled.result() as there:
            assert there.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
            sending = tunnel.hosts[1].do(there.sendall, content)
            got = b""
            while len(got) < len(content):
                got += here.recv(1 << 16)
            sending.result()
    assert got == content
    assert tunnel.ways[1].lost > 0
