"""The fixtures that all tests share: tiny random models on disk, and federations of them. Nothing here needs a network."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from commands import Printed, in_process
from federations import Outcome, World, run_world, world_of
from fedtailor.backbone import Backbone, load, quiet
from fedtailor.config import ModelSection
from fedtailor.core import stream
from fedtailor.techniques import TECHNIQUES, Technique
from tiny import CAUSAL, KINDS, LABELS, PADS, tiny, tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices: a second thread costs more than it brings, and one thread adds in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a folder written by save_pretrained."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(family))
                model = tiny(family)
            with torch.no_grad():  # biases start at zero: give them something to say
                for name, p in model.named_parameters():
                    if p.dim() == 1:
                        p.add_(torch.randn(p.shape, generator=stream(0, name)) * 0.1)
            with quiet():
                model.save_pretrained(made[family])
            if KINDS[family] == "image":
                from transformers import ViTImageProcessor

                ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(made[family])
            else:
                tokenizer(PADS[family]).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def backbones(folders: Callable[[str], Path]) -> Callable[[str], Backbone]:
    """family -> its frozen backbone, loaded once."""
    made: dict[str, Backbone] = {}

    def backbone(family: str) -> Backbone:
        if family not in made:
            labels = [] if family in CAUSAL else LABELS
            made[family] = load(ModelSection(name=str(folders(family))), KINDS[family], labels)
        return made[family]

    return backbone


@pytest.fixture(scope="session")
def techniques(backbones: Callable[[str], Backbone]) -> Callable[..., Technique]:
    """(family, kind, **options) -> the technique, made once."""
    made: dict[str, Technique] = {}

    def technique(family: str, kind: str, **options: Any) -> Technique:
        key = repr((family, kind, sorted(options.items())))
        if key not in made:
            made[key] = TECHNIQUES[kind](backbones(family), **options)
        return made[key]

    return technique


@pytest.fixture
def federation(techniques: Callable[..., Technique], tmp_path: Path) -> Callable[..., Outcome]:
    """Run any algorithm for a few rounds: federation("fedit", technique="lora", topts={"rank": 2}, rounds=3, ...)."""
    count = 0

    def run(
        kind: str,
        family: str = "bert",
        technique: str = "lora",
        topts: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        rounds: int = 2,
        start: int = 0,
        cohorts: Mapping[int, list[str]] | None = None,
        stacked: bool = False,
        up: tuple[str, ...] = (),
        flops: Callable[[int, int], float] = lambda rows, width: 0.0,
        deadline: float = 0.0,
        **world: Any,
    ) -> Outcome:
        nonlocal count
        count += 1
        given = topts or ({"rank": 2} if technique == "lora" else {})
        made = techniques(family, technique, **given)
        world.setdefault("make", lambda backbone: TECHNIQUES[technique](backbone, **given))
        where = folder or tmp_path / f"run-{count}"
        ready = world_of(made, family, kind, **world)
        return run_world(ready, where, rounds, start, cohorts, stacked, up, world.get("seed", 0), flops, deadline)

    return run


@pytest.fixture
def world(techniques: Callable[..., Technique]) -> Callable[..., World]:
    """A federation to drive by hand."""

    def make(
        kind: str, family: str = "bert", technique: str = "lora", topts: Mapping[str, Any] | None = None, **options: Any
    ) -> World:
        given = topts or ({"rank": 2} if technique == "lora" else {})
        options.setdefault("make", lambda backbone: TECHNIQUES[technique](backbone, **given))
        return world_of(techniques(family, technique, **given), family, kind, **options)

    return make


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Runs a command line in the current folder: its exit code and what it printed."""

    def run(command: str, *words: str) -> Printed:
        capsys.readouterr()
        code = in_process(*shlex.split(command), *words)
        return Printed(code, *capsys.readouterr())

    return run
