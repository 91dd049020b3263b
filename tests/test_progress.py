"""What a terminal shows of a run: bars, and of one that is served its members; elsewhere a line a round."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtailor.progress import MOST, watching

LINE = {"round": 1, "loss": 0.5, "valid": None, "seconds": 2.0}


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, color_system=None)


def shown(terminal: bool, members: dict[str, Any], **how: Any) -> str:
    where = console(terminal)
    with watching(where, 3, **how) as watch:
        watch.members(lambda: members)
        watch.round(LINE)
    return where.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def member(**values: Any) -> dict[str, Any]:
    return {"attached": True, "seconds": 61.0, "round": None, "waiting": 0.0, "bytes_in": 0, "bytes_out": 2_500_000, **values}


def test_a_terminal_shows_who_is_attached_and_for_whom_the_run_waits() -> None:
    told = shown(True, {"north": member(round=2, waiting=7.4), "south": member(attached=False, seconds=12.0)})
    rows = {line.split()[1]: line for line in told.splitlines() if "north" in line or "south" in line}
    assert [cell.strip() for cell in rows["north"].split("│")[3:-1]] == ["2", "7", "0.00", "2.50"]
    assert "away for 12 s" in rows["south"]
    assert "1/3" in told


def test_of_many_members_those_that_are_waited_for_are_shown() -> None:
    told = shown(True, {f"m{i:02d}": member(waiting=float(i)) for i in range(MOST + 5)})
    assert "m24" in told
    assert "m04" not in told
    assert "and 5 more" in told


@pytest.mark.parametrize("how", [(False, True), (True, False)], ids=["no terminal", "with --json"])
def test_elsewhere_there_is_a_line_a_round(how: tuple[bool, bool]) -> None:
    assert shown(how[0], {"north": member()}, live=how[1]) == "round 1/3, loss 0.5000, 2.0 s\n"


def test_a_served_run_shows_its_members(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    pytest.importorskip("grpc")
    from fedtailor.federation.member import Own
    from owners import Federation, owners

    two, where = owners(tmp_path, folders("bert"), names=("north", "south")), console(True)
    with watching(where, 2) as watch:
        federation = Federation(two.apart(), tmp_path, watch=watch)
        for name, path in two.own.items():
            federation.member(name, Own(str(path), models=(str(two.model),)), wait=False)
        assert isinstance(federation.end().summary, dict)
    last = where.file.getvalue().rpartition("attached since")[2]  # type: ignore[attr-defined]
    assert "north" in last
    assert "south" in last
