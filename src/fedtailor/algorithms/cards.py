"""What a user wants to know of an algorithm before choosing it; `fedtailor list algorithms` shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
ANY = "any that trains"
HEADED = "any with a head and something else"
LAYERED = "lora, prefix, full, ia3, head"


class Card(NamedTuple):
    """|t| is the size of the technique's tree; sizes are of one client and round, without headers."""

    gives: str  # global: one model for all | personal: one a client | baseline
    up: str
    down: str
    rule: str  # exact: as published | our reading: of what is not all published | ours
    takes: str = ANY  # techniques


def card(gives: str, up: str, down: str, rule: str, takes: str = ANY) -> Callable[[F], F]:
    """Puts a `Card` on an algorithm; one without is listed without."""

    def on(algorithm: F) -> F:
        algorithm.card = Card(gives, up, down, rule, takes)  # type: ignore[attr-defined]
        return algorithm

    return on
