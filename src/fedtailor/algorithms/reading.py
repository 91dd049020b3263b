"""What a generator makes of the passages that `rag` found: solved examples before a text, or what stands before an answer.

Passages come as lists of texts, one a query, the nearest first; rows are a batch of the queries' own tokens and labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtailor.core import Reader, Told, Tree
from fedtailor.techniques.retriever import questions

Passages = Sequence[Sequence[str]]
Rows = Mapping[str, Tensor]


def shown(text: str, label: str = "") -> str:
    """A passage as it stands in a prompt: "text\\nlabel\\n\\n", or without a label."""
    return f"{text}\n{label}\n\n" if label else f"{text}\n\n"


def likelihoods(reader: Reader, passages: Passages, rows: Rows) -> Tensor:
    """Mean log likelihood a token of each class's name after the examples and the text, (queries, classes)."""
    asked = zip(passages, halves(reader, rows), strict=True)
    told = [reader.score(read, f"{text}\n", reader.labels) for read, (text, _) in asked]
    return torch.tensor([[-one.nll / max(one.tokens, 1) for one in row] for row in told])


def answered(reader: Reader, passages: Passages, rows: Rows) -> Tree:
    """Rows of {nll, tokens, hits}: the rest of each row after the passages and its question."""
    asked = zip(passages, halves(reader, rows), strict=True)
    told = [reader.score(read, question, [answer])[0] for read, (question, answer) in asked]
    return {name: torch.tensor([getattr(one, name) for one in told]) for name in Told._fields}


def written(reader: Reader, passages: Passages, rows: Rows) -> list[str]:
    """What the generator answers to each question."""
    return [reader.write(read, question) for read, (question, _) in zip(passages, halves(reader, rows), strict=True)]


def halves(reader: Reader, rows: Rows) -> list[tuple[str, str]]:
    """(question, the rest) of each row, as texts."""
    seen, asked = rows["attention_mask"].bool(), questions(rows).bool()
    out = []
    for ids, mask, first in zip(rows["input_ids"], seen, asked, strict=True):
        whole, question, rest = (reader.read(ids[part].tolist()) for part in (mask, first, mask & ~first))
        # The rest keeps the space before it, which it loses where it is read alone.
        out.append((question, whole[len(question) :] if whole.startswith(question) else rest))
    return out
