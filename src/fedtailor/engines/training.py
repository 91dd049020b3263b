"""The one training loop: a client alone, or many clients stacked along a leading axis over one resident backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from fedtailor import optimizers
from fedtailor.core import Fit, Fitted, Forward, Tree
from fedtailor.engines.batches import batches
from fedtailor.trees import tensors, tree_map, unstack

Flops = Callable[[int, int], float]
"""(rows, width) -> floating-point operations of one training step, forward and backward."""


def no_flops(rows: int, width: int) -> float:
    return 0.0


def fit(
    asks: Sequence[Fit],
    randoms: Sequence[torch.Generator],
    forward: Forward,
    device: str = "cpu",
    flops: Flops = no_flops,
    stacked: bool | None = None,
    pace: int | None = None,
    tokens: int = 0,
) -> list[Fitted]:
    """Train the asks' params, each on its own data, with its own steps, batches and optimiser.

    Asks must agree in loss, plan, passes and signature. One ask runs without the client axis unless `stacked` says otherwise; more are
    one call of `vmap` a step. Clients with fewer steps leave the stack when they are done (they stand last), rows and tokens
    that a client lacks are padding without a label.

    Args:
        pace: seed of the order in which batches of like length come, the same for all clients (batches.py).
        tokens: a step of more tokens than this runs in several calls over fewer clients, to bound memory; 0 never does.
    """
    many = len(asks) > 1 if stacked is None else stacked
    plan, loss = asks[0].plan, asks[0].loss
    paces = [torch.Generator().manual_seed(pace) if pace is not None else None for _ in asks]
    todo = [batches(plan, ask.data.lengths, r, p) for ask, r, p in zip(asks, randoms, paces, strict=True)]
    order = sorted(range(len(asks)), key=lambda i: -len(todo[i]))  # stable: ties stay in client order
    lengths = [np.asarray(ask.data.lengths) for ask in asks]
    out: list[Fitted | None] = [None] * len(asks)

    params, aux, state = _gather([asks[i] for i in order], many, device)
    leaves = _leaves(params)
    state = optimizers.completed(plan, leaves, state)
    sums = torch.zeros(len(asks), dtype=torch.float64)
    paths: list[list[Tree]] = [[] for _ in asks]
    spent, passes, ran = [0.0] * len(asks), [0.0] * len(asks), [0.0] * len(asks)
    if plan.dropout:
        # One stream for the group: with dropout, stacked training draws masks of its own.
        torch.manual_seed(int(torch.randint(2**62, (), generator=randoms[order[0]])))

    active = len(order)
    for step in range(len(todo[order[0]]) + 1):
        staying = sum(len(todo[i]) > step for i in order)
        if staying < active:
            for place in range(staying, active):
                i = order[place]
                seen = {"n": float(len(asks[i].data)), "steps": float(len(todo[i])), "examples": passes[i], "flops": spent[i]}
                seen["loss"] = float(sums[i]) / max(len(todo[i]), 1)
                seen["lr"] = ran[i] / max(len(todo[i]), 1)
                at = place if many else None
                out[i] = Fitted(_own(params, at), seen, _own(state, at), paths[i])
            active = staying
            if active == 0:
                break
            params, aux, state = (_first(t, active) if many else t for t in (params, aux, state))
            leaves = _leaves(params)
        now = order[:active]
        for place, i in enumerate(now if plan.path else ()):
            paths[i].append(tree_map(torch.clone, _own(params, place if many else None)))
        rows = [todo[i][step] for i in now]
        own = [int(lengths[i][r].max()) for i, r in zip(now, rows, strict=True)]
        width, size = max(own), max(len(r) for r in rows)
        parts = [asks[i].data.batch(r, width, size) for i, r in zip(now, rows, strict=True)]
        batch = {k: (torch.stack([p[k] for p in parts]) if many else parts[0][k]).to(device) for k in parts[0]}
        parts_of = min(active, -(-active * size * width // tokens)) if many and tokens else 1
        values = torch.cat([_step(loss, forward, params, batch, aux, many, p) for p in _slices(active, parts_of)])
        if plan.clip:
            optimizers.clip(leaves, plan.clip, many)
        rates = [optimizers.learning_rate(plan, step, len(todo[i])) for i in now]
        same = len(set(rates)) == 1
        optimizers.apply(plan, leaves, state, rates[0] if same else torch.tensor(rates, device=device))
        for p in leaves.values():
            p.grad = None
        sums[now] += values.double().cpu()
        for i, r, w, rate in zip(now, rows, own, rates, strict=True):
            ran[i] += rate
            spent[i] += asks[0].passes * flops(len(r), w)
            passes[i] += len(r)
    return [done for done in out if done is not None]


def _slices(clients: int, parts: int) -> list[slice | None]:
    """The clients in `parts` neighbouring slices; None is all of them."""
    if parts == 1:
        return [None]
    cuts = np.linspace(0, clients, parts + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def _step(
    loss: Any, forward: Forward, params: Tree, batch: dict[str, Tensor], aux: Tree, many: bool, part: slice | None
) -> Tensor:
    """Forward and backward of these clients; gradients add up in the leaves. Returns their losses, (clients,)."""
    if part is not None:
        # The slice of a leaf is a view: its gradient lands in the leaf's rows.
        params, batch = tree_map(lambda t: t[part], params), {k: v[part] for k, v in batch.items()}
        aux = {k: v if k == _SHARED else tree_map(lambda t: t[part], {"": v})[""] for k, v in aux.items()}
    values = _losses(loss, forward, params, batch, aux, many)
    values.sum().backward()
    return values.detach().reshape(-1)


def _losses(loss: Any, forward: Forward, params: Tree, batch: dict[str, Tensor], aux: Tree, many: bool) -> Tensor:
    """(clients,) losses, or a scalar for one client."""
    if not many:
        return loss(forward, params, batch, aux)  # type: ignore[no-any-return]
    shared = aux.get(_SHARED, {})
    own = {k: v for k, v in aux.items() if k != _SHARED}
    axes = tree_map(lambda t: 0, own)

    def one(p: Tree, b: Tree, a: Tree) -> Tensor:
        return loss(forward, p, b, {**a, **shared})  # type: ignore[no-any-return]

    return vmap(one, in_dims=(0, 0, axes), randomness="different")(params, batch, own)  # type: ignore[no-any-return]


_SHARED = "\x00shared"


def _gather(asks: Sequence[Fit], many: bool, device: str) -> tuple[Tree, Tree, Tree]:
    """(params, aux, optimiser state) of these asks on the device, stacked where there are many; params are fresh leaves."""
    if not many:
        params = tree_map(lambda t: t.detach().to(device, copy=True), asks[0].params)
        state = tree_map(lambda t: t.to(device, copy=True), asks[0].optimizer)
        return _trained(params), tree_map(lambda t: t.to(device), asks[0].aux), state
    params = tree_map(lambda *ts: torch.stack(ts).to(device), asks[0].params, *(a.params for a in asks[1:]))
    aux: Tree = {}
    shared: Tree = {}
    for name, first in asks[0].aux.items():
        values = [ask.aux[name] for ask in asks]
        # What everybody received is one object: it stays one, without a client axis.
        if all(v is first for v in values):
            shared[name] = tree_map(lambda t: t.to(device), first) if isinstance(first, dict) else first.to(device)
        elif isinstance(first, dict):
            aux[name] = tree_map(lambda *ts: torch.stack(ts).to(device), first, *values[1:])
        else:
            aux[name] = torch.stack(values).to(device)
    if shared:
        aux[_SHARED] = shared
    states = [ask.optimizer for ask in asks]
    state = tree_map(lambda *ts: torch.stack(ts).to(device), states[0], *states[1:]) if states[0] else {}
    return _trained(params), aux, state


def _trained(params: Tree) -> Tree:
    return tree_map(lambda t: t.requires_grad_(t.is_floating_point()), params)


def _leaves(params: Tree) -> dict[str, Tensor]:
    return {path: t for path, t in tensors(params) if t.requires_grad}


def _first(tree: Tree, active: int) -> Tree:
    """The first clients of a stacked tree, as leaves of their own."""
    out: Tree = {}
    for name, value in tree.items():
        if name == _SHARED:
            out[name] = value
        elif isinstance(value, dict):
            out[name] = _first(value, active)
        elif isinstance(value, Tensor):
            out[name] = value.detach()[:active].clone().requires_grad_(value.requires_grad)
        else:
            out[name] = value
    return out


def _own(tree: Tree, place: int | None) -> Tree:
    """One client's part of a tree, on the CPU; all of it where the client is alone."""
    plain = tree_map(lambda t: t.detach(), tree)
    return tree_map(lambda t: t.cpu(), plain if place is None else unstack(plain, place))
