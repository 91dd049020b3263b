"""Optimisers against torch.optim, stacked clients against each alone, and server optimisers against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedtailor import optimizers
from fedtailor.core import Plan, Tree, stream
from tiny import same

STEPS = 5
SHAPES = {"w": (3, 4), "b": (4,), "scale": ()}

PLANS = {
    "sgd": Plan(optimizer="sgd", lr=0.1),
    "sgd decay": Plan(optimizer="sgd", lr=0.1, weight_decay=0.3),
    "sgd momentum": Plan(optimizer="sgd", lr=0.1, momentum=0.9),
    "sgd momentum decay": Plan(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.3),
    "adam": Plan(optimizer="adam", lr=0.05),
    "adam decay": Plan(optimizer="adam", lr=0.05, weight_decay=0.3),
    "adamw": Plan(optimizer="adamw", lr=0.05),
    "adamw decay": Plan(optimizer="adamw", lr=0.05, weight_decay=0.3),
}


def start(client: int = 0) -> dict[str, Tensor]:
    return {n: torch.randn(s, generator=stream(client, "start", n)) for n, s in SHAPES.items()}


def gradient(client: int, step: int, size: float = 1.0) -> dict[str, Tensor]:
    return {n: size * torch.randn(s, generator=stream(client, "grad", n, step)) for n, s in SHAPES.items()}


def torchs(plan: Plan, params: dict[str, Tensor]) -> torch.optim.Optimizer:
    leaves = list(params.values())
    if plan.optimizer == "sgd":
        return torch.optim.SGD(leaves, plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay)
    made = torch.optim.Adam if plan.optimizer == "adam" else torch.optim.AdamW
    return made(leaves, plan.lr, weight_decay=plan.weight_decay)


def by_torch(plan: Plan, client: int, rates: list[float], clip: float = 0.0) -> dict[str, Tensor]:
    params = {n: t.requires_grad_() for n, t in start(client).items()}
    optimizer = torchs(plan, params)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for n, g in gradient(client, step).items():
            params[n].grad = g
        if clip:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
    return {n: t.detach() for n, t in params.items()}


def by_us(plan: Plan, clients: list[int], rates: list[list[float]], stacked: bool, clip: float = 0.0) -> list[dict[str, Tensor]]:
    """`rates`: those of each client."""
    each = [start(c) for c in clients]
    params = {n: torch.stack([e[n] for e in each]) for n in SHAPES} if stacked else each[0]
    state = optimizers.fresh(plan, params)
    for step in range(len(rates[0])):
        grads = [gradient(c, step) for c in clients]
        for n, p in params.items():
            p.grad = torch.stack([g[n] for g in grads]) if stacked else grads[0][n]
        if clip:
            optimizers.clip(params, clip, stacked)
        optimizers.apply(plan, params, state, torch.tensor([r[step] for r in rates]) if stacked else rates[0][step])
    assert state["step"] == len(rates[0])
    return [{n: p[i] for n, p in params.items()} for i in range(len(clients))] if stacked else [params]


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", PLANS)
def test_steps_are_those_of_torch(name: str) -> None:
    plan = PLANS[name]
    assert_close(by_us(plan, [0], [[plan.lr] * STEPS], stacked=False)[0], by_torch(plan, 0, [plan.lr] * STEPS))


@pytest.mark.parametrize("name", PLANS)
def test_a_stack_of_clients_takes_the_steps_of_torch_for_each_at_its_own_rate(name: str) -> None:
    plan, clients = PLANS[name], [0, 1, 2]
    rates = [[plan.lr * (1 + c) / (1 + step) for step in range(STEPS)] for c in clients]
    for c, got in zip(clients, by_us(plan, clients, rates, stacked=True), strict=True):
        assert_close(got, by_torch(plan, c, rates[c]))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("clip", [0.5, 3.0, 1e6])
def test_clipped_steps_are_those_of_torch_alone_and_stacked(name: str, clip: float) -> None:
    plan, clients = PLANS[name], [0, 1, 2]
    rates = [[plan.lr] * STEPS] * 3
    want = [by_torch(plan, c, rates[c], clip) for c in clients]
    for got, expected in zip(by_us(plan, clients, rates, stacked=True, clip=clip), want, strict=True):
        assert_close(got, expected)
    assert_close(by_us(plan, [0], rates[:1], stacked=False, clip=clip)[0], want[0])


@pytest.mark.parametrize("name", PLANS)
def test_a_rate_may_be_a_whole_number(name: str) -> None:
    plan = PLANS[name]
    params, again = start(), start()
    state, other = optimizers.fresh(plan, params), optimizers.fresh(plan, again)
    for p, q, g in zip(params.values(), again.values(), gradient(0, 0).values(), strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    optimizers.apply(plan, params, state, 1)
    optimizers.apply(plan, again, other, 1.0)
    assert same(params, again)


def test_a_tensor_without_a_gradient_is_left_alone_as_torch_does() -> None:
    plan = PLANS["adamw decay"]
    params = start()
    before = params["b"].clone()
    params["w"].grad = gradient(0, 0)["w"]
    optimizers.apply(plan, params, optimizers.fresh(plan, params), plan.lr)
    assert torch.equal(params["b"], before)
    assert not torch.equal(params["w"], start()["w"])


@pytest.mark.parametrize("largest", [0.1, 2.0, 50.0])
def test_clip_is_torchs_for_each_client_however_unequal_they_are(largest: float) -> None:
    sizes = [1e-3, 1.0, 30.0]
    grads = [gradient(c, 0, size) for c, size in enumerate(sizes)]
    stacked = {n: torch.zeros(3, *s) for n, s in SHAPES.items()}
    for n, p in stacked.items():
        p.grad = torch.stack([g[n] for g in grads])
    optimizers.clip(stacked, largest, stacked=True)
    for c, own in enumerate(grads):
        alone = {n: torch.zeros(s, requires_grad=True) for n, s in SHAPES.items()}
        ours = {n: torch.zeros(s) for n, s in SHAPES.items()}
        for n in SHAPES:
            alone[n].grad, ours[n].grad = own[n].clone(), own[n].clone()
        torch.nn.utils.clip_grad_norm_(alone.values(), largest)
        optimizers.clip(ours, largest, stacked=False)
        for n in SHAPES:
            torch.testing.assert_close(stacked[n].grad[c], alone[n].grad)  # type: ignore[index]
            torch.testing.assert_close(ours[n].grad, alone[n].grad)


def test_clip_without_gradients_or_with_zero_ones_does_nothing() -> None:
    optimizers.clip(start(), 1.0, stacked=False)
    params = start()
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizers.clip(params, 1.0, stacked=False)
    assert all(bool((p.grad == 0).all()) for p in params.values())


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_schedules_are_those_of_torch(steps: int) -> None:
    p = torch.zeros(1, requires_grad=True)
    for schedule, factor in (
        ("constant", lambda i: 1.0),
        ("linear", lambda i: 1 - i / steps),
        ("cosine", lambda i: (1 + math.cos(math.pi * i / steps)) / 2),
    ):
        optimizer = torch.optim.SGD([p], 0.3)
        theirs = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for step in range(steps):
            rate = optimizers.learning_rate(Plan(lr=0.3, schedule=schedule), step, steps)
            assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
            assert rate > 0
            optimizer.step()
            theirs.step()


# Server optimisers, by hand on one number: w = 1, and D = 2 and then -1.

SERVER = {
    "momentum": optimizers.momentum(0.5, 0.8),
    "adam": optimizers.adam(0.1, 0.9, 0.99, 1e-3),
    "yogi": optimizers.yogi(0.1, 0.9, 0.99, 1e-3),
    "adagrad": optimizers.adagrad(0.1, 1e-3),
}
M1, M2 = 0.1 * 2, 0.9 * (0.1 * 2) + 0.1 * -1  # 0.2, 0.08
BY_HAND = {
    # m = 0.8 m + D: 2, then 0.6; w += 0.5 m.
    "momentum": (1 + 0.5 * 2, 2 + 0.5 * (0.8 * 2 - 1)),
    # v = 0.99 v + 0.01 D^2: 0.04, then 0.0496.
    "adam": (1 + 0.1 * M1 / (0.2 + 1e-3), 1 + 0.1 * M1 / (0.2 + 1e-3) + 0.1 * M2 / (math.sqrt(0.0496) + 1e-3)),
    # v = v - 0.01 D^2 sign(v - D^2): 0.04, then 0.05.
    "yogi": (1 + 0.1 * M1 / (0.2 + 1e-3), 1 + 0.1 * M1 / (0.2 + 1e-3) + 0.1 * M2 / (math.sqrt(0.05) + 1e-3)),
    # m = D; v = v + D^2: 4, then 5.
    "adagrad": (1 + 0.1 * 2 / (2 + 1e-3), 1 + 0.1 * 2 / (2 + 1e-3) - 0.1 / (math.sqrt(5) + 1e-3)),
}


def tree_of(value: float) -> Tree:
    return {"w": torch.tensor([value], dtype=torch.float64), "h": {"b": torch.tensor(value, dtype=torch.float64)}}


@pytest.mark.parametrize("name", SERVER)
def test_two_server_steps_are_those_by_hand(name: str) -> None:
    server = SERVER[name]
    params = tree_of(1.0)
    state = server.init(params)
    for delta, want in zip((2.0, -1.0), BY_HAND[name], strict=True):
        params, state = server.step(params, tree_of(delta), state)
        assert float(params["w"]) == pytest.approx(want, rel=1e-12)
        assert float(params["h"]["b"]) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", SERVER)
def test_no_pseudo_gradient_and_no_momentum_leave_the_params_as_they_are(name: str) -> None:
    params = {"w": torch.randn(4, generator=stream(0, "still"))}
    zero = {"w": torch.zeros(4)}
    new, state = SERVER[name].step(params, zero, SERVER[name].init(params))
    assert same(new, params)
    assert same(state, SERVER[name].init(params))


@pytest.mark.parametrize("name", SERVER)
def test_a_server_step_changes_nothing_it_was_given(name: str) -> None:
    params, delta = tree_of(1.0), tree_of(2.0)
    _, state = SERVER[name].step(params, delta, SERVER[name].init(params))
    kept = {k: {"w": v["w"].clone(), "h": {"b": v["h"]["b"].clone()}} for k, v in state.items()}
    SERVER[name].step(params, delta, state)
    assert same([params, delta, state], [tree_of(1.0), tree_of(2.0), kept])


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
def test_the_second_moment_is_never_negative(name: str) -> None:
    server, params = SERVER[name], {"w": torch.zeros(200)}
    state = server.init(params)
    for step in range(60):
        # Sizes over eight orders of magnitude, with long pauses: where yogi's v could undershoot.
        size = 10.0 ** ((step * 7) % 9 - 4) * (step % 5 != 0)
        params, state = server.step(params, {"w": size * torch.randn(200, generator=stream(step, name))}, state)
        assert bool((state["v"]["w"] >= 0).all())
        assert bool(torch.isfinite(params["w"]).all())


def test_momentum_without_memory_at_rate_one_is_plain_averaging() -> None:
    params, delta = tree_of(1.0), tree_of(2.0)
    new, _ = optimizers.momentum(1.0, 0.0).step(params, delta, optimizers.momentum(1.0, 0.0).init(params))
    assert same(new, tree_of(3.0))


def test_adagrads_second_moment_only_grows_and_is_the_sum_of_squares() -> None:
    server, params = SERVER["adagrad"], {"w": torch.zeros(5)}
    state, total = server.init(params), torch.zeros(5)
    for step in range(8):
        delta = torch.randn(5, generator=stream(step, "delta"))
        params, state = server.step(params, {"w": delta}, state)
        assert bool((state["v"]["w"] >= total).all())
        total = total + delta**2
        torch.testing.assert_close(state["v"]["w"], total)


@pytest.mark.parametrize(
    ("decay", "rates"),
    [("constant", [1.0] * 4), ("linear", [1.0, 0.75, 0.5, 0.25]), ("cosine", [1.0, 0.853553, 0.5, 0.146447])],
)
def test_the_rate_falls_from_round_to_round(decay: str, rates: list[float]) -> None:
    plan = Plan(lr=2.0, decay=decay, rounds=4)
    assert [plan.at(round).lr for round in (1, 2, 3, 4)] == pytest.approx([2 * rate for rate in rates], abs=1e-6)
    assert plan.at(3).at(4) == plan.at(3)  # it decays once


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ["sgd momentum", "adam decay", "adamw decay"])
def test_tensors_that_join_later_start_afresh(name: str, stacked: bool) -> None:
    """One state of which "b" joins after two steps is two optimisers of torch's, "b" with a new one."""
    plan = PLANS[name]
    wanted = {n: t.requires_grad_() for n, t in start().items()}
    old, new = torchs(plan, {n: t for n, t in wanted.items() if n != "b"}), torchs(plan, {"b": wanted["b"]})
    params = {n: t[None].clone() if stacked else t.clone() for n, t in start().items()}
    rates: Tensor | float = torch.tensor([plan.lr]) if stacked else plan.lr
    state: Tree = {}
    for step in range(STEPS):
        there = {n: p for n, p in params.items() if n != "b" or step >= 2}
        state = optimizers.completed(plan, there, state)
        for n, g in gradient(0, step).items():
            params[n].grad, wanted[n].grad = (g[None] if stacked else g), g
        optimizers.apply(plan, there, state, rates)
        for theirs in (old, new) if step >= 2 else (old,):
            theirs.step()
    assert_close({n: p[0] if stacked else p for n, p in params.items()}, {n: t.detach() for n, t in wanted.items()})
    assert optimizers.steps_in(state) != optimizers.steps_in({**state, "since": {}})


def test_the_state_of_one_tree_among_several() -> None:
    plan = PLANS["adamw"]
    alone = optimizers.fresh(plan, {"w": torch.ones(2), "part/b": torch.ones(3)})
    among = optimizers.completed(plan, {"mine/w": torch.ones(2), "mine/part/b": torch.ones(3), "other/w": torch.ones(2)}, {})
    assert same(optimizers.inside(among, "mine"), alone)
    assert same(optimizers.inside(optimizers.under(alone, "mine"), "mine"), alone)
