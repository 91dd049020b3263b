"""A technique on a model that is cut: what of its tree lies where, and the technique on one part alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fedtailor.backbone import Backbone
from fedtailor.core import Layers, Part, Tree
from fedtailor.cut import layers_of, only
from fedtailor.techniques.base import Technique, binder
from fedtailor.techniques.peft import PROMPT, positions_taken


def layers(technique: Technique) -> Layers | None:
    """How this technique's tree lies over its model's layers; None where the model has no list of layers, or where the technique is not
    about them (a soft prompt makes texts longer, a retriever has no head, Co-LoRA's pieces are alike in models of any depth).

    A tensor belongs to the layer whose number its name has; else to the front, if its name is of what comes before the layers, or to
    the back. A prefix has columns for every layer, in their order.
    """
    model: Any = technique.backbone.model
    base = model.base_model
    if technique.loss or technique.kind in ("template", "colora") or (PROMPT in technique.init and technique.kind != "prefix"):
        return None
    if not any(isinstance(module, nn.ModuleList) and len(module) for module in base.modules()):
        return None
    stack, modules = layers_of(base)
    depth, names = len(modules), [name for name, _ in base.named_children()]
    before = set(names[: names.index(stack.partition(".")[0])])

    def place(name: str) -> int:
        found = re.search(rf"(?:^|\.){re.escape(stack)}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
        return -1 if name == PROMPT or before & set(name.split(".")) else depth

    def part(tree: Tree, wanted: Part) -> Tree:
        out: Tree = {}
        for name, tensor in tree.items():
            at = place(name)
            if name == PROMPT and technique.kind == "prefix":
                if wanted.stop > wanted.start:
                    out[name] = tensor.unflatten(1, (depth, -1))[:, wanted.start : wanted.stop].flatten(1)
            elif wanted.start <= at < wanted.stop or (wanted.first and at < 0) or (wanted.last and at >= depth):
                out[name] = tensor
        return out

    def whole(trees: Sequence[Tree]) -> Tree:
        out: Tree = {}
        for tree in trees:
            for name, tensor in tree.items():
                out[name] = torch.cat([out[name], tensor], 1) if name == PROMPT and name in out else tensor
        return out

    # A prefix that goes as a cache counts as text already read: who gives tokens their positions must have a piece of it.
    counted = technique.kind == "prefix" and positions_taken(technique) > 0
    read = int(technique.backbone.unread is not None)
    return Layers(depth, part, whole, int(counted), read=read, dtype=technique.backbone.model.dtype)  # type: ignore[arg-type]


def on_part(technique: Technique, part: Part, make: Callable[[Backbone], Technique]) -> Technique:
    """The technique that `make` makes, on one part of this one's model: modules of its own, the same tensors. Where nothing of it is
    trained, the part is the model's alone."""
    model: Any = technique.backbone.model
    over = layers(technique)
    ends = over is not None and part.start < part.stop == over.depth  # the last layer is here: of it the head may read one token
    backbone = technique.backbone._replace(model=only(model, part), unread=technique.backbone.unread if ends else None)
    held = over.part(technique.init, part) if over else {}
    if over and (not held or (part.last and part.start == part.stop)):  # of what has no layers, the head's own tensors at most
        paths = {name: max((p for p, _ in backbone.model.named_parameters() if name.endswith(p)), key=len) for name in held}
        return technique._replace(backbone=backbone, init=held, bind=binder(backbone.model, paths, backbone.unread))
    return make(backbone)
