"""Tables for a terminal. Nothing heavy is imported here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.table import Table


def lines_of(members: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(head, body) of a table: who is attached since when, or away for how long; the round of what it works on, and how long that has taken."""
    now = time.time()

    def since(m: Any) -> str:
        return (
            time.strftime("%H:%M:%S", time.localtime(now - m["seconds"])) if m["attached"] else f"away for {m['seconds']:,.0f} s"
        )

    head = ["member", "attached since", "round", "waiting, s", "MB in", "MB out"]
    body = [
        [
            name,
            since(m),
            "" if m["round"] is None else str(m["round"]),
            "" if m["round"] is None else f"{m['waiting']:,.0f}",
            f"{m['bytes_in'] / 1e6:,.2f}",
            f"{m['bytes_out'] / 1e6:,.2f}",
        ]
        for name, m in members.items()
    ]
    return head, body


def table(head: list[str], body: list[list[str]]) -> Table:
    """Names to the left, numbers to the right."""
    made = Table(*head)
    for column in made.columns:
        column.overflow = "fold"  # a narrow terminal breaks lines, it loses nothing
    for column in made.columns[1:]:
        column.justify = "right"
    for line in body:
        made.add_row(*line)
    return made
