"""What a member looks at before it takes what a server names or sends."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedtailor.core import Tree
from fedtailor.trees import SEPARATOR, tensors


def misshapen(body: Tree, init: Tree) -> str:
    """The first tensor that has the name of one of the technique's, and another type or number of axes. Lengths may differ: a client of
    a smaller rank cuts what it is sent."""
    for path, tensor in tensors(body):
        mine = init.get(path.rpartition(SEPARATOR)[2])
        if isinstance(mine, Tensor) and (tensor.dim() != mine.dim() or tensor.dtype not in (mine.dtype, torch.float32)):
            return path
    return ""


def is_here(name: str) -> bool:
    """Whether this is a path of this machine rather than a name of the hub: those are the member's to give."""
    try:
        return Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists()
    except (OSError, ValueError):
        return True
