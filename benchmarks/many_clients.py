"""Memory and time of many clients: 20 against 1,000, 10 sampled a round, each size in a process of its own.

    python benchmarks/many_clients.py [--sizes 20 1000] [--rounds 4]

Every client holds 16 short texts; scaffold's idle clients also keep a state. Prints peak memory, seconds a round and bytes on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 1000])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--one", type=int, help="measure this size in this process")
    args = parser.parse_args()
    if args.one:
        measure(args.one, args.rounds)
        return
    print("| clients | peak memory, MB | seconds a round (median) |\n|---|---|---|")
    for size in args.sizes:
        command = [sys.executable, __file__, "--one", str(size), "--rounds", str(args.rounds)]
        line = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        print(f"| {size:,} | {line['peak'] / 1e6:.0f} | {line['seconds']:.2f} |", flush=True)


def measure(count: int, rounds: int) -> None:
    import numpy as np
    import torch

    from fedtailor.algorithms import ALGORITHMS
    from fedtailor.backbone import load
    from fedtailor.config import ModelSection
    from fedtailor.core import Job, Plan, Site
    from fedtailor.data.examples import Subset, store
    from fedtailor.engines.answering import Workers
    from fedtailor.engines.local import Local
    from fedtailor.engines.states import States
    from fedtailor.filters import chain
    from fedtailor.ledger import Ledger
    from fedtailor.losses import classification
    from fedtailor.memory import peak
    from fedtailor.metrics import metric
    from fedtailor.run import draw
    from fedtailor.techniques import TECHNIQUES

    backbone = load(ModelSection(), "text", ["a", "b"])
    technique = TECHNIQUES["lora"](backbone)
    random, each = np.random.default_rng(0), 16
    ids = random.integers(1000, 20000, (count * each, 16)).tolist()
    data = store({"input_ids": ids, "labels": random.integers(0, 2, len(ids))}, {"input_ids": 0})
    measured = metric("auto", "text", 2)
    plan = Plan(steps=2, batch=8, lr=0.01, optimizer="sgd")
    algorithm = ALGORITHMS["scaffold"](Job(classification, measured.judge, measured.tally, plan, count))
    names = [f"client-{k:04d}" for k in range(count)]
    place = {name: k for k, name in enumerate(names)}

    def sites(client: str, round: int) -> Site:
        k = place[client]
        return Site(client, {"train": Subset(data, np.arange(k * each, (k + 1) * each))}, technique.init, round)

    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        states = States(Path(folder))
        for name in names:  # every client has trained before: its state lies idle
            states.write_own(name, {"algorithm": {"control": technique.init}})
        engine = Local(algorithm, sites, Workers(technique.bind, torch.get_num_threads()), states, Ledger(), chain([]), chain([]))
        state = algorithm.init(technique.init)
        for number in range(1, rounds + 1):
            begun = time.perf_counter()
            state = engine.converse(algorithm.round(state, draw(names, 10, 0, number)), number)
            states.commit(number, state, engine.dump(), {})
            seconds.append(time.perf_counter() - begun)
        engine.close()
    print(json.dumps({"peak": peak(), "seconds": sorted(seconds)[len(seconds) // 2]}))


if __name__ == "__main__":
    main()
