"""Losses: module level, pure, `loss(forward, params, batch, aux) -> scalar`. Equal losses are stacked over clients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.core import Batch, Forward, Loss, Tree
from fedtailor.data.examples import IGNORED

TEMPERATURE = 0.05  # of cosines, in `contrastive` and in the votes of neighbours


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not IGNORED, and 0 where there is none (a padding batch must not give NaN).

    Shapes: logits (n, classes), labels (n,).
    """
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


def classification(forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
    """Cross entropy of the class labels."""
    return masked_cross_entropy(forward(params, batch), batch["labels"])


def language(forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
    """Next-token cross entropy over the labels that count (for instructions: those of the response)."""
    return masked_cross_entropy(*_rows(language, forward(params, batch), batch["labels"]))


def next_tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (batch, soft prompt + time, vocabulary) and labels (batch, time) -> both (batch, time - 1, ...), aligned."""
    return logits[:, -labels.shape[1] : -1], labels[:, 1:]


def contrastive(forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, L_out): each row against the others of its class.

    The forward gives embeddings (n, width) of length 1. Mean over the rows that have another one of their class; 0 without any.
    """
    embeddings, labels = forward(params, batch), batch["labels"]
    seen = labels != IGNORED
    others = seen[:, None] & seen[None] & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    alike = (others & (labels[:, None] == labels[None])).to(embeddings.dtype)
    # A finite number in the place of -inf: a row without any other has no gradient, and must not give NaN.
    near = (embeddings @ embeddings.T / TEMPERATURE).masked_fill(~others, -1e4)
    chances = near - near.logsumexp(1, keepdim=True)
    count = alike.sum(1)
    return -((chances * alike).sum(1) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


def calibrated(forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
    """Cross entropy of the logits plus the client's own shift, (classes,), in `aux` (FedLC, arXiv 2209.00189)."""
    return masked_cross_entropy(forward(params, batch) + aux["shift"], batch["labels"])


def proximal(base: Loss, mu: float) -> Loss:
    """base + mu/2 ||params - anchor||^2 over the names of the anchor, in `aux` (FedProx, arXiv 1812.06127). mu = 0 is base itself."""
    return _Proximal(base, mu) if mu else base


def shifted(base: Loss) -> Loss:
    """base + <params, shift>, the shift in `aux`: its gradient is that of base plus the shift (SCAFFOLD's correction)."""
    return _Shifted(base)


class Wrapped(tuple[object, ...]):
    """A loss with parameters as a value: two with equal parameters are equal, so their asks are stacked together."""

    def __new__(cls, *parts: object) -> Wrapped:
        return super().__new__(cls, (cls, *parts))


class _Proximal(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, base, mu = self
        anchor = aux["anchor"]
        distance = sum((params[n] - anchor[n]).square().sum() for n in anchor if isinstance(params[n], Tensor))
        return base(forward, params, batch, aux) + 0.5 * mu * distance  # type: ignore[operator,no-any-return]


class _Shifted(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, base = self
        shift = aux["shift"]
        linear = sum((params[n] * shift[n]).sum() for n in shift)
        return base(forward, params, batch, aux) + linear  # type: ignore[operator,no-any-return]


def beside(base: Loss) -> Loss:
    """base of the params together with those in `aux`["rest"], which stand still: a phase that trains a part of a tree."""
    return _Beside(base)


class _Beside(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, base = self
        return base(forward, {**aux["rest"], **params}, batch, aux)  # type: ignore[operator,no-any-return]


def distilling(temperature: float) -> Loss:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), mean over the rows (Hinton et al., arXiv 1503.02531)."""
    return _Distilling(temperature)


class _Distilling(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, temperature = self
        assert isinstance(temperature, float)
        said = (forward(params, batch) / temperature).log_softmax(-1)
        teacher = (batch["teacher"] / temperature).log_softmax(-1)
        return temperature**2 * divergence(teacher, said, batch["labels"])


def mutual(base: Loss, alpha: float, beta: float) -> Loss:
    """The two losses of Federated Mutual Learning (arXiv 2006.16765) as one sum, for params {"private": tree, "meme": tree}:
    alpha CE(private) + (1 - alpha) KL(meme || private) + beta CE(meme) + (1 - beta) KL(private || meme). Who teaches is
    held fixed, so each tree's gradient is that of its own loss. `base` is `classification` or `language`."""
    return _Mutual(base, alpha, beta)


class _Mutual(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        _, base, alpha, beta = self
        total = torch.zeros((), device=batch["labels"].device)
        said = {name: _rows(base, forward(params[name], batch), batch["labels"]) for name in ("private", "meme")}
        for student, teacher, own in (("private", "meme", alpha), ("meme", "private", beta)):
            logits, labels = said[student]
            taught = divergence(said[teacher][0].detach().log_softmax(-1), logits.log_softmax(-1), labels)
            total = total + own * masked_cross_entropy(logits, labels) + (1 - own) * taught  # type: ignore[operator]
        return total


def _rows(base: object, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n,): of the examples, or of a language model's next tokens."""
    if base is not language:
        return logits, labels
    logits, labels = next_tokens(logits, labels)
    return logits.flatten(0, 1), labels.flatten()


def divergence(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || student) of log probabilities (n, classes): mean over the rows whose label, (n,), is not IGNORED."""
    seen = labels != IGNORED  # padding rows have no teacher
    apart = (teacher.exp() * (teacher - student)).sum(-1)  # written out: torch has no rule to stack its own
    return (apart * seen).sum() / seen.sum().clamp_min(1)


def tail_norms(params: Tree, pairs: dict[str, tuple[str, str]], start: int) -> Tensor:
    """sum over LoRA modules of ||B[:, start:]||_F ||A[start:, :]||_F: what the last ranks still carry (HetLoRA)."""
    total = torch.zeros(())
    for name_a, name_b in pairs.values():
        a, b = params[name_a][start:], params[name_b][:, start:]
        # The square root of 0 has no gradient: B starts at 0.
        total = total + (b.square().sum() * a.square().sum() + 1e-12).sqrt()
    return total
