"""What padding costs in seconds: a round on real texts against a round of the same number of tokens without any padding.

    python benchmarks/padding.py [--experiment experiments/sst2.toml] [--repeats 5]

Both sides train the same clients for one epoch in the stacked engine, taking turns. The unpadded side has as many rows a client, each
of the client's mean length, so that its batches have no padding and as many tokens (to half a token a row).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from fedtailor.config import load
from fedtailor.core import Fit, Plan, stream
from fedtailor.data.examples import Store, Subset, store
from fedtailor.engines.answering import answer
from fedtailor.evaluation import workers
from fedtailor.losses import classification
from fedtailor.run import draw
from fedtailor.simulation import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, default=Path("experiments/sst2.toml"))
    parser.add_argument("--set", action="append", default=[], help="override a key of the experiment")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    world = build(load(args.experiment, args.set))
    plan: Plan = world.job.plan.at(1)
    cohort = draw(sorted(world.clients), world.experiment.clients.per_round, 0, 1)
    rows = {c: world.clients[c].train for c in cohort}
    flat, places = unpadded(world.store, rows)
    sides = {
        "real": {c: Fit(classification, world.technique.init, Subset(world.store, rows[c]), {}, plan) for c in cohort},
        "unpadded": {c: Fit(classification, world.technique.init, Subset(flat, places[c]), {}, plan) for c in cohort},
    }
    pool = workers(world)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):
        for name, fits in sides.items():
            begun = time.perf_counter()
            answer(fits, pool, lambda client: stream(0, client), stacked=True, pace=0)
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begun)
    pool.close()
    print("| side | examples | tokens | seconds (least to most) | tokens/s |\n|---|---|---|---|---|")
    rate = {}
    for name, fits in sides.items():
        tokens = sum(int(np.sum(fit.data.lengths)) for fit in fits.values())
        median = statistics.median(seconds[name])
        rate[name] = tokens / median
        examples = sum(len(fit.data) for fit in fits.values())
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"| {name} | {examples} | {tokens} | {median:.2f} ({spread}) | {rate[name]:.0f} |")
    print(f"| ratio | | | | {rate['real'] / rate['unpadded']:.2f} |")


def unpadded(real: Store, rows: dict[str, np.ndarray]) -> tuple[Store, dict[str, np.ndarray]]:
    """A store of rows of random ids, each as long as its client's texts are on average; and every client's row numbers."""
    ids: list[list[int]] = []
    places: dict[str, np.ndarray] = {}
    random = np.random.default_rng(0)
    for client, own in rows.items():
        mean = round(float(real.lengths[own].mean()))
        places[client] = np.arange(len(ids), len(ids) + len(own))
        ids += random.integers(1000, 20000, (len(own), mean)).tolist()
    return store({"input_ids": ids, "labels": random.integers(0, 2, len(ids))}, {"input_ids": 0}), places


if __name__ == "__main__":
    main()
