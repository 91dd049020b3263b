"""kill -9 at random moments of a run, then --resume: the state hash must be that of the uninterrupted run, every time.

    python benchmarks/kills.py [--kills 20] [--seed 0]

One run is killed again and again at random moments until it is through, and the count of kills that really hit a running process is
printed with the hashes. fedavg + lora with int8 and error feedback up, 6 clients on the embedded data.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXPERIMENT = """
name = "kills"
rounds = 30
[data]
name = "pydocs"
limit = 120
test_limit = 30
max_length = 16
[clients]
count = 6
per_round = 4
[technique]
kind = "lora"
[train]
batch = 8
lr = 1e-3
[filters]
up = ["int8"]
[evaluate]
every = 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "kills.toml").write_text(EXPERIMENT, encoding="utf-8")

        def command(out: str) -> list[str]:
            return [
                sys.executable,
                "-m",
                "fedtailor.cli",
                "run",
                str(folder / "kills.toml"),
                "--out",
                str(folder / out),
                "--resume",
            ]

        begun = time.perf_counter()
        subprocess.run(command("whole"), check=True, capture_output=True)
        whole = time.perf_counter() - begun
        wanted = json.loads((folder / "whole" / "summary.json").read_text(encoding="utf-8"))["state_hash"]
        print(f"uninterrupted: {whole:.1f} s, {wanted[:16]}")
        right = hit = trial = 0
        while hit < args.kills:
            trial += 1
            out = f"killed-{trial}"
            process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            # One kill a trial: every fifth at any moment, start-up included, the others from the first round on.
            begun = time.perf_counter()
            while hit % 5 and process.poll() is None and not (folder / out / "rounds.jsonl").exists():
                time.sleep(0.01)
            left = whole - (time.perf_counter() - begun)
            try:
                process.wait(moments.uniform(0.0, max(left, 1.0)))
                continue  # it was through before the kill
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            hit += 1
            lines = folder / out / "rounds.jsonl"
            done = len(lines.read_text(encoding="utf-8").splitlines()) if lines.exists() else 0
            subprocess.run(command(out), check=True, capture_output=True)
            found = json.loads((folder / out / "summary.json").read_text(encoding="utf-8"))["state_hash"]
            right += found == wanted
            print(f"kill {hit:2d} after {done:2d} rounds: {'same' if found == wanted else 'DIFFERENT'} {found[:16]}", flush=True)
        print(f"{right} of {hit} resumed to the same state hash")
        sys.exit(0 if right == hit else 1)


if __name__ == "__main__":
    main()
