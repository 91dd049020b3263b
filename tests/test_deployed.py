"""A federation as it is deployed: processes of their own, mutual TLS, and kills of either side at any moment."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc")

import tomli_w
from safetensors.torch import load_file, save_file

from commands import COMMAND, read
from fedtailor.federation import keys
from fedtailor.folder import plain
from owners import Owners, owners

SECTIONS: dict[str, Any] = {"rounds": 12, "train": {"epochs": 6.0, "optimizer": "sgd"}, "algorithm": {"kind": "scaffold"}}
"""Long enough to be killed in the middle, with states of the clients' own."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Process:
    """A command that runs; its standard error is in a file."""

    def __init__(self, log: Path, *words: str) -> None:
        self.log = log
        handler = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a suite run in the background would hand on that it is ignored
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        signal.signal(signal.SIGINT, handler)

    @property
    def pid(self) -> int:
        return self._process.pid

    def until(self, pattern: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if re.search(pattern, self.log.read_text(encoding="utf-8")):
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no '{pattern}' in {self.log}: {self.log.read_text(encoding='utf-8')}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self, seconds: float = 180) -> int:
        return self._process.wait(seconds)


@pytest.fixture
def started() -> Iterator[Callable[..., Process]]:
    """Starts commands; those that are left are killed when the test is over."""
    processes: list[Process] = []

    def start(log: Path, *words: str) -> Process:
        processes.append(Process(log, *words))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


class Deployed:
    """A server and two owners who are invited: commands in one folder."""

    def __init__(self, folder: Path, two: Owners, sections: dict[str, Any], start: Callable[..., Process]) -> None:
        self.folder, self.two, self.run, self._start = folder, two, folder / "run", start
        self.address, self.keys = f"127.0.0.1:{free_port()}", folder / "keys"
        (folder / "e.toml").write_text(tomli_w.dumps(plain(two.apart(**sections))), encoding="utf-8")
        keys.init(self.keys)
        self.tokens = {name: keys.invite(self.keys, name) for name in two.own}

    def serve(self, *more: str) -> Process:
        words = (
            "serve",
            str(self.folder / "e.toml"),
            "--at",
            self.address,
            "--keys",
            str(self.keys),
            "--out",
            str(self.run),
            *more,
        )
        return self._start(self.folder / "serve.log", *words)

    def join(self, name: str, *more: str, model: Path | None = None) -> Process:
        words = ("--data", str(self.two.own[name]), "--model", str(model or self.two.model), "--home", str(self.folder / name))
        return self._start(self.folder / f"{name}.log", "join", self.address, *words, *more)


def test_server_and_two_owners_over_tls_survive_kills(
    tmp_path: Path, folders: Callable[[str], Path], started: Callable[..., Process]
) -> None:
    two = owners(tmp_path, folders("bert"), names=("north", "south"))
    alone = two.simulated(tmp_path / "simulated", **SECTIONS)
    deployed = Deployed(tmp_path, two, SECTIONS, started)
    server = deployed.serve()
    server.until("listening on")
    members = {name: deployed.join(name, "--token", token) for name, token in deployed.tokens.items()}
    server.until(r"round 2/")
    members["south"].kill()
    server.until("south is cut off", seconds=10)
    members["south"] = deployed.join("south")  # it is known now: no token
    server.until(r"round 5/")
    server.kill()
    server = deployed.serve("--resume")
    assert server.end() == 0, server.log.read_text()
    assert [member.end() for member in members.values()] == [0, 0]
    summary = read(deployed.run / "summary.json")
    same = ("state_hash", "global_test", "clients_mean", "rounds")
    assert {k: summary[k] for k in same} == {k: alone[k] for k in same}
    assert (tmp_path / "north" / "adapter" / "adapter_config.json").is_file()
    refused: dict[str, Any] = {"a token is used once": ("--token", deployed.tokens["north"], "--home", str(tmp_path / "again"))}
    server = deployed.serve("--resume")
    server.until("listening on")
    for why, words in refused.items():
        other = started(tmp_path / "again.log", "join", deployed.address, "--data", str(two.own["north"]), *words)
        assert other.end() == 4, why
    assert "used" in (tmp_path / "again.log").read_text()


def without(layers: range, model: Path, folder: Path) -> Path:
    """A copy of a model's folder in which these layers are not."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in weights.items() if not any(f".layer.{i}." in name for i in layers)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_split_run_over_tls_where_no_member_has_the_whole_model(
    tmp_path: Path, folders: Callable[[str], Path], started: Callable[..., Process]
) -> None:
    """FlexP with two cuts: north has the embeddings and the head, south the first layer too, and neither has another layer on its disk."""
    two = owners(tmp_path, folders("bert"), names=("north", "south"))
    sections: dict[str, Any] = {"algorithm": {"kind": "flexp", "front": [0, 1], "back": 0}}
    alone = two.simulated(tmp_path / "simulated", **sections)
    deployed = Deployed(tmp_path, two, sections, started)
    server = deployed.serve()
    server.until("listening on")
    members = []
    for first, (name, token) in enumerate(deployed.tokens.items()):
        model = without(range(first, 2), two.model, tmp_path / f"model-{name}")
        members.append(deployed.join(name, "--token", token, model=model))
    assert server.end() == 0, server.log.read_text()
    assert [member.end() for member in members] == [0, 0]
    summary = read(deployed.run / "summary.json")
    same = ("state_hash", "clients_mean", "rounds", "bytes_total")
    assert {k: summary[k] for k in same} == {k: alone[k] for k in same}
    assert all((tmp_path / name / "ends" / "ends.json").is_file() for name in two.own)
