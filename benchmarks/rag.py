"""What federated retrieval finds and costs, by what clients let go (access) and by how the server merges it.

    python benchmarks/rag.py [--seeds 0 1 2] [--sizes 1 16 256] [--rounds 0]

experiments/rag.toml over the seeds (each draws its own partition and test texts). First table: accuracy of the neighbours' vote, recall
and nDCG against one index of all clients' rows, and bytes a query, all clients together, in letters of 256 queries. Second table: bytes a
query by queries in a letter: a passage that several of them cite crosses once, and so does a letter's header. Each seed encodes once:
all cases share the clients' indexes. With `--rounds N` another table instead: a retriever (LoRA of rank 8) trained for N rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from fedtailor.algorithms import ALGORITHMS
from fedtailor.compare import interval
from fedtailor.config import load
from fedtailor.core import Algorithm
from fedtailor.engines.local import Local
from fedtailor.engines.states import States
from fedtailor.evaluation import evaluate, workers
from fedtailor.filters import NOTHING
from fedtailor.ledger import Ledger
from fedtailor.run import run
from fedtailor.simulation import World, build

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "rag.toml"
MIXED = ["passages", "embeddings", "answers", "nothing"]
CASES: list[tuple[str, Any, str]] = [
    *(("passages", "passages", merge) for merge in ("scores", "calibrated", "rrf")),
    ("embeddings", "embeddings", "scores"),  # the same rows: only the bytes differ
    ("answers", "answers", "scores"),  # no lists to merge
    *(("a quarter each", MIXED, merge) for merge in ("scores", "calibrated", "rrf")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=0)
    args = parser.parse_args()
    if args.rounds:
        trained(args.seeds, args.rounds)
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    costs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in args.seeds:
        world = build(load(EXPERIMENT, [f"seed={seed}"]))
        with tempfile.TemporaryDirectory() as folder:
            states = States(Path(folder))
            for name, access, merge in CASES:
                told = asked(world, states, 256, True, access=access, merge=merge)
                found.setdefault((name, merge), []).append({**told, **world.without_training()})
            for name, access in (("passages", "passages"), ("embeddings", "embeddings"), ("answers", "answers")):
                for size in args.sizes:
                    costs.setdefault((name, size), []).append(asked(world, states, size, False, access=access))
    print("| access | merge | accuracy | recall@8 | nDCG@8 | up, B a query | down, B a query |\n|---|---|---|---|---|---|---|")
    for (name, merge), seeds in found.items():
        cells = [shown(seeds, measure) for measure in ("global_test", "recall_at_k", "ndcg_at_k")]
        print(f"| {name} | {merge} | {' | '.join(cells)} | {mean(seeds, 'up'):,.0f} | {mean(seeds, 'down'):,.0f} |")
    majority = shown(next(iter(found.values())), "majority")
    print(f"| the commonest class | - | {majority} | - | - | - | - |")
    print(f"\n| queries in a letter | {' | '.join(f'{name}, up' for name in ('passages', 'embeddings', 'answers'))} | down |")
    print("|---|---|---|---|---|")
    for size in args.sizes:
        ups = [f"{mean(costs[name, size], 'up'):,.0f}" for name in ("passages", "embeddings", "answers")]
        print(f"| {size} | {' | '.join(ups)} | {mean(costs['answers', size], 'down'):,.0f} |")


def asked(world: World, states: States, queries: int, judged: bool, **options: Any) -> dict[str, float]:
    """One round of the serving exchange, and what the evaluation says after it."""
    algorithm: Algorithm = ALGORITHMS["rag"](world.job, queries=queries, **options)
    here = dataclasses.replace(world, algorithm=algorithm)
    ledger = Ledger()
    engine = Local(algorithm, here.sites, workers(here), states, ledger, NOTHING, NOTHING, here.experiment.seed)
    try:
        state = engine.converse(algorithm.round(algorithm.init(here.technique.init), sorted(here.clients)), 1)
        scores = evaluate(here, engine, state, 1) if judged else {}
    finally:
        engine.close()
    count = state["queries"]
    return {**scores, "up": ledger.total("bytes_up") / count, "down": ledger.total("bytes_down") / count}


def trained(seeds: list[int], rounds: int) -> None:
    sets = ["technique.rank=8", "algorithm.train=true", f"rounds={rounds}", "train.batch=16", "train.lr=1e-3"]
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(load(EXPERIMENT, [*sets, f"seed={seed}"]), Path(folder) / f"{seed}") for seed in seeds]
    cells = [shown(runs, measure) for measure in ("global_test", "recall_at_k")]
    megabytes = mean(runs, "bytes_total") / 1e6
    print(
        f"\n| trained for | accuracy | recall@8 | MB in all |\n|---|---|---|---|\n| {rounds} rounds | {' | '.join(cells)} | {megabytes:.1f} |"
    )


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def shown(rows: list[dict[str, Any]], name: str) -> str:
    """The mean over seeds with its 95 % t-interval."""
    told = interval([row[name] for row in rows])
    half = told["high"] - told["mean"]
    return f"{told['mean']:.4f}" + (f" ± {half:.4f}" if half > 5e-5 else "")


if __name__ == "__main__":
    main()
