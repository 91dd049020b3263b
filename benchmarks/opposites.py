"""Where owners mean opposite things by the same names: which systems find out who is like whom?

    python benchmarks/opposites.py [--out runs/opposites] [--seeds 0 1 2] [--only NAME ...]      (some 20 minutes a seed on one core; resumable)

FDU-MTL, 16 clients, one a domain, of which every second one has its two labels swapped: what is good there is bad here. Everything else is the
small preset of experiments/personal.toml. One model for all has nothing to learn; a client alone has some 60 rows; eight others would help. A
system that weighs clients by how alike their tasks are should beat both. Prints a markdown table: means over the seeds, 95 % t-intervals.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from fedtailor.compare import compare, markdown
from fedtailor.config import parse

SETS: dict[str, dict[str, Any]] = {
    "local": {"algorithm.kind": "local"},
    "fedavg": {"algorithm.kind": "fedavg"},
    "finetune": {"algorithm.kind": "finetune", "algorithm.personal": 4},
    "fedper": {"algorithm.kind": "fedper"},
    "fedfomo": {"algorithm.kind": "fedfomo"},
    "dypfl": {"algorithm.kind": "dypfl"},
    "fedmosaic": {"algorithm.kind": "fedmosaic"},
    "fedmosaic, sharper": {"algorithm.kind": "fedmosaic", "algorithm.tau": 0.1},
}
DATA = Path(__file__).parents[2] / "shared" / "data" / "fdu_mtl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/opposites"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--rows", type=int, default=1600)
    args = parser.parse_args()
    if not DATA.is_dir():
        parser.error(f"'{DATA}' is not there: the benchmark needs FDU-MTL")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "name": "opposites",
        "rounds": 16,
        "model": {"name": "minilm"},
        "data": {"name": str(swapped(args.out.with_suffix(".csv"))), "limit": args.rows, "test": 0.1, "max_length": 32},
        "clients": {"count": 16, "partition": {"kind": "natural", "column": "domain"}, "test": 0.3, "valid": 0.1},
        "technique": {"kind": "lora"},
        "train": {"epochs": 0.25, "batch": 2, "lr": 2e-3},
        "engine": {"precision": "fp32"},
        "evaluate": {"every": 0, "sample": 25},
        "compare": {"seeds": args.seeds, "sets": [{"name": name, **SETS[name]} for name in args.only]},
    }
    print(markdown(compare(parse(values), args.out)))


def swapped(path: Path) -> Path:
    """All training rows of FDU-MTL in one file, the labels of every second domain exchanged."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "domain"])
        for number, source in enumerate(sorted(DATA.glob("*.task.train"))):
            for line in source.read_text(encoding="utf-8", errors="replace").splitlines():
                label, _, text = line.partition("\t")
                if label in ("0", "1") and text.strip():
                    rows.writerow([text.strip(), int(label) ^ (number % 2), source.name.split(".")[0]])
    return path


if __name__ == "__main__":
    main()
