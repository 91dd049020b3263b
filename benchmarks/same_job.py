"""The same federated LoRA job on fedtailor and on Flower's simulation, start-up included, taking turns.

    python benchmarks/same_job.py --peer venv-flower/bin/python [--repeats 3]

20 clients x 4 steps x batch 8 x 32 tokens, 4 rounds, all-MiniLM-L6-v2 with LoRA (r = 8), FedAvg (peer_flower.py says how the peer's
environment is made, and what it runs). Each side is a process of its own; wall time is measured from its start to its end; peak memory
is the peak over time of RSS and PSS summed over its process tree. `--ours` runs our side alone and prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CLIENTS, ROUNDS, STEPS, BATCH, TOKENS, CLASSES = 20, 4, 4, 8, 32, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--peer", help="the Python of the peer's environment")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.ours:
        ours()
        return
    here = Path(__file__).parent
    sides = {"fedtailor": [sys.executable, str(Path(__file__)), "--ours"]}
    if args.peer:
        sides["flwr 1.41.0 simulation"] = [args.peer, str(here / "peer_flower.py")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, command in sides.items():
            begun = time.perf_counter()
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
            found[name].append({**json.loads(out), "wall_seconds": time.perf_counter() - begun})
    print("| side | wall, s | warm examples/s | peak RSS, MB | peak PSS, MB |\n|---|---|---|---|---|")
    medians = {}
    for name, runs in found.items():
        keys = ("wall_seconds", "examples_per_second_warm", "peak_rss_bytes", "peak_pss_bytes")
        medians[name] = wall, rate, rss, pss = [statistics.median(r[k] for r in runs) for k in keys]
        spread = f"{min(r['wall_seconds'] for r in runs):.1f} to {max(r['wall_seconds'] for r in runs):.1f}"
        print(f"| {name} | {wall:.1f} ({spread}) | {rate:.1f} | {rss / 1e6:.0f} | {pss / 1e6:.0f} |")
    if len(medians) == 2:
        us, them = medians.values()
        print(f"| ratio | {us[0] / them[0]:.2f} | {us[1] / them[1]:.2f} | {us[2] / them[2]:.2f} | {us[3] / them[3]:.2f} |")


def ours() -> None:
    peak = {"rss": 0, "pss": 0}
    threading.Thread(target=watch, args=(peak,), daemon=True).start()

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
    from fedtailor.metrics import metric
    from fedtailor.techniques import TECHNIQUES

    backbone = load(ModelSection(), "text", [str(k) for k in range(CLASSES)])
    technique = TECHNIQUES["lora"](backbone)
    random, each = np.random.default_rng(0), STEPS * BATCH
    ids = random.integers(1000, 20000, (CLIENTS * each, TOKENS)).tolist()
    data = store({"input_ids": ids, "labels": random.integers(0, CLASSES, len(ids))}, {"input_ids": 0})
    measure = metric("auto", "text", CLASSES)
    job = Job(classification, measure.judge, measure.tally, Plan(steps=STEPS, batch=BATCH, lr=1e-3), CLIENTS)
    algorithm = ALGORITHMS["fedavg"](job)
    names = [f"client-{k:02d}" for k in range(CLIENTS)]

    def sites(client: str, round: int) -> Site:
        k = names.index(client)
        return Site(client, {"train": Subset(data, np.arange(k * each, (k + 1) * each))}, technique.init, round)

    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        states = States(Path(folder))
        workers = Workers(technique.bind, torch.get_num_threads())
        engine = Local(algorithm, sites, workers, states, Ledger(), chain([]), chain([]))
        state = algorithm.init(technique.init)
        for number in range(1, ROUNDS + 1):
            begun = time.perf_counter()
            state = engine.converse(algorithm.round(state, names), number)
            states.commit(number, state, engine.dump(), {})
            seconds.append(time.perf_counter() - begun)
        engine.close()
    warm = CLIENTS * each * (ROUNDS - 1) / sum(seconds[1:])
    print(
        json.dumps(
            {
                "examples_per_second_warm": warm,
                "round_seconds": seconds,
                "peak_rss_bytes": peak["rss"],
                "peak_pss_bytes": peak["pss"],
            }
        )
    )


def watch(peak: dict[str, int]) -> None:
    """Samples this process, which is the whole tree, as often as the peer samples its own: PSS, which is dear, less often."""
    page, sample = resource.getpagesize(), 0
    while True:
        rss = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * page
        if sample % 5 == 0 or rss > peak["rss"]:
            lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
            peak["pss"] = max(peak["pss"], *(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")))
        peak["rss"] = max(peak["rss"], rss)
        sample += 1
        time.sleep(0.2)


if __name__ == "__main__":
    main()
