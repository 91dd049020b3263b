"""What is meant to help where clients see few classes: calibrated logits, personal heads, frozen heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from federations import Outcome, World
from fedtailor.algorithms.fedlc import shift
from fedtailor.core import Plan, Tree
from fedtailor.data.examples import IGNORED, Subset
from fedtailor.errors import ConfigError
from fedtailor.losses import calibrated
from fedtailor.techniques import TECHNIQUES
from fedtailor.techniques.peft import of_head
from tiny import batch_of, distance, randomized, rows_of, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]
Techniques = Callable[..., Any]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")


# FedLC


def test_shifts_are_the_papers_margin_and_the_log_prior() -> None:
    labels = torch.tensor([0] * 16 + [2] * 1 + [3] * 81)
    margin = shift(labels, 4, "margin", 2.0)
    assert np.allclose(margin[[0, 2, 3]], [-2 / 2, -2 / 1, -2 / 3])
    assert margin[1] < -100  # no row: out of the softmax
    prior = shift(labels, 4, "prior", 0.5)
    assert np.allclose(prior[[0, 2, 3]], 0.5 * np.log(np.array([16, 1, 81]) / 98))


def test_the_calibrated_loss_is_the_papers_formula() -> None:
    logits, counts, tau = torch.randn(5, 3, dtype=torch.float64), torch.tensor([4.0, 9.0, 1.0]), 0.7
    labels = torch.tensor([0, 2, 1, 1, IGNORED])
    margins = torch.exp(logits - tau * counts**-0.25)
    expected = -torch.log(margins[range(4), labels[:4]] / margins[:4].sum(1)).mean()
    rows = torch.repeat_interleave(torch.arange(3), counts.long())
    found = calibrated(lambda params, batch: logits, {}, {"labels": labels}, {"shift": shift(rows, 3, "margin", tau)})
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["margin", "prior"])
def test_a_client_of_one_class_has_nothing_to_learn(rule: str) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.long)
    aux: Tree = {"shift": shift(labels, 3, rule, 1.0)}
    calibrated(lambda params, batch: logits, {}, {"labels": labels}, aux).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_without_temperature_it_is_fedavg_bit_for_bit(federation: Federation) -> None:
    runs = [federation(kind, plan=SGD, options=options) for kind, options in (("fedlc", {"tau": 0.0}), ("fedavg", {}))]
    assert same(runs[0].state["params"], runs[1].state["params"])
    assert not same(federation("fedlc", plan=SGD).state["params"], runs[1].state["params"])


def test_calibration_counts_the_clients_own_labels(world: Maker) -> None:
    here = world("fedlc", options={"rule": "prior"})
    talk = here.algorithm.round(here.algorithm.init(here.technique.init), ["c1"])
    letter = next(talk)["c1"]  # type: ignore[index]
    site = here.sites("c1", 1)
    ask = next(here.algorithm.client["train"](None, letter, site))
    labels = site.data["train"].batch(range(len(site.data["train"])), 16, len(site.data["train"]))["labels"]
    counts = np.bincount(labels, minlength=3).clip(1e-8)
    assert np.allclose(ask.aux["shift"], np.log(counts / counts.sum()), atol=1e-6)  # type: ignore[union-attr]


def test_it_needs_classes(world: Maker) -> None:
    with pytest.raises(ConfigError, match="needs labelled data"):
        world("fedlc", family="gpt2")
    with pytest.raises(ConfigError, match="did you mean 'margin'"):
        world("fedlc", options={"rule": "margins"})


# FedPer


def test_heads_stay_and_the_rest_is_fedavg(federation: Federation, techniques: Techniques) -> None:
    init = techniques("bert", "lora", rank=2).init
    heads = {name for name in init if of_head(name)}
    assert heads
    assert heads < set(init)
    done = federation("fedper", rounds=1, plan=SGD)
    for seen in done.log:
        assert not heads & (set(seen.letter.body) | set(seen.reply.body))
    assert all(set(own) == heads for own in done.own.values())
    assert not same(done.own["c0"], done.own["c1"])
    # In the first round all start alike, so what is averaged is what FedAvg averages.
    plain = federation("fedavg", rounds=1, plan=SGD).state["params"]
    body = {name: t for name, t in plain.items() if name not in heads}
    assert distance({n: done.state["params"][n] for n in body}, body) < 1e-6
    assert all(torch.equal(done.state["params"][n], init[n]) for n in heads)


def test_a_federation_of_one_client_is_local_training(federation: Federation) -> None:
    alone = federation("fedper", clients=1, plan=SGD, rounds=2)
    local = federation("local", clients=1, plan=SGD, rounds=2).own["c0"]["params"]
    both = {**alone.state["params"], **alone.own["c0"]}
    assert distance({n: both[n] for n in local}, dict(local)) < 1e-5


def test_it_needs_a_head_and_something_else(world: Maker) -> None:
    for technique, topts, family in (("head", {}, "bert"), ("lora", {"rank": 2}, "gpt2")):
        here = world("fedper", family=family, technique=technique, topts=topts)
        with pytest.raises(ConfigError, match="tells heads from the rest"):
            here.algorithm.init(here.technique.init)


# Frozen heads


@pytest.mark.parametrize(("kind", "options"), [("lora", {"rank": 2}), ("prefix", {"length": 3}), ("prompt", {"length": 3})])
def test_a_frozen_head_is_the_head_that_was_drawn(
    kind: str, options: dict[str, int], techniques: Techniques, tmp_path: Path
) -> None:
    whole, bare = techniques("bert", kind, **options), techniques("bert", kind, head="frozen", **options)
    heads = {name: t for name, t in whole.init.items() if of_head(name)}
    assert heads
    assert set(bare.init) == set(whole.init) - set(heads)
    assert set(bare.resized(4)) == set(bare.init)
    tree, batch = randomized(bare.init), batch_of("bert")
    ours = bare.bind(False)(tree, batch)
    assert torch.equal(ours, whole.bind(False)({**tree, **heads}, batch))
    bare.save(tree, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(bare.backbone.source).eval()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(**batch).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_vision_prefix_freezes_its_head_too(techniques: Techniques) -> None:
    bare = techniques("vit", "prefix", length=2, head="frozen")
    assert set(bare.init) == {"prompt_embeddings"}
    assert bare.bind(False)(bare.init, batch_of("vit")).shape == (3, 3)


@pytest.mark.parametrize(
    ("family", "head", "line"), [("gpt2", "frozen", "has no classification head"), ("bert", "frozn", "did you mean 'frozen'")]
)
def test_heads_that_cannot_be_frozen(family: str, head: str, line: str, techniques: Techniques) -> None:
    with pytest.raises(ConfigError, match=line):
        TECHNIQUES["prefix"](techniques(family, "prefix", length=2).backbone, length=2, head=head)


def test_a_column_is_what_batches_hold() -> None:
    data = Subset(rows_of("bert"), [5, 3, 50])
    assert torch.equal(data.column("labels"), data.batch(range(3), 16, 3)["labels"])
