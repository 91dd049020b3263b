"""Co-LoRA's one-off alignment of a client's frozen factors with the reference model's (arXiv 2506.11024, `train_abalign.py`).

P and Q of one model mean something in another only where A and B do the same there. On public rows, with x what enters a module of the client's
model, x' what enters its counterpart in the reference model, and both models as they were before any training:
    A <- argmin  sum over modules mean((A x - A' x')^2) + 1/2 mean squared cosine of different columns of A, by AdamW
    A <- U V^T, its polar factor
    z = A x, z' = A' x', both centred over all tokens;  X = z B^T, X' = z' B'^T;  S = X^T X + ridge I, S' = X'^T X' + ridge I
    B <- S^{1/2} U V^T S'^{-1/2} B',  U Sigma V^T = SVD(S^{-1/2} X^T X' S'^{-1/2})
All of B's side lies in the span of the orthonormal columns of B and B', so it is computed there, in matrices of rank x rank (a test has both).

**Our reading.** The authors pair tokens through tables between vocabularies where tokenizers differ; here an example's mean over its tokens stands
for it then, and for images. Theirs is 100 steps of 4 rows, lr 5e-5; ours are options. As A changes nothing of what enters a module, a model is
run once, and the steps are on what it said. Every client of a kind draws the same rows from the experiment's seed, so all of them arrive at
the same factors and nothing crosses the wire.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.core import Batch, Examples, Forward, Predict, Site, Tree, Work, falling, stream
from fedtailor.techniques.base import WITHIN

RIDGE = 1e-4
ROWS = 4  # of a step


def align(site: Site, frozen: Tree, theirs: Tree, rows: int, steps: int, lr: float) -> Generator[Predict | Work, Any, Tree]:
    """The client's own A and B, by the names in `frozen`; `theirs` are the reference model's. A part of a client handler.

    Args:
        rows: public examples that are looked at, at most.
    """
    assert site.reference
    mine, said = site.data["public"], site.reference.data["public"]
    chosen = torch.randperm(len(mine), generator=stream(site.seed, "alignment"))[:rows].numpy()
    mine, said = mine.take(chosen), said.take(chosen)
    paired = same_tokens(mine, said)
    look = functools.partial(entered, width=max(mine.lengths) if paired else 1, paired=paired)
    pieces = [name.removesuffix(".A") for name in frozen if name.endswith(".A")]
    downs, others = ([tree[f"{piece}.A"] for piece in pieces] for tree in (frozen, theirs))

    seen = yield Predict(look, {**site.reference.init, **theirs}, said, reference=True)
    targets = [x @ down.mT for x, down in zip(by_module(seen["within"], others), others, strict=True)]
    seen = yield Predict(look, {**site.init, **frozen}, mine)
    inputs = by_module(seen["within"], downs)
    counts = torch.ones(inputs[0].shape[:2], dtype=torch.bool)
    if paired:
        counts = torch.from_numpy(np.arange(counts.shape[1]) < np.asarray(mine.lengths)[:, None])

    yield Work(products(downs, others, counts, steps))
    downs = [polar(down) for down in fitted(downs, inputs, targets, counts, steps, lr, site.seed)]
    out: Tree = {}
    for piece, down, x, target in zip(pieces, downs, inputs, targets, strict=True):
        out[f"{piece}.A"] = down
        out[f"{piece}.B"] = carried(frozen[f"{piece}.B"], x[counts].double() @ down.double().mT, target[counts].double())
    return out


def same_tokens(a: Examples, b: Examples) -> bool:
    """Whether both models read the same tokens; never of images, whose patches may differ."""
    if not np.array_equal(a.lengths, b.lengths):
        return False
    width = int(max(a.lengths))
    here, there = (x.batch(range(len(x)), width, len(x)).get("input_ids") for x in (a, b))
    return here is not None and there is not None and torch.equal(here, there)


def entered(forward: Forward, params: Tree, batch: Batch, width: int, paired: bool) -> Tree:
    """Rows of {within}: what enters the modules, (batch, width, sum of widths), 0 at padding; or the mean over the tokens, of width 1."""
    x = forward({**params, WITHIN: True}, batch)
    mask = batch["attention_mask"][..., None].to(x.dtype) if "attention_mask" in batch else torch.ones_like(x[..., :1])
    x = x * mask
    return {"within": F.pad(x, (0, 0, 0, width - x.shape[1])) if paired else x.sum(1, keepdim=True) / mask.sum(1, keepdim=True)}


def products(downs: Sequence[Tensor], others: Sequence[Tensor], counts: Tensor, steps: int) -> float:
    """Operations of the products with A and A': targets, each step there and back, and z. Matrices of rank x rank are not counted."""
    ours, theirs = (float(sum(down.numel() for down in each)) for each in (downs, others))
    return 2 * counts.numel() * (ours + theirs) + 4 * steps * min(ROWS, len(counts)) * counts.shape[1] * ours


