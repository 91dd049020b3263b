"""A prior over trees, how likely a client's rows are under it, and the mixture of its draws that they leave (PAC-PFL's side of a client).

With L_j the mean loss of draw h_j of the prior theta = (mean, log std) on the client's rows:
    mll(theta) = (1/beta) ln (1/J) sum_j exp(-beta L_j);   w_kj in proportion to exp(m mll(theta_k)) exp(-beta L_kj), m the rows
Trees are flat here: the numbers of the tensors in the order of their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.algorithms.linear_heads import Head, features, logits
from fedtailor.core import Batch, Forward, Loss, Tree
from fedtailor.losses import Wrapped

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def shapes_of(tree: Mapping[str, Tensor]) -> Shapes:
    return tuple((name, tuple(tree[name].shape)) for name in sorted(tree))


def as_tree(flat: Tensor, shapes: Shapes) -> Tree:
    parts = flat.split([math.prod(shape) for _, shape in shapes])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


def drawn(theta: Tensor, z: Tensor) -> Tensor:
    """Draws (J, d) of the prior theta, (2 d,), by unit normal noise (J, d)."""
    mean, log_std = theta.chunk(2)
    return mean + log_std.exp() * z


def log_marginal(losses: Tensor, beta: Tensor | float) -> Tensor:
    """(1/beta) ln mean_j exp(-beta L_j) over the last axis."""
    return ((-beta * losses).logsumexp(-1) - math.log(losses.shape[-1])) / beta


def marginal(base: Loss, shapes: Shapes) -> Loss:
    """-mll of the prior `theta` in `aux`, whatever `up` has become: steps of SGD at rate 1 add up gradients of mll in it."""
    return _Marginal(base, shapes)


class _Marginal(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        base: Any
        _, base, shapes = self
        theta = aux["theta"] + params["up"] - params["up"].detach()
        losses = [base(forward, as_tree(h, shapes), batch, {}) for h in drawn(theta, aux["noise"]).unbind()]  # type: ignore[arg-type]
        return -log_marginal(torch.stack(losses), aux["beta"])


def shares(losses: Tensor, rows: int, beta: float) -> Tensor:
    """Weights of draws (K, J) in a client's mixture, by their mean losses on its rows; they add up to 1."""
    return (rows * log_marginal(losses, beta)).softmax(0)[:, None] * (-beta * losses).softmax(1)


def of_heads(thetas: Tensor, z: Tensor, beta: float, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(gradients of mll (K, 2 d), mll (K,)) of priors over a linear head, from all rows together."""
    with torch.enable_grad():
        leaf = thetas.detach().clone().requires_grad_()
        heads = torch.cat([drawn(theta, z) for theta in leaf])
        mll = log_marginal(losses_of_heads(heads, inputs, labels).view(len(thetas), len(z)), beta)
        mll.sum().backward()
    assert leaf.grad is not None
    return leaf.grad, mll.detach()


def losses_of_heads(heads: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each of these flat heads: (n,)."""
    said = logits(heads, inputs)
    return F.cross_entropy(said.flatten(0, 1), labels.repeat(len(heads)), reduction="none").view(len(heads), -1).mean(1)


def losses_of(judge: Any, shapes: Shapes, forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Rows of {nll (a column a tree), of (what they are summed over)}."""
    told = [judge(forward, as_tree(h, shapes), batch) for h in params["trees"]]
    nll = torch.stack([t["nll"] for t in told], 1)
    return {"nll": nll, "of": told[0].get("tokens", torch.ones_like(nll[:, 0]))}


def mixed(judge: Any, shapes: Shapes, forward: Forward, params: Tree, batch: Batch) -> Tree:
    """What `judge` says of the mean of the trees' probabilities."""

    def average(params: Tree, batch: Batch) -> Tensor:
        # One after the other: a language model's probabilities of all trees together are large.
        total = torch.zeros(())
        for weight, h in zip(params["weights"], params["trees"], strict=True):
            total = total + weight * forward(as_tree(h, shapes), batch).softmax(-1)
        return total.clamp_min(torch.finfo(total.dtype).tiny).log()

    return judge(average, params, batch)  # type: ignore[no-any-return]


def mixed_heads(judge: Any, head: Head, forward: Forward, params: Tree, batch: Batch) -> Tree:
    """`mixed` for linear heads: one pass through the model."""

    def average(params: Tree, batch: Batch) -> Tensor:
        chances = logits(params["trees"], features(forward, params["start"], batch, head)["features"]).softmax(-1)
        mean = torch.einsum("t,trc->rc", params["weights"], chances)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    return judge(average, params, batch)  # type: ignore[no-any-return]
