"""Optimisers as pairs of functions on trees: client side over a stacked client axis, server side on pseudo-gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as fused_adam
from torch.optim.adamw import adamw as fused_adamw

from fedtailor.core import Plan, Tree, falling
from fedtailor.trees import SEPARATOR, tree_map, zeros_like

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam and AdamW


def learning_rate(plan: Plan, step: int, steps: int) -> float:
    """Rate at `step` (from 0) of `steps`."""
    return plan.lr * falling(plan.schedule, step / steps)


def fresh(plan: Plan, params: dict[str, Tensor]) -> Tree:
    """Optimiser state for these tensors: {} or {name: ...} trees shaped like them, plus the step count."""
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    if plan.optimizer == "sgd":
        return {"momentum": zero, "step": 0} if plan.momentum else {"step": 0}
    return {"m": zero, "v": {name: torch.zeros_like(p) for name, p in params.items()}, "step": 0}


def completed(plan: Plan, params: dict[str, Tensor], state: Tree) -> Tree:
    """The state, with what it lacks of these tensors as `fresh` has it: their moments are zero, and their steps count from here."""
    if not state:
        return fresh(plan, params)
    kinds = [kind for kind in ("momentum", "m", "v") if kind in state]
    new = [name for name in params if kinds and name not in state[kinds[0]]]
    if not new:
        return state
    zero = {kind: {name: torch.zeros_like(params[name], requires_grad=False) for name in new} for kind in kinds}
    since = {**state.get("since", {}), **dict.fromkeys(new, state["step"])}
    return {**state, **{kind: {**state[kind], **zero[kind]} for kind in kinds}, "since": since}


def inside(state: Tree, name: str) -> Tree:
    """What of the state for {name: tree, ...} is that tree's: a state for the tree alone, if it has had every step."""
    return {
        kind: {path.removeprefix(f"{name}{SEPARATOR}"): t for path, t in part.items() if path.startswith(f"{name}{SEPARATOR}")}
        if isinstance(part, dict)
        else part
        for kind, part in state.items()
        if kind != "since"
    }


def under(state: Tree, name: str) -> Tree:
    """The state for a tree as one for {name: tree, ...}, of which the other trees have none."""
    return {
        kind: {f"{name}{SEPARATOR}{path}": t for path, t in part.items()} if isinstance(part, dict) else part
        for kind, part in state.items()
    }


def steps_in(state: Tree) -> tuple[object, ...]:
    """The numbers of steps in an optimiser's state: where they differ, clients cannot be stacked."""
    return (state.get("step"), *sorted(state.get("since", {}).items()))


@torch.no_grad()
def apply(plan: Plan, params: dict[str, Tensor], state: Tree, rates: Tensor | float) -> None:
    """One step in place from `p.grad`, as torch.optim's SGD, Adam or AdamW would (a test says so).

    `rates` is a number, or (clients,) for tensors with a leading client axis: each client has its own schedule.
    """
    state["step"] += 1
    count, since = state["step"], state.get("since", {})  # some may have joined later
    if plan.optimizer != "sgd" and not isinstance(rates, Tensor):
        _adam(plan, params, state, rates)
        return
    for name, p in params.items():
        if p.grad is None:
            continue
        grad = p.grad
        lr = rates.view(-1, *[1] * (p.dim() - 1)).to(p) if isinstance(rates, Tensor) else rates
        if plan.weight_decay and plan.optimizer == "adamw":
            p.mul_(1 - lr * plan.weight_decay)
        elif plan.weight_decay:
            grad = grad + plan.weight_decay * p
        if plan.optimizer == "sgd":
            if plan.momentum:
                # Zero start and no dampening give torch's first step, where the buffer is the gradient.
                grad = state["momentum"][name].mul_(plan.momentum).add_(grad)
            p.sub_(lr * grad)
            continue
        m, v = state["m"][name], state["v"][name]
        m.lerp_(grad, 1 - BETA1)
        v.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        taken = count - since.get(name, 0)
        below = (v.sqrt() / math.sqrt(1 - BETA2**taken)).add_(EPSILON)
        p.sub_((lr / (1 - BETA1**taken)) * m / below)


