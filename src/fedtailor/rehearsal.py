"""A run of split learning without its numbers, to know what crosses the wire before anything is trained.

The algorithm, its clients, their batches, filters and messages are the run's own; where parts of the model would compute, zeros of the same
shapes stand. So every message has the bytes that it will have, headers too, and the ledger is the run's (tested).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedtailor.core import HIDDEN, Back, ClientId, Keep, Layers, Recall, Slope, Slopes, Step, Through, Tree
from fedtailor.engines.answering import Workers
from fedtailor.engines.cache import Cache
from fedtailor.engines.local import Local
from fedtailor.engines.splitting import Run, Steps
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.options import algorithm_named, checked
from fedtailor.trees import tree_map

if TYPE_CHECKING:
    from fedtailor.simulation import World


def rehearse(world: World, front: int, back: int, rounds: int) -> Ledger:
    """The ledger's bytes, letters and replies of the first `rounds` rounds, all clients cut alike; other columns are not counted.

    With an algorithm that does not cut it is flexp that is rehearsed, with its own defaults. Nothing is lost or late.

    Raises:
        ConfigError: the algorithm does not suit the technique, or has no such cut.
    """
    from fedtailor.run import draw

    experiment, job = world.experiment, world.job
    own = experiment.algorithm
    kind, given = (own.kind, own.options) if world.algorithm.splits else ("flexp", {})
    # What moves tensors and no bytes is left out: it takes time.
    plan = job.plan._replace(optimizer="sgd", momentum=0.0, clip=0.0)
    factory = algorithm_named(kind)
    still = {"alignment": 0.0} if "alignment" in inspect.signature(factory).parameters else {}
    options = checked(factory, "algorithm", {**given, **still, "front": front, "back": back}, "job")
    algorithm = factory(job._replace(plan=plan, sizes=()), **options)
    assert job.layers
    ledger, drawer = Ledger(), Drawer()
    workers = Workers(lambda drops: world.technique.bind(drops), 1, steps=Blank(job.layers))
    up, down = chain(experiment.filters.up), chain(experiment.filters.down)
    engine = Local(algorithm, world.sites, workers, drawer, ledger, up, down, experiment.seed, stacked=False)  # type: ignore[arg-type]
    state = algorithm.init(world.technique.init)
    try:
        for number in range(1, rounds + 1):
            cohort = draw(world.facts.clients, experiment.clients.per_round, experiment.seed, number)
            state = engine.converse(algorithm.round(state, cohort), number)
            ledger.close_round()
    finally:
        engine.close()
    return ledger


class Drawer:
    """Own states, in memory."""

    def __init__(self) -> None:
        self.folder = Path()
        self._own: dict[ClientId, Tree] = {}

    def read_own(self, client: ClientId) -> Tree:
        return self._own.get(client, {})

    def write_own(self, client: ClientId, own: Tree) -> None:
        self._own[client] = own


class Shapes(Cache):
    """A cache that knows what it was given, and gives back zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._taken = 0

    def lie(self, folder: Path) -> None:
        """Nowhere."""

    def keep(self, items: Mapping[str, Tensor], room: float) -> bool:
        new = {name: t for name, t in items.items() if name not in self._known}
        size = sum(t.numel() * t.element_size() for t in new.values())
        if self._taken + size > room:
            return False
        self._known |= {name: (t.shape, t.dtype) for name, t in new.items()}
        self._taken += size
        return True

    def recall(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: zeros(*self._known[name]) for name in names if name in self._known}


class Blank(Steps):
    """Answers steps of cut models with zeros of the right shapes."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self.cache = Shapes()

    def answer(
        self, steps: Mapping[Any, Step], stacked: bool, run: Run = lambda work, items: list(map(work, items))
    ) -> dict[Any, Any]:
        return {key: self._of(step) for key, step in steps.items()}

    def work(self, step: Step) -> tuple[float, float]:
        return 0.0, 0.0

    def _of(self, step: Step) -> Any:
        if isinstance(step, Keep):
            return self.cache.keep(*step)
        if isinstance(step, Recall):
            return self.cache.recall(step.names)
        if isinstance(step, Through):
            return self._passed(step)
        on = step.of if isinstance(step, Back) else step
        inner = HIDDEN in on.batch and (isinstance(step, Slope) or step.of.inward)
        hidden = zeros(on.batch[HIDDEN].shape, on.batch[HIDDEN].dtype) if inner else None
        return Slopes(tree_map(lambda t: zeros(t.shape, t.dtype), on.params), hidden, 0.0)

    def _passed(self, step: Through) -> Tensor:
        layers, part = self._layers, step.part
        read = step.batch[HIDDEN] if HIDDEN in step.batch else next(x for x in step.batch.values() if x.dim() > 1)
        tokens = layers.tokens or read.shape[1]
        if layers.read and part.start < part.stop == layers.depth:  # of the last layer the head reads so many
            tokens = layers.read
        return zeros((len(read), tokens, layers.hidden), layers.dtype)


def zeros(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """One number in memory, however many it stands for."""
    return torch.zeros((), dtype=dtype).expand(tuple(shape))
