"""`full`: every weight is trained and sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedtailor import wire
from fedtailor.backbone import Backbone, fork, quiet
from fedtailor.core import Tree
from fedtailor.errors import ConfigError
from fedtailor.techniques.base import FRAME, Technique, binder, detached, save_frame


def full(backbone: Backbone) -> Technique:
    """Full fine-tuning: all weights trained, all weights on the wire (use it as the upper baseline of cost)."""
    model = backbone.model
    # Tied weights (an embedding that is also the output layer) are listed once and replaced together.
    paths = {name: name for name, _ in model.named_parameters()}

    def save(tree: Tree, folder: Path) -> None:
        write_model(backbone, {name: t for name, t in tree.items() if name not in FRAME}, folder)
        save_frame(tree, folder)

    def resized(size: int) -> Tree:
        raise ConfigError("clients.ranks and clients.lengths: 'full' has neither; use technique lora or prefix")

    init = detached(dict(model.named_parameters()))
    return Technique("full", backbone, init, resized, binder(model, paths, backbone.unread), save, save)


@torch.no_grad()
def write_model(backbone: Backbone, tree: Tree, folder: Path) -> None:
    """A plain transformers folder of the backbone with these weights."""
    own = fork(backbone.model)
    for name, value in tree.items():
        path, _, leaf = name.rpartition(".")
        module = own.get_submodule(path)
        dtype = getattr(module, leaf).dtype
        setattr(module, leaf, torch.nn.Parameter(value.to(dtype), requires_grad=False))
    if hasattr(own, "tie_weights"):
        own.tie_weights()  # type: ignore[operator]
    write_folder(backbone, own, folder)


def write_folder(backbone: Backbone, model: torch.nn.Module, folder: Path) -> None:
    with quiet(), wire.saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        config: Any = model.config
        config._attn_implementation = "sdpa"  # ours is not known where fedtailor is not installed
        model.save_pretrained(folder)  # type: ignore[operator]
        backbone.processor.save_pretrained(folder)
