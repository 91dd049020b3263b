"""What of a member's reply is looked at before an algorithm sees it."""

from __future__ import annotations

from fedtailor.core import Algorithm, Message
from fedtailor.federation.frames import Header
from fedtailor.trees import is_finite

MOST = 1e30
"""No number about a reply is as large as this."""


def complaint(algorithm: Algorithm, letter: Message, reply: Message, rows: float) -> str:
    """Why a reply does not reach the algorithm; "" if it does. `rows`: the most that it can count for."""
    if not is_finite(reply.body) or not all(abs(x) < MOST for x in reply.info.values()):
        return "its reply is not finite"
    if not 0 <= reply.info.get("n", 0) <= rows:
        return f"its reply counts for {reply.info['n']:g} rows, where it has {rows:g}"
    return algorithm.check(letter, reply) if algorithm.check else ""


def spent(note: Header, name: str) -> float:
    """A number that a member tells of its own work; 0 where it is none."""
    told = note.get(name)
    return float(told) if isinstance(told, int | float) and 0 <= told < MOST else 0.0
