"""The training loop against a plain torch loop, stacked clients against each alone, and everything back in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.core import Batch, Fit, Fitted, Flow, Forward, Message, Plan, Predict, Tree, stream
from fedtailor.data.examples import Subset, store
from fedtailor.engines import answering
from fedtailor.engines.answering import Workers, answer, drive, grouped
from fedtailor.engines.batches import WINDOW, batches
from fedtailor.engines.training import fit
from fedtailor.losses import classification, proximal, shifted
from tiny import distance, same

WORDS, WIDTH, CLASSES, ROWS = 30, 6, 3, 120
DICE = np.random.default_rng(0)
IDS = [DICE.integers(1, WORDS, DICE.integers(1, 12)).tolist() for _ in range(ROWS)]
LABELS = DICE.integers(0, CLASSES, ROWS)
DATA = store({"input_ids": IDS, "labels": LABELS}, {"input_ids": 0})


def forward(params: Tree, batch: Batch) -> Tensor:
    """A bag of embeddings and two layers: the mean over the visible tokens, then logits times a learned scale."""
    seen = batch["attention_mask"][..., None].to(params["table"].dtype)
    bag = (F.embedding(batch["input_ids"], params["table"]) * seen).sum(-2) / seen.sum(-2)
    return params["scale"] * (torch.tanh(bag) @ params["out"] + params["bias"])


def start(seed: int = 0) -> Tree:
    shapes = {"table": (WORDS, WIDTH), "out": (WIDTH, CLASSES), "bias": (CLASSES,), "scale": ()}
    return {n: torch.randn(s, generator=stream(seed, "start", n)) for n, s in shapes.items()}


def data_of(client: int, size: int) -> Subset:
    return Subset(DATA, torch.randperm(ROWS, generator=stream(client, "rows")).numpy()[:size])


def random_of(client: int) -> torch.Generator:
    return stream(0, "fit", client)


def by_torch(
    plan: Plan,
    data: Subset,
    params: Tree,
    random: torch.Generator,
    extra: Callable[[Tree], Tensor] = lambda p: torch.zeros(()),
    passes: int = 1,
) -> tuple[Tree, float]:
    """(params, mean loss of the last pass) of the same training as anybody would write it: rows one by one, no padding."""
    leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
    made: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[plan.optimizer]
    options = {"momentum": plan.momentum} if plan.optimizer == "sgd" else {}
    optimizer = made(leaves.values(), plan.lr, weight_decay=plan.weight_decay, **options)
    losses = []
    for _ in range(passes):
        todo = batches(plan, data.lengths, random)
        losses = []
        for step, rows in enumerate(todo):
            part = {"linear": 1 - step / len(todo), "cosine": (1 + math.cos(math.pi * step / len(todo))) / 2}
            optimizer.param_groups[0]["lr"] = plan.lr * part.get(plan.schedule, 1.0)
            optimizer.zero_grad()
            logits = []
            for row in data.rows[rows]:
                bag = leaves["table"][torch.tensor(IDS[row])].mean(0)
                logits.append(leaves["scale"] * (torch.tanh(bag) @ leaves["out"] + leaves["bias"]))
            loss = F.cross_entropy(torch.stack(logits), torch.from_numpy(LABELS[data.rows[rows]])) + extra(leaves)
            loss.backward()
            if plan.clip:
                torch.nn.utils.clip_grad_norm_(leaves.values(), plan.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
    return {n: t.detach() for n, t in leaves.items()}, float(np.mean(losses))


PLANS = {
    "adamw": Plan(epochs=2, batch=4, lr=0.05, weight_decay=0.1),
    "adam": Plan(epochs=2, batch=4, optimizer="adam", lr=0.05, weight_decay=0.1),
    "sgd": Plan(epochs=2, batch=4, optimizer="sgd", lr=0.2),
    "momentum": Plan(epochs=2, batch=4, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.1),
    "clip": Plan(epochs=2, batch=4, optimizer="sgd", lr=0.5, clip=0.1),
    "linear": Plan(epochs=2, batch=4, lr=0.05, schedule="linear"),
    "cosine": Plan(epochs=2, batch=4, optimizer="sgd", lr=0.3, schedule="cosine", clip=0.5),
    "steps": Plan(steps=7, batch=4, lr=0.05),
    "fraction": Plan(epochs=0.5, batch=4, lr=0.05),
}
SIZES = [9, 1, 17, 0, 5, 17]


def assert_close(got: Tree, want: Tree, atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-5, atol=atol)


# Which rows make which batch.


@pytest.mark.parametrize(("rows", "batch"), [(1, 4), (4, 4), (5, 4), (37, 4), (100, 3), (7, 100)])
def test_every_row_is_seen_once_a_pass(rows: int, batch: int) -> None:
    lengths = DICE.integers(1, 50, rows)
    per_pass = math.ceil(rows / batch)
    todo = batches(Plan(epochs=3, batch=batch), lengths, stream(0))
    assert len(todo) == 3 * per_pass
    for start in range(0, len(todo), per_pass):
        one = todo[start : start + per_pass]
        assert sorted(np.concatenate(one)) == list(range(rows))
        assert sorted(map(len, one), reverse=True) == [min(batch, rows - i) for i in range(0, rows, batch)]


@pytest.mark.parametrize(
    ("plan", "steps"),
    [
        (Plan(epochs=1, batch=10), 10),
        (Plan(epochs=0.5, batch=10), 5),
        (Plan(epochs=1.3, batch=10), 13),
        (Plan(epochs=0.001, batch=10), 1),
        (Plan(epochs=5, steps=3, batch=10), 3),
        (Plan(steps=27, batch=10), 27),
    ],
)
def test_the_number_of_steps_is_that_of_the_plan(plan: Plan, steps: int) -> None:
    todo = batches(plan, [5] * 100, stream(0))
    assert len(todo) == steps
    for start in range(0, steps, 10):
        part = np.concatenate(todo[start : start + 10])
        assert len(set(part.tolist())) == len(part)  # within a pass no row comes twice


def test_without_rows_there_is_no_step() -> None:
    assert batches(Plan(steps=5), [], stream(0)) == []


def test_batches_are_a_function_of_the_stream() -> None:
    lengths = DICE.integers(1, 50, 60)

    def drawn(seed: int) -> list[list[int]]:
        return [rows.tolist() for rows in batches(Plan(epochs=2, batch=4), lengths, stream(seed))]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert sorted(drawn(1)[:15]) != sorted(drawn(1)[15:])  # each pass meets other rows


def test_sorting_within_windows_lowers_padding_and_leaves_batches_in_random_order() -> None:
    lengths, batch = DICE.integers(1, 200, 640), 8

    def tokens(todo: Sequence[np.ndarray]) -> int:
        return sum(len(rows) * int(lengths[rows].max()) for rows in todo)

    todo = batches(Plan(batch=batch), lengths, stream(0))
    order = torch.randperm(640, generator=stream(0)).numpy()
    unsorted = [order[i : i + batch] for i in range(0, 640, batch)]
    padding, before = tokens(todo) - int(lengths.sum()), tokens(unsorted) - int(lengths.sum())
    assert padding < before / 3
    # Each window of the permutation is kept together, and the order of batches says nothing about length.
    windows = {i: set(order[i : i + WINDOW * batch].tolist()) for i in range(0, 640, WINDOW * batch)}
    assert all(any(set(rows.tolist()) <= w for w in windows.values()) for rows in todo)
    means = [lengths[rows].mean() for rows in todo]
    assert abs(float(np.corrcoef(means, range(len(means)))[0, 1])) < 0.3


def test_clients_that_share_a_pace_meet_long_batches_together() -> None:
    sizes = [320, 160, 240, 80]
    lengths = [np.random.default_rng(c).integers(1, 200, n) for c, n in enumerate(sizes)]

    def widths(pace: int | None) -> list[list[int]]:
        paces = [stream(pace) if pace is not None else None for _ in sizes]
        todo = [batches(Plan(batch=8), own, stream(0, c), p) for c, (own, p) in enumerate(zip(lengths, paces, strict=True))]
        for each, n in zip(todo, sizes, strict=True):
            assert sorted(np.concatenate(each)) == list(range(n))
        return [[int(own[rows].max()) for rows in each] for own, each in zip(lengths, todo, strict=True)]

    def padding(each: list[list[int]]) -> int:
        steps = [[w[i] for w in each if i < len(w)] for i in range(max(map(len, each)))]
        return sum(len(step) * max(step) - sum(step) for step in steps)

    assert padding(widths(5)) < padding(widths(None)) / 2
    assert widths(5) == widths(5)
    assert widths(5) != widths(6)


# One client.


@pytest.mark.parametrize("stacked", [False, True], ids=["plain", "stack of one"])
@pytest.mark.parametrize("name", PLANS)
def test_a_fit_is_a_plain_torch_loop(name: str, stacked: bool) -> None:
    plan, data = PLANS[name], data_of(0, 18)
    want, loss = by_torch(plan, data, start(), random_of(0))
    (got,) = fit([Fit(classification, start(), data, {}, plan)], [random_of(0)], forward, stacked=stacked)
    assert_close(got.params, want)
    assert got.seen["loss"] == pytest.approx(loss, rel=1e-5)
    assert got.seen["n"] == 18
    assert got.seen["steps"] == len(batches(plan, data.lengths, random_of(0)))
    assert distance(got.params, start()) > 1e-2


def test_losses_with_aux_are_the_loss_plus_the_term_written_out() -> None:
    plan, data, anchor, shift = PLANS["sgd"], data_of(0, 10), start(7), start(8)

    def near(p: Tree) -> Tensor:
        return 0.15 * sum(((p[n] - anchor[n]) ** 2).sum() for n in p)  # type: ignore[return-value]

    def along(p: Tree) -> Tensor:
        return sum((p[n] * shift[n]).sum() for n in p)  # type: ignore[return-value]

    for loss, aux, extra in (
        (proximal(classification, 0.3), {"anchor": anchor}, near),
        (shifted(classification), {"shift": shift}, along),
    ):
        want, mean = by_torch(plan, data, start(), random_of(0), extra)
        (got,) = fit([Fit(loss, start(), data, aux, plan)], [random_of(0)], forward)
        assert_close(got.params, want, 5e-6)
        assert got.seen["loss"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("stacked", [False, True], ids=["plain", "stack of one"])
@pytest.mark.parametrize("name", ["adamw", "adam", "momentum", "sgd"])
def test_two_fits_that_hand_on_the_optimizer_are_one_torch_loop(name: str, stacked: bool) -> None:
    plan, data = PLANS[name], data_of(0, 13)
    want, _ = by_torch(plan, data, start(), random_of(0), passes=2)
    random, params, state = random_of(0), start(), {}
    for _ in range(2):
        (got,) = fit([Fit(classification, params, data, {}, plan, state)], [random], forward, stacked=stacked)
        params, state = got.params, got.optimizer
    assert_close(params, want)
    assert state["step"] == 2 * got.seen["steps"]


@pytest.mark.parametrize("stacked", [False, True], ids=["plain", "stack of one"])
def test_a_fit_changes_nothing_it_was_given_and_gives_plain_tensors(stacked: bool) -> None:
    data, plan = data_of(0, 9), PLANS["adamw"]
    (first,) = fit([Fit(classification, start(), data, {}, plan)], [random_of(0)], forward)
    before = {k: {n: t.clone() for n, t in first.optimizer[k].items()} for k in ("m", "v")}
    ask = Fit(proximal(classification, 0.1), start(), data, {"anchor": start(2)}, plan, first.optimizer)
    (got,) = fit([ask], [random_of(0)], forward, stacked=stacked)
    assert same(ask.params, start())
    assert same(ask.aux, {"anchor": start(2)})
    assert same(first.optimizer, {**before, "step": int(first.seen["steps"])})
    assert not any(t.requires_grad for t in got.params.values())
    assert not any(t.requires_grad for t in [*got.optimizer["m"].values(), *got.optimizer["v"].values()])


@pytest.mark.parametrize("stacked", [False, True], ids=["plain", "stack of one"])
def test_a_client_without_data_gives_back_what_it_got(stacked: bool) -> None:
    (got,) = fit([Fit(classification, start(), data_of(0, 0), {}, PLANS["adamw"])], [random_of(0)], forward, stacked=stacked)
    assert same(got.params, start())
    assert got.seen.keys() >= {"n", "steps", "loss", "flops"}
    assert set(got.seen.values()) == {0.0}


def test_whole_numbers_ride_along_untouched() -> None:
    params = {**start(), "count": torch.arange(3)}
    asks = [Fit(classification, params, data_of(c, 6), {}, PLANS["adamw"]) for c in range(2)]
    for many in (asks, asks[:1]):
        for got in fit(many, [random_of(c) for c in range(len(many))], forward):
            assert same(got.params["count"], torch.arange(3))


def test_rows_without_tokens_are_trained_as_well() -> None:
    pixels, labels = torch.randn(10, 4, generator=stream(0, "pixels")), torch.arange(10) % 3
    data = Subset(store({"pixel_values": pixels, "labels": labels}, {}), range(10))
    params = {"out": torch.randn(4, 3, generator=stream(0, "out"))}
    plan = Plan(epochs=1, batch=4, optimizer="sgd", lr=0.3)
    want = params["out"].clone().requires_grad_()
    for rows in batches(plan, data.lengths, random_of(0)):
        loss = F.cross_entropy(pixels[rows] @ want, labels[rows])
        want = (want - 0.3 * torch.autograd.grad(loss, want)[0]).detach().requires_grad_()

    def linear(p: Tree, batch: Batch) -> Tensor:
        return batch["pixel_values"] @ p["out"]

    asks = [Fit(classification, params, data, {}, plan), Fit(classification, params, data.take(range(3)), {}, plan)]
    assert_close(fit(asks[:1], [random_of(0)], linear)[0].params, {"out": want.detach()})
    assert_close(fit(asks, [random_of(0), random_of(1)], linear)[0].params, {"out": want.detach()})


def test_flops_are_charged_for_own_rows_and_own_width_alone_and_stacked() -> None:
    def flops(rows: int, width: int) -> float:
        return 1000.0 * rows + width

    plan = PLANS["adamw"]
    asks = [Fit(classification, start(), data_of(c, n), {}, plan) for c, n in enumerate(SIZES)]
    want = []
    for c, ask in enumerate(asks):
        lengths = np.array([len(IDS[r]) for r in ask.data.rows])  # type: ignore[attr-defined]
        want.append(sum(1000.0 * len(rows) + max(lengths[rows]) for rows in batches(plan, lengths, random_of(c))))
    together = fit(asks, [random_of(c) for c in range(len(asks))], forward, flops=flops)
    assert [f.seen["flops"] for f in together] == want
    assert [fit([a], [random_of(c)], forward, flops=flops)[0].seen["flops"] for c, a in enumerate(asks)] == want


@pytest.mark.parametrize("name", ["adamw", "steps", "fraction"])
def test_examples_are_counted_once_for_each_time_that_they_are_seen(name: str) -> None:
    asks = [Fit(classification, start(), data_of(c, n), {}, PLANS[name]) for c, n in enumerate(SIZES)]
    want = [sum(map(len, batches(PLANS[name], a.data.lengths, random_of(c)))) for c, a in enumerate(asks)]
    assert [f.seen["examples"] for f in fit(asks, [random_of(c) for c in range(len(asks))], forward)] == want


def test_dropout_is_drawn_from_the_clients_stream() -> None:
    def dropping(params: Tree, batch: Batch) -> Tensor:
        return F.dropout(forward(params, batch), 0.5)

    plan = PLANS["sgd"]._replace(dropout=True)
    for many in (1, 3):
        asks = [Fit(classification, start(), data_of(c, 9), {}, plan) for c in range(many)]

        def drawn(seed: int, asks: list[Fit] = asks) -> list[Tree]:
            return [f.params for f in fit(asks, [stream(seed, c) for c in range(len(asks))], dropping)]

        torch.manual_seed(1)
        first = drawn(0)
        torch.manual_seed(2)
        assert same(first, drawn(0))
        assert not same(first, drawn(1))


# Many clients.


def aux_none(client: int) -> Tree:
    return {}


SHARED = {"anchor": start(50)}


def aux_shared(client: int) -> Tree:
    return SHARED


def aux_own(client: int) -> Tree:
    return {"anchor": start(60 + client)}


def pulled(forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
    """A loss with a shared tree, an own tree and an own tensor."""
    near = sum((aux["weight"] * (params[n] - aux["anchor"][n]) * aux["own"][n]).sum() for n in params)
    return classification(forward, params, batch, aux) + 0.01 * near


def aux_mixed(client: int) -> Tree:
    return {**SHARED, "own": start(70 + client), "weight": torch.tensor(float(client))}


CASES = {
    "no aux": (classification, aux_none),
    "shared aux": (proximal(classification, 0.2), aux_shared),
    "own aux": (proximal(classification, 0.2), aux_own),
    "mixed aux": (pulled, aux_mixed),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLANS)
def test_a_stack_of_unequal_clients_is_each_alone(name: str, case: str) -> None:
    loss, aux = CASES[case]
    asks = [Fit(loss, start(c % 2), data_of(c, n), aux(c), PLANS[name]) for c, n in enumerate(SIZES)]
    together = fit(asks, [random_of(c) for c in range(len(asks))], forward)
    for c, (ask, got) in enumerate(zip(asks, together, strict=True)):
        (alone,) = fit([ask], [random_of(c)], forward)
        assert_close(got.params, alone.params, 1e-5)
        assert distance(got.optimizer, alone.optimizer) < 1e-4
        assert got.optimizer["step"] == alone.optimizer["step"] == got.seen["steps"]
        assert got.seen == pytest.approx(alone.seen, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "momentum", "linear"])
def test_a_stack_of_clients_goes_on_with_each_ones_optimizer(name: str) -> None:
    plan = PLANS[name]._replace(steps=4)
    sizes = [9, 3, 17]
    randoms, again = ([random_of(c) for c in range(3)] for _ in range(2))
    asks = [Fit(classification, start(c), data_of(c, n), {}, plan) for c, n in enumerate(sizes)]
    first = fit(asks, randoms, forward)
    asks = [a._replace(params=f.params, optimizer=f.optimizer) for a, f in zip(asks, first, strict=True)]
    second = fit(asks, randoms, forward)
    for c, n in enumerate(sizes):
        want, _ = by_torch(plan, data_of(c, n), start(c), again[c], passes=2)
        assert_close(second[c].params, want, 1e-5)
        assert second[c].optimizer["step"] == 8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 60, 100, 10**6])
def test_a_step_in_several_calls_is_the_step_in_one(case: str, tokens: int) -> None:
    loss, aux = CASES[case]
    asks = [Fit(loss, start(c), data_of(c, n), aux(c), PLANS["clip"]) for c, n in enumerate(SIZES)]
    held: list[int] = []

    def watching(params: Tree, batch: Batch) -> Tensor:
        held.append(params["table"].numel())  # under vmap that of one client
        return forward(params, batch)

    whole = fit(asks, [random_of(c) for c in range(len(asks))], forward)
    parts = fit(asks, [random_of(c) for c in range(len(asks))], watching, tokens=tokens)
    for a, b in zip(whole, parts, strict=True):
        assert_close(b.params, a.params, 1e-5)
        assert b.seen == pytest.approx(a.seen, rel=1e-5)
    steps = max(f.seen["steps"] for f in whole)
    assert len(held) == steps if tokens == 10**6 else len(held) > steps
    if tokens == 1:
        assert len(held) == sum(f.seen["steps"] for f in whole)  # each client by itself


def test_the_place_in_the_stack_says_nothing() -> None:
    asks = [Fit(classification, start(), data_of(c, n), {}, PLANS["adamw"]) for c, n in enumerate(SIZES)]
    there = fit(asks, [random_of(c) for c in range(len(asks))], forward)
    back = fit(asks[::-1], [random_of(c) for c in reversed(range(len(asks)))], forward)[::-1]
    for a, b in zip(there, back, strict=True):
        assert_close(a.params, b.params, 1e-5)


def test_a_finished_client_does_not_keep_the_stack_alive() -> None:
    asks = [Fit(classification, start(), data_of(c, 6), {}, PLANS["adamw"]) for c in range(4)]
    for got in fit(asks, [random_of(c) for c in range(4)], forward):
        assert got.params["table"].untyped_storage().nbytes() == WORDS * WIDTH * 4
        assert got.optimizer["m"]["table"].untyped_storage().nbytes() == WORDS * WIDTH * 4


# Answering asks.


def row_of(forward: Forward, params: Tree, batch: Batch) -> Tree:
    return {"logits": forward(params, batch), "first": batch["input_ids"][:, 0], "label": batch["labels"]}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 2048])
def test_predictions_come_in_the_datas_order(stacked: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "PREDICTED", tokens)
    workers = Workers(lambda dropout: forward, 2)
    asks = {f"c{c}": Predict(row_of, start(c), data_of(c, n)) for c, n in enumerate([50, 1, 0, 23])}
    try:
        results = answer(asks, workers, lambda c: stream(0), stacked)
    finally:
        workers.close()
    assert results["c2"] == {}
    for client, ask in asks.items():
        rows = ask.data.rows  # type: ignore[attr-defined]
        if not len(rows):
            continue
        got = results[client]
        assert got["first"].tolist() == [IDS[r][0] for r in rows]
        assert got["label"].tolist() == [LABELS[r] for r in rows]
        for i, r in enumerate(rows):
            alone = forward(ask.params, {"input_ids": torch.tensor([IDS[r]]), "attention_mask": torch.ones(1, len(IDS[r]))})
            torch.testing.assert_close(got["logits"][i], alone[0], rtol=1e-5, atol=1e-6)
        assert not got["logits"].requires_grad


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("group", [0, 2])
def test_asks_of_all_kinds_are_answered_stacked_as_one_by_one(count: int, group: int) -> None:
    workers = Workers(lambda dropout: forward, count, group=group)
    asks: dict[str, Any] = {f"c{c}": Fit(classification, start(), data_of(c, n), {}, PLANS["adamw"]) for c, n in enumerate(SIZES)}
    asks |= {f"d{c}": Fit(proximal(classification, 0.1), start(), data_of(c, 7), SHARED, PLANS["clip"]) for c in range(3)}
    asks |= {f"p{c}": Predict(row_of, start(), data_of(c, 5)) for c in range(2)}
    try:
        together, alone = (answer(asks, workers, lambda c: stream(0, c), stacked) for stacked in (True, False))
    finally:
        workers.close()
    assert together.keys() == alone.keys() == asks.keys()
    for client, want in alone.items():
        if isinstance(want, Fitted):
            assert_close(together[client].params, want.params, 1e-5)
        else:
            assert same(together[client], want)


def fits_of(sizes: Sequence[int], **changes: Any) -> dict[str, Fit]:
    plain = Fit(classification, start(), data_of(0, 1), {}, PLANS["sgd"])
    return {f"c{i:03}": plain._replace(data=data_of(i, n), **changes) for i, n in enumerate(sizes)}


@pytest.mark.parametrize("size", [0, 1, 3, 100])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_groups_hold_every_client_once_and_are_the_same_every_time(size: int, workers: int) -> None:
    fits = fits_of(DICE.integers(0, 40, 37).tolist())
    groups = grouped(fits, size, workers)
    assert sorted(c for group in groups for c in group) == sorted(fits)
    assert all(groups)
    assert len(groups) % workers == 0 or len(groups) == len(fits)
    if size:
        assert max(map(len, groups)) <= size
    assert groups == grouped(dict(reversed(fits.items())), size, workers)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_clients_are_stacked_only_with_their_like() -> None:
    kinds = [
        {},
        {"loss": proximal(classification, 0.1), "aux": SHARED},
        {"loss": proximal(classification, 0.2), "aux": SHARED},
        {"plan": PLANS["adamw"]},
        {"params": {n: t.double() for n, t in start().items()}},
        {"optimizer": {"step": 3}},
        {"optimizer": {"step": 4}},
    ]
    fits = {f"{kind}-{c}": f for kind, changes in enumerate(kinds) for c, f in fits_of([5, 6, 7], **changes).items()}
    groups = grouped(fits, 100, 1)
    assert sorted(sorted({c.split("-")[0] for c in group}) for group in groups) == [[str(kind)] for kind in range(len(kinds))]
    assert all(len(group) == 3 for group in groups)
    # Two losses with equal parameters are one loss.
    fits = {f"x{i}": f for i in range(3) for f in fits_of([5], loss=proximal(classification, 0.1), aux=SHARED).values()}
    assert len(grouped(fits, 100, 1)) == 1


def test_neighbours_in_size_share_a_group() -> None:
    groups = grouped(fits_of([40, 1, 39, 2, 38, 3]), 3, 1)
    assert sorted(sorted(g) for g in groups) == [["c000", "c002", "c004"], ["c001", "c003", "c005"]]


def test_large_trees_are_trained_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = fits_of([5] * 6)
    assert max(map(len, grouped(fits, 0, 1))) > 1
    monkeypatch.setattr(answering, "LARGE", 10)
    assert sorted(grouped(fits, 0, 1)) == [[c] for c in sorted(fits)]


def test_flows_advance_in_lockstep_and_may_end_at_different_times() -> None:
    def flow(name: str, asks: int) -> Flow:
        got = []
        for i in range(asks):
            got.append((yield Predict(row_of, {"ask": f"{name}{i}"}, data_of(0, 1))))
        return {"got": got}, Message("done", {}, {"n": float(asks)})

    seen: list[list[str]] = []

    def reply(asks: dict[str, Any]) -> dict[str, Any]:
        seen.append([ask.params["ask"] for ask in asks.values()])
        return {c: ask.params["ask"].upper() for c, ask in asks.items()}

    done = drive({"a": flow("a", 2), "b": flow("b", 0), "c": flow("c", 1)}, reply)
    assert seen == [["a0", "c0"], ["a1"]]
    assert done == {
        "a": ({"got": ["A0", "A1"]}, Message("done", {}, {"n": 2.0})),
        "b": ({"got": []}, Message("done", {}, {"n": 0.0})),
        "c": ({"got": ["C0"]}, Message("done", {}, {"n": 1.0})),
    }
