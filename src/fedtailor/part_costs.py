"""What a part of a cut model costs who holds and trains it: operations and memory, counted on its real steps.

A step is a row of operations; after each one, the bytes of all tensors that are alive are a quadratic in the
width of the batch and linear in its rows, so that six small steps (two numbers of rows, three widths) tell them for any batch. Their
highest point, with the weights beside them, is what the step needs. Not counted: the interpreter and its libraries, the tokenizer, what a
kernel takes for itself while it runs, and gaps that the allocator leaves between blocks (docs/plan.md says how much that is).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedtailor.backbone import Backbone, sample_inputs
from fedtailor.core import HIDDEN, Batch, Forward, Job, Layers, Part, PartCost, Tree
from fedtailor.cut import only
from fedtailor.engines.splitting import back, slope, through
from fedtailor.engines.training import Flops
from fedtailor.ledger import count_flops
from fedtailor.losses import language
from fedtailor.optimizers import apply, clip, fresh, stepped
from fedtailor.techniques import Technique
from fedtailor.techniques.parts import on_part
from fedtailor.trees import nbytes, numel, tensors, tree_map

Make = Callable[[Backbone], Technique]
ROWS, WIDTHS = (2, 3), (8, 16, 24)  # of the steps that are counted; a batch of one row makes views where others make copies
WHOLE = Part(0, 0, True, True)
"""The uncut model, also where it has no list of layers."""


# Operations


def costs(technique: Technique, part: Part, job: Job, inward: bool = True) -> tuple[Flops, Flops]:
    """What a part of a cut model costs through, and through and back, (rows, width) -> operations."""
    forward, tree = technique.bind(False), _placed(technique.init, job)

    def batch_of(width: int) -> dict[str, Tensor]:
        batch = _batch(technique, part, job, 1, width)
        if HIDDEN in batch:
            batch[HIDDEN].requires_grad_(inward and torch.is_grad_enabled())
        return batch

    def total(forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        return forward(params, batch).sum()

    ragged = technique.backbone.kind != "image" or not part.first  # hidden states of an image have a width
    there = count_flops(forward, None, tree, batch_of, ragged)
    if not numel(tree) and (part.first or not inward):  # frozen: nobody goes back
        return there, there
    return there, count_flops(forward, job.loss if part.last else total, tree, batch_of, ragged)


def _batch(technique: Technique, part: Part, job: Job, rows: int, width: int) -> dict[str, Tensor]:
    """What this part is given in a step, with labels where it has the head."""
    batch = sample_inputs(technique.backbone, width, rows)
    if part.last:
        shape = (rows, width) if job.loss is language else (rows,)
        batch["labels"] = torch.zeros(shape, dtype=torch.long, device=job.device)
    return batch


def _placed(tree: Tree, job: Job) -> Tree:
    return tree_map(lambda t: t.to(job.device), tree)


# Memory


class Alive(TorchDispatchMode):
    """Bytes of the tensors that were made inside (or added) and are still there, after each operation.

    Tensors that share memory count once; those from before, such as weights, not at all.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.line: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_leaves((args, kwargs or {})):
            if isinstance(t, Tensor):
                self._meet(t, 0)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.add(t)
        self.line.append(self.bytes)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor, if it is not known yet."""
        self._meet(tensor, tensor.untyped_storage().nbytes())

    def _meet(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and storage.device.type != "meta":
            self._known.add(storage._cdata)
            self.bytes += size
            weakref.finalize(storage, self._gone, storage._cdata, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)  # the address may be given to another one
        self.bytes -= size


class Line(NamedTuple):
    """Bytes alive after each operation of a step: (operations,) float64, or (3, operations) as a quadratic in the width."""

    bytes: np.ndarray
    waiting: np.ndarray  # of these, what waits between going through and going back: a number, or (3,)


def step_line(forward: Forward, tree: Tree, batch: dict[str, Tensor], part: Part, job: Job, inward: bool) -> Line:
    """What is alive while one step of a part runs: its trained tensors and their moments, the batch, and all that the step makes.

    A part steps as a client of split learning does, copying; the uncut model as the training loop does, in place beside its start.
    """
    uncut = part.first and part.last
    moments = fresh(job.plan, dict(tensors(tree))) if numel(tree) and not uncut else {}
    with Alive() as alive:
        for t in (*batch.values(), *(t for _, t in tensors(tree)), *(t for _, t in tensors(moments))):
            alive.add(t)
        waiting = alive.bytes
        if uncut:
            _fit(forward, tree, batch, job)
        elif part.last:
            _, slopes, _ = slope(job.loss, forward, tree, batch, {})
            stepped(job.plan, tree, slopes, moments, job.plan.lr)
        else:
            waiting = _to_and_fro(alive, forward, tree, moments, batch, job, inward)
        return Line(np.array(alive.line, dtype=np.float64), np.array(float(waiting)))


def _to_and_fro(
    alive: Alive, forward: Forward, tree: Tree, moments: Tree, batch: dict[str, Tensor], job: Job, inward: bool
) -> int:
    """A step of a front or a middle; returns the bytes that wait for the gradient."""
    outputs, kept = through(forward, tree, batch, inward)
    gradient = torch.ones_like(outputs)
    del outputs  # sent
    if not kept.outputs.requires_grad:
        del kept, gradient
        return alive.bytes
    waiting = alive.bytes - gradient.untyped_storage().nbytes()
    slopes, _ = back(kept, gradient)
    del kept, gradient
    stepped(job.plan, tree, slopes, moments, job.plan.lr)
    return waiting


def _fit(forward: Forward, tree: Tree, batch: dict[str, Tensor], job: Job) -> None:
    """A step of `engines.training.fit` for one client."""
    if not numel(tree):
        with torch.no_grad():
            forward(tree, batch)
        return
    own = tree_map(lambda t: t.clone().requires_grad_(t.is_floating_point()), tree)
    leaves = {name: t for name, t in tensors(own) if t.requires_grad}
    moments = fresh(job.plan, leaves)
    job.loss(forward, own, batch, {}).backward()
    if job.plan.clip:
        clip(leaves, job.plan.clip, False)
    apply(job.plan, leaves, moments, job.plan.lr)


class Memory(NamedTuple):
    """Bytes of a step for any batch: quadratics in the width, of what does not depend on rows and of what each row adds."""

    fixed: Line
    each: Line

    def at(self, rows: int, width: int) -> tuple[float, float]:
        """(highest point, what waits between through and back)."""
        powers = np.array([1.0, width, width * width])
        line = powers @ (self.fixed.bytes + rows * self.each.bytes)
        return float(line.max(initial=0.0)), float(powers @ (self.fixed.waiting + rows * self.each.waiting))


def step_memory(technique: Technique, tree: Tree, part: Part, job: Job, inward: bool) -> Memory:
    """Counted on six small steps, or on two where the inputs have one size (images)."""
    forward, tree = technique.bind(False), _placed(tree, job)
    with torch.no_grad():
        forward(
            tree, _batch(technique, part, job, 1, WIDTHS[0])
        )  # what a technique keeps after its first call is not of the step

    def line(rows: int, width: int) -> Line:
        return step_line(forward, tree, _batch(technique, part, job, rows, width), part, job, inward)

    widths = WIDTHS if technique.backbone.kind != "image" or not part.first else WIDTHS[:1]
    found = [_quadratic([line(rows, width) for width in widths]) for rows in ROWS]
    each = Line(*(np.subtract(b, a) / (ROWS[1] - ROWS[0]) for a, b in zip(*found, strict=True)))
    return Memory(Line(*(a - ROWS[0] * e for a, e in zip(found[0], each, strict=True))), each)


def _quadratic(lines: Sequence[Line]) -> Line:
    """Coefficients (3, ...) of 1, width and its square, through these lines at WIDTHS; one line alone is a constant."""
    if len(lines) == 1:
        return Line(*(np.stack([y, 0 * y, 0 * y]) for y in lines[0]))
    inverse = np.linalg.inv(np.vander(WIDTHS, 3, increasing=True).astype(np.float64))
    return Line(*(np.tensordot(inverse, np.stack(list(ys)), 1) for ys in zip(*lines, strict=True)))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Steps this small take many times longer where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Parts


def costed(layers: Layers | None, technique: Technique, make: Make, job: Job) -> Layers | None:
    """The same with the costs of parts and the width of hidden states; `make` makes the technique on a part of the model.

    As it is where images go through the layers in other shapes than (batch, tokens, width): such models have no costs.
    """
    if layers is None:
        return None
    config: Any = technique.backbone.model.config
    hidden = int(getattr(config.get_text_config(), "hidden_size", 0))
    images = technique.backbone.kind == "image"
    try:
        tokens = image_tokens(technique, make, job) if images else 0
    except Exception:  # vision models are of many kinds, and one that cannot be cut can still be trained
        return layers

    @functools.cache
    def front() -> set[int]:
        return {id(p) for p in only(technique.backbone.model, Part(0, 0, True, False)).parameters()}

    @functools.cache
    def of(part: Part) -> Callable[[int, int], PartCost]:
        own = on_part(technique, part, make)
        tree = layers.part(technique.init, part)
        before = layers.part(technique.init, Part(0, part.start, True, False))
        inward = not part.first and (part.last or numel(before) > 0)
        tied = [p for p in own.backbone.model.parameters() if id(p) in front()] if part.last and not part.first else []
        return part_cost(own, tree, part, job, inward, sum(p.numel() * p.element_size() for p in tied))

    def cost(part: Part, rows: int, width: int) -> PartCost:
        return of(part)(rows, tokens or width)

    return layers._replace(cost=cost, hidden=hidden, tokens=tokens)


def image_tokens(technique: Technique, make: Make, job: Job) -> int:
    """Hidden states of an image."""
    first = Part(0, 0, True, False)
    own = on_part(technique, first, make)
    with torch.no_grad():
        return int(own.bind(False)(_placed(own.init, job), _batch(own, first, job, 1, 1)).shape[1])


def part_cost(
    technique: Technique, tree: Tree, part: Part, job: Job, inward: bool = False, tied: float = 0.0
) -> Callable[[int, int], PartCost]:
    """What this technique's model costs, (rows, width) -> costs; `tree` is what of it is trained."""
    weights = float(sum(p.numel() * p.element_size() for p in technique.backbone.model.parameters()))
    with one_thread():
        memory = step_memory(technique, tree, part, job, inward)
        there, flops = costs(technique, part, job, inward)
    # Beside the weights: the tensors as they were given, which a client keeps to begin anew.
    still = weights + nbytes(tree)
    moments = fresh(job.plan, dict(tensors(tree))) if numel(tree) else {}
    held = still + nbytes(tree) + nbytes(moments)

    def cost(rows: int, width: int) -> PartCost:
        highest, waiting = memory.at(rows, width)
        kept = 0.0 if part.last else waiting - (held - still)
        return PartCost(still + highest, weights, numel(tree), flops(rows, width), held, kept, there(rows, width), tied)

    return cost


def uncut_cost(technique: Technique, job: Job) -> Callable[[int, int], PartCost]:
    """What the whole model costs, (rows, width) -> costs."""
    return part_cost(technique, technique.init, WHOLE, job)


def both_ends(front: PartCost, last: PartCost) -> float:
    """Bytes that a client needs who holds a front and a back: one works at a time, beside what the other holds and keeps."""
    return max(front.memory + last.held, last.memory + front.held + front.kept) - last.tied
