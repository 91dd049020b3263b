"""Federated retrieval: texts are classified, or questions answered, by passages that stay with their owners.

A client indexes the embeddings of its own training rows (technique `retriever`). The server sends the embeddings of its queries, each
client answers with its k nearest rows, and the server merges the answers; labels of the k best vote, with weights softmax(cosine / 0.05).
Sources: retrieval as part of a model (Lewis et al., arXiv 2005.11401), a vote of neighbours as a classifier (kNN-LM, arXiv 1911.00172),
reciprocal rank fusion (Cormack et al., SIGIR 2009). That clients differ in what they let go (`access`), and the rest, is ours.

access      what leaves a client with its k nearest rows (a list is dealt to the clients in turn; a client keeps to its own rule)
            passages    scores, row numbers, labels, and the rows' tokens, each row once a letter
            embeddings  scores, row numbers, labels, and the rows' embeddings; no text
            answers     the vote of its own k rows, (queries, classes), and its best score; no row of its own
            nothing     nothing: it takes part as a reader only
merge       scores      by cosine: exactly the k nearest of all rows, as all clients have one encoder
            calibrated  by (cosine - mean) / deviation over all rows of that client, for each query
            rrf         by 1 / (rrf + rank) in the client's own list. No row is in two lists, so this takes all firsts, then all
                        seconds; among equals the larger cosine comes first
An answer counts like one more neighbour of its best score whose label is the vote.

use         vote        the labels of the k best vote
            prompt      those of the k best whose text left their client are solved examples before the text, for the technique's
                        `generator`; the class is the one whose words are likeliest after them (mean log probability a token)
Without classes the generator always reads: it is judged by the perplexity of the rest of a row after the passages and the row's question.
It stands beside the server, so only the server's texts are asked for then, and every score is taken without the passages too.

`train` = true makes each round a round of FedAvg on the retriever's tree first, with the contrastive loss. Then the server asks its next
`queries` test texts, to measure what queries cost: nothing is learned from the answers, and no label of a query is read outside of
evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.fedavg import fedavg
from fedtailor.algorithms.rag_checks import check_of
from fedtailor.algorithms.reading import answered, likelihoods, shown, written
from fedtailor.algorithms.retrieval import (
    MERGES,
    Hits,
    agreement,
    brought,
    citations,
    everything,
    indexed,
    library,
    listed,
    merged,
    top,
    vote,
    weighed,
)
from fedtailor.core import (
    SERVER,
    Algorithm,
    ClientId,
    Flow,
    Job,
    Message,
    Predict,
    Reader,
    Site,
    State,
    Talk,
    Tree,
)
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import contrastive
from fedtailor.techniques.retriever import embed, smoothed
from fedtailor.trees import numel

RULES = ("passages", "embeddings", "answers", "nothing")
USES = ("vote", "prompt")


@card("global", "k neighbours a query", "the queries' embeddings", "ours", "retriever")
def rag(
    job: Job,
    *,
    k: int = 8,
    access: str | list[str] = "passages",
    merge: str = "scores",
    use: str = "vote",
    rrf: int = 60,
    queries: int = 256,
    train: bool = False,
    weighting: str = "examples",
) -> Algorithm:
    """Federated retrieval: neighbours among all clients' rows vote or are read; `access`: what may leave a client."""
    rules = [access] if isinstance(access, str) else list(access)
    for name, found, known in (*(("access", rule, RULES) for rule in rules), ("merge", merge, MERGES), ("use", use, USES)):
        one_of(f"algorithm.{name}", found, known)
    for name, value in {"k": k, "queries": queries, "rrf": rrf}.items():
        if value < 1:
            raise ConfigError(f"algorithm.{name} must be at least 1 (got {value})")
    if all(rule == "nothing" for rule in rules[: job.clients]):
        raise ConfigError(f"algorithm.access lets nothing leave any client: choose one of: {', '.join(RULES[:3])}")
    if job.loss is not contrastive:
        raise ConfigError("algorithm rag searches by embeddings: set technique.kind = 'retriever'")
    reader = job.reader or Reader()
    without_classes = job.reader is not None and not reader.labels
    reads, answer_name = use == "prompt" or without_classes, "text" if without_classes else "scores"
    if reads and job.reader is None:
        raise ConfigError("algorithm.use = 'prompt' needs a model that reads: set technique.generator to a causal model")
    if reads and "passages" not in rules[: job.clients]:
        raise ConfigError("algorithm.access lets no text leave any client, and a generator reads text: let some give 'passages'")
    if without_classes and "answers" in rules:
        raise ConfigError("algorithm.access = 'answers' are votes for classes, and this data has none: choose another")
    library()  # what is missing is told now, not after the first round
    averaged = fedavg(job, weighting=weighting)

    def init(params: Tree) -> State:
        if train and not numel(params):
            raise ConfigError("algorithm.train = true, but technique.rank = 0 has nothing to train: set it to 1 or more")
        return {**averaged.init(params), "queries": 0, "sources": []}

    def encoder(state: State) -> Tree:
        """What a letter says of the encoder: nothing where everybody has it from the start."""
        return state["params"] if train else {}

    def embed_queries(own: Tree | None, msg: Message, site: Site) -> Flow:
        """This site's test texts, or `count` of them from number `start` on, as embeddings."""
        data = site.data.get("test")
        if data is None or not len(data):
            return own, Message("embedded")
        if "count" in msg.info:
            data = data.take((int(msg.info["start"]) + np.arange(min(int(msg.info["count"]), len(data)))) % len(data))
        outputs = yield Predict(embed, msg.body["params"] or site.init, data)
        return own, Message("embedded", {"queries": outputs["embedding"]})

    def search(own: Tree | None, msg: Message, site: Site) -> Flow:
        data, rule = site.data["train"], rules[site.number % len(rules)]
        if rule == "nothing" or not len(data):
            return own, Message("found")
        rows = everything(data)
        own, vectors = yield from indexed(own, msg.body["params"] or site.init, data, rows)
        asked = msg.body["queries"]
        scores, found = top(vectors, asked, k)
        body: Tree = {"scores": scores, "rows": found.int()}
        if not without_classes:
            labels = rows["labels"][found]
            if rule == "answers":
                return own, Message("found", {"votes": vote(scores, labels), "best": scores[:, 0].clone()})
            body["labels"] = labels.int()
        if merge == "calibrated":
            near = asked @ vectors.T
            body |= {"mean": near.mean(1), "deviation": near.std(1, correction=0)}
        cited = found.unique()
        if rule == "embeddings":
            return own, Message("found", {**body, "embeddings": {"rows": cited.int(), "vectors": vectors[cited]}})
        seen = rows["attention_mask"][cited].bool()
        tokens = rows["input_ids"][cited][seen]
        passages = {"rows": cited.int(), "lengths": seen.sum(1).int(), "tokens": tokens.int()}
        return own, Message("found", {**body, "passages": passages})

    def judge(own: Tree | None, msg: Message, site: Site) -> Flow:
        """Compare what was found for this site's test texts with what is right; at the server, also with one index of all rows."""
        if not msg.body:
            return own, Message("judged", {}, {"n": 0.0})
        rows = everything(site.data["test"])
        body = {"test": job.tally(judged(msg.body, rows))}
        info = {"n": float(len(rows["labels"]))}
        if "scores" in msg.body and reads:
            body["without"] = job.tally(judged({"passages": [[]] * len(rows["labels"])}, rows))
        if "scores" in msg.body and len(site.data.get("train", ())):
            outputs = yield Predict(embed, msg.body["params"] or site.init, site.data["train"])
            best, _ = top(outputs["embedding"], msg.body["queries"], k)
            info |= agreement(msg.body["scores"], best)
        return own, Message("judged", body, info)

    def judged(grounds: Tree, rows: Mapping[str, Tensor]) -> Tree:
        """Outputs as the metric has them."""
        if without_classes:
            return answered(reader, grounds["passages"], rows)
        label, votes = rows["labels"], chances(grounds, rows)
        votes = F.pad(votes, (0, max(0, int(label.max()) + 1 - votes.shape[1])))
        shares = smoothed(votes)
        nll = -shares.gather(1, label[:, None])[:, 0].log()
        return {"nll": nll, "predicted": votes.argmax(1), "confidence": shares.amax(1), "label": label}

    def chances(grounds: Tree, rows: Mapping[str, Tensor]) -> Tensor:
        """Shares of the classes, (queries, classes)."""
        shares: Tensor = likelihoods(reader, grounds["passages"], rows).softmax(1) if reads else grounds["votes"]
        return shares

    def reply(own: Tree | None, msg: Message, site: Site) -> Flow:
        """What this site's test texts are answered: a text each, or shares of the classes."""
        rows = everything(site.data["test"])
        if without_classes:
            return own, Message("replied", {answer_name: written(reader, msg.body["passages"], rows)})
        return own, Message("replied", {answer_name: chances(msg.body, rows)})
        yield  # a handler is a generator, also one that asks for nothing

    def grounds_of(hits: Hits, found: Mapping[ClientId, Message]) -> Tree:
        """What answers rest on, by query: the vote, or what the generator reads."""
        if not reads:
            return {"votes": weighed(hits, found)}
        texts = {at: reader.read(tokens) for at, tokens in brought(found).items()}
        labels = reader.labels or [""]
        passages = [
            [shown(texts[owner, row], labels[label]) for _, label, owner, row in one if (owner, row) in texts]
            for one in listed(hits)
        ]
        return {"passages": passages}

    def consult(state: State, cohort: list[ClientId]) -> Talk:
        """Answers to the server's test texts; a passage is {client, row, score, tokens}, without tokens where no text left its
        client. Where a client answered itself and was counted, it is cited without a row, with its best score."""
        params = encoder(state)
        asked = yield {SERVER: Message("embed", {"params": params})}
        embeddings = asked[SERVER].body["queries"]
        found = yield dict.fromkeys(cohort, Message("search", {"params": params, "queries": embeddings}))
        hits = merged(found, len(embeddings), k, merge, rrf)
        replied = yield {SERVER: Message("reply", grounds_of(hits, found))}
        answers, cited = replied[SERVER].body[answer_name], citations(hits, found, not reads)
        return [{answer_name: one, "passages": passages} for one, passages in zip(answers, cited, strict=True)]

    def round(state: State, cohort: list[ClientId]) -> Talk:
        if train:
            state = yield from averaged.round(state, cohort)
        start = int(state["queries"])
        letter = Message("embed", {"params": encoder(state)}, {"start": float(start), "count": float(queries)})
        asked = yield {SERVER: letter}
        if SERVER not in asked or "queries" not in asked[SERVER].body:
            return state
        embeddings = asked[SERVER].body["queries"]
        found = yield dict.fromkeys(cohort, Message("search", {"params": encoder(state), "queries": embeddings}))
        return {**state, "queries": start + len(embeddings), "sources": sorted({*state["sources"], *found})}

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        """Every client's test texts and the server's are searched for among all clients; an empty cohort (a look between rounds)
        asks the server's alone, of whoever has answered so far."""
        params, sources = encoder(state), cohort or list(state["sources"])
        asked = yield dict.fromkeys([SERVER] if reads else [*cohort, SERVER], Message("embed", {"params": params}))
        askers = {c: asked[c].body["queries"] for c in sorted(asked) if "queries" in asked[c].body}
        if SERVER in askers:  # all are laid side by side
            askers = {c: q for c, q in askers.items() if q.shape[1] == askers[SERVER].shape[1]}
        letters = dict.fromkeys([*cohort, SERVER], Message("judge"))
        shares: dict[ClientId, float] = {}
        if askers:
            together, sizes = torch.cat(list(askers.values())), [len(q) for q in askers.values()]
            places = dict(zip(askers, torch.arange(len(together)).split(sizes), strict=True))
            found = (yield dict.fromkeys(sources, Message("search", {"params": params, "queries": together}))) if sources else {}
            hits = merged(found, len(together), k, merge, rrf)
            grounds = grounds_of(hits, found)
            letters |= {
                c: Message("judge", {name: part[rows[0] : rows[-1] + 1] for name, part in grounds.items()})
                for c, rows in places.items()
            }
            if SERVER in places and cohort:
                rows = places[SERVER]
                extra = {"scores": hits.scores[rows], "queries": together[rows], "params": params}
                letters[SERVER] = Message("judge", {**letters[SERVER].body, **extra})
                shares = {c: float((hits.owners[rows] == i).any(1).double().mean()) for i, c in enumerate(sorted(found))}
        replies = yield letters
        return {c: r._replace(info={**r.info, "cited": shares[c]} if c in shares else r.info) for c, r in replies.items()}

    return Algorithm(
        init=init,
        round=round,
        client={"train": averaged.client["train"], "embed": embed_queries, "search": search, "judge": judge, "reply": reply},
        answer=answer,
        model=lambda state: state["params"],
        trains=False,  # what `train` needs is checked above
        updates=False,
        check=check_of(job, k, merge),
        consult=consult,
    )
