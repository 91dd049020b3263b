"""A member's process: it dials, takes part, and ends with the federation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtailor.federation.dial import Dial
from fedtailor.federation.doors import Doors
from fedtailor.federation.member import Limits, Member, Own
from fedtailor.federation.shelf import arriving


def join(
    server: str, doors: Doors, home: Path, own: Own, limits: Limits, notice: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Take part in the federation at `server` until it is over; returns what came of it.

    Raises:
        RunError: the server refuses this member, or the home cannot be written. ConfigError, DataError: what this member has does not suit
            the experiment.
    """
    dial = Dial(server, doors.name, doors.credentials, arriving(home), limits.memory, notice)
    member = Member(doors.name, dial, home, own, limits, notice)
    dial.open()
    try:
        return member.serve()
    finally:
        dial.close()
