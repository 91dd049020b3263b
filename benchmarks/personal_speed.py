"""Seconds a round of every personal algorithm against FedAvg of the same technique, and how much of the ratio is arithmetic.

    python benchmarks/personal_speed.py [--only NAME ...] [--repeats 3] [--rounds 3] [--rows 300] [--set a.b=value ...]

The embedded model on the embedded data, 10 clients, batches of 8, one pass a round, no evaluation; LoRA where an algorithm takes it, else
its own technique. Algorithms are those whose card gives something personal and that cut no model, with `adaptive-prefix` and
`fed_influence`, all with the options that they begin with. FedAvg runs right before each of them, with the same technique and optimiser, on
the same engine, in the same process. Seconds are this process's own (user and system), so that a machine that others use disturbs them
little; a round is letters, clients' work, replies, the merge and the checkpoint. Those of all rounds but the first are taken, in the median
over the repeats, each ratio over the two runs side by side. FLOPs are the ledger's. The last column is seconds' ratio over FLOPs' ratio: above 1
is what the count does not explain.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedtailor import memory
from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.cards import ANY, HEADED
from fedtailor.config import override, parse
from fedtailor.engines.states import States
from fedtailor.errors import FedtailorError
from fedtailor.launch import engine_for
from fedtailor.ledger import Ledger
from fedtailor.run import draw
from fedtailor.simulation import World, build
from fedtailor.techniques import TECHNIQUES

BESIDE = ("adaptive-prefix", "fed_influence")  # not personal by their card, and measured with the others
RATES = {"lora": 1e-3, "prefix": 1e-2, "prompt": 1e-2}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # what an algorithm cannot do without
    "distil": {"data": {"public": 0.2}},
    "adaptive-prefix": {"technique": {"length": 20}},
    "fed_influence": {"train": {"optimizer": "sgd"}},
    "pac_pfl": {"technique": {"kind": "head"}},  # another tree is too large for its particles
}


class Side(NamedTuple):
    """Means of a round."""

    wall: float
    seconds: float
    flops: float
    bytes: float  # that crossed, both ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=personal(), help="these algorithms")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=300, help="of all clients together")
    parser.add_argument("--set", action="append", default=[], help="override a key of both sides")
    args = parser.parse_args()
    memory.keep()
    worlds: dict[str, World] = {}
    found: dict[str, list[tuple[Side, Side]]] = {}
    failed: dict[str, str] = {}
    for _ in range(args.repeats):
        for kind in args.only:
            key = f"{technique_of(kind)} {SETTINGS.get(kind)}"
            try:
                if key not in worlds:
                    worlds[key] = world_for(kind, args)
                pair = measured("fedavg", worlds[key]), measured(kind, worlds[key])
            except FedtailorError as error:
                failed[kind] = str(error)
            else:
                found.setdefault(kind, []).append(pair)
                print(f"{kind}: {pair[1].seconds:.2f} s a round, FedAvg {pair[0].seconds:.2f} s", file=sys.stderr, flush=True)
    print("| algorithm | technique | FedAvg, s a round | s a round | ratio | FLOPs' ratio | bytes' ratio | seconds over FLOPs |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, pairs in found.items():
        plain, own = (statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1))
        seconds, work, sent = (
            statistics.median(getattr(b, name) / getattr(a, name) for a, b in pairs) for name in ("seconds", "flops", "bytes")
        )
        print(
            f"| `{kind}` | {technique_of(kind)} | {plain:.2f} | {own:.2f} | {seconds:.2f} | {work:.2f} | {sent:.2f} "
            f"| {f'{seconds / work:.2f}' if work else '-'} |"
        )
    for kind, why in failed.items():
        print(f"not run: {kind}: {why}")
    waited = [side.wall / side.seconds for pairs in found.values() for pair in pairs for side in pair]
    print(
        f"\n{args.repeats} repeats; threads: {torch.get_num_threads()}; wall over processor time: {statistics.median(waited):.2f}"
    )


def personal() -> list[str]:
    """Names of the algorithms to be measured; those with a `front` hold a part of a model at each client."""
    known = {name: (make.card.gives, inspect.signature(make).parameters) for name, make in ALGORITHMS.items()}  # type: ignore[attr-defined]
    return [n for n, (gives, keys) in known.items() if n in BESIDE or (gives == "personal" and "front" not in keys)]


def technique_of(kind: str) -> str:
    if asked := SETTINGS.get(kind, {}).get("technique", {}).get("kind"):
        return str(asked)
    takes: str = ALGORITHMS[kind].card.takes  # type: ignore[attr-defined]
    named = [word.strip(",;") for word in takes.split() if word.strip(",;") in TECHNIQUES]
    return "lora" if takes in (ANY, HEADED) or "lora" in named else (named or ["lora"])[0]


def world_for(kind: str, args: argparse.Namespace) -> World:
    """Model, data and plan as this algorithm needs them, under FedAvg."""
    technique, given = technique_of(kind), SETTINGS.get(kind, {})
    values: dict[str, Any] = {
        "rounds": args.rounds,
        "data": {"limit": args.rows, "test_limit": 20, "max_length": 32, **given.get("data", {})},
        "clients": {"count": 10, "valid": 0.2},
        "technique": {"kind": technique, **given.get("technique", {})},
        "train": {"batch": 8, "lr": RATES.get(technique, 1e-3), **given.get("train", {})},
    }
    for item in args.set:
        override(values, item)
    return build(parse(values))


def measured(algorithm: str, world: World) -> Side:
    world = replace(world, algorithm=ALGORITHMS[algorithm](world.job))
    experiment, found = world.experiment, []
    with tempfile.TemporaryDirectory() as folder:
        states, ledger = States(Path(folder)), Ledger()
        engine = engine_for(world, lambda line: None, lambda client: None, states, ledger)
        try:
            state = world.algorithm.init(world.technique.init)
            for number in range(1, experiment.rounds + 1):
                begun = time.perf_counter(), time.process_time()
                cohort = draw(world.facts.clients, experiment.clients.per_round, experiment.seed, number)
                state = engine.converse(world.algorithm.round(state, cohort), number)
                lines = ledger.close_round().values()
                states.commit(number, state, engine.dump(), ledger.dump())
                spent = time.perf_counter() - begun[0], time.process_time() - begun[1]
                sent = sum(line["bytes_up"] + line["bytes_down"] for line in lines)
                found.append(Side(*spent, sum(line["flops"] for line in lines), sent))
        finally:
            engine.close()
    return Side(*(statistics.mean(values) for values in zip(*found[1:], strict=True)))


if __name__ == "__main__":
    main()