def _adam(plan: Plan, params: dict[str, Tensor], state: Tree, rate: float) -> None:
    """torch's own fused step: one pass over memory where the rule written out takes ten (full fine-tuning waits for it)."""
    there = [name for name, p in params.items() if p.grad is not None]
    # Each tensor wants a count of its own, which the step raises by one.
    since = state.get("since", {})
    counts = [torch.full((), float(state["step"] - 1 - since.get(name, 0)), device=params[name].device) for name in there]
    step = fused_adamw if plan.optimizer == "adamw" else fused_adam
    step(
        [params[name] for name in there],
        [params[name].grad for name in there],  # type: ignore[misc]
        [state["m"][name] for name in there],
        [state["v"][name] for name in there],
        [],
        counts,
        fused=True,
        amsgrad=False,
        beta1=BETA1,
        beta2=BETA2,
        lr=rate,
        weight_decay=plan.weight_decay,
        eps=EPSILON,
        maximize=False,
    )


def stepped(plan: Plan, params: Tree, slopes: Tree, state: Tree, rate: float) -> tuple[Tree, Tree]:
    """(params, state) after one step with these gradients; what was given stays as it is. An empty state is a fresh one."""
    own: Tree = {name: p.detach().clone() for name, p in params.items()}
    for name, p in own.items():
        p.grad = slopes[name].clone()
    if plan.clip:
        clip(own, plan.clip, False)
    after = tree_map(lambda t: t.clone(), state) if state else fresh(plan, own)
    if own:
        apply(plan, own, after, rate)
    for p in own.values():
        p.grad = None
    return own, after


@torch.no_grad()
def clip(params: dict[str, Tensor], largest: float, stacked: bool) -> None:
    """Scale each client's gradient to a norm of at most `largest`; with `stacked`, axis 0 is the client."""
    grads = [p.grad for p in params.values() if p.grad is not None]
    if not grads:
        return
    flat = [g.reshape(len(g) if stacked else 1, -1) for g in grads]
    norms = torch.stack([f.square().sum(1) for f in flat]).sum(0).sqrt()
    factors = (largest / (norms + 1e-6)).clamp_max(1.0)
    for g in grads:
        g.mul_(factors.view(-1, *[1] * (g.dim() - 1)) if stacked else factors[0])


class ServerOptimizer(NamedTuple):
    """(fresh state for params, (params, pseudo-gradient, state) -> (params, state)). D = FedAvg(w_k) - w_t points downhill."""

    init: Callable[[Tree], Tree]
    step: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def momentum(lr: float = 1.0, beta: float = 0.9) -> ServerOptimizer:
    """FedAvgM (arXiv 1909.06335): m = beta m + D; w += lr m."""

    def step(params: Tree, delta: Tree, state: Tree) -> tuple[Tree, Tree]:
        m = tree_map(lambda old, d: beta * old + d, state["m"], delta)
        return tree_map(lambda w, v: w + lr * v, params, m), {"m": m}

    return ServerOptimizer(lambda params: {"m": zeros_like(params)}, step)


def _adaptive(lr: float, beta1: float, tau: float, second: Callable[[Tensor, Tensor], Tensor]) -> ServerOptimizer:
    """m = b1 m + (1 - b1) D; v = second(v, D^2); w += lr m / (sqrt(v) + tau). No bias correction; m and v start at 0."""

    def step(params: Tree, delta: Tree, state: Tree) -> tuple[Tree, Tree]:
        m = tree_map(lambda old, d: beta1 * old + (1 - beta1) * d, state["m"], delta)
        v = tree_map(lambda old, d: second(old, d.square()), state["v"], delta)
        new = tree_map(lambda w, a, b: w + lr * a / (b.sqrt() + tau), params, m, v)
        return new, {"m": m, "v": v}

    return ServerOptimizer(lambda params: {"m": zeros_like(params), "v": zeros_like(params)}, step)


def adam(lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdam (arXiv 2003.00295)."""
    return _adaptive(lr, beta1, tau, lambda v, square: beta2 * v + (1 - beta2) * square)


def yogi(lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedYogi (arXiv 2003.00295)."""
    return _adaptive(lr, beta1, tau, lambda v, square: v - (1 - beta2) * square * torch.sign(v - square))


def adagrad(lr: float = 0.1, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdagrad (arXiv 2003.00295): beta1 = 0, and v only grows."""
    return _adaptive(lr, 0.0, tau, lambda v, square: v + square)
