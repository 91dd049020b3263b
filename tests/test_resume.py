"""A run that is killed at any moment and resumed ends as one that was not: the same state, the same lines, to the bit."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import COMMAND, csv_of, in_process, lines, read, sets, until_checkpoint, write_experiment
from tiny import LABELS

KILLS = 4
ROUNDS = 6
DEVICES = [{"name": "slow", "gflops": 0.001, "latency_ms": 5}, {"name": "fast", "gflops": 0.004, "uplink_mbps": 1}]
# What each of these carries from round to round, besides the model.
CASES: dict[str, dict[str, Any]] = {
    "what int8 rounded off": {"filters.up": ["int8"], "algorithm.kind": "fedadam"},
    "control variates": {"algorithm.kind": "scaffold", "train.optimizer": "sgd"},
    "replies under way": {
        "algorithm.kind": "asynchronous",
        "algorithm.buffer": 2,
        "clients.per_round": 4,
        "clients.devices": DEVICES,
    },
    "personal models": {"algorithm.kind": "local"},
}
MEASURED = ("seconds", "peak_memory_bytes")  # differ from run to run


def value(of: Any) -> str:
    if isinstance(of, dict):
        return "{" + ", ".join(f"{name} = {value(part)}" for name, part in of.items()) + "}"
    return f"[{', '.join(map(value, of))}]" if isinstance(of, list) else json.dumps(of)


def command(changes: dict[str, Any], out: str, *more: str) -> list[str]:
    options = sets(**{key: value(of) for key, of in changes.items()})
    return ["run", "e.toml", "--out", out, *shlex.split(options), *more]


def finished(words: list[str]) -> None:
    assert in_process(*words) == 0, shlex.join(words)


def told(folder: Path) -> list[dict[str, Any]]:
    return [{key: of for key, of in line.items() if key not in MEASURED} for line in lines(folder)]


def summary(folder: Path) -> dict[str, Any]:
    return {key: of for key, of in read(folder / "summary.json").items() if key not in (*MEASURED, "seconds_total")}


def write_inputs(folder: Path, model: Path) -> None:
    rows = [(f"{LABELS[k % 3]} w{k % 29} fox", LABELS[k % 3], f"u{k % 4}") for k in range(60)]
    (folder / "d.csv").write_text(csv_of(rows), encoding="utf-8")
    write_experiment(folder, model, ROUNDS, 'name = "d.csv"', "count = 4\nper_round = 3")


@pytest.fixture
def here(tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    write_inputs(tmp_path, folders("bert"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Imports once, then runs each command line in a child that kills itself, as kill -9 would, when so many calls were made of
# what a run does again and again. Prints how each child ended.
KILLER = """
import json, os, signal, sys
import torch
from fedtailor import cli, compare, predict, progress, report, run, wire
from fedtailor.engines import clients, states

torch.set_num_threads(1)
asked = json.load(sys.stdin)

