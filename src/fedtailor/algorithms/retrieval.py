"""Looking up rows by their embeddings, and what is made of several clients' lists of them: one list, a vote, citations.

`rag` says who may give what. Lists come as the bodies of replies: scores, rows, labels, and what else the client let go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtailor import wire
from fedtailor.core import Ask, ClientId, Examples, Message, Predict, Tree
from fedtailor.errors import ConfigError
from fedtailor.losses import TEMPERATURE
from fedtailor.techniques.retriever import embed

MERGES = ("scores", "calibrated", "rrf")
CLOSE = 1e-5  # cosines nearer than this are equal: a row's embedding depends in its last bits on what shares its batch


def library() -> ModuleType:
    """faiss.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("algorithm rag needs faiss, which is not installed: pip install 'fedtailor[rag]'") from error
    return faiss


def top(vectors: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of largest inner product, the largest first: (scores, row numbers), both (queries, min(k, rows))."""
    index = library().IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())
    scores, rows = index.search(queries.contiguous().numpy(), min(k, len(vectors)))
    return torch.from_numpy(scores), torch.from_numpy(rows)


def everything(data: Examples) -> dict[str, Tensor]:
    """All rows as one batch: labels, and tokens with the mask that says where they end."""
    return data.batch(range(len(data)), int(max(data.lengths)), len(data))


def indexed(
    own: Tree | None, params: Tree, data: Examples, rows: Mapping[str, Tensor]
) -> Generator[Ask, Any, tuple[Tree, Tensor]]:
    """(own state, embeddings of the rows): encoded once for an encoder and these rows, and kept with a mark of both."""
    digest = hashlib.sha256(wire.encode(Message("encoder", params)))
    for name in sorted(rows):
        digest.update(rows[name].numpy().tobytes())
    mark = digest.hexdigest()
    if own is None or own["mark"] != mark:
        outputs = yield Predict(embed, params, data)
        own = {"mark": mark, "vectors": outputs["embedding"]}
    return own, own["vectors"]


def vote(scores: Tensor, labels: Tensor, classes: int = 0) -> Tensor:
    """Shares of the classes among neighbours, weights softmax(score / 0.05); shapes (n, k) twice -> (n, classes)."""
    classes = classes or int(labels.max()) + 1
    weights = (scores / TEMPERATURE).softmax(1)
    return torch.zeros(len(scores), classes).scatter_add_(1, labels.long(), weights)


class Hits(NamedTuple):
    """Merged lists, the best first; each (queries, up to k)."""

    scores: Tensor  # cosines
    labels: Tensor  # 0 where there are no classes
    owners: Tensor  # numbers of the clients, in their sorted order
    rows: Tensor  # numbers of the rows at their owners


def merged(found: Mapping[ClientId, Message], queries: int, k: int, merge: str, rrf: int) -> Hits:
    """The k best of all clients' lists, for each query. Equal keys: the larger cosine, then the earlier client."""
    lists = [(i, found[c].body) for i, c in enumerate(sorted(found)) if "scores" in found[c].body]
    if not lists:
        nothing = torch.zeros(queries, 0)
        return Hits(nothing, nothing.long(), nothing.long(), nothing.long())
    scores = torch.cat([body["scores"] for _, body in lists], 1)
    keys = torch.cat([_keys(body, merge, rrf) for _, body in lists], 1)
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, keys.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    owners = torch.cat([torch.full_like(body["rows"], i) for i, body in lists], 1)
    rows = torch.cat([body["rows"] for _, body in lists], 1)
    labels = torch.cat([body.get("labels", torch.zeros_like(body["rows"])) for _, body in lists], 1)
    return Hits(*(t.gather(1, order) for t in (scores, labels.long(), owners.long(), rows.long())))


def _keys(body: Tree, merge: str, rrf: int) -> Tensor:
    scores: Tensor = body["scores"]
    if merge == "calibrated":
        # A client with one row, or with equal ones, has no deviation: its rows are as near as its mean.
        standard: Tensor = (scores - body["mean"][:, None]) / body["deviation"].clamp_min(CLOSE)[:, None]
        return standard
    if merge == "rrf":
        return (1 / (rrf + 1 + torch.arange(scores.shape[1]))).expand_as(scores)
    return scores


def weighed(hits: Hits, found: Mapping[ClientId, Message]) -> Tensor:
    """Shares of the classes, (queries, classes): each neighbour votes for its label, each answer as one neighbour that is torn."""
    answers = [found[c].body for c in sorted(found) if "votes" in found[c].body]
    known = int(hits.labels.max()) + 1 if hits.labels.numel() else 1
    classes = max([known, *(a["votes"].shape[1] for a in answers)])
    weights = (torch.cat([hits.scores, *(a["best"][:, None] for a in answers)], 1) / TEMPERATURE).softmax(1)
    direct, torn = weights.split([hits.scores.shape[1], len(answers)], 1)
    shares = torch.zeros(len(hits.scores), classes).scatter_add_(1, hits.labels, direct)
    for i, body in enumerate(answers):
        shares[:, : body["votes"].shape[1]] += torn[:, i : i + 1] * body["votes"]
    return shares


def brought(found: Mapping[ClientId, Message]) -> dict[tuple[int, int], list[int]]:
    """Tokens of the rows whose text left their client, by (owner, row) as `Hits` has them."""
    out: dict[tuple[int, int], list[int]] = {}
    for i, client in enumerate(sorted(found)):
        if passages := found[client].body.get("passages"):
            tokens = passages["tokens"].split(passages["lengths"].tolist())
            out |= {(i, row): ids.tolist() for row, ids in zip(passages["rows"].tolist(), tokens, strict=True)}
    return out


def listed(hits: Hits) -> list[list[tuple[float, int, int, int]]]:
    """By query: (score, label, owner, row), the best first."""
    return [list(zip(*one, strict=True)) for one in zip(*(part.tolist() for part in hits), strict=True)]


def citations(hits: Hits, found: Mapping[ClientId, Message], voting: bool) -> list[list[Tree]]:
    """What each query's answer rests on, the best first; with `voting` the clients' own answers after that."""
    names, tokens = sorted(found), brought(found)
    torn = {c: found[c].body["best"].tolist() for c in names if voting and "best" in found[c].body}
    out: list[list[Tree]] = []
    for q, one in enumerate(listed(hits)):
        rows = [{"client": names[i], "row": row, "score": score, "tokens": tokens.get((i, row))} for score, _, i, row in one]
        own = sorted(((best[q], client) for client, best in torn.items()), reverse=True)
        out.append([*rows, *({"client": client, "row": None, "score": score, "tokens": None} for score, client in own)])
    return out


def agreement(scores: Tensor, best: Tensor) -> dict[str, float]:
    """Means over the queries of recall and nDCG, a row being relevant if one index of all rows has it among its k best.

    Args:
        scores: (queries, up to k) cosines of the rows that were found, in their order.
        best: (queries, up to k) those of the k nearest of all rows. A row with at least the last of them is one of them, or as near.
    """
    hit = (scores >= best[:, -1:] - CLOSE).double()
    discounts = 1 / torch.arange(2, best.shape[1] + 2).double().log2()
    gained = (hit * discounts[: hit.shape[1]]).sum(1) / discounts.sum()
    return {"recall_at_k": float(hit.sum(1).mean()) / best.shape[1], "ndcg_at_k": float(gained.mean())}
