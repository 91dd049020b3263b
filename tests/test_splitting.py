"""A split step is the unsplit step: loss and every gradient, for one client and for many at once; and a lost graph is made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import vmap

from fedtailor.backbone import Backbone, load
from fedtailor.config import ModelSection
from fedtailor.core import HIDDEN, Back, Flow, Message, Slope, Through, Tree, stream
from fedtailor.cut import partial_class, parts
from fedtailor.engines.answering import Workers, answer, drive
from fedtailor.engines.splitting import Steps, back, slope, through
from fedtailor.losses import classification, language
from fedtailor.techniques import TECHNIQUES, Technique
from tiny import CAUSAL, KINDS, LABELS, batch_of, distance, randomized

CUT = parts(2, 0, 1)  # embeddings alone at the front, one layer in the middle, one at the back
FAMILIES = ("bert", "gpt2", "llama", "vit")


@pytest.fixture(scope="module")
def cut_up(folders: Callable[[str], Path]) -> Callable[[str], list[Technique]]:
    """family -> LoRA on the whole model, on its middle, and on its back."""

    def of(family: str) -> list[Technique]:
        config, kind, labels = ModelSection(name=str(folders(family))), KINDS[family], [] if family in CAUSAL else LABELS
        whole = load(config, kind, labels)
        each: list[Backbone] = [
            load(config, kind, labels, made=lambda cls, part=part: partial_class(cls, [part])) for part in CUT
        ]
        return [TECHNIQUES["lora"](backbone, rank=2) for backbone in (whole, *each[1:])]

    return of


def training(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = batch_of(family, extra=1, seed=seed)
    return {**batch, "labels": batch["input_ids"] if family in CAUSAL else torch.tensor([0, 2, 1])}


def own(tree: Tree, technique: Technique) -> Tree:
    return {name: tree[name] for name in technique.init}


def embedded(batch: dict[str, torch.Tensor], folder: Path, family: str) -> torch.Tensor:
    """What a frozen front without layers says: hidden states of the embeddings."""
    kind, labels = KINDS[family], [] if family in CAUSAL else LABELS
    front = load(ModelSection(name=str(folder)), kind, labels, made=lambda cls: partial_class(cls, [CUT[0]])).model
    with torch.no_grad():
        hidden: torch.Tensor = front(**{k: v for k, v in batch.items() if k != "labels"})["logits"]
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_step_is_the_unsplit_step(
    family: str, cut_up: Callable[[str], list[Technique]], folders: Callable[[str], Path]
) -> None:
    whole, middle, end = cut_up(family)
    loss, batch = language if family in CAUSAL else classification, training(family)
    tree = randomized(whole.init)
    value, slopes, _ = slope(loss, whole.bind(False), tree, batch, {})
    mask = {name: x for name, x in batch.items() if name == "attention_mask"}
    given = {**mask, HIDDEN: embedded(batch, folders(family), family)}
    hidden, kept = through(middle.bind(False), own(tree, middle), given)
    ours, ends, g2 = slope(loss, end.bind(False), own(tree, end), {**batch, HIDDEN: hidden}, {})
    assert g2 is not None
    inner, g1 = back(kept, g2)
    assert abs(float(ours - value)) < 1e-5
    assert g1 is not None
    assert g1.shape == given[HIDDEN].shape
    assert set(inner) | set(ends) == set(slopes)
    assert distance({**inner, **ends}, {n: slopes[n] for n in {**inner, **ends}}) < 1e-4
    # A graph that is gone is made again.
    _, again = through(middle.bind(False), own(tree, middle), given)
    assert distance(dict(back(again, g2)[0]), dict(inner)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_middles_of_many_clients_go_together(
    family: str, cut_up: Callable[[str], list[Technique]], folders: Callable[[str], Path]
) -> None:
    whole, middle, _ = cut_up(family)
    batches = [training(family, seed) for seed in range(3)]
    width = min(b["input_ids"].shape[1] for b in batches) if family != "vit" else 0
    batches = [{k: v[:, :width] if v.dim() == 2 and width else v for k, v in b.items()} for b in batches]
    trees = [own(randomized(whole.init, seed), middle) for seed in range(3)]
    given = [
        {**{k: v for k, v in b.items() if k == "attention_mask"}, HIDDEN: embedded(b, folders(family), family)} for b in batches
    ]
    gradients = [torch.randn_like(g[HIDDEN]) for g in given]
    forward = middle.bind(False)
    together, kept = through(
        vmap(forward),
        {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]},
        {name: torch.stack([g[name] for g in given]) for name in given[0]},
    )
    slopes, inner = back(kept, torch.stack(gradients))
    assert inner is not None
    for i, (tree, one, gradient) in enumerate(zip(trees, given, gradients, strict=True)):
        hidden, alone = through(forward, tree, one)
        expected, g1 = back(alone, gradient)
        assert torch.allclose(together[i], hidden, atol=1e-5 * float(hidden.abs().max()))
        assert distance({n: x[i] for n, x in slopes.items()}, dict(expected)) < 1e-4
        assert g1 is not None
        assert torch.allclose(inner[i], g1, atol=1e-5 * max(1.0, float(g1.abs().max())))


def test_a_frozen_front_has_nothing_to_go_back_to(folders: Callable[[str], Path]) -> None:
    backbone = load(ModelSection(name=str(folders("bert"))), "text", LABELS, made=lambda cls: partial_class(cls, [CUT[0]]))

    def forward(params: Tree, batch: Any) -> torch.Tensor:
        hidden: torch.Tensor = backbone.model(**batch)["logits"]
        return hidden

    hidden, kept = through(forward, {}, batch_of("bert"))
    assert back(kept, torch.ones_like(hidden)) == ({}, None)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("stacked", [True, False])
def test_steps_that_are_asked_for_are_those_steps(
    family: str, stacked: bool, cut_up: Callable[[str], list[Technique]], folders: Callable[[str], Path]
) -> None:
    """Three clients of two shapes, answered together or one by one; one of those that went together comes back alone."""
    whole, middle, end = cut_up(family)
    loss = language if family in CAUSAL else classification
    bound = {part: technique.bind(False) for part, technique in ((CUT[1], middle), (CUT[2], end))}
    steps = Steps(lambda part, dropout: bound[part])
    batches = [training(family, seed) for seed in range(3)]
    width = min(b["input_ids"].shape[1] for b in batches)
    batches = [{k: v[:, : width - (i == 2)] if v.dim() == 2 else v for k, v in b.items()} for i, b in enumerate(batches)]
    trees = [randomized(whole.init, seed) for seed in range(3)]
    asked = [
        Through(
            CUT[1],
            own(tree, middle),
            {"attention_mask": b["attention_mask"], HIDDEN: embedded(b, folders(family), family)},
            f"{i}",
        )
        for i, (tree, b) in enumerate(zip(trees, batches, strict=True))
    ]
    outputs = steps.answer(dict(enumerate(asked)), stacked)
    slopes = [
        Slope(loss, CUT[2], own(t, end), {**b, HIDDEN: outputs[i]}) for i, (t, b) in enumerate(zip(trees, batches, strict=True))
    ]
    ends = steps.answer(dict(enumerate(slopes)), stacked)
    first = steps.answer({0: Back(asked[0], ends[0].hidden)}, stacked)  # its neighbour is not ready
    rest = steps.answer({i: Back(asked[i], ends[i].hidden) for i in (1, 2)}, stacked)
    for i, found in enumerate((first[0], rest[1], rest[2])):
        value, expected, _ = slope(loss, whole.bind(False), trees[i], batches[i], {})
        assert ends[i].loss == pytest.approx(float(value), abs=1e-5)
        ours = {**found.params, **ends[i].params}
        assert distance(ours, {n: expected[n] for n in ours}) < 1e-4
        assert found.hidden.shape == asked[i].batch[HIDDEN].shape


def test_handlers_may_ask_for_a_list_of_steps(cut_up: Callable[[str], list[Technique]], folders: Callable[[str], Path]) -> None:
    _, middle, _ = cut_up("bert")
    workers = Workers(middle.bind, 1, steps=Steps(lambda part, dropout: middle.bind(dropout)))
    batch = training("bert")
    hidden = embedded(batch, folders("bert"), "bert")
    one = Through(CUT[1], middle.init, {"attention_mask": batch["attention_mask"], HIDDEN: hidden}, "a")

    def handler() -> Flow:
        alone = yield one
        both = yield [one._replace(name="b"), one._replace(name="c")]
        nothing = yield []
        return None, Message("done", {"alone": alone, "both": both}, {"nothing": float(len(nothing))})

    def answered(asks: Any) -> Any:
        return answer(asks, workers, lambda client: stream(0), stacked=True)

    _, reply = drive({"server": handler()}, answered)["server"]
    assert reply.info["nothing"] == 0
    for found in reply.body["both"]:
        assert torch.allclose(found, reply.body["alone"], atol=1e-5)
