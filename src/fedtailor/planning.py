"""What a cut of a model costs before anything is trained, and which cut a device should have.

    client k holds the first `front` and the last `back` layers; T(front, back) are the seconds of a step, M the bytes it needs
    cut_k = argmin T(front, back) + weight * penalty(front, back)    subject to    M(front, back) <= memory of the device
T counts operations at both sides, the tensors of a step over the device's links and its latency four times; a penalty is what a pilot run has
measured (accuracy that a cut costs), never a guess. "memory" is the rule that papers compare with: the largest front that fits.
What parts cost is counted in part_costs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedtailor import wire
from fedtailor.core import Device, Job, Layers, Message, PartCost, Tree
from fedtailor.cut import cut_at
from fedtailor.engines.batches import batches
from fedtailor.engines.clock import seconds
from fedtailor.errors import ConfigError, one_of
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.part_costs import both_ends, uncut_cost
from fedtailor.techniques import TECHNIQUES
from fedtailor.trees import numel

if TYPE_CHECKING:
    from fedtailor.config import Experiment
    from fedtailor.simulation import World

LINK = 4  # bytes of a number on its way between two parts: float32
REHEARSED = 10_000
"""Steps of clients that are rehearsed for the bytes of all cuts of a plan, but at least two rounds: 3 to 6 milliseconds each."""
RULES = ("optimal", "memory")
COMPARED = ("full", "lora", "prefix", "prompt", "head", "ia3")


# Cuts


class Estimate(NamedTuple):
    """What a cut costs a device, a step."""

    front: int  # layers
    back: int
    memory: float  # bytes at the device
    client_flops: float
    server_flops: float
    bytes_up: float  # of tensors, in a step of the median width: headers and filters are not in it
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
    """What a reply tells: the loss is not known yet, and takes as much room whatever it will be."""
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
    rehearsal = Rehearsal(world, experiment, now)
    return {
        "name": experiment.name,
        "model": experiment.model.name,
        "technique": experiment.technique.kind,
        **now._asdict(),
        "rounds_rehearsed": rehearsal.rounds,
        "devices": [profile(world, now, device, number, whole, rehearsal) for number, device in enumerate(devices)],
        "techniques": compared(world, now),
    }


class Rehearsal:
    """Bytes of a client's round, as the ledger will count them: means over clients and rounds of a run in which nothing is computed."""

    def __init__(self, world: World, experiment: Experiment, now: Pace) -> None:
        from fedtailor.equip import devices

        self.world = world
        self.of_devices = devices(experiment, world.facts.clients)
        cuts = world.job.layers.depth if world.job.layers else 1
        taken = experiment.clients.per_round or len(world.clients)
        steps = taken * max(now.steps, 1) * cuts
        self.rounds = min(experiment.rounds, max(2, REHEARSED // steps))
        self._known: dict[tuple[int, int], Ledger] = {}

    def bytes(self, front: int, back: int, device: Device) -> tuple[float, float]:
        """(up, down) of a client on this device."""
        from fedtailor.rehearsal import rehearse  # it reads the registry of algorithms, of which one imports this file

        if (front, back) not in self._known:
            self._known[front, back] = rehearse(self.world, front, back, self.rounds)
        lines = self._known[front, back].clients
        theirs = [c for c, d in self.of_devices.items() if d == device and c in lines] or list(lines)
        up, down = (sum(lines[c][way] for c in theirs) for way in ("bytes_up", "bytes_down"))
        return up / (len(theirs) * self.rounds), down / (len(theirs) * self.rounds)


def profile(
    world: World, now: Pace, device: Device, number: int, whole: Callable[[int, int], PartCost], rehearsal: Rehearsal
) -> dict[str, Any]:
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
    found["cuts"] = [cut_line(layers, now, cut, rehearsal.bytes(cut.front, cut.back, device)) for cut in cuts]
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


def cut_line(layers: Layers, now: Pace, cut: Estimate, sent: tuple[float, float]) -> dict[str, Any]:
    """`sent`: bytes (up, down) of a round."""
    assert layers.cost
    first, _, last = (layers.cost(part, now.rows, now.width) for part in cut_at(layers, cut.front, cut.back))
    return {
        "front": cut.front,
        "back": cut.back,
        "trained": first.trained + last.trained,
        "memory_bytes": cut.memory,
        "flops_per_step": cut.client_flops,
        "server_flops_per_step": cut.server_flops,
        "bytes_up_per_round": sent[0],
        "bytes_down_per_round": sent[1],
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
