"""A frozen tree beside a trained one, a gate a module between them (FedMosaic).

In LoRA two adapters answer side by side, g B_G A_G + (1 - g) B_L A_L, as factors of twice the rank; other tensors are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedtailor.core import Batch, Forward, Loss, Tree
from fedtailor.losses import Wrapped
from fedtailor.trees import lora_pairs


def closed(tree: Tree) -> Tree:
    """A gate a module at its start, half open."""
    return {module: torch.zeros(()) for module in sorted({*lora_pairs(tree), *map(module_of, tree)})}


def module_of(name: str) -> str:
    return name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] or name


def mixed(gates: Tree, shared: Tree, own: Tree) -> Tree:
    """sigmoid(gate) of the shared tree and the rest of the own one, module by module."""
    open_ = {module: gate.sigmoid() for module, gate in gates.items()}
    out: Tree = {}
    for module, (down, up) in lora_pairs(own).items():
        out[down] = torch.cat([shared[down], own[down]])
        out[up] = torch.cat([open_[module] * shared[up], (1 - open_[module]) * own[up]], 1)
    # Written so that where both are equal a gate's gradient is exactly 0: Adam would make a step of rounding.
    for name in own.keys() - out.keys():
        out[name] = own[name] + open_[module_of(name)] * (shared[name] - own[name])
    return {name: out[name] for name in own}


def gated(base: Loss) -> Loss:
    """base of the mixture of "global" in `aux` and the params {"local", "gates"}, beside "rest" in `aux`."""
    return _Gated(base)


class _Gated(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, base = self
        tree = {**mixed(params["gates"], aux["global"], params["local"]), **aux["rest"]}
        return base(forward, tree, batch, {})  # type: ignore[operator,no-any-return]
