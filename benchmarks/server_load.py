"""What a federation's server takes: members that do not train, over mutual TLS on the loopback, and FedAvg's real rounds.

python benchmarks/server_load.py many      # 200 members attached, 200 kB a message: seconds a round, memory a member
python benchmarks/server_load.py full      # 6 members, MiniLM whole (90 MB a message): the server's peak memory, seconds a round
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from fedtailor import memory, wire
from fedtailor.algorithms import ALGORITHMS
from fedtailor.core import Job, Message, Site
from fedtailor.engines.answering import Workers
from fedtailor.engines.states import States
from fedtailor.federation import keys
from fedtailor.federation.dial import Credentials, Dial
from fedtailor.federation.doors import server_doors
from fedtailor.federation.frames import EXPERIMENT, LETTER, READY, Parcel
from fedtailor.federation.post import Post
from fedtailor.federation.remote import Remote, Rules
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.losses import classification

LAYERS = 96
CASES = {"many": (200, 50_000), "full": (6, 22_700_000)}  # members, numbers in the tree


def tree(numbers: int) -> dict[str, torch.Tensor]:
    """As many tensors as a model of six layers has."""
    return {f"layer.{i}.weight": torch.zeros(numbers // LAYERS) for i in range(LAYERS)}


def members(address: str, folder: Path, count: int, numbers: int) -> None:
    """Light members in one process: each answers a letter at once, with a reply that is made beforehand: what a member does with a letter it
    does on a machine of its own."""
    answer = wire.encode(Message("update", tree(numbers), {"n": 1.0}))
    note = {"is": LETTER, "flops": 0.0, "examples": 0.0, "own": ""}

    def take_part(name: str) -> None:
        mine = keys.identity(folder / name)
        assert mine
        dial = Dial(
            address, name, Credentials(mine.key, mine.certificate, mine.authority), folder, wire.MAX_BYTES, lambda line: None
        )
        dial.open()
        while isinstance(parcel := dial.inbox.get(), Parcel):
            if parcel.note["is"] == EXPERIMENT:
                dial.send(Parcel(parcel.id, {"is": READY}, b""))
                continue
            parcel.discard()
            dial.send(Parcel(parcel.id, note, answer))

    for i in range(count):
        threading.Thread(target=take_part, args=(f"m{i:03d}",), daemon=True).start()
    threading.Event().wait()


def nowhere(client: str, round: int) -> Site:
    return Site(client, {}, {}, round)


def enrolled(folder: Path, name: str) -> None:
    token = keys.read_token(keys.invite(folder / "keys", name))
    key, request = keys.request(name)
    keys.keep(folder / name, keys.Identity(name, key, keys.enrol(folder / "keys", token.certificate, request), token.authority))


def measure(case: str, rounds: int, here: Path) -> None:
    count, numbers = CASES[case]
    names = [f"m{i:03d}" for i in range(count)]
    keys.init(here / "keys")
    for name in names:
        enrolled(here, name)
    (here / "post").mkdir()
    job = Job(classification, lambda forward, params, batch: {}, lambda outputs: {}, clients=count)
    algorithm = ALGORITHMS["fedavg"](job)
    memory.give_back()  # as serve does
    begun = psutil.Process().memory_info().rss
    post = Post("127.0.0.1:0", here / "post", wire.MAX_BYTES, server_doors(here / "keys"))
    post.open()
    hello = Parcel("experiment", {"is": EXPERIMENT}, b"")
    engine = Remote(
        algorithm, nowhere, nowhere, Workers(lambda dropout: None, 1), States(here / "state"), Ledger(),  # type: ignore[arg-type,return-value]
        post, chain([]), chain([]), 0, Rules(least=count), lambda member: post.send(member, hello), lambda member, note: True,
    )  # fmt: skip
    other = subprocess.Popen([sys.executable, __file__, case, "--members", f"127.0.0.1:{post.port}", str(here)])
    try:
        at = time.monotonic()
        engine.wait(lambda: len(engine.ready) == count)
        attached = psutil.Process().memory_info().rss
        print(f"{count} members attached after {time.monotonic() - at:.1f} s: {(attached - begun) / 1e6 / count:.2f} MB a member")
        state: Any = algorithm.init(tree(numbers))
        size = len(wire.encode(Message("train", tree(numbers))))
        before = psutil.Process().memory_info().rss - 4 * numbers  # without the model that it holds
        memory.forget_peak()
        times = []
        for number in range(1, rounds + 1):
            at = time.perf_counter()
            state = engine.converse(algorithm.round(state, names), number)
            times.append(time.perf_counter() - at)
        took = statistics.median(times[1:])
        print(f"message {size / 1e6:.2f} MB; a round without training: {took:.2f} s (median of {rounds - 1})")
        more = memory.peak() - before
        print(f"peak memory of the server: {more / 1e6:.0f} MB beyond what it had without the model = {more / size:.2f} models")
        copies = copied(count, size)
        print(f"copying the same bytes in memory, there and back: {copies:.2f} s; the round takes {took / copies:.1f} x as long")
    finally:
        other.kill()
        other.wait()
        post.close(0)
        engine.close()


def copied(count: int, size: int) -> float:
    source, at = bytearray(size), time.perf_counter()
    for _ in range(2 * count):
        bytes(source)
    return time.perf_counter() - at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--members", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.members:
        return members(asked.members[0], Path(asked.members[1]), *CASES[asked.case])
    with tempfile.TemporaryDirectory() as folder:
        measure(asked.case, asked.rounds, Path(folder))


if __name__ == "__main__":
    main()
