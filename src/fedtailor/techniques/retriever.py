"""`retriever`: the encoder's sentence embedding in the place of logits; what `rag` searches by.

The forward is the mean of the last hidden states over a text's tokens, scaled to length 1, as sentence-transformers' all-MiniLM-L6-v2
reads its encoder: (batch, width), so that inner products are cosines. `rank` = 0 trains nothing; else LoRA on query and value is
trained, by any algorithm that averages trees, with the supervised contrastive loss. There is no classification head.

Data without classes: what is embedded of a row is its question, which is the instruction, or the first half of a text that has none (a
passage is looked up by its beginning and read whole, as in RETRO, arXiv 2112.04426). `generator` names a causal model that reads
what was found (generator.py); without classes there is no other way to answer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.backbone import Backbone
from fedtailor.core import Batch, Forward, Tree
from fedtailor.data.examples import IGNORED
from fedtailor.errors import ConfigError
from fedtailor.losses import TEMPERATURE, contrastive
from fedtailor.metrics import Metric
from fedtailor.techniques.base import Technique, binder, pooled
from fedtailor.techniques.full import write_model
from fedtailor.techniques.generator import reader
from fedtailor.techniques.peft import QUERY_VALUE, peft, targets_of

SMALL = 1e-3  # what a class keeps that no neighbour has, so that a loss is finite (ours)
CHUNK = 1024  # rows compared with all others at a time


def retriever(
    backbone: Backbone, rank: int = 0, alpha: float | None = None, generator: str = "", new_tokens: int = 40
) -> Technique:
    """Embeddings for retrieval: frozen (rank 0), or LoRA on query and value (alpha: 2 rank); `generator` reads what is found."""
    if backbone.kind == "image":
        raise ConfigError("technique 'retriever' embeds texts: this is image data, use technique 'lora'")
    if rank < 0:
        raise ConfigError(f"technique.rank must be at least 0 (got {rank})")
    if backbone.kind != "text" and rank:
        raise ConfigError(
            f"technique.rank = {rank}: a retriever learns from classes, and {backbone.kind} data has none: set it to 0"
        )
    if backbone.kind != "text" and not generator:
        raise ConfigError(
            f"technique 'retriever' on {backbone.kind} data needs something that answers: set technique.generator to a causal model"
        )
    # The encoder alone, and all of its last layer: a mean reads every token.
    base: Any = backbone.model.base_model
    encoder = backbone._replace(model=base, unread=None)
    if rank:
        targets = targets_of(encoder, QUERY_VALUE)
        scale = 2 * rank if alpha is None else alpha
        config = {"r": rank, "lora_alpha": scale, "target_modules": targets}
        inner = peft(encoder, peft_type="LORA", task_type="FEATURE_EXTRACTION", **config)
    else:
        inner = _frozen(encoder)

    def bind(dropout: bool = False) -> Forward:
        hidden = inner.bind(dropout)

        def forward(params: Tree, batch: Batch) -> Tensor:
            return pooled(hidden(params, batch), batch["attention_mask"])

        return forward

    reads = reader(generator, backbone, new_tokens) if generator else None
    judged = by_neighbour if backbone.kind == "text" else unjudged
    return inner._replace(kind="retriever", bind=bind, loss=contrastive, metric=judged, reader=reads)


def embed(forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Rows of {embedding}, for Predict: those of their questions."""
    return {"embedding": forward(params, {**batch, "attention_mask": questions(batch)})}


def questions(batch: Batch) -> Tensor:
    """Which tokens a row is looked up by, (rows, width) of 0 and 1: all of a text with a class, the instruction (what is before the
    tokens that count), or the first half."""
    mask, labels = batch["attention_mask"], batch["labels"]
    if labels.dim() == 1:
        return mask
    before = mask * (labels == IGNORED)
    half = torch.arange(mask.shape[1], device=mask.device) < (mask.sum(1, keepdim=True) + 1) // 2
    return torch.where(before.any(1, keepdim=True), before, mask * half)


def smoothed(shares: Tensor) -> Tensor:
    """Shares of a vote (rows, classes) as probabilities of which none is 0; without any vote they are equal."""
    return (shares + SMALL) / (shares + SMALL).sum(-1, keepdim=True)


def by_neighbour(metric: Metric) -> Metric:
    """The metric for embeddings: a row gets the class of its nearest other row among those judged with it (what metric learning
    calls recall at 1). So a retriever that some algorithm has trained has a number of its own, without any index."""

    def judge(forward: Forward, params: Tree, batch: Batch) -> Tree:
        return {**embed(forward, params, batch), "label": batch["labels"]}

    def tally(outputs: Tree) -> Tree:
        return metric.tally(outputs if "predicted" in outputs else _left_out(outputs["embedding"], outputs["label"]))

    return metric._replace(judge=judge, tally=tally)


def unjudged(metric: Metric) -> Metric:
    """The metric of what is made from embeddings; they themselves say nothing that could be right."""

    def judge(forward: Forward, params: Tree, batch: Batch) -> Tree:
        raise ConfigError("a retriever without classes has no score of its own: set algorithm.kind = 'rag'")

    return metric._replace(judge=judge)


def _left_out(embeddings: Tensor, labels: Tensor) -> Tree:
    """{nll, predicted, confidence, label} of rows (n, width) against each other; a row that is alone is taken for class 0."""
    classes = int(labels.max()) + 1
    parts = []
    for start in range(0, len(labels), CHUNK):
        near = embeddings[start : start + CHUNK] @ embeddings.T
        near[torch.arange(len(near)), start + torch.arange(len(near))] = -math.inf
        found = torch.zeros(len(near), dtype=torch.long) if len(labels) == 1 else labels[near.argmax(1)]
        weights = torch.zeros_like(near) if len(labels) == 1 else (near / TEMPERATURE).softmax(1)
        chances = smoothed(weights @ F.one_hot(labels, classes).to(near.dtype))
        own = labels[start : start + CHUNK]
        parts.append((-chances.gather(1, own[:, None])[:, 0].log(), found, chances.gather(1, found[:, None])[:, 0]))
    nll, predicted, confidence = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"nll": nll, "predicted": predicted, "confidence": confidence, "label": labels}


def _frozen(encoder: Backbone) -> Technique:
    """The encoder as it is: an empty tree, and a plain transformers folder."""

    def save(tree: Tree, folder: Path) -> None:
        write_model(encoder, {}, folder)

    def resized(rank: int) -> Tree:
        raise ConfigError("clients.ranks and clients.lengths: technique 'retriever' has one size at every client")

    return Technique("retriever", encoder, {}, resized, binder(encoder.model, {}), save, save)
