"""A run on Ray's actors is the local engine's run: the same bits, the same ledger, whatever actor works, and whichever is lost."""

from __future__ import annotations

import copy
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch

from commands import Printed, csv_of, lines
from fedtailor import launch, wire
from fedtailor.config import Experiment, parse
from fedtailor.core import Message
from fedtailor.engines.clients import Done, Place
from fedtailor.engines.deals import Answer, Carried, Deal, Dealer, Result, Task, own_bytes, raised, taken, told, worked
from fedtailor.errors import ConfigError, DataError, FedtailorError, RunError
from fedtailor.folder import written
from fedtailor.run import Watch, run
from tiny import LABELS, same

ray = pytest.importorskip("ray")

from fedtailor.engines import ray_cluster  # noqa: E402
from fedtailor.engines.ray_cluster import Shares, Spread, Wanted, join, shares  # noqa: E402

MEASURED = ("seconds", "seconds_total", "peak_memory_bytes")  # differ from run to run
SGD = {"epochs": 1, "batch": 4, "lr": 0.05, "optimizer": "sgd"}
PREFIX = {"technique": {"kind": "prefix", "length": 2}}
CASES: dict[str, dict[str, Any]] = {
    "prefix, int8, lost letters": PREFIX
    | {"filters": {"up": ["int8"]}}
    | {"clients": {"count": 4, "devices": [{"name": "far", "gflops": 0.01, "uplink_mbps": 1, "latency_ms": 9, "dropout": 0.2}]}},
    "fedex": {"technique": {"kind": "lora", "rank": 2}, "algorithm": {"kind": "fedex"}},
    "distil": {"technique": {"kind": "lora", "rank": 2}, "algorithm": {"kind": "distil", "rows": 8}, "data": {"public": 0.2}},
    "flexp": {"technique": {"kind": "lora", "rank": 2}, "algorithm": {"kind": "flexp", "front": 0, "alignment": 0.5}},
}
SCAFFOLD = {**PREFIX, "algorithm": {"kind": "scaffold"}}

Runs = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for all runs of this module: a process that is on one stays there."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not see the tests
    assert join("")
    yield
    ray.shutdown()


class Seat:
    """An actor that outlives a run: to import torch takes longer than a run of this module."""

    def ready(self, *given: Any) -> Any:
        self.hand = launch.Hand(*given)
        return self.hand.ready()

    def work(self, *given: Any) -> Any:
        return self.hand.work(*given)


@pytest.fixture(scope="module")
def seats(cluster: None) -> list[Any]:
    return [ray.remote(Seat).options(num_cpus=0).remote() for _ in range(2)]


