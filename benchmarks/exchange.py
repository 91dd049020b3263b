"""One exchange between two processes on the loopback, there and back, over mutual TLS: median milliseconds, and bytes on the socket.

python benchmarks/exchange.py --repeats 30
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from fedtailor.federation import keys
from fedtailor.federation.dial import Credentials, Dial
from fedtailor.federation.doors import server_doors
from fedtailor.federation.frames import Parcel
from fedtailor.federation.post import Event, Post
from fedtailor.wire import MAX_BYTES

SIZES = {"1 KB": 1 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20, "50 MB": 50 << 20}
ASKED = {"1 KB": 1.0, "1 MB": 6.0, "50 MB": 500.0}


def echo(address: str, home: Path) -> None:
    mine = keys.identity(home)
    assert mine
    dial = Dial(address, mine.name, Credentials(mine.key, mine.certificate, mine.authority), home, MAX_BYTES, lambda line: None)
    dial.open()
    while isinstance(parcel := dial.inbox.get(), Parcel):
        dial.send(Parcel(parcel.id, {}, parcel.content))


def loopback() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--echo", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.echo:
        return echo(asked.echo[0], Path(asked.echo[1]))
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        keys.init(here / "keys")
        token = keys.read_token(keys.invite(here / "keys", "north"))
        key, request = keys.request("north")
        signed = keys.enrol(here / "keys", token.certificate, request)
        keys.keep(here / "north", keys.Identity("north", key, signed, token.authority))
        (here / "post").mkdir()
        post = Post("127.0.0.1:0", here / "post", MAX_BYTES, server_doors(here / "keys"))
        post.open()
        other = subprocess.Popen([sys.executable, __file__, "--echo", f"127.0.0.1:{post.port}", str(here / "north")])
        try:
            assert post.events.get(timeout=60).kind == "attached"
            print("| message | there and back, ms (median) | asked | on the socket beyond the message |")
            print("|---|---|---|---|")
            for name, size in SIZES.items():
                measure(post, name, size, asked.repeats if size < 8 << 20 else max(5, asked.repeats // 3))
        finally:
            other.kill()
            post.close(0)


def measure(post: Post, name: str, size: int, repeats: int) -> None:
    content, times = os.urandom(size), []
    before = 0
    for turn in range(repeats + 2):
        if turn == 2:
            before = loopback()
        begun = time.perf_counter()
        post.send("north", Parcel(f"{name}-{turn}", {}, content))
        event = arrived(post.events)
        times.append(time.perf_counter() - begun)
        assert event.parcel
        if isinstance(event.parcel.content, Path):
            event.parcel.content.unlink()
    beyond = (loopback() - before) / repeats / (2 * size) - 1
    limit = f"{ASKED[name]:g}" if name in ASKED else ""
    print(f"| {name} | {1e3 * statistics.median(times[2:]):.1f} | {limit} | {100 * beyond:.1f} % |", flush=True)


def arrived(events: queue.SimpleQueue[Event]) -> Event:
    while True:
        event = events.get(timeout=60)
        if event.kind == "parcel":
            return event


if __name__ == "__main__":
    main()
