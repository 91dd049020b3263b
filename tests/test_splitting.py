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
from fedtailor.core import Tree
from fedtailor.cut import HIDDEN, partial_class, parts
from fedtailor.engines.splitting import back, slope, through
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
