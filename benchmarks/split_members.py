"""What a member of a split federation takes in fact, against what `fedtailor plan` tells: a server and a member, each a process.

    python benchmarks/split_members.py [minilm gpt2] [--test 0.2]

The member is `fedtailor join --data`: it loads its front and its back and nothing else, trains flexp's steps (LoRA of rank 8, every text as long as
the longest), keeps its state on disk, and judges its test rows through the cut. Measured is the highest resident memory of its process (VmHWM) less
that of the same member of the same federation with a tiny model of the same family and tokenizer, plus what is planned for the tiny one. The
allocator is told to give freed blocks back (MALLOC_MMAP_THRESHOLD_), as the plan counts; the last column is without that. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch

from fedtailor.backbone import locate, quiet
from fedtailor.config import parse
from fedtailor.core import Device
from fedtailor.planning import estimates, pace
from fedtailor.simulation import build

COMMAND = [sys.executable, "-m", "fedtailor.cli"]
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Case(NamedTuple):
    title: str
    kind: str  # of the data
    batch: int
    width: int
    fronts: tuple[int, ...]
    named: int  # the front of the cut that is the target


CASES = {
    "minilm": Case("MiniLM, 6 layers, 8 x 64", "text", 8, 64, (0, 1, 2, 4), 1),
    "gpt2": Case("GPT-2 size, 12 layers, 4 x 64", "language", 4, 64, (0, 2, 6, 10), 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument(
        "--test", type=float, default=0.2, help="share of the rows that the member judges itself on; 0: it does not"
    )
    parser.add_argument("--fronts", type=int, nargs="*", help="layers at the front, where not all are wanted")
    asked = parser.parse_args()
    print("| model | cut | planned, MB | measured, MB | measured / planned | with the allocator as it is, MB |")
    print("|---|---|---|---|---|---|")
    for name in asked.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as temporary:
            here = Path(temporary)
            whole, tiny = models(name, here)
            data = texts(here, case)
            base = experiment(case, tiny, 1, asked.test)
            small = planned(base, data, [1])[1][1]
            bases = [measured(base, data, here / f"tiny-{i}", more) for i, more in enumerate((GIVES_BACK, {}))]
            fronts = asked.fronts or case.fronts
            depth, told = planned(experiment(case, whole, 1, asked.test), data, fronts)
            for front in fronts:
                values = experiment(case, whole, front, asked.test)
                peaks = [measured(values, data, here / f"{front}-{i}", more) for i, more in enumerate((GIVES_BACK, {}))]
                took, as_it_is = (peak - before + small for peak, before in zip(peaks, bases, strict=True))
                cut = f"{front} \\| {depth - front - 1} \\| 1"
                shown = f"**{cut}**" if front == case.named else cut
                numbers = f"{told[front] / 1e6:.1f} | {took / 1e6:.1f} | {took / told[front]:.2f} | {as_it_is / 1e6:.1f}"
                print(f"| {case.title} | {shown} | {numbers} |", flush=True)


def models(name: str, here: Path) -> tuple[str, str]:
    """(folder of the model, folder of a tiny one of its family)."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(locate("minilm"))

    def made(cls: Any, config: Any, folder: Path) -> str:
        torch.manual_seed(0)
        with quiet():
            cls(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    if name == "gpt2":
        few = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=len(tokenizer))
        return made(GPT2LMHeadModel, GPT2Config(), here / "whole"), made(GPT2LMHeadModel, few, here / "tiny")
    few = BertConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=len(tokenizer))
    return str(locate("minilm")), made(BertForSequenceClassification, few, here / "tiny")


def texts(here: Path, case: Case) -> Path:
    """80 rows, all longer than the longest batch is wide."""
    draw = random.Random(0)
    words = ["good", "bad", "slow", "long", "film", "year", "war"]
    rows = [" ".join(draw.choices(words, k=case.width + 8)) for _ in range(80)]
    path = here / "own.csv"
    lines = [f"{row},{draw.choice(('bad', 'good'))}" for row in rows] if case.kind == "text" else rows
    path.write_text("\n".join(["text,label" if case.kind == "text" else "text", *lines]) + "\n", encoding="utf-8")
    return path


def experiment(case: Case, model: str, front: int, test: float) -> dict[str, Any]:
    labels = {"labels": ["bad", "good"]} if case.kind == "text" else {}
    return {
        "name": "members",
        "rounds": 2,
        "model": {"name": model},
        "data": {"name": "own", "kind": case.kind, "max_length": case.width, **labels},
        "clients": {"count": 1, "min_clients": 1, "test": test, "valid": 0.0},
        "technique": {"kind": "lora", "rank": 8},
        "algorithm": {"kind": "flexp", "front": front, "back": 1},
        "train": {"batch": case.batch, "steps": 4, "lr": 1e-3},
    }


def planned(values: dict[str, Any], data: Path, fronts: Iterable[int]) -> tuple[int, dict[int, float]]:
    """(layers of the model, front -> bytes that `fedtailor plan` tells)."""
    here = {**values["data"], "name": str(data)}
    here.pop("labels", None)
    clients = {"count": 1, "test": values["clients"]["test"], "valid": 0.0}
    world = build(parse({**values, "data": here, "clients": clients}))
    now, over = pace(world), world.job.layers
    assert over
    found = estimates(over, Device(), Device(), now.rows, now.width, fronts, widest=now.widest)
    return over.depth, {cut.front: cut.memory for cut in found}


def measured(values: dict[str, Any], data: Path, folder: Path, more: dict[str, str]) -> float:
    """Bytes: the highest resident memory of the member's process."""
    folder.mkdir()
    (folder / "e.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{found.getsockname()[1]}"
    log = (folder / "log").open("wb")
    serve = [*COMMAND, "serve", str(folder / "e.toml"), "--at", at, "--insecure", "--out", str(folder / "run")]
    server = subprocess.Popen(serve, stdout=log, stderr=log)
    while b"listening on" not in (folder / "log").read_bytes():
        if server.poll() is not None:
            raise SystemExit((folder / "log").read_text())
        time.sleep(0.2)
    join = [*COMMAND, "join", at, "--insecure", "--name", "north", "--data", str(data), "--model", values["model"]["name"]]
    member = subprocess.Popen([*join, "--home", str(folder / "home")], stdout=log, stderr=log, env={**os.environ, **more})
    highest = 0.0
    while member.poll() is None:  # rusage would have in it what this process had when it forked
        with contextlib.suppress(OSError):
            if found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{member.pid}/status").read_text()):
                highest = 1024.0 * int(found[1])
        time.sleep(0.02)
    if member.returncode or server.wait():
        raise SystemExit((folder / "log").read_text())
    return highest


if __name__ == "__main__":
    main()
