"""A federation in processes of its own, over mutual TLS on the loopback, with MiniLM: what is killed, what it takes.

python benchmarks/deployed.py kill-members        # kill -9 at 20 random moments, started again 2 s later
python benchmarks/deployed.py kill-server         # kill -9 at 20 random moments, serve --resume
python benchmarks/deployed.py step                # a step of FlexP-SFL, against the same step in one process
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedtailor.config import parse
from fedtailor.engines.states import States
from fedtailor.federation import keys
from fedtailor.run import run

COMMAND = [sys.executable, "-m", "fedtailor.cli"]


def experiment(members: int, rounds: int, **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "deployed",
        "rounds": rounds,
        "data": {"name": "pydocs", "limit": 60 * members, "test_limit": 100, "max_length": 32},
        "clients": {"count": members},
        "technique": {"kind": "lora", "rank": 8},
        "train": {"batch": 8, "lr": 3e-3},
        "engine": {"stacked": False, "ordered": True},
    }
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value}
    return values


class Deployed:
    """A server and its members, each a process; clients take their parts of one data set."""

    def __init__(self, values: Mapping[str, Any], folder: Path) -> None:
        self.folder, self.values = folder, dict(values)
        folder.mkdir(parents=True)
        (folder / "e.toml").write_text(tomli_w.dumps(self.values), encoding="utf-8")
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.host = "127.0.0.1"
        keys.init(folder / "keys")
        count = int(self.values["clients"]["count"])
        self.names = [f"client-{i:0{len(str(count - 1))}d}" for i in range(count)]
        self.tokens = {name: keys.invite(folder / "keys", name) for name in self.names}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=log)

    def serve(self, *more: str) -> None:
        at = ("--at", f"{self.host}:{self.port}", "--keys", str(self.folder / "keys"))
        self.start("server", "serve", str(self.folder / "e.toml"), *at, "--out", str(self.folder / "run"), *more)

    def join(self, name: str) -> None:
        home = self.folder / name
        enrolled = () if (home / "identity.pem").exists() else ("--token", self.tokens[name])
        self.start(name, "join", f"{self.host}:{self.port}", "--simulate", "--home", str(home), *enrolled)

    def begin(self) -> None:
        self.serve()
        self.until("listening on")
        for name in self.names:
            self.join(name)

    def said(self, name: str = "server") -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")

    def until(self, pattern: str, seconds: float = 600, begin: int = 0) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, self.said()[begin:]):
                return found
            if self.running["server"].poll() is not None:
                break
            time.sleep(0.01)
        raise SystemExit(f"no '{pattern}': {self.said()[-2000:]}")

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def end(self) -> dict[str, Any]:
        code = self.running["server"].wait()
        for name in self.names:
            try:
                self.running[name].wait(60)
            except subprocess.TimeoutExpired:
                self.running[name].kill()
        if code:
            raise SystemExit(f"the server ended with {code}: {self.said()[-2000:]}")
        summary: dict[str, Any] = json.loads((self.folder / "run" / "summary.json").read_text(encoding="utf-8"))
        return summary

    def rounds(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "run" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]


def kill_members(here: Path, count: int) -> None:
    values = experiment(
        3,
        rounds=4000,
        algorithm={"kind": "scaffold"},
        train={"optimizer": "sgd", "epochs": 2.0},
        evaluate={"every": 0},
        clients={"grace": 300.0},  # no letter is lost, so that the state can be compared, however slowly processes start here
    )
    deployed, draw, noticed, away, next_ = Deployed(values, here), random.Random(0), [], [], 0
    deployed.begin()
    deployed.until("round 1/")
    for _ in range(count):
        time.sleep(draw.uniform(1, 6))
        name, begin, at = draw.choice(deployed.names), len(deployed.said()), time.monotonic()
        deployed.kill(name)
        deployed.until(f"{name} is cut off", 30, begin)
        noticed.append(time.monotonic() - at)
        time.sleep(2)
        begin = len(deployed.said())
        deployed.join(name)
        deployed.until(f"{name} is attached", 300, begin)
        away.append(time.monotonic() - at)
        begin = len(deployed.said())
        over = int(deployed.until(r"round (\d+)/\d+,", 300, begin)[1])
        next_ += "replies" in deployed.rounds()[over - 1]["clients"][name]
        assert all(p.poll() is None for p in deployed.running.values()), "another one stopped"
    for name in ["server", *deployed.names]:
        deployed.kill(name)
    states = States(here / "run" / "state")
    found = states.resume()
    assert found
    rounds, state = found[:2]
    whole = sum(line["replies"] == 3 for line in deployed.rounds()[:rounds])
    alone = run(parse({**values, "rounds": rounds}), here / "simulated")
    same = states.hash(state) == alone["state_hash"]
    print(f"kills: {count}; noticed after {statistics.median(noticed):.3f} s (median), {max(noticed):.3f} s (most)")
    print(f"attached again {statistics.median(away):.1f} s after the kill (median), {max(away):.1f} s (most), 2 s of them dead")
    print(f"replied in the next round that ended: {next_} of {count}; rounds meanwhile: {rounds}, with every reply: {whole}")
    print(f"the others never stopped; state as simulated: {same}")


def kill_server(here: Path, count: int) -> None:
    values = experiment(2, rounds=60, algorithm={"kind": "scaffold"}, train={"optimizer": "sgd", "epochs": 4.0})
    deployed, draw, killed = Deployed(values, here), random.Random(1), 0
    deployed.begin()
    deployed.until("round 1/")
    while killed < count:
        time.sleep(draw.uniform(0.1, 4))
        if deployed.running["server"].poll() is not None:
            break
        deployed.kill("server")
        killed += 1
        begin = len(deployed.said())
        deployed.serve("--resume")
        deployed.until("round [0-9]+/", 600, begin)
    summary = deployed.end()
    alone = run(parse(values), here / "simulated")
    same = summary["state_hash"] == alone["state_hash"]
    print(f"kills of the server: {killed}; members attached again by themselves each time; final state as uninterrupted: {same}")


def step(here: Path) -> None:
    sections: dict[str, Any] = {
        "algorithm": {"kind": "flexp", "front": 1, "back": 1},
        "evaluate": {"every": 0},
        "train": {"batch": 16},
    }
    values = experiment(1, rounds=6, **sections)
    values["data"] |= {"limit": 400, "max_length": 64}
    run(parse(values), here / "simulated")
    alone = [json.loads(line) for line in (here / "simulated" / "rounds.jsonl").read_text().splitlines()]
    deployed = Deployed(values, here / "deployed")
    deployed.begin()
    deployed.end()
    steps = alone[-1]["replies"] / 2
    one, two = (1e3 * statistics.median(line["seconds"] for line in lines[1:-1]) / steps for lines in (alone, deployed.rounds()))
    print(f"a step in one process: {one:.1f} ms; over the loopback, two processes: {two:.1f} ms; ratio {two / one:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill-members", "kill-server", "step"])
    parser.add_argument("--count", type=int, default=20)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "deployed"
        if asked.what == "kill-members":
            kill_members(here, asked.count)
        elif asked.what == "kill-server":
            kill_server(here, asked.count)
        else:
            step(here)


if __name__ == "__main__":
    main()
