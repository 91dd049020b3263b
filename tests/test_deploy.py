"""The files for deploying are sound: their commands are ours, their options exist, what they name is there."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtailor.cli import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def commands() -> dict[str, set[str]]:
    """The options of each command, as typer makes them."""
    import typer.main

    group: Any = typer.main.get_command(app)
    return {name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} for name, command in group.commands.items()}


def check(words: list[str]) -> None:
    """A command of ours with options that it has."""
    known = commands()
    assert words[0] in known
    used = {word for word in words[1:] if word.startswith("--")}
    assert used <= known[words[0]], used - known[words[0]]


def test_the_compose_file() -> None:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert set(found) == {"services", "volumes"}
    for name, service in found["services"].items():
        assert set(service) <= {"build", "command", "volumes", "ports", "depends_on", "restart"}, name
        check(service["command"])
        build = service["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in found["volumes"] or source.startswith("."), volume
        assert set(service.get("depends_on", [])) <= set(found["services"])
    served = found["services"]["server"]["command"]
    assert (ROOT / served[1].lstrip("/")).is_file()


def test_the_image_takes_what_the_project_has() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for name in line.split():
            assert (ROOT / name).exists(), name
    assert "[grpc]" in text


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_units(path: Path) -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(path.read_text(encoding="utf-8"))
    assert unit.sections() == ["Unit", "Service", "Install"]
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[0].endswith("/fedtailor")
    check(words[1:])
    assert unit["Service"]["Restart"] == "on-failure"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_itself_finds_no_fault(path: Path, tmp_path: Path) -> None:
    here = tmp_path / path.name
    here.write_text(path.read_text(encoding="utf-8").replace("/usr/local/bin/fedtailor", "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
