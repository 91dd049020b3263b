"""A tree of experts: trees of one technique and a gate that says which of them an input is given to.

    {"experts": {"e0": tree, "e3": tree}, "gate": {"w1", "b1", "w2", "b2"}, "common": tree}
The gate is a network of two layers over the mean hidden state under the common tree, with a score for each expert that there is anywhere;
each input gets the best of the experts that this tree has. Two forward passes an input, however many they are. Its folder has one
of the technique's own for each tree, and gate.safetensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fedtailor import wire
from fedtailor.core import Batch, Forward, Tree, stream
from fedtailor.techniques.base import MEAN, Technique

EXPERTS, GATE, COMMON = "experts", "gate", "common"


def expert(number: int) -> str:
    return f"e{number}"


def gate(inputs: int, width: int, experts: int, seed: int) -> Tree:
    """A gate as torch's linear layers start."""
    shapes = {"w1": (inputs, width), "b1": (width,), "w2": (width, experts), "b2": (experts,)}
    drawn: Tree = {}
    for name, shape in shapes.items():
        most = (inputs if name.endswith("1") else width) ** -0.5
        drawn[name] = torch.empty(shape).uniform_(-most, most, generator=stream(seed, GATE, name))
    return drawn


def gated(gate: Tree, embeddings: Tensor) -> Tensor:
    """(rows, width of hidden states) -> logits of the experts, (rows, experts)."""
    inputs = F.layer_norm(embeddings, embeddings.shape[-1:])
    return (inputs @ gate["w1"] + gate["b1"]).relu() @ gate["w2"] + gate["b2"]  # type: ignore[no-any-return]


def embed(forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Rows of {embedding} under a common tree, for Predict."""
    return {"embedding": forward({**params, MEAN: True}, batch)}


def routed(forward: Forward, params: Tree, batch: Batch) -> Tensor:
    """The logits of the best-scored expert for each row, of those in the tree."""
    scores = gated(params[GATE], forward({**params[COMMON], MEAN: True}, batch))
    best = scores[:, [int(name[1:]) for name in params[EXPERTS]]].argmax(1)
    out: Tensor | None = None
    for place, tree in enumerate(params[EXPERTS].values()):
        rows = (best == place).nonzero()[:, 0]
        if len(rows):
            said = forward(tree, {name: t[rows] for name, t in batch.items()})
            out = said.new_zeros((len(best), *said.shape[1:])) if out is None else out
            out[rows] = said
    assert out is not None, "a batch without rows"
    return out


def with_experts(make: Callable[..., Technique]) -> Callable[..., Technique]:
    """The same technique, which also knows what to do with a tree of experts."""

    @functools.wraps(make)
    def wider(*args: Any, **options: Any) -> Technique:
        plain = make(*args, **options)

        def bind(dropout: bool = False) -> Forward:
            alone = plain.bind(dropout)

            @functools.wraps(alone)
            def forward(params: Tree, batch: Batch) -> Tensor:
                return routed(alone, params, batch) if EXPERTS in params else alone(params, batch)

            return forward

        def writing(write: Callable[[Tree, Path], None]) -> Callable[[Tree, Path], None]:
            def save(tree: Tree, folder: Path) -> None:
                if EXPERTS not in tree:
                    return write(tree, folder)
                for name, one in {COMMON: tree[COMMON], **tree[EXPERTS]}.items():
                    write(one, folder / name)
                path = folder / "gate.safetensors"
                with wire.saving(path):
                    save_file({name: t.contiguous() for name, t in tree[GATE].items()}, str(path), {"format": "pt"})

            return save

        return plain._replace(bind=bind, save=writing(plain.save), merge=writing(plain.merge))

    return wider
