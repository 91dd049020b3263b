"""Metrics as sums: a client tallies its own rows, the server adds tallies and takes the value; no prediction travels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from fedtailor.core import Batch, Forward, Tree
from fedtailor.data.examples import IGNORED
from fedtailor.errors import ConfigError, nearest
from fedtailor.losses import next_tokens
from fedtailor.trees import add, stack, tree_map

LOWER_IS_BETTER = ("ece", "perplexity")
BINS = 15  # of confidences
TOKENS = 1024
"""In one call of `side_by_side`; a batch of a Predict has as many at most (engines/answering.py)."""


class Metric(NamedTuple):
    name: str
    judge: Callable[[Forward, Tree, Batch], Tree]  # a batch -> outputs, one row an example
    tally: Callable[[Tree], Tree]  # outputs of many examples -> sums
    value: Callable[[Tree], float]  # sums -> the metric
    better: Callable[[float, float], bool] = float.__gt__


def judge_classes(forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Rows of {nll, predicted, confidence (the probability of what is predicted), label}."""
    logits, labels = forward(params, batch), batch["labels"]
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return {"nll": nll, "predicted": logits.argmax(-1), "confidence": logits.softmax(-1).amax(-1), "label": labels}


def judge_tokens(forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Rows of {nll (sum over the tokens that count), tokens, hits}."""
    logits, labels = next_tokens(forward(params, batch), batch["labels"])
    nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
    counted = labels != IGNORED
    hits = ((logits.argmax(-1) == labels) & counted).sum(1)
    return {"nll": nll, "tokens": counted.sum(1), "hits": hits}


def scores(forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Rows of class probabilities, for `predict`."""
    return {"scores": forward(params, batch).softmax(-1)}


def side_by_side(judge: Callable[[Forward, Tree, Batch], Tree], forward: Forward, trees: Tree, batch: Batch) -> Tree:
    """A batch judged with each of several alike trees: outputs (rows, trees, ...), in the order of the trees.

    Few rows are judged with many trees in one call, as many as make up TOKENS: what a call costs whatever its size is paid once.
    """
    each, inputs = list(trees.values()), batch.get("input_ids", batch["labels"])
    size = max(1, TOKENS // max(1, inputs.numel()))
    found: list[Tree] = []
    for start in range(0, len(each), size):
        group = each[start : start + size]
        try:
            found.append(tree_map(lambda t: t.movedim(0, 1), vmap(lambda tree: judge(forward, tree, batch))(stack(group))))
        except RuntimeError as error:  # what cannot be stacked in training either
            if not any(word in str(error) for word in ("vmap", "functorch")):
                raise
            alone = [judge(forward, tree, batch) for tree in group]
            found.append(tree_map(lambda *ts: torch.stack(ts, 1), alone[0], *alone[1:]))
    return tree_map(lambda *ts: torch.cat(ts, 1), found[0], *found[1:])


def apart(outputs: Tree) -> list[Tree]:
    """What `side_by_side` gives, tree by tree."""
    return [{name: t[:, i] for name, t in outputs.items()} for i in range(next(iter(outputs.values())).shape[1])]


def _tally_accuracy(outputs: Tree) -> Tree:
    return {
        "n": torch.tensor(len(outputs["label"])),
        "nll": outputs["nll"].double().sum(),
        "correct": (outputs["predicted"] == outputs["label"]).sum(),
    }


def _tally_confusion(outputs: Tree, classes: int) -> Tree:
    """Also counts[label, predicted], (classes, classes)."""
    flat = torch.bincount(outputs["label"] * classes + outputs["predicted"], minlength=classes * classes)
    return {**_tally_accuracy(outputs), "confusion": flat.view(classes, classes)}


def _tally_calibration(outputs: Tree) -> Tree:
    """Also, of the rows whose confidence lies in each of BINS equal parts of (0, 1]: (BINS, 3) of how many, how sure, how many right."""
    sure, right = outputs["confidence"].double(), (outputs["predicted"] == outputs["label"]).double()
    part = (sure * BINS).ceil().long().clamp(1, BINS) - 1
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    bins.index_add_(0, part, torch.stack([torch.ones_like(sure), sure, right], 1))
    return {**_tally_accuracy(outputs), "bins": bins}


def _tally_tokens(outputs: Tree) -> Tree:
    return {
        "n": torch.tensor(len(outputs["tokens"])),
        "nll": outputs["nll"].double().sum(),
        "tokens": outputs["tokens"].sum(),
        "correct": outputs["hits"].sum(),
    }


def accuracy(sums: Tree) -> float:
    """Share of the rows (of the tokens that count, for language) that are right."""
    return float(sums["correct"]) / float(sums["n"])  # two tensors of integers would be divided in float32


def f1(sums: Tree) -> float:
    """F1 of class 1 of two."""
    return _f1_of(sums["confusion"], 1)


def macro_f1(sums: Tree) -> float:
    """Mean F1 over the classes that occur."""
    confusion = sums["confusion"]
    present = [k for k in range(len(confusion)) if confusion[k].sum() + confusion[:, k].sum() > 0]
    return sum(_f1_of(confusion, k) for k in present) / len(present)


def _f1_of(confusion: Tensor, k: int) -> float:
    hit, given, true = confusion[k, k], confusion[:, k].sum(), confusion[k].sum()
    return 2 * float(hit) / max(float(given + true), 1.0)


def matthews(sums: Tree) -> float:
    """Matthews correlation, its multi-class form; 0 where it is not defined."""
    c = sums["confusion"].double()
    predicted, true, right, total = c.sum(0), c.sum(1), c.trace(), c.sum()
    above = right * total - (predicted * true).sum()
    below = ((total**2 - predicted.square().sum()) * (total**2 - true.square().sum())).sqrt()
    return float(above / below) if below > 0 else 0.0


def ece(sums: Tree) -> float:
    """Expected calibration error (Guo et al., ICML 2017): |how sure - how often right|, the mean over the rows by parts; smaller is better."""
    _, sure, right = sums["bins"].unbind(1)
    return float((sure - right).abs().sum() / sums["n"])


def perplexity(sums: Tree) -> float:
    """exp of the mean loss a token; smaller is better."""
    return math.exp(min(mean_loss(sums), 700.0))


def mean_loss(sums: Tree) -> float:
    """Mean loss an example, or a token for language models."""
    return float(sums["nll"] / sums["tokens" if "tokens" in sums else "n"].clamp_min(1))


def metric(name: str, kind: str, classes: int) -> Metric:
    """The metric for data of this kind; "auto" is accuracy for classes and perplexity for language.

    Raises:
        ConfigError: this data has no such metric.
    """
    tokens = kind in ("language", "instruction")
    values = (
        {"perplexity": perplexity} if tokens else {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews, "ece": ece}
    )
    if classes == 2:
        values["f1"] = f1
    if name not in ("auto", *values):
        what = f"{kind} data" if tokens else f"{classes} classes"
        raise ConfigError(f"data.metric cannot be '{name}' for {what}: {nearest(name, values)}")
    if name == "auto":
        name = "perplexity" if tokens else "accuracy"
    tally = {"accuracy": _tally_accuracy, "ece": _tally_calibration, "perplexity": _tally_tokens}.get(name)
    better = float.__lt__ if name in LOWER_IS_BETTER else float.__gt__
    judge = judge_tokens if tokens else judge_classes
    return Metric(name, judge, tally or partial(_tally_confusion, classes=classes), values[name], better)


def total(tallies: Iterable[Tree]) -> Tree:
    """The sum of tallies, in the order given."""
    result: Tree = {}
    for tally in tallies:
        result = add(result, tally) if result else dict(tally)
    return result