@pytest.fixture
def seated(seats: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take these actors in the place of new ones."""

    def new(self: Spread) -> Any:
        given, seat = (*self._given, self._shares.threads, False), seats[len(begun) % self._shares.actors]
        begun.append(seat)
        return SimpleNamespace(ready=SimpleNamespace(remote=lambda: seat.ready.remote(*given)), work=seat.work)

    begun: list[Any] = []
    monkeypatch.setattr(Spread, "_new", new)
    monkeypatch.setattr(ray_cluster, "_kill", lambda actor: None)


@pytest.fixture
def experiment(folders: Callable[[str], Path], tmp_path: Path) -> Callable[..., Experiment]:
    """An experiment on the tiny model and a few texts, clients one by one unless it says otherwise."""
    rows = [(f"{LABELS[k % 3]} w{k % 29} fox", LABELS[k % 3]) for k in range(60)]
    (tmp_path / "d.csv").write_text(csv_of(rows, "text,label"), encoding="utf-8")

    def make(changes: dict[str, Any], **engine: Any) -> Experiment:
        values = copy.deepcopy({"rounds": 2, "clients": {"count": 4}, "train": SGD, **changes})
        values["model"] = {"name": str(folders("bert"))}
        values["data"] = {"name": str(tmp_path / "d.csv"), **changes.get("data", {})}
        values["engine"] = {"stacked": False, "device": "cpu", **engine}
        return parse(values)

    return make


@pytest.fixture
def ran(experiment: Callable[..., Experiment], tmp_path: Path) -> Runs:
    """Everything that a run ends with and tells of its rounds, without what was measured."""

    def go(changes: dict[str, Any], out: str, resume: bool = False, watch: Watch = Watch(), **engine: Any) -> dict[str, Any]:
        found = run(experiment(changes, **engine), tmp_path / out, resume, watch)
        told = [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(tmp_path / out)]
        return {**{k: v for k, v in found.items() if k not in MEASURED}, "lines": told}

    return go


RAY = {"kind": "ray", "actors": 2}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("seated")
def test_it_is_the_local_run(case: str, ran: Runs, tmp_path: Path) -> None:
    assert ran(CASES[case], "ray", **RAY) == ran(CASES[case], "local")
    assert (tmp_path / "ray/clients.csv").read_bytes() == (tmp_path / "local/clients.csv").read_bytes()


@pytest.mark.usefixtures("cluster")
def test_a_lost_actor_changes_nothing(ran: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed while it works on the first round; its clients' control variates are carried on by others."""
    send, killed, notices = Spread._send, list[int](), list[str]()

    def sent(self: Spread, place: int, task: Any, letters: list[Any]) -> dict[Any, Any]:
        waiting = send(self, place, task, letters)
        if not killed:
            killed.append(place)
            ray.kill(self._actors[place])
        return waiting

    monkeypatch.setattr(Spread, "_send", sent)
    assert ran(SCAFFOLD, "ray", watch=Watch(notice=notices.append), **RAY) == ran(SCAFFOLD, "local")
    assert [line.partition(" (")[0] for line in notices] == ["round 1: a Ray actor was lost: 2 clients go to another"]


@pytest.mark.usefixtures("seated")
def test_a_run_is_resumed(ran: Runs) -> None:
    """With the own states that the engine kept."""
    ran({**SCAFFOLD, "rounds": 1}, "ray", **RAY)
    assert ran(SCAFFOLD, "ray", resume=True, **RAY) == ran(SCAFFOLD, "local")


@pytest.mark.usefixtures("seated")
def test_stacked_on_one_actor_it_is_the_stacked_run(ran: Runs) -> None:
    """The same clients together: the same groups, the same bits."""
    assert ran(PREFIX, "ray", kind="ray", actors=1, stacked=True) == ran(PREFIX, "local", stacked=True)


@pytest.mark.usefixtures("seated")
def test_stacked_on_two_actors_it_is_the_stacked_run_but_for_rounding(ran: Runs) -> None:
    two, local = ran(PREFIX, "ray", stacked=True, **RAY), ran(PREFIX, "local", stacked=True)
    assert [line["loss"] for line in two["lines"]] == pytest.approx([line["loss"] for line in local["lines"]], rel=1e-5)
    assert two["global_test_loss"] == pytest.approx(local["global_test_loss"], rel=1e-5)
    assert two["flops_total"] == local["flops_total"]


class Broken:
    """An actor that comes to its end before it is ready, or in its work."""

    def __init__(self, experiment: str, data: str, threads: int, gpu: bool) -> None:
        if threads < 0:
            raise ValueError("no such device")

    def ready(self) -> Any:
        return SimpleNamespace(error=None)

    def work(self, task: Any, *letters: bytes) -> Any:
        os._exit(1)


@pytest.mark.usefixtures("cluster")
def test_actors_that_are_lost_again_and_again_end_the_run(ran: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "Hand", Broken)
    monkeypatch.setattr(ray_cluster, "LOSSES", 1)
    notices: list[str] = []
    with pytest.raises(RunError, match=r"^Ray actors are lost again and again, the last one so: [^\n]+$"):
        ran(PREFIX, "ray", kind="ray", actors=1, watch=Watch(notice=notices.append))
    assert sum("was lost: 4 clients" in line for line in notices) == 2


@pytest.mark.usefixtures("cluster")
def test_actors_that_do_not_start_are_told_in_one_line(ran: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "Hand", Broken)
    monkeypatch.setattr(ray_cluster, "shares", lambda *of: Shares(1, -1, 1, 0))
    with pytest.raises(RunError, match=r"^Ray could not start 1 actor with 1 cores and 0 GPUs each: [^\n]+$"):
        ran(PREFIX, "ray", kind="ray")


@pytest.mark.usefixtures("seated")
def test_what_an_actor_finds_wrong_is_said_as_here(ran: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "fingerprint", lambda world: "of other data")
    with pytest.raises(RunError, match=r"^an actor reads other data than the machine that runs the experiment"):
        ran(PREFIX, "ray", **RAY)


def test_what_a_client_raises_keeps_its_class_and_its_line() -> None:
    def make(owner: Any, notice: Callable[[str], None]) -> Any:
        def work(*given: Any) -> Any:
            notice("seen")
            raise DataError("client c0: no rows")

        return SimpleNamespace(work=work)

    task = Task((Deal("c0", 0, b""),), Place(1, 1), "sites", False)
    answer = worked(make, lambda client, round: None, task, [wire.encode(Message("train"))])  # type: ignore[arg-type, return-value]
    assert answer == Answer((), ("seen",), ("DataError", "client c0: no rows"))
    for kind in (FedtailorError, ConfigError, DataError, RunError, wire.WireError):
        back = raised(told(kind("one line")))
        assert (type(back), str(back)) == (kind, "one line")


def test_own_states_go_with_their_letters_and_come_back() -> None:
    own = {"algorithm": {"control": torch.arange(3.0)}, "filter": {}}
    here, there = Carried([]), Carried([Deal("c0", 0, own_bytes(own)), Deal("c1", 0, own_bytes({}))])
    assert same(there.read_own("c0"), own)
    assert there.read_own("c1") == {}
    there.write_own("c1", own)
    result = Result("c1", None, there.written["c1"], 2.0, 3.0, "why")
    assert taken(result, here) == Done("c1", None, 2.0, 3.0, "why")
    assert here.written == {"c1": own_bytes(own)}


def test_clients_are_dealt_by_rows_and_stay() -> None:
    rows = {"a": 9, "b": 5, "c": 4, "d": 0, "e": 1}
    dealer = Dealer([0, 1])
    dealer.begin("round 1")
    # 9 | 5, 9 | 5 + 4, 9 + 1 (e) | 9, then d, which counts as one row, where there is less.
    assert dealer.deal(rows) == {0: ["a", "e"], 1: ["b", "c", "d"]}
    assert dealer.deal({"d": 0, "a": 9}) == {0: ["a"], 1: ["d"]}
    assert dealer.deal({"c": 4, "b": 5}, without=1) == {0: ["b", "c"]}
    dealer.begin("round 1")
    assert dealer.deal(rows) == {0: ["a", "b", "c", "e"], 1: ["d"]}
    dealer.begin("round 2")
    assert dealer.deal(rows) == {0: ["a", "e"], 1: ["b", "c", "d"]}
    dealer.close(0)
    assert dealer.deal(rows) == {1: ["a", "b", "c", "d", "e"]}
    assert dealer.deal({"a": 9}, without=1) == {1: ["a"]}  # there is no other


@pytest.mark.parametrize(
    ("wanted", "cpus", "gpus", "found"),
    [
        (Wanted(), 2, 0, Shares(1, 2, 1, 0)),
        (Wanted(), 1, 0, Shares(1, 1, 1, 0)),
        (Wanted(), 16, 0, Shares(8, 2, 1, 0)),
        (Wanted(), 16, 4, Shares(4, 4, 1, 1)),
        (Wanted(gpus=False), 16, 4, Shares(8, 2, 1, 0)),
        (Wanted(actors=3), 2, 0, Shares(3, 1, 1 / 2, 0)),
        (Wanted(actors=3), 8, 2, Shares(3, 2, 1, 1 / 2)),
    ],
)
def test_shares_of_a_cluster(wanted: Wanted, cpus: int, gpus: int, found: Shares) -> None:
    assert shares(wanted, cpus, gpus) == found


def test_nobody_at_the_address_is_one_line(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., Printed]
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as held:  # bound, and not listened at
        held.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{held.getsockname()[1]}", "nonsense"):
            values = written(experiment(PREFIX, kind="ray", address=address))
            (tmp_path / "e.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
            printed = typed("run", str(tmp_path / "e.toml"), "--out", str(tmp_path / address))
            errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
            assert printed.code == 4
            assert len(errors) == 1
            assert errors[0].startswith(f"error: engine.address '{address}': no Ray cluster answers there: ")


def test_what_is_missing_or_for_another_engine(experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    launch.check_engine(experiment(PREFIX, **RAY))
    with pytest.raises(ConfigError, match=r"^engine.actors does nothing with engine.kind 'local'"):
        launch.check_engine(experiment(PREFIX, actors=2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    launch.check_engine(experiment(PREFIX))
    with pytest.raises(ConfigError) as error:
        launch.check_engine(experiment(PREFIX, **RAY))
    assert str(error.value) == "engine.kind 'ray' needs an extra: pip install 'fedtailor[ray]'"
