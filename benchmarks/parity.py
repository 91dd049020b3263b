"""What the parity benchmarks share: an algorithm of ours on any torch module, and the batches that it will draw.

A parity benchmark runs somebody's public code beside ours, from the same tensors over the same batches, and prints how far they are
apart. That code is not part of this project: each benchmark takes the path of a checkout. Numbers are float64: in float32 a rounding
that flips one of a network's ReLUs would look like a difference between two rules.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedtailor.core import Algorithm, ClientId, Forward, Job, Plan, Site, Tree, stream
from fedtailor.data.examples import Store, Subset, store
from fedtailor.engines.answering import Workers
from fedtailor.engines.batches import batches
from fedtailor.engines.local import Local
from fedtailor.engines.states import States
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.losses import classification
from fedtailor.metrics import metric

CLASSES = 10
torch.set_default_dtype(torch.float64)


def job(plan: Plan, clients: int) -> Job:
    judged = metric("auto", "image", CLASSES)
    return Job(classification, judged.judge, judged.tally, plan, clients=clients, classes=CLASSES)


def images(rows: int, seed: int = 0) -> Store:
    """Random images of CIFAR's size, with random labels."""
    labels = torch.randint(CLASSES, (rows,), generator=stream(seed, "labels"))
    return store({"pixel_values": torch.randn(rows, 3, 32, 32, generator=stream(seed, "images")), "labels": labels}, {})


def detached(module: nn.Module) -> Tree:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def forward_of(module: nn.Module) -> Forward:
    return lambda params, batch: functional_call(module, params, (batch["pixel_values"],))


def ours(
    algorithm: Algorithm,
    forward: Forward,
    params: Tree,
    inits: Mapping[ClientId, Tree],
    data: Mapping[ClientId, Subset],
    rounds: int,
) -> tuple[Tree, dict[ClientId, Tree]]:
    """(server's state, every client's own) after these rounds on the local engine, messages encoded, clients one by one."""

    def sites(client: ClientId, round: int) -> Site:
        return Site(client, {"train": data[client]}, inits[client], round)

    with tempfile.TemporaryDirectory() as folder:
        states = States(Path(folder))
        engine = Local(
            algorithm, sites, Workers(lambda dropout: forward, 1), states, Ledger(), chain(()), chain(()), stacked=False
        )
        try:
            state = algorithm.init(params)
            for round in range(1, rounds + 1):
                state = engine.converse(algorithm.round(state, sorted(data)), round)
                states.commit(round, state, engine.dump(), {})
            return state, {c: states.read_own(c)["algorithm"] for c in sorted(data)}
        finally:
            engine.close()


def drawn(plan: Plan, data: Subset, client: ClientId, round: int, asked: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The batches of a client's so many-th Fit in a round: (images, labels)."""
    rows = batches(plan, data.lengths, stream(0, "fit", client, round, 1, asked), stream(0, "pace", round, 1))
    found = [data.batch(r, 1, len(r)) for r in rows]
    return [(batch["pixel_values"], batch["labels"]) for batch in found]


def apart(name: str, mine: Tree, theirs: Tree, before: Tree, say: Callable[[str], None] = print) -> float:
    """The largest difference of two trees, beside how far training has moved them."""
    worst = max(float((mine[n] - theirs[n]).abs().max()) for n in theirs)
    moved = max(float((theirs[n] - before[n]).abs().max()) for n in theirs)
    say(f"{name}: largest difference {worst:.1e}, largest movement {moved:.1e}")
    return worst
