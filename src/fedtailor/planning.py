"""What a cut of a model costs before anything is trained, and which cut a device should have.

    client k holds the first `front` and the last `back` layers; T(front, back) are the seconds of a step, M the bytes it needs
    cut_k = argmin T(front, back) + weight * penalty(front, back)    subject to    M(front, back) <= memory of the device
T counts operations at both sides, the tensors of a step over the device's links and its latency four times; a penalty is what a pilot run has
measured (accuracy that a cut costs), never a guess. "memory" is the rule that papers compare with: the largest front that fits.

Memory is counted on real steps. A step is a row of operations; after each one, the bytes of all tensors that are alive are a quadratic in the
width of the batch and linear in its rows, so that six small steps (two numbers of rows, three widths) tell them for any batch. Their
highest point, with the weights beside them, is what the step needs. Not counted: the interpreter and its libraries, the tokenizer, what a
kernel takes for itself while it runs, and gaps that the allocator leaves between blocks (docs/plan.md says how much that is).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedtailor import wire
from fedtailor.backbone import Backbone, sample_inputs
from fedtailor.core import HIDDEN, Batch, Device, Forward, Job, Layers, Message, Part, PartCost, Tree
from fedtailor.cut import cut_at, only
from fedtailor.engines.batches import batches
from fedtailor.engines.clock import seconds
from fedtailor.engines.splitting import back, slope, through
from fedtailor.engines.training import Flops
from fedtailor.errors import ConfigError, one_of
from fedtailor.filters import chain
from fedtailor.ledger import count_flops
from fedtailor.losses import language
from fedtailor.optimizers import apply, clip, fresh, stepped
from fedtailor.techniques import TECHNIQUES, Technique
from fedtailor.techniques.parts import on_part
from fedtailor.trees import nbytes, numel, tensors, tree_map

if TYPE_CHECKING:
    from fedtailor.config import Experiment
    from fedtailor.simulation import World

Make = Callable[[Backbone], Technique]
ROWS, WIDTHS = (2, 3), (8, 16, 24)  # of the steps that are counted; a batch of one row makes views where others make copies
LINK = 4  # bytes of a number on its way between two parts: float32
RULES = ("optimal", "memory")
COMPARED = ("full", "lora", "prefix", "prompt", "head", "ia3")
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


# Cuts


class Estimate(NamedTuple):
    """What a cut costs a device, a step."""

    front: int  # layers
    back: int
    memory: float  # bytes at the device
    client_flops: float
    server_flops: float
    bytes_up: float  # of tensors: headers and filters are not in it
    bytes_down: float
    seconds: float
    penalty: float
    objective: float  # seconds + weight * penalty
    fits: bool
    device: Device = Device()


def estimates(
    layers: Layers,
    device: Device,
    server: Device,
    rows: int,
    width: int,
    fronts: Iterable[int] | None = None,
    backs: Iterable[int] = (1,),
    penalty: Callable[[int, int], float] = lambda front, back: 0.0,
    weight: float = 1.0,
    widest: int = 0,
    trains: bool = True,
) -> list[Estimate]:
    """What the admissible cuts of this grid cost, for steps of `rows` x `width`; without `fronts`, from the least front on.

    Args:
        widest: tokens of the longest batch, for which there must be memory; `width` unless it is more.
        trains: whether the front is trained. If not, its memory is an upper bound, and what a cache saves on the wire is not in it.

    Raises:
        ConfigError: the costs of this model's parts are not known.
    """
    if layers.cost is None:
        raise ConfigError("the costs of this model's parts cannot be counted: give algorithm.front and algorithm.back as numbers")
    grid = [
        (front, last)
        for last in backs
        for front in (range(layers.depth) if fronts is None else fronts)
        if front >= layers.least and last >= 0 and front + last < layers.depth
    ]

    def one(front: int, last: int) -> Estimate:
        assert layers.cost
        cut = cut_at(layers, front, last)
        first, middle, end = (layers.cost(part, rows, width) for part in cut)
        up, down = link_bytes(layers, rows, width, trains and first.trained > 0, layers.read if not last else 0)
        longest = max(widest, width)
        wide = layers.cost(cut[0], rows, longest)
        memory = both_ends(wide if trains else wide._replace(kept=0.0), layers.cost(cut[2], rows, longest))
        work = ((first.flops if trains else first.forward) + end.flops, middle.flops)
        # Two letters and two replies.
        took = (
            seconds(device, int(down), work[0], int(up)) + 2 * device.latency + (work[1] / server.flops if server.flops else 0.0)
        )
        lost = penalty(front, last)
        fits = not device.memory or memory <= device.memory
        return Estimate(front, last, memory, *work, up, down, took, lost, took + weight * lost, fits, device)

    return [one(front, last) for front, last in grid]


def link_bytes(layers: Layers, rows: int, width: int, inward: bool, read: int = 0) -> tuple[float, float]:
    """(up, down) of a step: hidden states and the gradient of the loss up; outputs down, and a gradient where the front trains.
    `read`: tokens that go to and come from the back, where that is not all."""
    tensor = float(LINK * rows * (layers.tokens or width) * layers.hidden)
    ends = float(LINK * rows * read * layers.hidden) if read else tensor
    mask = 0 if layers.tokens else rows * width
    return tensor + ends + mask, inward * tensor + ends


class Choice(NamedTuple):
    """How clients of split learning choose their cuts: flexp's options of these names."""

    front: int | list[int] | str = "optimal"
    back: int | list[int] = 1
    train_front: bool = True
    penalty: Sequence[float] = ()
    weight: float = 1.0
    least_front: int = 1

    @property
    def rule(self) -> str:
        return self.front if isinstance(self.front, str) else "optimal"

    def fronts(self, number: int, depth: int) -> Sequence[int]:
        """Among which the client of this number chooses."""
        if isinstance(self.front, str):
            return range(self.least_front, depth)
        return [self.front if isinstance(self.front, int) else self.front[number % len(self.front)]]

    def lost(self, front: int, back: int) -> float:
        """What a pilot has measured that a front of so many layers costs; the last one holds for longer fronts."""
        return self.penalty[min(front, len(self.penalty) - 1)] if self.penalty else 0.0

    def estimates(
        self, layers: Layers, job: Job, device: Device, number: int, rows: int, width: int, widest: int, all_fronts: bool = False
    ) -> list[Estimate]:
        """The cuts that a client may choose among (or all, for a look); all clients share the server."""
        back = self.back if isinstance(self.back, int) else self.back[number % len(self.back)]
        share = job.server._replace(flops=job.server.flops / job.clients)
        return estimates(
            layers,
            device,
            share,
            rows,
            width,
            fronts=None if all_fronts else self.fronts(number, layers.depth),
            backs=[back],
            penalty=self.lost,
            weight=self.weight,
            widest=widest,
            trains=self.train_front,
        )


