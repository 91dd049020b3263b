"""A member's process: it dials, takes part, and ends with the federation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtailor.errors import RunError
from fedtailor.federation.dial import Dial
from fedtailor.federation.doors import Doors
from fedtailor.federation.member import Limits, Member, Own


def join(
    server: str, doors: Doors, home: Path, own: Own, limits: Limits, notice: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Take part in the federation at `server` until it is over; returns what came of it.

    Raises:
        RunError: the server refuses this member, or the home cannot be written. ConfigError, DataError: what this member has does not suit
            the experiment.
    """
    try:
        (home / "line").mkdir(parents=True, exist_ok=True)
        for path in (home / "line").iterdir():  # of a process that was killed
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to '{home}': {error.strerror}") from error
    dial = Dial(server, doors.name, doors.credentials, home / "line", limits.memory, notice)
    said = [0]

    def round(number: int, rounds: int, verb: str) -> None:
        if number != said[0]:
            said[0] = number
            notice(f"round {number}/{rounds}: {verb}")

    member = Member(doors.name, dial, home, own, limits, notice, round)
    dial.open()
    try:
        return member.serve()
    finally:
        dial.close()
