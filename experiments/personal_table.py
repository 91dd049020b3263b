"""Rebuild the tables and the picture of docs/personal.md: run what is missing, keep what was measured.

python experiments/personal_table.py --preset small                            (some hours a task on one core; resumable at any moment)
python experiments/personal_table.py --preset small --only "FDU-MTL, LoRA"     (one task; with --system apfl, one system of it)
python experiments/personal_table.py --tables                                  (only the tables, from what is kept in docs/personal/)
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedtailor.compare import interval
from fedtailor.config import load

HERE = Path(__file__).parent
FILE = HERE / "personal.toml"
BASELINES = ("local", "fedavg", "fedavg, head", "pooled", "finetune", "fedper", "fedrep", "fedbabu", "ditto", "apfl", "fedala")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = [task["name"] for task in load(FILE).compare.tasks]
    parser.add_argument("--preset", help="small: sizes for two cores; without: full sizes, for a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/personal"), help="run folders")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "personal", help="what is kept")
    parser.add_argument("--only", choices=tasks, action="append", help="these tasks (repeatable)")
    parser.add_argument(
        "--system", action="append", default=[], help="these systems; what is kept of the others stays (repeatable)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="these alone; a table says how many it has")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    asked = parser.parse_args()
    asked.docs.mkdir(parents=True, exist_ok=True)
    for task in [] if asked.tables else asked.only or tasks:
        compare(task, asked.system, asked.out, asked.preset, asked.seeds)
        keep(asked.docs / f"{slug(task)}.json", json.loads((asked.out / "compare.json").read_text(encoding="utf-8")))
    found = {
        task: json.loads(path.read_text(encoding="utf-8"))
        for task in tasks
        if (path := asked.docs / f"{slug(task)}.json").is_file()
    }
    (asked.docs / "tables.md").write_text("\n".join(pages(found)), encoding="utf-8")
    picture(found, asked.docs)
    print(asked.docs / "tables.md")


def compare(task: str, systems: list[str], out: Path, preset: str | None, seeds: list[int] | None) -> None:
    command = [sys.executable, "-m", "fedtailor.cli", "compare", str(FILE), "--out", str(out)]
    command += [word for name in (task, *systems) for word in ("--only", name)]
    command += ["--preset", preset] if preset else []
    command += ["--set", f"compare.seeds={seeds}"] if seeds else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def keep(path: Path, rows: list[Row]) -> None:
    """Rows in the place of those of the same name, without the paths of this machine and the curves."""
    kept = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}
    kept |= {row["name"]: {k: v for k, v in row.items() if k not in ("runs", "curves")} for row in rows}
    path.write_text(json.dumps(list(kept.values())) + "\n", encoding="utf-8")


def slug(task: str) -> str:
    return re.sub(r"\W+", "_", task.lower())


def bare(rows: list[Row], task: str) -> list[Row]:
    """The systems of a task, the best first, under their own names."""
    named = [{**row, "name": row["name"].removeprefix(f"{task}, ")} for row in rows if "clients_mean" in row]
    return sorted(named, key=lambda row: -row["clients_mean"]["mean"])


def pages(found: dict[str, list[Row]]) -> list[str]:
    lines = [
        "# The personal leaderboard",
        "",
        "Written by `python experiments/personal_table.py`; what it means: [the page](../personal.md).",
        "",
        "Means over the seeds, with 95 % t-intervals where there is more than one; a gain is over `local`, seed by seed; work: operations in all",
        "over FedAvg's. Baselines are not in bold.",
        "",
    ]
    for task, rows in found.items():
        lines += [f"## {task}", "", *table(bare(rows, task)), ""]
    return lines


def table(rows: list[Row]) -> list[str]:
    by_name = {row["name"]: row for row in rows}
    whole = "| system | seeds | clients' mean | gain over local | worst tenth | newcomers | joined | kB up | kB down | work |"
    lines = [whole, "|---" * 10 + "|"]
    for row in rows:
        cells = [
            f"**{row['name']}**" if row["name"] not in BASELINES else row["name"],
            str(row["seeds"]),
            spelled(row.get("clients_mean")),
        ]
        cells.append(spelled(gain(row, by_name.get("local")), "+"))
        cells += [spelled(row.get(m)) for m in ("clients_worst_decile", "newcomers_mean", "newcomers_joined_mean")]
        cells += [f"{row[m]['mean'] / 1e3:,.1f}" for m in ("bytes_up_per_client_round", "bytes_down_per_client_round")]
        base = by_name.get("fedavg")
        cells.append(f"{row['flops_total']['mean'] / base['flops_total']['mean']:.1f} x" if base else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def gain(row: Row, local: Row | None) -> dict[str, float] | None:
    """Over local training, seed by seed."""
    there = {v["seed"]: v["clients_mean"] for v in local["values"]} if local else {}
    differences = [v["clients_mean"] - there[v["seed"]] for v in row["values"] if v["seed"] in there]
    return interval(differences) if differences else None


def spelled(measure: dict[str, float] | None, sign: str = "") -> str:
    if measure is None:
        return "-"
    half = (measure["high"] - measure["low"]) / 2
    return f"{measure['mean']:{sign}.3f}" + (f" ± {half:.3f}" if half > 5e-4 else "")


def picture(found: dict[str, list[Row]], docs: Path) -> None:
    """leaderboard.svg: each system's clients, a panel a task; lines where training alone and FedAvg are."""
    if not found:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "fedtailor", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot

    most = max(len(bare(rows, task)) for task, rows in found.items())
    across, down = min(2, len(found)), (len(found) + 1) // 2
    figure, panels = pyplot.subplots(down, across, figsize=(3.6 * across, (0.6 + 0.2 * most) * down), squeeze=False)
    for spare in panels.flat[len(found) :]:
        spare.set_visible(False)
    for panel, (task, rows) in zip(panels.flat, found.items(), strict=False):
        systems = bare(rows, task)[::-1]
        for place, row in enumerate(systems):
            measure, colour = row["clients_mean"], "#64748b" if row["name"] in BASELINES else "#e8710a"
            panel.plot([measure["low"], measure["high"]], [place, place], color=colour, linewidth=2, alpha=0.4)
            panel.plot(measure["mean"], place, "o", color=colour)
            panel.plot(row["clients_worst_decile"]["mean"], place, "|", color=colour)
        for row in systems:
            if row["name"] in ("local", "fedavg"):
                panel.axvline(
                    row["clients_mean"]["mean"],
                    color="#94a3b8",
                    linewidth=0.8,
                    linestyle={"local": ":", "fedavg": "--"}[row["name"]],
                )
        panel.set_yticks(range(len(systems)), [row["name"] for row in systems])
        panel.set(title=task, xlabel="clients' own test rows, accuracy")
    figure.text(
        0.01,
        0.005,
        "dot: mean, bar: 95 % interval, tick: worst tenth; dotted: local, dashed: fedavg; grey: baselines",
        fontsize=7,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(docs / "leaderboard.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
