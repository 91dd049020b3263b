"""What a run asks of an engine, wherever the clients are, and what all engines do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fedtailor.core import ClientId, Letters, Message, Talk, Tree
from fedtailor.engines.clients import Place, Sites


class Engine(Protocol):
    """Holds conversations; what it carries from round to round is `dump`ed into checkpoints."""

    own_states_here: bool  # or with their owners, as their data is

    @property
    def clock(self) -> float:
        """Seconds since the run began: simulated, or real where clients are."""

    def converse(self, talk: Talk, round: int, sites: Sites | None = None) -> Any:
        """Drive a conversation to its end and return its value; with `sites` it is an evaluation among them."""
        ...

    def dump(self) -> Tree: ...

    def load(self, dumped: Tree) -> None: ...

    def finish(self) -> None:
        """The run is done, not interrupted: what is only of use while it goes on can go."""
        ...

    def close(self) -> None: ...


def hold(
    talk: Talk, round: int, notice: Callable[[str], None], exchange: Callable[[Letters, Place], dict[ClientId, Message]]
) -> Any:
    """Drive a conversation to its end and return its value; `exchange` makes replies of the letters of each of its yields."""
    inbox: dict[ClientId, Message] | None = None
    step = 0
    while True:
        try:
            letters = talk.send(inbox) if inbox is not None else next(talk)
        except StopIteration as end:
            return end.value
        if not isinstance(letters, Letters):
            letters = Letters(letters)
        step += 1
        if letters.note:
            notice(f"round {round}: {letters.note}")
        inbox = exchange(letters, Place(round, step))
