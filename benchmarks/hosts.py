"""A federation on two hosts with a bad line between them: 100 ms one way, 20 Mbit/s, 1 % of packets lost, against the virtual clock.

The hosts are network namespaces, and the packets go through a line in user space (tests/tunnels.py): TCP itself meets delay, rate and
loss. `fedtailor serve` is at one end and `fedtailor join` at the other, over mutual TLS. The forecast is the virtual clock's for a device
with the line's numbers; its `gflops` are what the same rounds need over the loopback. Needs root.

python benchmarks/hosts.py tcp                          # what plain TCP gets through, by congestion control
python benchmarks/hosts.py full                         # MiniLM whole; in the second upload the line is cut for 30 s
python benchmarks/hosts.py lora [--control cubic]       # small messages
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deployed import COMMAND, Deployed, experiment

from fedtailor.config import parse
from fedtailor.run import run

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tunnels import Bad, Tunnel

LATENCY, MBITS, LOSS, DEAD = 0.1, 20, 0.01, 30.0
BAD = Bad(
    LATENCY, MBITS * 1e6 / 8, queue=int(2 * LATENCY * MBITS * 1e6 / 8), loss=LOSS
)  # waits: what is under way there and back
UPLOAD = 136_000_000  # bytes from the member, with acknowledgements: the middle of the second message of 90.8 MB
CONTROLS = ("reno", "cubic", "bbr")


class Apart(Deployed):
    """The server in the first namespace, the member in the second."""

    def __init__(self, values: dict[str, Any], folder: Path, tunnel: Tunnel) -> None:
        super().__init__(values, folder)
        self.host, self.tunnel = tunnel.hosts[0].address, tunnel

    def start(self, name: str, *words: str) -> None:
        host = self.tunnel.hosts[0 if name == "server" else 1]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = host.do(subprocess.Popen, [*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=log).result()

    def watched(self) -> list[str]:
        """Wait until the server ends; what the line was used for in each round, and what happened around the cut."""
        told, tunnel, first, busy = [], self.tunnel, {"server": 0.0, "member": 0.0, "back": 0.0}, [0.0]
        at, carried = time.monotonic(), [0, 0]
        while self.running["server"].poll() is None:
            time.sleep(0.1)
            server, member, now = self.said(), self.said(self.names[0]), time.monotonic()
            rates = [(way.bytes - before) / (now - at) for way, before in zip(tunnel.ways, carried, strict=True)]
            busy += [0.0] * (server.count("\nround ") + 1 - len(busy))
            busy[-1] += (now - at) * (max(rates) > MBITS * 1e6 / 8 / 2)
            at, carried = now, [way.bytes for way in tunnel.ways]
            back = "cut off from the server" in member and member.count("attached to") > 1
            seen = {"server": "is cut off" in server, "member": "cut off from the server" in member, "back": back}
            if tunnel.dead_since:
                first = {name: was or (now - tunnel.dead_since) * seen[name] for name, was in first.items()}
        told.append(
            f"seconds with more than half the rate on the line, by round and at the end: {', '.join(f'{b:.1f}' for b in busy)}"
        )
        if tunnel.dead_since:
            told.append(f"cut for {DEAD:g} s: the server says so after {first['server']:.1f} s, the member after ")
            told[-1] += f"{first['member']:.1f} s, attached again {first['back'] - DEAD:.1f} s after the line is back"
        return told


@contextlib.contextmanager
def ended(deployed: Deployed) -> Any:
    try:
        yield deployed
    finally:
        for process in deployed.running.values():
            process.kill()


def served(deployed: Deployed) -> tuple[dict[str, Any], list[dict[str, float]], list[str]]:
    with ended(deployed):
        deployed.begin()
        told = deployed.watched() if isinstance(deployed, Apart) else []
        summary = deployed.end()
    return summary, [entry["clients"]["client-0"] for entry in deployed.rounds()], told


def compare(here: Path, technique: dict[str, Any], rounds: int, bad: Bad, control: str) -> None:
    values = experiment(1, rounds, train={"steps": 2, "lr": 1e-4}, evaluate={"every": 0}, clients={"grace": 120.0})
    values["technique"] = technique
    _, near, _ = served(Deployed(values, here / "loopback"))
    work = statistics.median(entry["simulated_seconds"] for entry in near)
    gflops = near[0]["flops"] / work / 1e9
    device = {
        "name": "far",
        "gflops": gflops,
        "uplink_mbps": MBITS,
        "downlink_mbps": MBITS,
        "latency_ms": 1e3 * LATENCY,
        "packet_loss": bad.loss,
    }
    forecast = run(parse({**values, "clients": {"count": 1, "devices": [device]}}), here / "simulated")
    told = forecast["simulated_seconds"] / rounds
    size = near[0]["bytes_up"] / 1e6
    print(f"a message: {size:.2f} MB; a round over the loopback: {work:.2f} s, which is {gflops:.2f} GFLOP/s")
    print(f"the virtual clock: {told:.2f} s a round", flush=True)
    with Tunnel(bad, control) as tunnel:
        summary, far, lines = served(Apart(values, here / "apart", tunnel))
        ways = tunnel.ways
    took = [entry["simulated_seconds"] for entry in far]
    cut = ways[1].bytes > bad.cut > 0
    print(f"{control}: {', '.join(f'{t:.2f}' for t in took)} s", end="; ")
    print(f"of the virtual clock's: {', '.join(f'{t / told:.3f}' for t in took)}", end="; ")
    if cut:
        print(f"the second without the {DEAD:g} s: {(took[1] - DEAD) / told:.3f}", end="; ")
    print(f"same state: {summary['state_hash'] == forecast['state_hash']}")
    lost = sum(w.lost for w in ways) / sum(w.packets for w in ways)
    print(f"packets: {sum(w.packets for w in ways)}, lost by chance {lost:.2%}, at a full queue {sum(w.full for w in ways)}")
    print(*lines, sep="\n")


def tcp(seconds: float = 30.0) -> None:
    law = 1448 * 8 / (2 * LATENCY) * (1.5 / LOSS) ** 0.5 / 1e6
    print(f"Mathis et al. (1997) for Reno: {law:.2f} Mbit/s")
    for control in CONTROLS:
        with Tunnel(BAD, control) as tunnel:
            here, there = tunnel.hosts
            listening = here.do(socket.create_server, (here.address, 0)).result()
            dialled = there.do(socket.create_connection, listening.getsockname(), 10)
            with listening, listening.accept()[0] as sink, dialled.result() as source:
                end, piece, got = time.monotonic() + seconds, bytes(1 << 16), 0

                def push(end: float = end, source: socket.socket = source, piece: bytes = piece) -> None:
                    with contextlib.suppress(TimeoutError, OSError):
                        while time.monotonic() < end:
                            source.send(piece)

                pushing = there.do(push)
                sink.settimeout(1.0)
                while time.monotonic() < end:
                    with contextlib.suppress(TimeoutError):
                        got += len(sink.recv(1 << 20))
                source.shutdown(socket.SHUT_RDWR)
                pushing.result()
        print(f"{control}: {8e-6 * got / seconds:.2f} Mbit/s in {seconds:g} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tcp", "full", "lora"])
    parser.add_argument("--control", choices=CONTROLS, default="bbr", help="TCP's congestion control at both hosts")
    parser.add_argument("--whole", action="store_true", help="no packet is lost, and the line is not cut")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left running
    if asked.what == "tcp":
        tcp()
        return
    bad = BAD._replace(loss=0.0) if asked.whole else BAD
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "hosts"
        here.mkdir()
        if asked.what == "full":
            bad = bad if asked.whole else bad._replace(cut=UPLOAD, dead=DEAD)
            compare(here, {"kind": "full"}, 3, bad, asked.control)
        else:
            compare(here, {"kind": "lora", "rank": 8}, 8, bad, asked.control)


if __name__ == "__main__":
    main()