def chosen(found: Sequence[Estimate], rule: str = "optimal") -> Estimate:
    """The cut for this device. "optimal": the least objective among those that fit, of equals the one with fewer layers at the client;
    "memory": the largest front that fits.

    Raises:
        ConfigError: none fits: names the device, what it has and what the least demanding cut needs.
    """
    one_of("rule", rule, RULES)
    fitting = [e for e in found if e.fits]
    if not fitting:
        raise ConfigError(_nothing_fits(found))
    if rule == "memory":
        return max(fitting, key=lambda e: (e.front, -e.objective))
    return min(fitting, key=lambda e: (e.objective, e.front + e.back, e.front))


def _nothing_fits(found: Sequence[Estimate]) -> str:
    if not found:
        return "this model has no admissible cut: it has too few layers for algorithm.least_front, or for what the technique asks for at the front"
    least = min(found, key=lambda e: e.memory)
    return (
        f"device '{least.device.name}': memory_mb = {least.device.memory / 1e6:g}, but the least demanding cut (front {least.front}, back "
        f"{least.back}) takes {least.memory / 1e6:.1f} MB: raise memory_mb to what the device has, or lower train.batch or data.max_length"
    )


# An experiment


class Pace(NamedTuple):
    """How the clients of an experiment train."""

    rows: int  # of a batch
    width: int  # tokens of a batch, the median
    widest: int  # tokens of the longest
    steps: int  # of a client and round, the median
    examples: int  # of a client, the median


def pace(world: World) -> Pace:
    """From the batches that the real training data makes."""
    sizes, widths, steps, examples = [1], [1], [], []
    for client in sorted(world.clients):
        site = world.sites(client, 0)
        data = site.data["train"]
        order = batches(world.job.plan, data.lengths, site.random("plan"))
        sizes += [len(rows) for rows in order]
        widths += [int(data.lengths[rows].max()) for rows in order]
        steps.append(len(order))
        examples.append(len(data))
    return Pace(max(sizes), int(np.median(widths[1:] or widths)), max(widths), int(np.median(steps)), int(np.median(examples)))


def letter_bytes(tree: Tree, experiment: Experiment, info: Mapping[str, float]) -> tuple[int, int]:
    """(up, down) of a round of averaging, encoded as fedavg sends it, after the filters. `info` is what a reply tells beside it."""
    up, down = chain(experiment.filters.up), chain(experiment.filters.down)
    reply, letter = up.apply(Message("update", tree, info), {})[0], down.apply(Message("train", tree), {})[0]
    return len(wire.encode(reply)), len(wire.encode(letter))


def info_of(world: World, now: Pace, flops: float) -> dict[str, float]:
    """What a reply tells: the loss is not known yet, and has as many digits as this one (or 8 bytes more or less)."""
    examples = float(now.steps * now.rows)
    seen = {"n": float(now.examples), "steps": float(now.steps), "examples": examples, "flops": now.steps * flops}
    return {**seen, "loss": 2 / 3, "lr": world.job.plan.lr}


