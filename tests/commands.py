"""What a user types, and what lies in the folders of experiments and runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedtailor import cli

COMMAND = [sys.executable, "-m", "fedtailor.cli"]
EXPERIMENT = """\
name = "tiny"
rounds = {rounds}
[model]
name = "{model}"
[data]
{data}
[clients]
{clients}
partition = {{ kind = "natural", column = "user" }}
[technique]
kind = "lora"
rank = 2
[train]
batch = 4
lr = 0.05
"""


class Printed(NamedTuple):
    code: int
    out: str
    err: str


def write_experiment(folder: Path, model: Path, rounds: int, data: str, clients: str) -> None:
    """The file e.toml; `data` and `clients` are lines of those sections."""
    text = EXPERIMENT.format(model=model, rounds=rounds, data=data, clients=clients)
    (folder / "e.toml").write_text(text, encoding="utf-8")


def csv_of(rows: Iterable[tuple[str, ...]], columns: str = "text,label,user") -> str:
    """The text of a csv file; no cell needs quotes."""
    return "".join(",".join(row) + "\n" for row in (columns.split(","), *rows))


def sets(**changes: Any) -> str:
    """--set options; dots are written as two underscores."""
    return " ".join(shlex.join(["--set", f"{key.replace('__', '.')}={value}"]) for key, value in changes.items())


def in_process(*words: str, folder: Path | None = None) -> int:
    """The exit code of `fedtailor` with these words, run in this process and in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.chdir(folder)
        patch.setattr(sys, "argv", ["fedtailor", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def until_checkpoint(process: subprocess.Popen[Any], folder: Path) -> None:
    """Waits until the run in `folder` has its first checkpoint, or is over."""
    until = time.monotonic() + 120
    while not (folder / "state" / "checkpoint.json").is_file() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run folder tells of each round."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
