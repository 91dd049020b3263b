"""Seconds a round of every personal algorithm against FedAvg of the same technique, and how much of the ratio is arithmetic.

    python benchmarks/personal_speed.py [--only NAME ...] [--repeats 3] [--rounds 3] [--rows 300] [--set a.b=value ...]

The embedded model on the embedded data, 10 clients, batches of 8, one pass a round, no evaluation between rounds; LoRA where an
algorithm takes it, else its own technique. Algorithms are those whose card gives something personal and that cut no model, with
`fed_influence` and `adaptive-prefix`. FedAvg runs right before each of them in the same process, with the same technique and
optimiser. A run's seconds and FLOPs (of the ledger: `rounds.jsonl`) are those of all rounds but the first; medians over the repeats, each
ratio over the two runs side by side. The last column is seconds' ratio over FLOPs' ratio: above 1 is what arithmetic does not explain.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.cards import ANY, HEADED
from fedtailor.config import override, parse
from fedtailor.errors import FedtailorError
from fedtailor.run import run
from fedtailor.techniques import TECHNIQUES

BESIDE = ("adaptive-prefix", "fed_influence")  # not personal by their card, and measured with the others
RATES = {"lora": 1e-3, "prefix": 1e-2, "prompt": 1e-2}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # what an algorithm cannot do without
    "adaptive-prefix": {"technique": {"length": 20}},
    "fed_influence": {"train": {"optimizer": "sgd"}},
}


class Side(NamedTuple):
    seconds: float  # a round
    flops: float
    megabytes: float  # that crossed, both ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=personal(), help="these algorithms")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=300, help="of all clients together")
    parser.add_argument("--set", action="append", default=[], help="override a key of both sides")
    args = parser.parse_args()
    found: dict[str, list[tuple[Side, Side]]] = {}
    failed: dict[str, str] = {}
    for _ in range(args.repeats):
        for kind in args.only:
            try:
                pair = measured("fedavg", kind, args), measured(kind, kind, args)
            except FedtailorError as error:
                failed[kind] = str(error)
            else:
                found.setdefault(kind, []).append(pair)
    print("| algorithm | technique | FedAvg, s a round | s a round | ratio | FLOPs' ratio | MB, ratio | seconds over FLOPs |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, pairs in found.items():
        plain, own = (statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1))
        ratio = statistics.median(b.seconds / a.seconds for a, b in pairs)
        work = statistics.median(b.flops / a.flops for a, b in pairs)
        sent = statistics.median(b.megabytes / a.megabytes for a, b in pairs)
        print(
            f"| `{kind}` | {technique_of(kind)} | {plain:.2f} | {own:.2f} | {ratio:.2f} | {work:.2f} | {sent:.2f} "
            f"| {ratio / work:.2f} |"
        )
    for kind, why in failed.items():
        print(f"not run: {kind}: {why}")
    print(f"\n{args.repeats} repeats; threads: {torch.get_num_threads()}")


def personal() -> list[str]:
    """Names of the algorithms to be measured; those with a `front` hold a part of a model at each client."""
    cards = {name: (make.card.gives, inspect.signature(make).parameters) for name, make in ALGORITHMS.items()}  # type: ignore[attr-defined]
    return [n for n, (gives, keys) in cards.items() if n in BESIDE or (gives == "personal" and "front" not in keys)]


def technique_of(kind: str) -> str:
    takes: str = ALGORITHMS[kind].card.takes  # type: ignore[attr-defined]
    named = [word.strip(",;") for word in takes.split() if word.strip(",;") in TECHNIQUES]
    return "lora" if takes in (ANY, HEADED) or "lora" in named else (named or ["lora"])[0]


def measured(algorithm: str, kind: str, args: argparse.Namespace) -> Side:
    """A run of `algorithm` as `kind` needs it."""
    technique, given = technique_of(kind), SETTINGS.get(kind, {})
    values: dict[str, Any] = {
        "rounds": args.rounds,
        "data": {"limit": args.rows, "test_limit": 20, "max_length": 32},
        "clients": {"count": 10, "valid": 0.2},
        "technique": {"kind": technique, **given.get("technique", {})},
        "algorithm": {"kind": algorithm},
        "train": {"batch": 8, "lr": RATES.get(technique, 1e-3), **given.get("train", {})},
        "evaluate": {"every": 0},
    }
    for item in args.set:
        override(values, item)
    with tempfile.TemporaryDirectory() as folder:
        run(parse(values), Path(folder) / "run")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "rounds.jsonl").read_text("utf-8").splitlines()][1:]
    crossed = statistics.mean(line["bytes_up"] + line["bytes_down"] for line in lines) / 1e6
    return Side(statistics.mean(line["seconds"] for line in lines), statistics.mean(line["flops"] for line in lines), crossed)


if __name__ == "__main__":
    main()
