"""How far the confidences of finished runs are from how often they are right: for clients that trained, and for those that come new.

    python benchmarks/calibration.py RUN [RUN ...]            (folders of `fedtailor compare`: RUN/seed-*; classes only)

    python benchmarks/calibration.py runs/personal/Banking77_{pac_pfl,pac_pfl_one_tree,local,finetune,fedavg_head}   (docs/algorithms/pac_pfl.md)

Every run's last checkpoint is opened again with the metric `ece`, on the test rows of the clients' own; the sums of all clients of a seed
are added before the error is taken, as a client's few dozen rows say little about fifteen bins. Newcomers are judged as they come:
nothing is trained.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

import tomli_w
from rich.console import Console
from rich.progress import track

from fedtailor.compare import interval
from fedtailor.core import SERVER, ClientId, Message, Tree
from fedtailor.evaluation import gathered
from fedtailor.folder import EXPERIMENT
from fedtailor.metrics import accuracy, ece, mean_loss, total
from fedtailor.newcomers import beside, coming, own_rows

COLUMNS = {"accuracy": accuracy, "nll": mean_loss, "ece": ece}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    folders = parser.parse_args().runs
    seeds = {folder: sorted(folder.glob("seed-*")) for folder in folders}
    if missing := [str(folder) for folder, found in seeds.items() if not found]:
        parser.error(f"no seed-* in {', '.join(missing)}")
    print("| run | seeds | " + " | ".join(f"{who}: {name}" for who in ("trained", "new") for name in COLUMNS) + " |")
    print("|---|---|" + "---|" * 2 * len(COLUMNS))
    for folder, found in seeds.items():
        told = [judged(path) for path in track(found, folder.name, console=Console(stderr=True), transient=True)]
        cells = [
            spread([value(sums[who]) for sums in told if sums[who]]) for who in ("trained", "new") for value in COLUMNS.values()
        ]
        print(f"| {folder.name} | {len(found)} | " + " | ".join(cells) + " |", flush=True)


def judged(run: Path) -> dict[str, Tree]:
    """Sums over the clients that trained, and over those that only join."""
    with tempfile.TemporaryDirectory(prefix="calibration-") as scratch:
        copy = Path(shutil.copytree(run, Path(scratch) / "run"))
        values = tomllib.loads((copy / EXPERIMENT).read_text(encoding="utf-8"))
        values["data"]["metric"] = "ece"
        (copy / EXPERIMENT).write_text(tomli_w.dumps(values), encoding="utf-8")
        with gathered(copy) as (world, engine, state):
            talk = world.algorithm.answer(state, world.facts.clients)
            replies = engine.converse(talk, world.experiment.rounds, own_rows(world))
            with beside(world) as apart:
                new = coming(world, apart, state)
        return {"trained": of_clients(replies), "new": of_clients(new)}


def of_clients(replies: Mapping[ClientId, Message]) -> Tree:
    return total(reply.body["test"] for client, reply in sorted(replies.items()) if client != SERVER and "test" in reply.body)


def spread(values: list[float]) -> str:
    """The mean, and half of its 95 % t-interval where there is more than one; "-" of none."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    found = interval(values)
    return f"{found['mean']:.3f} ± {found['high'] - found['mean']:.3f}"


if __name__ == "__main__":
    main()
