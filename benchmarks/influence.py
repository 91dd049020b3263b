"""Estimated influence against leave-one-out retraining on real data: FedAvg once with the monitor, then once without each client.

    python benchmarks/influence.py EXPERIMENT [--set a.b=value ...] [--samples 4] [--wrong 1]

The experiment names model, data, clients and technique; its algorithm is replaced. `--wrong` clients get their labels turned round, so
that there is somebody whom the model would be better without. Prints FIL, FIA and the length of the parameters' change, estimated and
retrained, a client a line, and Pearson's r of each over the clients (the paper's measure). Judged on the server's validation rows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fedtailor.algorithms import ALGORITHMS
from fedtailor.config import load
from fedtailor.core import SERVER, Algorithm, ClientId, Message, Plan, Tree
from fedtailor.engines.local import Local
from fedtailor.engines.states import States
from fedtailor.evaluation import workers
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.run import draw
from fedtailor.simulation import World, build
from fedtailor.trees import norm, subtract


def trained(world: World, algorithm: Algorithm, without: ClientId | None) -> tuple[Tree, float, float]:
    """(state, loss, share of right validation rows) after all rounds, in which one client is never asked."""
    experiment, nothing = world.experiment, chain(())
    with tempfile.TemporaryDirectory() as folder:
        engine = Local(
            algorithm, world.sites, workers(world), States(Path(folder)), Ledger(), nothing, nothing, experiment.seed
        )  # fmt: skip
        try:
            state = algorithm.init(world.technique.init)
            for number in range(1, experiment.rounds + 1):
                cohort = draw(world.facts.clients, experiment.clients.per_round, experiment.seed, number)
                state = engine.converse(algorithm.round(state, [c for c in cohort if c != without]), number)
            answers = engine.converse(judge(algorithm.model(state)), experiment.rounds, world.valid_sites)
        finally:
            engine.close()
    sums = answers[SERVER].body["test"]
    return state, float(sums["nll"]) / float(sums["n"]), float(sums["correct"]) / float(sums["n"])


def judge(tree: Tree):  # type: ignore[no-untyped-def]
    return (yield {SERVER: Message("answer", tree)})


def turned(world: World, clients: list[ClientId]) -> None:
    """These clients' training labels are one class further, in place."""
    labels, classes = world.store.fixed["labels"], len(world.facts.labels)
    for client in clients:
        rows = torch.from_numpy(world.clients[client].train)
        labels[rows] = (labels[rows] + 1) % classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--set", action="append", default=[], help="override a key of the experiment")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--wrong", type=int, default=1)
    args = parser.parse_args()
    sgd = ["algorithm.kind=fedavg", "train.optimizer=sgd"]
    world = build(load(args.experiment, [*args.set, *sgd]))
    turned(world, world.facts.clients[: args.wrong])
    plan: Plan = world.job.plan
    began = time.perf_counter()
    watching = ALGORITHMS["fed_influence"](world.job._replace(plan=plan), samples=args.samples, on="valid")
    state, loss, right = trained(world, watching, None)
    assert watching.tells
    found = watching.tells(state)["influence"]
    spent = time.perf_counter() - began
    print(f"with everybody: loss {loss:.4f}, {right:.3f} right; {spent:.0f} s with the monitor")
    plain, rows = ALGORITHMS["fedavg"](world.job), []
    print(f"{'without':>12}  {'FIL':>9} {'retrained':>9}  {'FIA':>7} {'retrained':>9}  {'length':>8} {'retrained':>9}")
    for client in world.facts.clients:
        other, one_loss, one_right = trained(world, plain, client)
        moved = norm(subtract(other["params"], state["params"]))
        line = found[client]
        rows.append((line["fil"], one_loss - loss, line["fia"], one_right - right, line["fip"], moved))
        a, b, c, d, e, f = rows[-1]
        print(f"{client:>12}  {a:9.5f} {b:9.5f}  {c:7.3f} {d:9.3f}  {e:8.5f} {f:9.5f}")
    table = np.asarray(rows).T
    for name, i in (("FIL", 0), ("FIA", 2), ("length", 4)):
        print(f"Pearson's r of {name}: {np.corrcoef(table[i], table[i + 1])[0, 1]:.4f}")


if __name__ == "__main__":
    main()
