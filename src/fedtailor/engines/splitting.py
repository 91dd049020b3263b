"""A training step whose layers lie in two places: outputs go one way, their gradients come back.

    client  through(front)            -> hidden states    up
    server  through(middle)           -> hidden states    down
    client  slope(loss, back)         -> their gradient   up
    server  back(middle), its step    -> the gradient     down (not where the front is frozen)
    client  back(front), its step
What going back needs is `Kept`: a graph in memory, a cache, never a part of any state. Where it is gone, `through` makes it again.
With `torch.vmap(forward)` in the place of the forward, all of this is of many clients at once, each tree and tensor with a leading axis.
Dropout is replayed: a step that has a seed draws its masks from it each time it is made, alone, whatever was drawn before.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from fedtailor.core import HIDDEN, Back, Batch, Forward, Keep, Loss, Part, Recall, Slope, Slopes, Step, Through, Tree
from fedtailor.engines.cache import Cache
from fedtailor.engines.training import Flops, no_flops
from fedtailor.trees import signature, tensors, tree_map, unstack


class Kept(NamedTuple):
    """What `back` needs of a `through`."""

    outputs: Tensor  # with their graph
    params: Tree  # its leaves
    hidden: Tensor | None  # what came in, a leaf too; None at the front, and where its gradient is not wanted


def through(forward: Forward, params: Tree, batch: Batch, inward: bool = True) -> tuple[Tensor, Kept]:
    """(outputs, what going back needs) of a part of a cut model; without `inward` there is no gradient of what came in."""
    leaves, given = _leaves(params, batch, inward)
    outputs = forward(leaves, given)
    return outputs.detach(), Kept(outputs, leaves, given.get(HIDDEN) if inward else None)


def back(kept: Kept, gradient: Tensor) -> tuple[Tree, Tensor | None]:
    """(gradients of the params, gradient of what came in), from the gradient of the outputs. Tensors that took no part have zeros."""
    return _slopes(kept.outputs, kept.params, kept.hidden, gradient)


def slope(loss: Loss, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> tuple[Tensor, Tree, Tensor | None]:
    """(loss, gradients of the params, gradient of what came in) at the part that has the labels."""
    leaves, given = _leaves(params, batch, True)
    value = loss(forward, leaves, given, aux)
    return value.detach(), *_slopes(value.sum(), leaves, given.get(HIDDEN), None)


def _leaves(params: Tree, batch: Batch, inward: bool) -> tuple[Tree, dict[str, Tensor]]:
    leaves = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), params)
    given = dict(batch)
    if HIDDEN in given:
        given[HIDDEN] = given[HIDDEN].detach().requires_grad_(inward)
    return leaves, given


def _slopes(outputs: Tensor, params: Tree, hidden: Tensor | None, gradient: Tensor | None) -> tuple[Tree, Tensor | None]:
    named = [t for _, t in tensors(params) if t.requires_grad]
    wanted = named if hidden is None else [*named, hidden]
    if not wanted or not outputs.requires_grad:  # a frozen front: nothing to go back to
        return tree_map(torch.zeros_like, params), None
    found = torch.autograd.grad(outputs, wanted, gradient, allow_unused=True)
    slopes = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)}
    return tree_map(lambda t: slopes.get(id(t), t), params), None if hidden is None else slopes[id(hidden)]


KEPT = 256
"""Ways that are remembered for going back; for others the way is gone again."""
DRAWING = threading.Lock()
"""Who draws masks holds it: torch's random state is one for all threads."""
Run = Callable[[Callable[[Any], Any], list[Any]], list[Any]]
Costs = Callable[[Part, bool], tuple[Flops, Flops]]
"""(part, inward) -> what going through it costs, and going through and back: (rows, width) -> operations."""