def counted(function):
    def call(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

for module, name in ((wire, "encode"), (wire, "decode"), (wire, "atomically"), (wire, "save_file"), (os, "replace"),
                     (os, "fsync"), (states.States, "_sweep"), (clients.Clients, "_answered")):
    setattr(module, name, counted(getattr(module, name)))
ends = []
for left, words in asked:
    child = os.fork()
    if not child:
        sys.argv[1:] = words
        os.dup2(2, 1)
        cli.main()
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> tuple[Path, dict[str, list[int]]]:
    """A folder with a run of each case that was killed again and again, each time resuming the last; how each time ended."""
    folder = tmp_path_factory.mktemp("killed")
    write_inputs(folder, folders("bert"))
    asked = [
        (draw.randrange(8, 70), command(changes, f"cut {case}", "--resume"))
        for case, changes in CASES.items()
        for draw in [random.Random(case)]
        for _ in range(KILLS)
    ]
    words = [sys.executable, "-c", KILLER]
    done = subprocess.run(words, cwd=folder, input=json.dumps(asked), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert set(ends) <= {-9, 0}, done.stderr
    return folder, {case: ends[k * KILLS : (k + 1) * KILLS] for k, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_never_killed(
    case: str, killed: tuple[Path, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, ends = killed
    monkeypatch.chdir(here)
    assert ends[case].count(-9) >= 2
    cut, whole = here / f"cut {case}", here / f"whole {case}"
    finished(command(CASES[case], whole.name))
    finished(command(CASES[case], cut.name, "--resume"))
    assert summary(cut) == summary(whole)
    assert told(cut) == told(whole)
    assert (cut / "clients.csv").read_bytes() == (whole / "clients.csv").read_bytes()
    for path in sorted((whole / "adapter").rglob("*.safetensors")):
        assert (cut / path.relative_to(whole)).read_bytes() == path.read_bytes()
    # Nothing is left behind either.
    kinds = [sorted(path.name.rpartition("-")[0] for path in (folder / "state").iterdir()) for folder in (cut, whole)]
    assert kinds[0] == kinds[1]


def test_two_processes_never_write_to_one_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is taken for dead, and is not: the second one says so, and the first is not harmed."""
    import fcntl

    first = command({"rounds": 2}, "run")
    finished(first)
    before = (here / "run" / "rounds.jsonl").read_bytes()
    holder = os.open(here / "run", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert in_process(*first, "--resume") == 4
    assert "another process writes to 'run': wait until it ends, or name another --out" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert (here / "run" / "rounds.jsonl").read_bytes() == before
    os.close(holder)
    finished([*first, "--resume"])


def test_what_is_carried_is_there(here: Path) -> None:
    """The cases above mean something: each has a state besides the model after the first rounds."""
    from fedtailor.engines.states import States

    for case, changes in CASES.items():
        finished(command({**changes, "rounds": 2}, case))
        states = States(here / case / "state")
        found = states.resume()
        assert found is not None
        _, server, engine, _ = found
        kept = [states.read_own(f"u{k}") for k in range(4)]
        if case == "what int8 rounded off":
            assert all("filter" in own for own in kept if own)
            assert any(own for own in kept)
            assert server["optimizer"]
        elif case == "replies under way":
            assert engine["under_way"]
            assert engine["clock"] > 0
        else:
            assert any("algorithm" in own for own in kept)


def test_a_real_kill_at_a_real_moment(here: Path) -> None:
    """kill -9 from outside, some time after the first checkpoint."""
    changes = {**CASES["what int8 rounded off"], "rounds": 25, "evaluate.every": 0}
    finished(command(changes, "whole"))
    words = [*COMMAND, *command(changes, "cut")]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: how many clients are stacked depends on it
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one)
    until_checkpoint(process, here / "cut")
    time.sleep(random.Random(0).uniform(0, 0.5))
    process.kill()
    process.wait()
    assert not (here / "cut" / "summary.json").exists()
    assert 1 <= len((here / "cut" / "rounds.jsonl").read_bytes().splitlines()) < 25
    finished(command(changes, "cut", "--resume"))
    assert summary(here / "cut") == summary(here / "whole")
    assert told(here / "cut") == told(here / "whole")


def test_more_rounds_are_the_same_rounds(here: Path) -> None:
    """Three rounds and three more are six."""
    changes = CASES["control variates"]
    finished(command(changes, "whole"))
    finished(command({**changes, "rounds": 3}, "grown"))
    finished(command(changes, "grown", "--resume"))
    assert summary(here / "grown") == summary(here / "whole")
    assert told(here / "grown") == told(here / "whole")


def test_resuming_what_is_done_changes_nothing(here: Path) -> None:
    finished(command({}, "done"))
    before = summary(here / "done"), told(here / "done")
    finished(command({}, "done", "--resume"))
    assert (summary(here / "done"), told(here / "done")) == before


def test_a_line_that_a_kill_cut_short_is_dropped(here: Path) -> None:
    changes = {"rounds": 2}
    finished(command(changes, "cut"))
    whole = told(here / "cut")
    with (here / "cut" / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "coh')
    finished(command(changes, "cut", "--resume"))
    assert told(here / "cut") == whole


def test_the_bits_of_a_run_do_not_depend_on_the_number_of_cores(here: Path) -> None:
    """Two processes, one with a thread and one with two: the same groups, the same sums, the same hash."""
    found = []
    for threads in ("1", "2"):
        words = [*COMMAND, *command({}, f"on {threads}")]
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": threads})
        found.append((read(here / f"on {threads}" / "environment.json")["cpus"], read(here / f"on {threads}" / "summary.json")))
    assert [cpus for cpus, _ in found] == [1, 2]
    assert found[0][1]["state_hash"] == found[1][1]["state_hash"]
