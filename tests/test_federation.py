"""A federation over real lines: what is simulated is what is deployed, and nobody gets in or more than is due."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc")

from commands import read
from fedtailor.federation.member import Own
from owners import NAMES, Owners, federated, owners


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Owners:
    return owners(tmp_path_factory.mktemp("owners"), folders("bert"))


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"technique": {"kind": "prefix", "length": 3}}, id="fedavg, prefix"),
        pytest.param({"algorithm": {"kind": "fedex"}}, id="fedex, lora"),
        pytest.param({"algorithm": {"kind": "scaffold"}, "train": {"optimizer": "sgd"}}, id="scaffold, lora"),
        pytest.param({"algorithm": {"kind": "distil", "rows": 8}}, id="distil, lora"),
        pytest.param({"algorithm": {"kind": "flexp", "front": 1, "back": 0}}, id="flexp, lora"),
        pytest.param({"algorithm": {"kind": "flexp", "front": [0, 1], "back": 0}}, id="flexp, cut in two ways"),
        pytest.param(
            {"algorithm": {"kind": "splitfed", "front": 0, "back": 1}, "technique": {"kind": "full"}}, id="splitfed, full"
        ),
        pytest.param(
            {
                "algorithm": {"kind": "pfsl", "front": 1, "back": 0},
                "technique": {"kind": "prefix", "length": 2},
                "train": {"steps": 2},
            },
            id="pfsl, prefix",
        ),
        pytest.param({"algorithm": {"kind": "fedfomo", "m": 2}, "clients": {"valid": 0.3}}, id="fedfomo, lora"),
        pytest.param({"algorithm": {"kind": "fedmosaic", "samples": 1}}, id="fedmosaic, lora"),
        pytest.param(
            {"algorithm": {"kind": "ddome", "experts": 3, "k": 1, "anchors": 1}, "train": {"optimizer": "sgd"}}, id="ddome, lora"
        ),
        pytest.param(
            {"algorithm": {"kind": "fed_influence", "samples": 2}, "train": {"optimizer": "sgd"}}, id="fed_influence, lora"
        ),
        pytest.param({"filters": {"up": ["int8"], "down": ["bf16"]}}, id="fedavg, int8 with error feedback"),
        pytest.param({"algorithm": {"kind": "asynchronous"}}, id="asynchronous, lora"),
        pytest.param({"technique": {"kind": "full"}, "clients": {"per_round": 2}}, id="fedavg, full, two a round"),
    ],
)
def test_what_is_simulated_is_what_is_deployed(three: Owners, tmp_path: Path, sections: dict[str, Any]) -> None:
    alone = three.simulated(tmp_path / "simulated", **sections)
    served = federated(three, tmp_path, **sections)
    assert isinstance(served.summary, dict), (served.summary, served.notices)
    same = ["state_hash", "clients_mean", "bytes_total", "flops_total", "example_passes", "rounds", "train_rows"]
    if not (
        tmp_path / "simulated" / "adapter" / "personal"
    ).is_dir():  # a personal model is at its owner's, the global test set is not
        same.append("global_test")
    assert {k: served.summary[k] for k in same} == {k: alone[k] for k in same}
    for name in NAMES:
        told = served.members[name]
        assert isinstance(told, dict), told
        assert told["state_hash"] == alone["state_hash"]
        made = sections.get("algorithm", {})
        kept = "ends.json" if "front" in made else "gate.safetensors" if "experts" in made else "adapter_config.json"
        assert (Path(told["adapter"]) / kept).is_file() or sections.get("technique") == {"kind": "full"}
    assert read(tmp_path / "run" / "summary.json")["state_hash"] == alone["state_hash"]


def test_members_of_different_models(three: Owners, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Each aligns its own model with the server's, and the pieces that cross make the simulation's state."""
    sections: dict[str, Any] = {
        "algorithm": {"kind": "fedmosaic", "samples": 1, "align_rows": 8, "align_steps": 10},
        "technique": {"kind": "colora", "rank": 2, "blocks": 2},
        "data": {"public": str(three.public)},
        "clients": {"kinds": [{}, {"model": {"name": str(folders("distilbert"))}}]},
    }
    alone = three.simulated(tmp_path / "simulated", **sections)
    # Who is of the server's kind needs its model alone, in a folder of its own; who is of another needs both.
    copies = {
        folder: str(shutil.copytree(folder, tmp_path / Path(folder).name)) for folder in map(folders, ("bert", "distilbert"))
    }
    (bert, here), (distilbert, there) = ((str(folder), copy) for folder, copy in copies.items())
    models = {"north": (f"{bert}={here}", f"{distilbert}={there}")}

    def own(name: str) -> Own:
        return Own(str(three.own[name]), models=models.get(name, (here,)), public=str(three.public))

    served = federated(three, tmp_path, own, **sections)
    assert isinstance(served.summary, dict), (served.summary, served.notices)
    same = ["state_hash", "clients_mean", "bytes_total", "flops_total"]
    assert {k: served.summary[k] for k in same} == {k: alone[k] for k in same}
    for name in NAMES:
        told = served.members[name]
        assert isinstance(told, dict), told
        assert ("distilbert" in (Path(told["adapter"]) / "adapter_config.json").read_text(encoding="utf-8")) == (name == "north")
