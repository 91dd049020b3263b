"""Prefix lengths that clients choose against fixed ones, at equal bytes: every fixed length gets the rounds that its bytes pay for.

    python benchmarks/adaptive_prefix.py [--seeds 0 1 2] [--rounds 8] [--lengths 2 5 10 20]

The embedded model on the embedded data, 20 clients, Dirichlet 0.5. Half of the clients are phones whose uplink sends 100 kB in the second
that `upload` allows; a fixed length is not bounded by that. Prints a markdown table: means over the seeds with 95 % t-intervals.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fedtailor.config import load
from fedtailor.run import run

HERE = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8, help="of the adaptive run")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 5, 10, 20])
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            longest = max(args.lengths)
            adaptive = one(
                Path(folder) / f"adaptive-{seed}", seed, args.rounds, longest,
                "algorithm.kind=adaptive-prefix", f"algorithm.lengths={args.lengths}", "algorithm.upload=1.0",
            )  # fmt: skip
            found.setdefault("chosen by each client", []).append(adaptive)
            for length in args.lengths:
                # A round costs what the last one did: one round tells what that is.
                probe = one(Path(folder) / f"probe-{length}-{seed}", seed, 1, length, "evaluate.every=0")
                rounds = max(1, round(adaptive["bytes_total"] / probe["bytes_total"]))
                found.setdefault(f"fixed, {length}", []).append(
                    one(Path(folder) / f"fixed-{length}-{seed}", seed, rounds, length)
                )
    print("| length | rounds | global test | clients' mean | worst decile | kB up, a client and round | MB in all |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        scores = [interval([r[key] for r in runs]) for key in ("global_test", "clients_mean", "clients_worst_decile")]
        rounds, up, total = (np.mean([r[key] for r in runs]) for key in ("rounds", "bytes_up_per_client_round", "bytes_total"))
        print(f"| {name} | {rounds:.0f} | {' | '.join(scores)} | {up / 1e3:.1f} | {total / 1e6:.1f} |")


def one(out: Path, seed: int, rounds: int, length: int, *more: str) -> dict[str, Any]:
    devices = 'clients.devices=[{name="phone", share=1, uplink_mbps=0.8}, {name="laptop", share=1}]'
    keys = [f"seed={seed}", f"rounds={rounds}", f"technique.length={length}", devices, *more]
    return run(load(HERE / "experiments" / "demo.toml", keys), out)


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.4f} ± {half:.4f}"


if __name__ == "__main__":
    main()
