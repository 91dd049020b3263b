"""What a run asks of an engine, wherever the clients are."""

from __future__ import annotations

from typing import Any, Protocol

from fedtailor.core import Talk, Tree
from fedtailor.engines.clients import Sites


class Engine(Protocol):
    """Holds conversations; what it carries from round to round is `dump`ed into checkpoints."""

    clock: float  # seconds since the run began: simulated, or real where clients are
    own_states_here: bool  # or with their owners, as their data is

    def converse(self, talk: Talk, round: int, sites: Sites | None = None) -> Any:
        """Drive a conversation to its end and return its value; with `sites` it is an evaluation among them."""
        ...

    def dump(self) -> Tree: ...

    def load(self, dumped: Tree) -> None: ...

    def finish(self) -> None:
        """The run is done, not interrupted: what is only of use while it goes on can go."""
        ...

    def close(self) -> None: ...
