"""A federation as it is deployed: processes of their own, mutual TLS, and kills of either side at any moment."""

from __future__ import annotations

import os
import re
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

from commands import COMMAND, in_process, read
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


def test_server_and_two_owners_over_tls_survive_kills(
    tmp_path: Path, folders: Callable[[str], Path], started: Callable[..., Process], capsys: pytest.CaptureFixture[str]
) -> None:
    two: Owners = owners(tmp_path, folders("bert"), names=("north", "south"))
    alone = two.simulated(tmp_path / "simulated", **SECTIONS)
    (tmp_path / "e.toml").write_text(tomli_w.dumps(plain(two.apart(**SECTIONS))), encoding="utf-8")
    keys, address, run = tmp_path / "keys", f"127.0.0.1:{free_port()}", tmp_path / "run"
    assert in_process("keys", "init", "--keys", str(keys)) == 0
    tokens: dict[str, str] = {}
    for name in two.own:
        capsys.readouterr()
        assert in_process("keys", "invite", name, "--keys", str(keys)) == 0
        tokens[name] = capsys.readouterr().out.strip()

    def serve(*more: str) -> Process:
        words = ("serve", str(tmp_path / "e.toml"), "--at", address, "--keys", str(keys), "--out", str(run), *more)
        return started(tmp_path / "serve.log", *words)

    def join(name: str, *more: str) -> Process:
        words = ("join", address, "--data", str(two.own[name]), "--model", str(two.model), "--home", str(tmp_path / name), *more)
        return started(tmp_path / f"{name}.log", *words)

    server = serve()
    server.until("listening on")
    members = {name: join(name, "--token", token) for name, token in tokens.items()}
    server.until(r"round 2/")
    members["south"].kill()
    server.until("south is cut off", seconds=10)
    members["south"] = join("south")  # it is known now: no token
    server.until(r"round 5/")
    server.kill()
    server = serve("--resume")
    assert server.end() == 0, server.log.read_text()
    assert [member.end() for member in members.values()] == [0, 0]
    summary = read(run / "summary.json")
    same = ("state_hash", "global_test", "clients_mean", "rounds")
    assert {k: summary[k] for k in same} == {k: alone[k] for k in same}
    assert (tmp_path / "north" / "adapter" / "adapter_config.json").is_file()
    refused: dict[str, Any] = {"a token is used once": ("--token", tokens["north"], "--home", str(tmp_path / "again"))}
    server = serve("--resume")
    server.until("listening on")
    for why, words in refused.items():
        other = started(tmp_path / "again.log", "join", address, "--data", str(two.own["north"]), *words)
        assert other.end() == 4, why
    assert "used" in (tmp_path / "again.log").read_text()
