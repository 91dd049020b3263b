"""The ledger: every cost is counted where it arises, none is guessed. Bytes are those of the encoded messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedtailor.core import ClientId, Forward, Loss, Tree
from fedtailor.trees import tree_map

COLUMNS = ("letters", "replies", "bytes_down", "bytes_up", "flops", "simulated_seconds", "examples")


class Ledger:
    """Totals by client, and the lines of the round that is running."""

    def __init__(self) -> None:
        self.clients: dict[ClientId, dict[str, float]] = {}
        self.round: dict[ClientId, dict[str, float]] = {}
        self.pairs = {"letters": 0, "replies": 0}  # of a client and a round with at least one of them

    def add(self, client: ClientId, **amounts: float) -> None:
        for table in (self.clients, self.round):
            line = table.setdefault(client, dict.fromkeys(COLUMNS, 0.0))
            for name, amount in amounts.items():
                line[name] = line.get(name, 0.0) + amount

    def note(self, client: ClientId, **values: float) -> None:
        """Values of this round that are no amounts: they are not added up."""
        self.round.setdefault(client, dict.fromkeys(COLUMNS, 0.0)).update(values)

    def close_round(self) -> dict[ClientId, dict[str, float]]:
        """The finished round's lines; the next round starts with none."""
        done, self.round = self.round, {}
        for by in self.pairs:
            self.pairs[by] += sum(line.get(by, 0.0) > 0 for line in done.values())
        return done

    def total(self, name: str) -> float:
        return sum(line.get(name, 0.0) for line in self.clients.values())

    def per_client_round(self, name: str, by: str) -> float:
        """Mean of a column over the rounds of each client in which letters were sent, or replies received: a round may have many."""
        return self.total(name) / self.pairs[by] if self.pairs[by] else 0.0

    def dump(self) -> dict[str, Any]:
        return {"clients": self.clients, "pairs": self.pairs}

    def load(self, dumped: dict[str, Any]) -> None:
        self.clients, self.pairs = dumped["clients"], dumped["pairs"]


def count_flops(
    forward: Forward, loss: Loss | None, params: Tree, batch_of: Callable[[int], dict[str, Tensor]], ragged: bool
) -> Callable[[int, int], float]:
    """(rows, width) -> operations of one training step, forward and backward, or of a forward pass alone where there is no loss.

    Counted on the real step. A transformer's count is a quadratic in the width (linear layers, attention, a constant for the
    head), so three counted steps give it exactly; a test compares it with a counted step of another width. Images have one width.
    """

    def counted(width: int) -> float:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        leaves = tree_map(lambda t: t.detach().clone().requires_grad_(bool(loss) and t.is_floating_point()), params)
        # The counter knows the matrix products of the plain kernel, not the fused CPU one.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if loss:
                loss(forward, leaves, batch_of(width), {}).backward()
            else:
                with torch.no_grad():  # around both: a view of what wants a gradient confuses the counter
                    forward(leaves, batch_of(width))
        return float(counter.get_total_flops())

    if not ragged:
        each = counted(1)
        return lambda rows, width: rows * each
    at = [8, 16, 24]
    y = [counted(width) for width in at]
    second = (y[2] - 2 * y[1] + y[0]) / (2 * 8 * 8)
    first = (y[1] - y[0]) / 8 - second * (at[0] + at[1])
    constant = y[0] - first * at[0] - second * at[0] ** 2
    return lambda rows, width: rows * (constant + first * width + second * width * width)
