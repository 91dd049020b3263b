"""Rebuild the tables of docs/paper-2601.00526.md: run what is missing, keep what was measured, write tables and pictures.

python experiments/paper-2601.00526/table.py --preset small                 (some hours on 2 cores; resumable at any moment)
python experiments/paper-2601.00526/table.py --preset small --only sst2     (one task)
python experiments/paper-2601.00526/table.py --tables                       (only the tables, from what is kept in docs/)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedtailor.compare import bytes_to, interval

HERE = Path(__file__).parent
TASKS = ("sst2", "banking77", "qnli", "fdu_mtl", "pacs")
STUDIES = ("remedies", "networks")
TECHNIQUES = ("full", "lora", "prefix", "prompt", "distil", "prompt-search", "rag")
PARTITIONS = {
    "iid": {"kind": "iid"},
    "alpha 1": {"kind": "inner_dirichlet", "alpha": 1.0},
    "alpha 0.1": {"kind": "inner_dirichlet", "alpha": 0.1},
}
UNVERIFIED = {  # a third party's summary of the paper: (difference to central in points, bytes a round, client compute)
    "full": ("-0.8", "1.2 GB", "high"),
    "lora": ("-0.4", "300 MB", "medium"),
    "prompt": ("-1.2", "150 MB", "low"),
    "prefix": ("-0.2", "120 MB", "low"),
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="small: sizes for two cores; without: full sizes, for a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-2601.00526"), help="run folders")
    parser.add_argument("--docs", type=Path, default=HERE.parent.parent / "docs" / "paper-2601.00526", help="what is kept")
    parser.add_argument("--only", choices=[*TASKS, *STUDIES, "memory"], action="append", help="these parts (repeatable)")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    asked = parser.parse_args()
    asked.docs.mkdir(parents=True, exist_ok=True)
    if not asked.tables:
        for task in asked.only or [*TASKS, *STUDIES, "memory"]:
            if task == "memory":
                keep(asked.docs / "memory.json", memory(asked.out))
            else:
                prepare(task)
                compare(task, asked.out / task, asked.preset)
                keep(asked.docs / f"{task}.json", bare(asked.out / task / "compare.json"))
    kept = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.docs.glob("*.json"))}
    (asked.docs / "tables.md").write_text("\n".join(pages(kept)), encoding="utf-8")
    pictures({task: kept[task] for task in TASKS if task in kept}, asked.docs)
    print(asked.docs / "tables.md")


# What is run


def prepare(task: str) -> None:
    if task == "pacs" and not Path("runs/vit-cifar10/model").is_dir():
        subprocess.run([sys.executable, str(HERE / "pretrain_vit.py")], check=True)


def compare(task: str, out: Path, preset: str | None) -> None:
    command = [sys.executable, "-m", "fedtailor.cli", "compare", str(HERE / f"{task}.toml"), "--out", str(out)]
    subprocess.run([*command, *(["--preset", preset] if preset else [])], check=True, stdout=subprocess.DEVNULL)


def memory(out: Path) -> dict[str, float]:
    """Peak resident bytes of a process that is one client for one round of SST-2 in fp32, by technique; `none` only predicts."""
    small = {
        "clients.count": 1,
        "rounds": 1,
        "data.limit": 200,
        "data.test_limit": 50,
        "engine.precision": "fp32",
        "train.batch": 8,
    }
    kinds = {"full": "full", "lora": "lora", "prefix": "prefix", "prompt": "prompt", "none": "template"}
    found = {}
    for name, kind in kinds.items():
        asked = {**small, "technique.kind": kind, "algorithm.kind": "zero-shot" if name == "none" else "local"}
        command = [
            sys.executable,
            "-m",
            "fedtailor.cli",
            "run",
            str(HERE / "sst2.toml"),
            "--json",
            "--out",
            str(out / "memory" / name),
        ]
        if not (out / "memory" / name / "summary.json").is_file():
            subprocess.run(
                [*command, *(w for k, v in asked.items() for w in ("--set", f"{k}={v}"))], check=True, stdout=subprocess.DEVNULL
            )
        found[name] = json.loads((out / "memory" / name / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"]
    return found


def bare(path: Path) -> list[Row]:
    """The rows without the paths of this machine."""
    return [{k: v for k, v in row.items() if k != "runs"} for row in json.loads(path.read_text(encoding="utf-8"))]


def keep(path: Path, found: Any) -> None:
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


# What is shown


def pages(kept: dict[str, Any]) -> list[str]:
    lines = [
        "# Tables of the experiment of arXiv 2601.00526",
        "",
        "Written by `python experiments/paper-2601.00526/table.py`; what it means: [the page](../paper-2601.00526.md).",
        "",
    ]
    for task in TASKS:
        if task in kept:
            lines += [
                f"## {task}",
                "",
                *task_table(kept[task]),
                "",
                *cost_table(kept[task], kept.get("memory", {}) if task == "sst2" else {}),
                "",
            ]
    if "sst2" in kept:
        lines += ["## Means over the tasks", "", *mean_table({t: kept[t] for t in TASKS if t in kept}), ""]
    if "remedies" in kept:
        lines += ["## Remedies", "", *remedies_table(kept["remedies"]), ""]
    if "networks" in kept:
        lines += ["## Networks", "", *networks_table(kept["networks"]), ""]
    return lines


def case(rows: list[Row], name: str, partition: str | None = None) -> Row | None:
    wanted = PARTITIONS.get(partition or "")
    for row in rows:
        if row["name"].split(",")[0] == name and row.get("changes", {}).get("clients.partition") == wanted:
            return row
    return None


def pooled_of(rows: list[Row], row: Row | None) -> Row | None:
    return next((r for r in rows if row and r["name"] == row.get("pooled")), None)


def task_table(rows: list[Row]) -> list[str]:
    """Quality: a line a technique, the partitions side by side."""
    natural = case(rows, "prefix", "iid") is None
    parts: list[str | None] = [None] if natural else [p for p in PARTITIONS if case(rows, "prefix", p)]
    head = ["technique", "pooled", *(["natural clients"] if natural else map(str, parts)), "to pooled, points"]
    head += ["worst decile" if natural else "worst decile, alpha 0.1", *([] if natural else ["alpha 0.1 - iid, points"])]
    body = []
    for name in TECHNIQUES:
        found = [case(rows, name, p) for p in parts]
        if found[0] is None:
            continue
        pooled, last = pooled_of(rows, found[0]), found[0] if natural else case(rows, name, "alpha 0.1")
        line = [name, score(pooled), *(score(r) for r in found), points(found[0].get("to_pooled"))]
        line += [score(last, "clients_worst_decile"), *([] if natural else [points(paired(last, found[0]))])]
        body.append(line)
    majority = next((r for r in rows if r["name"] == "majority"), None)
    if majority:
        body.append(["majority", score(majority), *["-"] * (len(head) - 2)])
    return table(head, body)


def cost_table(rows: list[Row], memory: dict[str, float]) -> list[str]:
    """Costs, of the iid (or natural) clients."""
    natural = case(rows, "prefix", "iid") is None
    whole = case(rows, "full", None if natural else "iid")
    head = [
        "technique",
        "numbers trained",
        "kB up",
        "kB down",
        "below full",
        "MB to 99 % of its best",
        "FLOPs an example, forward = 1 (with padding)",
        "TFLOPs of all clients",
        "client's peak MB",
    ]
    body = []
    for name in TECHNIQUES:
        row = case(rows, name, None if natural else "iid")
        if row is None:
            continue
        up, down = mean(row, "bytes_up_per_client_round"), mean(row, "bytes_down_per_client_round")
        of_whole = mean(whole, "bytes_up_per_client_round") + mean(whole, "bytes_down_per_client_round") if whole else 0.0
        trained = name not in ("prompt-search", "rag")
        forward = mean(whole, "forward_flops_per_example") if whole else 0
        times = f"{mean(row, 'flops_per_example') / forward:.2f}" if trained and forward else "-"
        near = [b for b in (bytes_to(0.99, c, row["metric"]) for c in row["curves"]) if b is not None]
        body.append(
            [name, f"{mean(row, 'trainable_parameters'):,.0f}" if trained else "0", f"{up / 1e3:,.1f}", f"{down / 1e3:,.1f}",
             f"{of_whole / (up + down):,.0f} x" if whole else "-",
             f"{sum(near) / len(near) / 1e6:,.1f}" if near else "-", times, f"{mean(row, 'flops_total') / 1e12:,.1f}",
             f"{memory[name] / 1e6:,.0f}" if name in memory else "-"]
        )  # fmt: skip
    return table(head, body)


def mean_table(tasks: dict[str, list[Row]]) -> list[str]:
    """Over the tasks that have the technique: the difference to pooled beside what a summary of the paper reports."""
    head = [
        "technique",
        "tasks",
        "to pooled, points (ours)",
        "kB a client and round (ours)",
        "alpha 0.1 - iid, points (ours)",
        "to central, points (reported by a summary, unverified)",
        "a round (reported by a summary, unverified)",
    ]
    body = []
    for name in TECHNIQUES:
        firsts = {t: case(rows, name, "iid") or case(rows, name) for t, rows in tasks.items()}
        had = {t: r for t, r in firsts.items() if r and "to_pooled" in r}
        if not had:
            continue
        apart = [r["to_pooled"]["mean"] * 100 for r in had.values()]
        size = [(mean(r, "bytes_up_per_client_round") + mean(r, "bytes_down_per_client_round")) / 1e3 for r in had.values()]
        drops = [d for t in had if (d := paired(case(tasks[t], name, "alpha 0.1"), firsts[t]))]
        told = UNVERIFIED.get(name, ("-", "-", "-"))
        body.append(
            [name, str(len(had)), f"{sum(apart) / len(apart):+.1f}", f"{min(size):,.0f} to {max(size):,.0f}",
             f"{sum(d['mean'] for d in drops) / len(drops) * 100:+.1f}" if drops else "-", told[0], told[1]]
        )  # fmt: skip
    return table(head, body)


def remedies_table(rows: list[Row]) -> list[str]:
    head = [
        "remedy",
        "iid",
        "alpha 0.1",
        "alpha 0.1 - iid, points",
        "against plain at alpha 0.1, points",
        "own test rows at alpha 0.1",
        "kB up",
    ]
    plain, body = case(rows, "plain", "alpha 0.1"), []
    for name in dict.fromkeys(partless(row["name"]) for row in rows):
        iid, skewed = (
            next(
                (r for r in rows if partless(r["name"]) == name and r["changes"].get("clients.partition") == PARTITIONS[p]), None
            )
            for p in ("iid", "alpha 0.1")
        )
        if iid and skewed:
            body.append(
                [name, score(iid), score(skewed), points(paired(skewed, iid)), points(paired(skewed, plain)) if skewed is not plain else "-",
                 score(skewed, "clients_mean"), f"{mean(skewed, 'bytes_up_per_client_round') / 1e3:,.1f}"]
            )  # fmt: skip
    return table(head, body)


def networks_table(rows: list[Row]) -> list[str]:
    """Seconds on the virtual clock until the validation metric is reached, means over the seeds that reach it."""
    names = list(dict.fromkeys(row["name"].split(",")[0] for row in rows))
    lines = list(dict.fromkeys(row["name"].partition("clients.devices=")[2] for row in rows))
    goals = (0.65, 0.75)
    head = ["technique", *(f"{line}: {goal:.2f}" for line in lines for goal in goals), *(f"{line}: test" for line in lines)]
    body = []
    for name in names:
        found = [next(r for r in rows if r["name"] == f"{name}, clients.devices={line}") for line in lines]
        body.append([name, *(until(r, goal) for r in found for goal in goals), *(score(r) for r in found)])
    return table(head, body)


def until(row: Row, goal: float) -> str:
    reached = [next((p["clock"] for p in c if p["valid"] >= goal), None) for c in row["curves"]]
    times = [t for t in reached if t is not None]
    if not times:
        return "never"
    return f"{sum(times) / len(times):,.0f} s" + (f" ({len(times)} of {len(reached)})" if len(times) < len(reached) else "")


def partless(name: str) -> str:
    return name.partition(", clients.partition=")[0]


def paired(one: Row | None, other: Row | None) -> Row | None:
    """Differences of the global test metric, seed by seed."""
    if not one or not other:
        return None
    there = {v["seed"]: v["global_test"] for v in other["values"] if "global_test" in v}
    apart = [v["global_test"] - there[v["seed"]] for v in one["values"] if v["seed"] in there and "global_test" in v]
    return interval(apart) if apart else None


def mean(row: Row, name: str) -> float:
    return float(row[name]["mean"]) if name in row else 0.0


def score(row: Row | None, name: str = "global_test") -> str:
    if not row or name not in row:
        return "-"
    half = row[name]["high"] - row[name]["mean"]
    return f"{row[name]['mean']:.3f}" + (f" ± {half:.3f}" if half else "")


def points(cell: Row | None) -> str:
    if not cell:
        return "-"
    half = cell["high"] - cell["mean"]
    return f"{cell['mean'] * 100:+.1f}" + (f" ± {half * 100:.1f}" if half else "")


def table(head: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in body)]


def pictures(tasks: dict[str, list[Row]], docs: Path) -> None:
    """quality.svg: test metric over the bytes that it took, a panel a task; bars from alpha 0.1 to iid."""
    if not tasks:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "fedtailor", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot

    colours = dict(zip(TECHNIQUES, ("#8d6e63", "#3b82f6", "#e8710a", "#12a37f", "#8b5cf6", "#d6457f", "#b8860b"), strict=True))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(max(6.2, 3.1 * len(tasks)), 3.5), squeeze=False)
    for panel, (task, rows) in zip(panels[0], tasks.items(), strict=True):
        for name in TECHNIQUES:
            found = [r for p in (*PARTITIONS, None) if (r := case(rows, name, p))]
            if not found:
                continue
            values, size = [mean(r, "global_test") for r in found], max(mean(found[0], "bytes_total"), 1) / 1e6
            panel.plot([size, size], [min(values), max(values)], color=colours[name], alpha=0.4, linewidth=2)
            panel.plot(size, values[0], "o", color=colours[name], label=name)
        panel.set(xscale="log", title=task, xlabel="MB in all, clients and server")
    panels[0][0].set_ylabel("test accuracy\ndot: iid, line: to alpha 0.1")
    handles = {h.get_label(): h for panel in panels[0] for h in panel.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(docs / "quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