def plan(experiment: Experiment) -> dict[str, Any]:
    """What an experiment will cost each device profile, uncut and cut, and with other techniques; nothing is trained.

    Raises:
        ConfigError, DataError: as `simulation.build`.
    """
    from fedtailor.equip import device_of  # these import what is above
    from fedtailor.simulation import build

    # What a device cannot hold whole is what is asked here.
    clients = experiment.clients.model_copy(update={"devices": []})
    world = build(experiment.model_copy(update={"clients": clients}))
    now = pace(world)
    devices = [device_of(section) for section in experiment.clients.devices] or [Device()]
    whole = uncut_cost(world.technique, world.job)
    return {
        "name": experiment.name,
        "model": experiment.model.name,
        "technique": experiment.technique.kind,
        **now._asdict(),
        "devices": [profile(world, now, device, number, whole) for number, device in enumerate(devices)],
        "techniques": compared(world, now),
    }


def profile(world: World, now: Pace, device: Device, number: int, whole: Callable[[int, int], PartCost]) -> dict[str, Any]:
    """The uncut model and every cut on one device, and which cut it would choose."""
    whole_line = uncut_line(world, now, device, whole)
    layers, own = world.job.layers, world.experiment.algorithm
    found: dict[str, Any] = {"device": device.name, "memory_bytes": device.memory, "uncut": whole_line, "cuts": []}
    if layers is None or layers.cost is None:
        return {**found, "chosen": None, "why": f"technique {world.technique.kind} is not cut by layers: the model is used uncut"}
    options = own.options if own.kind == "flexp" else {}
    choice = Choice(**{name: options[name] for name in Choice._fields if name in options})
    sizes = (now.rows, now.width, now.widest)
    cuts = choice.estimates(layers, world.job, device, number, *sizes, all_fronts=True)
    found["cuts"] = [cut_line(layers, now, cut) for cut in cuts]
    try:
        open_to = choice.estimates(layers, world.job, device, number, *sizes)
        best = chosen(open_to, choice.rule)
    except ConfigError as error:
        return {**found, "chosen": None, "why": str(error)}
    fits = "fits" if whole_line["fits"] else "does not fit"
    why = f"front {best.front}, back {best.back}: {best.seconds:.3g} s a step"
    if len(open_to) > 1:
        fitting, also = sum(cut.fits for cut in open_to), " + weight x penalty" if choice.penalty else ""
        rule = f"the least seconds{also}" if choice.rule == "optimal" else "the largest front"
        largest = chosen(open_to, "memory").front
        why += f", {rule} among the {fitting} cuts (of {len(cuts)}) that fit and have {choice.least_front} or more layers at the front"
        why += f"; by memory alone it would be front {largest}"
    return {**found, "chosen": {"front": best.front, "back": best.back}, "why": f"{why}; the uncut model {fits}"}


def uncut_line(world: World, now: Pace, device: Device, whole: Callable[[int, int], PartCost]) -> dict[str, Any]:
    cost, memory = whole(now.rows, now.width), whole(now.rows, now.widest).memory
    up, down = letter_bytes(world.technique.init, world.experiment, info_of(world, now, cost.flops))
    return {
        "trained": cost.trained,
        "memory_bytes": memory,
        "flops_per_step": cost.flops,
        "bytes_up_per_round": up,
        "bytes_down_per_round": down,
        "seconds_per_round": seconds(device, down, now.steps * cost.flops, up),
        "fits": not device.memory or memory <= device.memory,
    }


def cut_line(layers: Layers, now: Pace, cut: Estimate) -> dict[str, Any]:
    assert layers.cost
    first, _, last = (layers.cost(part, now.rows, now.width) for part in cut_at(layers, cut.front, cut.back))
    return {
        "front": cut.front,
        "back": cut.back,
        "trained": first.trained + last.trained,
        "memory_bytes": cut.memory,
        "flops_per_step": cut.client_flops,
        "server_flops_per_step": cut.server_flops,
        "bytes_up_per_round": now.steps * cut.bytes_up,
        "bytes_down_per_round": now.steps * cut.bytes_down,
        "seconds_per_round": now.steps * cut.seconds,
        "fits": cut.fits,
    }


def compared(world: World, now: Pace) -> list[dict[str, Any]]:
    """Techniques with their default options on this model; those that do not fit it say why."""
    if world.technique.loss or world.technique.kind == "template":  # their models have no head to train others with
        return []
    return [technique_line(world, now, kind) for kind in COMPARED]


def technique_line(world: World, now: Pace, kind: str) -> dict[str, Any]:
    try:
        technique = TECHNIQUES[kind](world.backbone)
    except ConfigError as error:
        return {"technique": kind, "why_not": str(error)}
    whole = uncut_cost(technique, world.job)
    flops = whole(now.rows, now.width).flops
    up, down = letter_bytes(technique.init, world.experiment, info_of(world, now, flops))
    return {
        "technique": kind,
        "trained": numel(technique.init),
        "bytes_up": up,
        "bytes_down": down,
        "memory_bytes": whole(now.rows, now.widest).memory,
        "flops_per_step": flops,
    }
