"""A federation where NVIDIA FLARE runs already: a job is values and no code, and ends in the bits of the simulation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc")

from commands import COMMAND, in_process, read
from fedtailor.config import Experiment
from fedtailor.folder import written
from owners import NAMES, Owners, owners

ALLOWED = ["fedtailor.flare", "nvflare.collab.runtime"]
"""What every site adds to its `class_allow_list`."""


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
        text = f'data = "{path}"\nmodel = "{owners.model}"\nhome = "{folder / "home-{site}"}"\n'
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return str(folder / "{site}.toml")


def environment(owners: Owners, folder: Path) -> dict[str, str]:
    source = str(Path(__file__).parents[1] / "src")
    paths = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p)
    more = {"FEDTAILOR_MEMBER": site_files(owners, folder), "FEDTAILOR_RUN": str(folder / "runs"), "PYTHONPATH": paths}
    return {**os.environ, **more, "OMP_NUM_THREADS": "1"}


def exported(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


SECTIONS: list[Any] = [
    pytest.param({"technique": {"kind": "prefix", "length": 3}}, id="fedavg, prefix"),
    pytest.param({"algorithm": {"kind": "scaffold"}, "train": {"optimizer": "sgd"}}, id="scaffold, lora"),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sections", SECTIONS)
def test_flare_ends_in_the_bits_of_the_simulation(three: Owners, tmp_path: Path, sections: dict[str, Any]) -> None:
    """FLARE's own simulator: its server, its sites in processes, its calls between them."""
    pytest.importorskip("nvflare.collab")
    path = experiment_file(three.apart(**sections), tmp_path)
    assert in_process("submit", str(path), "--to", "nvflare", "--export", str(tmp_path / "jobs")) == 0
    local = tmp_path / "ws" / "local"
    local.mkdir(parents=True)
    (local / "resources.json").write_text(json.dumps({"format_version": 2, "class_allow_list": ALLOWED}), encoding="utf-8")
    command = ["-m", "nvflare.cli", "simulator", str(tmp_path / "jobs" / "owners"), "-w", str(tmp_path / "ws")]
    command += ["-c", ",".join(NAMES), "-t", str(len(NAMES))]
    ended = subprocess.run(
        [sys.executable, *command], env=environment(three, tmp_path), capture_output=True, text=True, timeout=800, cwd=tmp_path
    )
    found = tmp_path / "runs" / "owners" / "summary.json"
    assert found.is_file(), ended.stdout[-6000:] + ended.stderr[-6000:]
    alone = three.simulated(tmp_path / "simulated", **sections)
    same = ["state_hash", "global_test", "clients_mean", "bytes_total", "flops_total", "example_passes", "rounds"]
    assert {k: read(found)[k] for k in same} == {k: alone[k] for k in same}
    for name in NAMES:
        assert (tmp_path / f"home-{name}" / "owners" / "adapter" / "adapter_config.json").is_file()