def by_module(within: Tensor, downs: Sequence[Tensor]) -> list[Tensor]:
    """(rows, tokens, d_in) for each module."""
    return list(within.split([down.shape[1] for down in downs], -1))


def fitted(
    downs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    counts: Tensor,
    steps: int,
    lr: float,
    seed: int,
) -> list[Tensor]:
    """A after AdamW on the loss of A. Shapes: A (rank, d_in), inputs (rows, tokens, d_in), targets (rows, tokens, rank), counts (rows, tokens)."""
    leaves = [down.clone().requires_grad_() for down in downs]
    optimizer = torch.optim.AdamW(leaves, lr=lr, weight_decay=0.0)
    with torch.enable_grad():
        for step in range(steps):
            draw = torch.randperm(len(counts), generator=stream(seed, "alignment", step))[:ROWS]
            optimizer.param_groups[0]["lr"] = lr * falling("cosine", step / steps)
            optimizer.zero_grad()
            nearness(leaves, [x[draw] for x in inputs], [t[draw] for t in targets], counts[draw]).backward()
            optimizer.step()
    return [leaf.detach() for leaf in leaves]


def nearness(downs: Sequence[Tensor], inputs: Sequence[Tensor], targets: Sequence[Tensor], counts: Tensor) -> Tensor:
    """The loss of A: near the reference model's at the same tokens (a row's mean, mean over rows), with columns that point apart."""
    weights = counts / counts.sum(1, keepdim=True) / len(counts)
    apart = [
        ((x @ down.mT - target).square().mean(-1) * weights).sum() for down, x, target in zip(downs, inputs, targets, strict=True)
    ]
    return torch.stack(apart).sum() + 0.5 * torch.stack([cosines(down) for down in downs]).mean()


def cosines(table: Tensor) -> Tensor:
    """Mean squared cosine between different columns, without a matrix of all of them: ||C^T C||_F = ||C C^T||_F."""
    columns = F.normalize(table, dim=0)
    count = columns.shape[1]
    return ((columns @ columns.mT).square().sum() - count) / (count * (count - 1))


def polar(table: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows."""
    u, _, v = torch.linalg.svd(table.double(), full_matrices=False)
    nearest: Tensor = u @ v
    return nearest.to(table.dtype)


def carried(up: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """B for this model. Shapes: up (d_out, rank) with orthonormal columns, own and other (tokens, rank) -> (d_out, rank)."""
    own, other = own - own.mean(0), other - other.mean(0)
    (inverse, root), (theirs, _) = powers(own.mT @ own), powers(other.mT @ other)
    u, _, v = torch.linalg.svd(inverse @ (own.mT @ other) @ theirs)
    moved: Tensor = up.double() @ root @ u @ v @ theirs
    return moved.to(up.dtype)


def powers(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(S^{-1/2}, S^{1/2}) of S = covariance + ridge I."""
    values, vectors = torch.linalg.eigh(covariance + RIDGE * torch.eye(len(covariance), dtype=covariance.dtype))
    roots = values.clamp_min(RIDGE).sqrt()
    return vectors / roots @ vectors.mT, vectors * roots @ vectors.mT
