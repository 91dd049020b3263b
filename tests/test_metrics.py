"""Metrics are sums over clients: their value is scikit-learn's on all rows together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef

from fedtailor import metrics
from fedtailor.algorithms.checks import tallied
from fedtailor.core import Job, Plan, Tree, stream
from fedtailor.data.examples import IGNORED, Subset
from fedtailor.losses import classification
from fedtailor.metrics import apart, judge_classes, judge_tokens, mean_loss, metric, scores, side_by_side, total
from fedtailor.report import folders
from tiny import randomized, rows_of

REFERENCE = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "macro_f1": lambda true, predicted: f1_score(true, predicted, average="macro"),
    "matthews": matthews_corrcoef,
}
CUTS = (0, 1, 40, 97, 150)  # one client has a single row


def rows(classes: int, seed: int, n: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that know the label a little, and skewed labels."""
    labels = (torch.rand(n, generator=stream(seed)) ** 2 * classes).long()
    return torch.randn(n, classes, generator=stream(seed, "logits")) + F.one_hot(labels, classes), labels


def answered(params: Tree, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["logits"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "classes"), [("accuracy", 4), ("f1", 2), ("macro_f1", 5), ("matthews", 2), ("matthews", 5)])
def test_the_sum_over_clients_is_the_reference_on_everybody(name: str, classes: int, seed: int) -> None:
    logits, labels = rows(classes, seed)
    measure = metric(name, "text", classes)
    parts = [{"logits": logits[a:b], "labels": labels[a:b]} for a, b in zip(CUTS, CUTS[1:], strict=False)]
    sums = total(measure.tally(measure.judge(answered, {}, part)) for part in parts)
    assert measure.value(sums) == pytest.approx(REFERENCE[name](labels, logits.argmax(1)), abs=1e-12)
    assert mean_loss(sums) == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(classes)), rel=1e-5)
    assert measure.better(0.9, 0.1)


def test_a_report_knows_which_are_better_when_lower() -> None:
    assert folders.LOWER_IS_BETTER == metrics.LOWER_IS_BETTER


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_that_of_a_loop_over_all_rows(seed: int) -> None:
    logits, labels = rows(4, seed)
    measure = metric("ece", "text", 4)
    parts = [{"logits": logits[a:b], "labels": labels[a:b]} for a, b in zip(CUTS, CUTS[1:], strict=False)]
    sums = total(measure.tally(measure.judge(answered, {}, part)) for part in parts)
    sure, predicted = logits.double().softmax(1).max(1)
    found = 0.0
    for k in range(15):
        here = [i for i in range(len(labels)) if k / 15 < sure[i] <= (k + 1) / 15]
        gap = sum(float(sure[i]) - (predicted[i] == labels[i]).item() for i in here)
        found += abs(gap) / len(labels)
    assert measure.value(sums) == pytest.approx(found, abs=1e-6)
    assert measure.value(sums) > 0.01
    assert measure.better(0.1, 0.9)


def test_bins_that_do_not_add_up_are_refused() -> None:
    logits, labels = rows(4, 0)
    measure = metric("ece", "text", 4)
    job = Job(classification, measure.judge, measure.tally, Plan(), clients=2)
    sums = measure.tally(measure.judge(answered, {}, {"logits": logits, "labels": labels}))
    assert tallied(job, sums) == ""
    for place in (0, 2):
        bins = sums["bins"].clone()
        bins[3, place] += 1
        assert "bins" in tallied(job, {**sums, "bins": bins})


def test_a_class_that_never_occurs_is_left_out_of_the_mean() -> None:
    logits, labels = rows(3, 1)
    wide = torch.cat([logits, torch.full((len(logits), 1), -99.0)], 1)
    measure = metric("macro_f1", "text", 4)
    found = measure.value(measure.tally(measure.judge(answered, {}, {"logits": wide, "labels": labels})))
    assert found == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"), abs=1e-12)


def test_matthews_without_any_variety_is_zero() -> None:
    measure = metric("matthews", "text", 2)
    batch = {"logits": torch.tensor([[1.0, 0.0]] * 4), "labels": torch.zeros(4, dtype=torch.long)}
    assert measure.value(measure.tally(measure.judge(answered, {}, batch))) == 0.0


def test_perplexity_counts_the_tokens_that_have_a_label() -> None:
    logits = torch.randn(5, 9, 11, generator=stream(0, "logits"))
    labels = torch.randint(11, (5, 7), generator=stream(0, "labels"))  # two positions of a soft prompt stand before them
    labels[2, 3:] = IGNORED
    measure = metric("auto", "language", 0)
    parts = [{"logits": logits[k : k + 1], "labels": labels[k : k + 1]} for k in range(5)]
    sums = total(measure.tally(judge_tokens(answered, {}, part)) for part in parts)
    flat, wanted = logits[:, 2:-1].reshape(-1, 11), labels[:, 1:].reshape(-1)
    nll = F.cross_entropy(flat.double(), wanted, ignore_index=IGNORED)
    assert measure.value(sums) == pytest.approx(math.exp(nll), rel=1e-5)
    assert int(sums["tokens"]) == int((wanted != IGNORED).sum())
    assert int(sums["correct"]) == int((flat.argmax(1) == wanted)[wanted != IGNORED].sum())
    assert measure.better(1.0, 2.0)


def test_scores_are_probabilities() -> None:
    logits, _ = rows(3, 0)
    torch.testing.assert_close(scores(answered, {}, {"logits": logits})["scores"].sum(1), torch.ones(150))


@pytest.mark.parametrize("tokens", [1, 50, 10_000])
@pytest.mark.parametrize(("family", "kind", "judge"), [("bert", "lora", judge_classes), ("gpt2", "prefix", judge_tokens)])
def test_trees_that_are_judged_together_are_judged_as_alone(
    family: str, kind: str, judge: Any, tokens: int, techniques: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = techniques(family, kind)
    data, trees, forward = Subset(rows_of(family), range(5)), [randomized(made.init, i) for i in range(3)], made.bind(False)
    batch = data.batch(range(5), int(data.lengths.max()), 5)
    monkeypatch.setattr(metrics, "TOKENS", tokens)
    with torch.no_grad():
        found = apart(side_by_side(judge, forward, dict(zip("abc", trees, strict=True)), batch))
        for one, tree in zip(found, trees, strict=True):
            for name, t in judge(forward, tree, batch).items():
                torch.testing.assert_close(one[name], t, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0]["nll"], found[1]["nll"])


def test_what_cannot_be_stacked_is_judged_tree_by_tree() -> None:
    def stubborn(params: Tree, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["logits"] * (2 if bool(params["w"] > 0) else 1)

    logits, labels = rows(3, 0)
    batch, trees = {"logits": logits, "labels": labels}, {"a": {"w": torch.tensor(1.0)}, "b": {"w": torch.tensor(-1.0)}}
    found = apart(side_by_side(judge_classes, stubborn, trees, batch))
    for one, factor in zip(found, (2, 1), strict=True):
        torch.testing.assert_close(one["nll"], F.cross_entropy(factor * logits, labels, reduction="none"))
