"""Seconds a round of one experiment on the local engine and on Ray's actors, taking turns; each run is a process of its own.

    python benchmarks/ray_engine.py [--repeats 3] [--rounds 4] [--actors 2] [--clients 16]

The embedded model and data, LoRA (r = 8), 4 steps x batch 8 a client and round, stacked. Start-up is the wall time of the whole process
without its rounds; the first round of a run is left out of the medians. With Ray, actors start when the first letters are sent, so that
start-up lies in the first round: it is told apart as the first round's seconds beyond the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args()
    sides = {"local": "{}", f"ray, {args.actors} actors": json.dumps({"kind": "ray", "actors": args.actors})}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, engine in sides.items():
            found[name].append(one(engine, args))
    print("| engine | a round, s (medians of runs, lowest to highest) | start-up, s | whole run, s |\n|---|---|---|---|")
    for name, runs in found.items():
        rounds = sorted(run["round"] for run in runs)
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"| {name} | {middle['round']:.2f} ({rounds[0]:.2f} to {rounds[-1]:.2f}) | {middle['start']:.1f} | {middle['all']:.1f} |"
        )


def one(engine: str, args: argparse.Namespace) -> dict[str, float]:
    """A run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "rounds": args.rounds,
            "data.limit": 60 * args.clients,
            "data.test_limit": 100,
            "clients.count": args.clients,
            "train.steps": 4,
            "train.batch": 8,
            "evaluate.every": 0,
        }
        sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        sets += ["--set", "technique.kind=lora", "--set", "technique.rank=8"]
        sets += [word for key, value in json.loads(engine).items() for word in ("--set", f"engine.{key}={value}")]
        begun = time.perf_counter()
        command = [sys.executable, "-m", "fedtailor.cli", "run", "--out", f"{folder}/run", *sets]
        subprocess.run(command, check=True, capture_output=True, text=True)
        wall = time.perf_counter() - begun
        lines = (Path(folder) / "run" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    usual = statistics.median(seconds[1:])
    return {"round": usual, "start": wall - sum(seconds) + seconds[0] - usual, "all": wall}


if __name__ == "__main__":
    main()