class Steps:
    """Answers steps of cut models, alike ones of many clients in one call, and keeps what going back needs."""

    def __init__(
        self, bind: Callable[[Part, bool], Forward], device: str = "cpu", costs: Costs = lambda part, inward: (no_flops, no_flops)
    ) -> None:
        """`bind` makes a forward of a part, with the model's own dropout on or off."""
        self._bind, self.device, self._costs = bind, device, costs
        self._known: dict[tuple[Part, bool], tuple[Flops, Flops]] = {}
        self._forwards: dict[tuple[Part, bool], queue.SimpleQueue[Forward]] = {}
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Kept, int | None]] = {}  # by the name of a Through: with its place among those done together
        self.cache = Cache()

    def answer(
        self, steps: Mapping[Any, Step], stacked: bool, run: Run = lambda work, items: list(map(work, items))
    ) -> dict[Any, Any]:
        """The results of these steps, by what they are called; `run` may work on several groups at a time."""
        alike: dict[Any, list[Any]] = {}
        for key, step in steps.items():
            alike.setdefault(_kind(step) if stacked and _stacks(step) else key, []).append(key)
        found = run(self._together, [[steps[key] for key in keys] for keys in alike.values()])
        return {
            key: result
            for keys, results in zip(alike.values(), found, strict=True)
            for key, result in zip(keys, results, strict=True)
        }

    def work(self, step: Step) -> tuple[float, float]:
        """(operations, example passes) of a step."""
        if isinstance(step, Keep | Recall):
            return 0.0, 0.0
        on = step.of if isinstance(step, Back) else step
        read = on.batch[HIDDEN] if HIDDEN in on.batch else next(x for x in on.batch.values() if x.dim() > 1)
        rows, width = len(read), read.shape[1] if read.dim() < 4 else 1  # texts and hidden states have tokens, images do not
        way = on.part, getattr(on, "inward", True)
        if way not in self._known:
            self._known[way] = self._costs(*way)
        there, both = (flops(rows, width) for flops in self._known[way])
        if isinstance(step, Through):
            return there, 0.0
        return (both - there, 0.0) if isinstance(step, Back) else (both, float(rows))

    def _together(self, group: list[Any]) -> list[Any]:
        if isinstance(group[0], Keep):
            return [self.cache.keep(*ask) for ask in group]
        if isinstance(group[0], Recall):
            return [self.cache.recall(ask.names) for ask in group]
        if isinstance(group[0], Through):
            return self._through(group) if group[0].back else [self._past(ask) for ask in group]
        return self._slope(group) if isinstance(group[0], Slope) else self._back(group)

    @contextmanager
    def _forward(self, part: Part, seed: int | None) -> Iterator[Forward]:
        """A forward of this part that nobody else uses meanwhile: a call puts tensors into its modules. What is drawn in it comes from
        the seed."""
        way = part, seed is not None
        with self._lock:
            free = self._forwards.setdefault(way, queue.SimpleQueue())
            forward = self._bind(*way) if free.empty() else free.get()
        try:
            with drawn_from(seed, self.device):
                yield forward
        finally:
            free.put(forward)

    def _through(self, group: list[Through]) -> list[Tensor]:
        many = len(group) > 1
        params, batch = _joined([t.params for t in group], self.device), _joined([dict(t.batch) for t in group], self.device)
        with self._forward(group[0].part, group[0].seed) as forward:
            outputs, kept = through(vmap(forward) if many else forward, params, batch, group[0].inward)
        with self._lock:
            if kept.outputs.requires_grad:  # nobody comes back through what is frozen
                self._kept |= {t.name: (kept, i if many else None) for i, t in enumerate(group)}
            while len(self._kept) > KEPT:  # the oldest: of clients that were lost
                del self._kept[next(iter(self._kept))]
        return [plain(x) for x in outputs] if many else [plain(outputs)]

    @torch.no_grad()
    def _past(self, ask: Through) -> Tensor:
        """Through, and never back."""
        params, batch = _joined([ask.params], self.device), _joined([dict(ask.batch)], self.device)
        with self._forward(ask.part, ask.seed) as forward:
            return plain(forward(params, batch))

    def _back(self, group: list[Back]) -> list[Slopes]:
        """Those that went through together and come back together do so in one call; for any other the way is gone again alone."""
        with self._lock:
            held = [self._kept.pop(ask.of.name, None) for ask in group]
        whole = held[0] is not None and all(h is not None and h[0] is held[0][0] for h in held)
        if whole and held[0] and len(group) == (1 if held[0][1] is None else len(held[0][0].outputs)):
            places = [0 if h is None or h[1] is None else h[1] for h in held]
            gradients: list[Any] = [None] * len(group)
            for place, ask in zip(places, group, strict=True):
                gradients[place] = placed(ask.gradient, self.device)
            params, hidden = back(held[0][0], torch.stack(gradients) if held[0][1] is not None else gradients[0])
            found = _apart(params, hidden, None, len(group), held[0][1] is not None)
            return [found[place] for place in places]
        out = []
        for ask in group:
            params, batch = _joined([ask.of.params], self.device), _joined([dict(ask.of.batch)], self.device)
            with self._forward(ask.of.part, ask.of.seed) as forward:
                _, kept = through(forward, params, batch, ask.of.inward)
            out += _apart(*back(kept, placed(ask.gradient, self.device)), None, 1, False)
        return out

    def _slope(self, group: list[Slope]) -> list[Slopes]:
        many = len(group) > 1
        first = group[0]
        parts = (_joined([dict(getattr(s, name)) for s in group], self.device) for name in ("params", "batch", "aux"))
        params, batch, aux = parts
        with self._forward(first.part, first.seed) as forward:
            value, slopes, hidden = slope(_each(first.loss) if many else first.loss, forward, params, batch, aux)
        return _apart(slopes, hidden, value, len(group), many)


