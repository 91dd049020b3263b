"""A federation where NVIDIA FLARE runs already: a job is values and no code, and ends in the bits of the simulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("grpc")

from commands import COMMAND, in_process, lines, read
from fedtailor.config import Experiment
from fedtailor.errors import ConfigError, RunError
from fedtailor.flare.job import submit
from fedtailor.folder import written
from kits import LEAD, allow, provisioned, running, told, until, workers
from owners import NAMES, Owners, owners


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Owners:
    return owners(tmp_path_factory.mktemp("owners"), folders("bert"))


def experiment_file(experiment: Experiment, folder: Path) -> Path:
    import tomli_w

    path = folder / "e.toml"
    path.write_text(tomli_w.dumps(written(experiment)), encoding="utf-8")
    return path


def site_files(owners: Owners, folder: Path) -> str:
    """What every site brings, a file each; the value of FEDTAILOR_MEMBER."""
    for name, path in owners.own.items():
        text = f'data = "{path}"\nmodel = "{owners.model}"\npublic = "{owners.public}"\nhome = "{folder / "home-{site}"}"\n'
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return str(folder / "{site}.toml")


def environment(owners: Owners, folder: Path) -> dict[str, str]:
    source = str(Path(__file__).parents[1] / "src")
    paths = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p)
    more = {"FEDTAILOR_MEMBER": site_files(owners, folder), "FEDTAILOR_RUN": str(folder / "runs"), "PYTHONPATH": paths}
    return {**os.environ, **more, "OMP_NUM_THREADS": "1"}


CASES: list[Any] = [
    pytest.param({"technique": {"kind": "prefix", "length": 3}}, False, id="fedavg, prefix"),
    pytest.param({"algorithm": {"kind": "scaffold"}, "train": {"optimizer": "sgd"}}, True, id="scaffold, lora, as tensors"),
    pytest.param({"algorithm": {"kind": "fedex"}}, False, id="fedex, lora"),
    pytest.param({"algorithm": {"kind": "distil", "rows": 8}}, False, id="distil, lora"),
    pytest.param({"algorithm": {"kind": "flexp", "front": 1, "back": 0}}, False, id="flexp, lora"),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("sections", "large"), CASES)
def test_flare_ends_in_the_bits_of_the_simulation(three: Owners, tmp_path: Path, sections: dict[str, Any], large: bool) -> None:
    """FLARE's own simulator: its server, its sites in processes, its calls between them; `large`: tiny messages count as large."""
    pytest.importorskip("nvflare.collab")
    path = experiment_file(three.apart(**sections), tmp_path)
    assert in_process("submit", str(path), "--to", "nvflare", "--export", str(tmp_path / "jobs")) == 0
    local = tmp_path / "ws" / "local"
    local.mkdir(parents=True)
    allow(local)
    command = ["-m", "nvflare.cli", "simulator", str(tmp_path / "jobs" / "owners"), "-w", str(tmp_path / "ws")]
    command += ["-c", ",".join(NAMES), "-t", str(len(NAMES))]
    env = environment(three, tmp_path)
    if large:
        text = "import fedtailor.flare.cargo as cargo\ncargo.LARGE, cargo.PIECE = 1000, 700\n"
        (tmp_path / "sitecustomize.py").write_text(text, encoding="utf-8")
        env["PYTHONPATH"] = os.pathsep.join((str(tmp_path), env["PYTHONPATH"]))
    ended = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=800, cwd=tmp_path)
    found = tmp_path / "runs" / "owners" / "summary.json"
    assert found.is_file(), ended.stdout[-6000:] + ended.stderr[-6000:]
    streamed = [log for log in (tmp_path / "ws").rglob("log.txt") if "downloaded to all" in log.read_text(encoding="utf-8")]
    assert bool(streamed) == large  # FLARE's word for what it does with tensors
    alone = three.simulated(tmp_path / "simulated", **sections)
    same = ["state_hash", "clients_mean", "bytes_total", "flops_total", "example_passes", "rounds"]
    if not (tmp_path / "simulated" / "adapter" / "personal").is_dir():
        same.append("global_test")
    assert {k: read(found)[k] for k in same} == {k: alone[k] for k in same}
    kept = "ends/ends.json" if "front" in sections.get("algorithm", {}) else "adapter/adapter_config.json"
    for name in NAMES:
        assert (tmp_path / f"home-{name}" / "owners" / kept).is_file()


def test_a_site_answers_no_other_site() -> None:
    pytest.importorskip("nvflare.collab")
    from fedtailor.flare.site import Participant

    with pytest.raises(RunError, match="'south' has no letters"):
        Participant("j").deliver("1", {}, b"", 0.0, context=SimpleNamespace(caller="south"))
    with pytest.raises(RunError, match="'south' has no letters"):
        Participant("j").collect("1", 0.0, context=SimpleNamespace(caller="south"))


def test_a_folder_that_is_no_kit(three: Owners, tmp_path: Path) -> None:
    pytest.importorskip("nvflare.collab")
    with pytest.raises(ConfigError, match="is no startup kit"):
        submit(tmp_path, tmp_path)


@pytest.mark.skipif(os.environ.get("FEDTAILOR_SLOW") != "1", reason="takes minutes: FEDTAILOR_SLOW=1")
@pytest.mark.timeout(1800)
def test_a_consortium_goes_on_after_a_worker_was_killed(three: Owners, tmp_path: Path) -> None:
    """Provisioned kits, a server and three sites on the loopback: a killed worker ends the job, which is then submitted again."""
    pytest.importorskip("nvflare.collab")
    sections: dict[str, Any] = {"technique": {"kind": "prefix", "length": 3}, "rounds": 40}
    path, env = experiment_file(three.apart(**sections), tmp_path), environment(three, tmp_path)
    kits, state = provisioned(tmp_path, NAMES), tmp_path / "runs" / "owners" / "state" / "checkpoint.json"
    command = [*COMMAND, "submit", str(path), "--to", "nvflare", "--admin", str(kits / LEAD), "--wait", "--json"]
    with running(kits, env) as processes:
        first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until("a first checkpoint", lambda: state.is_file() or first.poll() is not None, 400)
        assert state.is_file(), str(first.communicate()) + told(kits)
        for worker in workers(processes["north"]):
            worker.kill()
        _, told_first = first.communicate(timeout=400)
        assert first.returncode == 4, told_first + told(kits)
        assert "submit it again" in told_first
        done = len(lines(tmp_path / "runs" / "owners"))
        assert 0 < done < 40
        again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
        assert again.returncode == 0, again.stderr + told(kits)
    found = read(tmp_path / "runs" / "owners" / "summary.json")
    alone = three.simulated(tmp_path / "simulated", **sections)
    assert found["state_hash"] == alone["state_hash"]
    assert found["bytes_total"] == alone["bytes_total"]
    assert json.loads(again.stdout)["status"] == "FINISHED:COMPLETED"
