"""What tells one split algorithm from another, and what its clients and its server both know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedtailor.algorithms.fedavg import one_size
from fedtailor.core import ClientId, Job, Layers, Message, Part, Site, Tree, seed_of
from fedtailor.cut import cut_at
from fedtailor.errors import ConfigError
from fedtailor.optimizers import learning_rate, stepped
from fedtailor.trees import select

MASK = "attention_mask"
ENDS = ("front", "back")
EVERYBODY: ClientId = "everybody"
"""Whose the middle is where there is one for all."""


class Rules(NamedTuple):
    """What tells one split algorithm from another. Rounds count from 1."""

    cut: Callable[[Site], tuple[int, int]]  # layers of this client at the front and at the back; 0 at the back is the head alone
    moves: Callable[[int, str, str], bool] = lambda round, place, name: True  # is this tensor of front, middle or back trained?
    settle: Callable[[Tree, Mapping[ClientId, float]], Tree] = lambda middles, rates: middles  # after steps at these rates
    shared: bool = False  # one middle for all clients
    lockstep: bool = False  # everybody's step before anybody's next one
    ahead: bool = False  # a client that is done goes on with its next pass; else it waits for the round to end
    cache: float = 1e9  # bytes that the server keeps of what frozen fronts said
    delta: float = 0.0  # share of its numbers that a row is sent of again where the front trains; 0: all of them
    room: float = 1e9  # bytes of such rows that the server holds
    start: Callable[[Tree], Tree] = lambda tree: tree  # what everybody makes of the technique's initial tree


class Ground(NamedTuple):
    """Where a split algorithm stands: its rules on this job."""

    job: Job
    layers: Layers
    rules: Rules

    def cut(self, front: float, back: float) -> tuple[Part, Part, Part]:
        """(front, middle, back).

        Raises:
            ConfigError: no such cut.
        """
        return cut_at(self.layers, int(front), int(back))

    def moving(self, tree: Tree, place: str, number: int) -> list[str]:
        """Names of the tensors of front, middle or back that are trained in this pass."""
        return [name for name in tree if self.rules.moves(number, place, name)]

    def seed(self, root: int, client: ClientId, place: str, number: int, step: int) -> int | None:
        """Of what front, middle or back of a client drop in a step: the same however often it is made. None without dropout."""
        return seed_of(root, "dropout", client, number, step, place) if self.job.plan.dropout else None

    def rate(self, at: Mapping[str, Any]) -> float:
        """The learning rate of a step: at has pass, step and steps."""
        return learning_rate(self.job.plan.at(int(at["pass"])), int(at["step"]), int(at["steps"]))

    def descend(self, tree: Tree, moments: Tree, place: str, slopes: Tree, at: Mapping[str, Any]) -> tuple[Tree, Tree]:
        """(tree, optimiser state) after a step of the tensors that move in this pass."""
        names = self.moving(tree, place, int(at["pass"]))
        held = moments.get("m", moments.get("momentum"))
        if held is not None and set(held) != set(names):  # others moved before
            moments = {}
        params, moments = stepped(self.job.plan, select(tree, names), select(slopes, names), moments, self.rate(at))
        return {**tree, **params}, moments


def ground(job: Job, name: str, rules: Rules) -> Ground:
    """The rules on this job.

    Raises:
        ConfigError: its model or technique cannot be cut, clients differ in rank, gradients are to be clipped, or changes would not arrive
            as they were sent.
    """
    one_size(job, name)
    if job.layers is None:
        raise ConfigError(
            f"algorithm {name} cuts a model by its layers: use a model that has a list of them, and technique lora, prefix, full, ia3 or head"
        )
    if job.plan.clip:
        raise ConfigError(f"algorithm {name}: no side knows the whole gradient that train.clip is about: leave it out")
    if not 0 <= rules.delta <= 1:
        raise ConfigError(
            f"algorithm.delta = {rules.delta:g}: the share of a row's numbers that is sent again, from 0 (off: all) to 1"
        )
    if rules.delta and not job.exact_up:
        raise ConfigError(
            f"algorithm.delta = {rules.delta:g}: both sides must hold the same rows, which a filter on what goes up would change: "
            "set algorithm.delta = 0, or leave in filters.up only filters that end in @gradient"
        )
    if job.plan.dropout:  # what a frozen front says is something else each time: there is nothing to keep
        rules = rules._replace(cache=0)
    return Ground(job, job.layers, rules)


def dealt(layers: int | Sequence[int], number: int) -> int:
    """Layers of the client of this place: one number for all, or a list that is dealt to the clients in turn."""
    return layers if isinstance(layers, int) else layers[number % len(layers)]


def place_of(given: Mapping[str, Any], further: int = 0) -> dict[str, float]:
    """Where in its work a client is: what its messages are told apart by."""
    return {"pass": float(given["pass"]), "step": float(given["step"] + further)}


def at_of(reply: Message) -> dict[str, int]:
    """What a client says of itself."""
    names = ("pass", "step", "steps", "n", "front", "back", "inward", "masked", "number")
    return {name: int(reply.info[name]) for name in names if name in reply.info}