def _each(loss: Loss) -> Loss:
    """The losses of many clients, (clients,), each of its own tree and batch."""

    def losses(forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        values: Tensor = vmap(lambda p, b, a: loss(forward, p, b, a))(params, dict(batch), aux)
        return values

    return losses


@contextmanager
def drawn_from(seed: int | None, device: str) -> Iterator[None]:
    """What is drawn inside comes from this seed; the random state is afterwards what it was before. None: nothing is drawn."""
    if seed is None:
        yield
        return
    with DRAWING, torch.random.fork_rng([] if device == "cpu" else [torch.device(device)]):
        torch.manual_seed(seed)
        yield


def plain(tensor: Tensor) -> Tensor:
    """As it comes out of a message."""
    return tensor.cpu().contiguous()


def placed(tensor: Tensor, device: str) -> Tensor:
    """A copy in memory of its own: the last bits of a product depend on how its factors are aligned, and messages are packed."""
    return tensor.to(device, copy=True)


def _stacks(step: Step) -> bool:
    """What nobody comes back through may be asked for again in other company, and must then be the same bits; so must masks, which a
    stack would draw for all its clients from one stream."""
    if isinstance(step, Keep | Recall) or (isinstance(step, Through) and not step.back):
        return False
    return (step.of if isinstance(step, Back) else step).seed is None


def _kind(step: Any) -> Any:
    """Steps of one kind go together."""
    if isinstance(step, Back):
        return (Back, *_kind(step.of)[1:])
    own = (step.loss, signature(step.aux)) if isinstance(step, Slope) else (step.inward,)
    return (type(step), step.part, signature(step.params), signature(dict(step.batch)), *own)


def _joined(trees: list[Tree], device: str) -> Tree:
    if len(trees) == 1:
        return tree_map(lambda t: placed(t, device), trees[0])
    return tree_map(lambda *ts: torch.stack(ts).to(device), trees[0], *trees[1:])


def _apart(params: Tree, hidden: Tensor | None, loss: Tensor | None, count: int, many: bool) -> list[Slopes]:
    def own(i: int) -> Slopes:
        tree = unstack(params, i) if many else params
        inner = hidden if hidden is None or not many else hidden[i]
        value = 0.0 if loss is None else float(loss[i] if loss.dim() else loss)
        return Slopes(tree_map(plain, tree), None if inner is None else plain(inner), value)

    return [own(i) for i in range(count)]
