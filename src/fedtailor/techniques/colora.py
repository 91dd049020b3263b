"""Co-LoRA: LoRA whose inner pieces have one size in every model (Seo et al., arXiv 2506.11024, `coloralayer.py` at 7887f5f).

The layers are divided into `blocks` parts of equal depth. In the last layer of each an adapter is
    s B (P^T A x + Q),  P: (rank, rank), Q: (rank), both zero at first;  A has orthonormal rows, B orthonormal columns, and both stand still
and in all other layers a plain one, s B A x, trained. A tree calls the pieces colora.<block>.<module>.P and .Q, where modules count in the
order of a layer: the same names and shapes for models of other widths, depths and families. Their A and B are in no tree, unless an
algorithm has put them there under the names .A and .B: then these are used (`fedmosaic` aligns them between models). To PEFT it is a LoRA
with B P^T in the place of B and the bias B Q, and is exported so.

`blocks` is 4 as in the authors' code, or the depth of the model where that is less; where they would not be equal, the last is the longer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor.backbone import Backbone
from fedtailor.core import Batch, Forward, Tree, stream
from fedtailor.cut import layers_of
from fedtailor.errors import ConfigError
from fedtailor.techniques.base import WITHIN, Technique
from fedtailor.techniques.peft import QUERY_VALUE, fixed, peft, targets_of, with_head
from fedtailor.trees import lora_pairs

PIECES = "colora."
"""How the names of pieces that have one size in every model begin."""


class Place(NamedTuple):
    """A module that is adapted through P and Q."""

    piece: str  # colora.<block>.<module>
    down: str  # PEFT's name of its A
    up: str  # of its B
    bias: str  # of what B Q is added as


def colora(
    backbone: Backbone,
    rank: int = 8,
    alpha: float | None = None,
    target: list[str] | None = None,
    blocks: int = 4,
    head: str = "trained",
) -> Technique:
    """Co-LoRA: in some layers rank-sized P and Q between frozen factors, alike in models of any width; in the others LoRA."""
    if rank < 1 or blocks < 1:
        raise ConfigError(f"technique colora: rank and blocks must be at least 1 (got {rank} and {blocks})")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_bias": True,
        "target_modules": targets_of(backbone, QUERY_VALUE, target),
    }
    plain = peft(backbone, **config)
    # With every token of the last layer too, where a classifier needs the first one alone.
    whole = peft(backbone._replace(unread=None), **config) if backbone.unread else plain
    places = placed(backbone, plain.init, blocks)
    replaced = {name for place in places for name in (place.down, place.up)}
    # Of the other modules the bias stays zero: it is in PEFT's folder, and trained by nobody.
    held = {name: t for name, t in plain.init.items() if name not in replaced and not name.endswith(".lora_B.bias")}
    frozen: Tree = {}
    for place in places:
        frozen[f"{place.piece}.A"] = orthonormal(plain.init[place.down].shape, f"{place.piece}.A")
        frozen[f"{place.piece}.B"] = orthonormal(plain.init[place.up].mT.shape, f"{place.piece}.B").mT.contiguous()
        held |= {f"{place.piece}.P": torch.zeros(rank, rank), f"{place.piece}.Q": torch.zeros(rank)}

    def plainly(tree: Tree) -> Tree:
        """The same adapter in PEFT's words."""
        out = {name: t for name, t in tree.items() if not name.startswith(PIECES)}
        for place in places:
            inner, shift = tree[f"{place.piece}.P"], tree[f"{place.piece}.Q"]
            names = (f"{place.piece}.A", f"{place.piece}.B")
            down, up = ((tree[n] if n in tree else frozen[n]).to(inner.device) for n in names)
            out |= {place.down: down, place.up: up @ inner.mT, place.bias: up @ shift}
        return out

    def bind(dropout: bool = False) -> Forward:
        forward, inside = plain.bind(dropout), whole.bind(dropout)

        def run(params: Tree, batch: Batch) -> Tensor:
            if WITHIN in params:
                return inside({**plainly(params), WITHIN: [place.down for place in places]}, batch)
            return forward(plainly(params), batch)

        return run

    def save(tree: Tree, folder: Path) -> None:
        plain.save(plainly({**held, **tree}), folder)

    def merge(tree: Tree, folder: Path) -> None:
        modules = dict(backbone.model.named_modules())
        for place in places:
            module = max((n for n in modules if place.down.startswith(f"base_model.model.{n}.")), key=len)
            if getattr(modules[module], "bias", None) is None:
                raise ConfigError(
                    f"a colora adapter shifts what '{module}' puts out, which has no bias to merge it into: export it without --merge"
                )
        plain.merge(plainly({**held, **tree}), folder)

    made = plain._replace(kind="colora", init=held, resized=fixed, bind=bind, save=save, merge=merge, frozen=frozen)
    return with_head(made, head)


def placed(backbone: Backbone, tree: Tree, blocks: int) -> list[Place]:
    """The adapted modules of the last layer of each block, block by block, in the order of the layer.

    Raises:
        ConfigError: the model has no list of layers; or nothing is adapted in one of these layers.
    """
    stack, layers = layers_of(backbone.model.base_model)  # type: ignore[arg-type]
    out: list[Place] = []
    for block, layer in enumerate(ends(len(layers), blocks)):
        inside = re.compile(rf"(?:^|\.){re.escape(stack)}\.{layer}\.")
        order = [name for name, _ in layers[layer].named_modules()]
        found = {module: pair for module, pair in lora_pairs(tree).items() if inside.search(f"{module}.")}
        if not found:
            raise ConfigError(f"technique colora: layer {layer} has none of the modules to adapt: leave technique.target out")
        here = sorted(found, key=lambda module: max((len(n), order.index(n)) for n in order if f".{module}".endswith(f".{n}"))[1])
        for number, module in enumerate(here):
            out.append(Place(f"{PIECES}{block}.{number}", *found[module], f"{module}.lora_B.bias"))
    return out


def ends(depth: int, blocks: int) -> list[int]:
    """The last layer of each block."""
    blocks = min(blocks, depth)
    step = depth // blocks
    return [*(k * step - 1 for k in range(1, blocks)), depth - 1]


def orthonormal(shape: Sequence[int], name: str) -> Tensor:
    """A matrix with orthonormal rows, from the singular vectors of a Kaiming-uniform draw that its name gives."""
    most = 1 / math.sqrt(shape[1])
    noise = torch.empty(*shape).uniform_(-most, most, generator=stream(0, name))
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    return u @ v  # type: ignore[no-any-return]
