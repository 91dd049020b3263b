"""How today's tree would differ without a client, followed through a round, a tensor and some clients at a time (Fed-Influence)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedtailor.core import ClientId, Message, State, Tree
from fedtailor.memory import zeros

AT_ONCE, COPIES = 256_000_000, 5  # bytes of shifts in float64 that are followed at once, and how many of them there are meanwhile
GROWN = 1 + 1e-6  # a tensor that nothing moved is as long as before, but for rounding


def followed(
    seen: State,
    delta: Tree,
    replies: Mapping[ClientId, Message],
    weights: Sequence[float],
    mu: float,
    truncate: bool,
    on_disk: bool = False,
    room: int = AT_ONCE,
) -> State:
    """eps of all clients ever heard, after a round in which the tree moved by `delta`; tensor by tensor where each is followed alone.

    `eps` holds (clients, *shape) a tensor, `cut` whether the sequential part of a client's tensor was dropped. In memory at once are about
    `room` bytes of shifts in float64, and one client's gradients of what is followed together.
    """
    clients, here = sorted({*seen["clients"], *replies}), list(replies)
    shares = _shares(clients, dict(zip(here, weights, strict=True)))
    took_part = torch.tensor([c in replies for c in clients])
    alone = took_part & (shares.sum(1) == 0)
    places = {c: i for i, c in enumerate(seen["clients"])}
    cut = {name: _placed(t, seen["clients"], clients).bool() for name, t in seen["cut"].items()}
    names = sorted(delta)
    eps = {name: zeros((len(clients), *delta[name].shape), seen["eps"][name].dtype, on_disk) for name in names}
    for block in [[name] for name in names] if truncate else [names]:
        sizes = [delta[name].numel() for name in block]
        move = torch.cat([delta[name].double().flatten() for name in block])
        for part in _parts(len(clients), max(1, room // (8 * COPIES * max(len(move), 1)))):
            before = torch.stack([_row(seen["eps"], block, places.get(c), move) for c in clients[part]])
            after = torch.zeros_like(before)
            without = torch.zeros_like(before)  # what the tree would have moved by
            for k, reply in enumerate(replies.values()):
                slopes, rate = reply.body["gradients"], float(reply.info["lr"])
                g = [slopes[name].double().flatten(2) for name in block if name in slopes]
                through = _through(before, torch.cat(g, dim=2), rate, mu) if g else before
                after += shares[part, k, None] * through
                without += shares[part, k, None] * torch.cat([reply.body["update"][name].double().flatten() for name in block])
            after[alone[part]] = before[alone[part]]
            comb = torch.where(took_part[part, None], without - move, 0.0)
            if truncate:
                (name,) = block
                cut[name][part] |= ~(after.norm(dim=1) <= GROWN * before.norm(dim=1))  # also what is no number
                after[cut[name][part]] = 0.0
            for name, t in zip(block, (after + comb).split(sizes, dim=1), strict=True):
                eps[name][part] = t.view(-1, *delta[name].shape).to(eps[name].dtype)
    return {"clients": clients, "eps": eps, "cut": {name: t.to(torch.uint8) for name, t in cut.items()}}


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _row(eps: Tree, block: Sequence[str], place: int | None, move: Tensor) -> Tensor:
    """A client's shift of these tensors as one row in float64; zeros where it has none yet."""
    return torch.zeros_like(move) if place is None else torch.cat([eps[name][place].double().flatten() for name in block])


def lengths(eps: Tree, clients: int) -> list[float]:
    """||eps_c|| of each client, a tensor of a client's at a time."""
    return [sum(float(t[i].double().square().sum()) for t in eps.values()) ** 0.5 for i in range(clients)]


def _shares(clients: Sequence[ClientId], weights: Mapping[ClientId, float]) -> Tensor:
    """(clients, participants): the weight of each participant in a round without that client; zeros where nobody would be left."""
    rows = []
    for c in clients:
        rest = torch.tensor([0.0 if k == c else w for k, w in weights.items()], dtype=torch.float64)
        rows.append(rest / rest.sum() if float(rest.sum()) > 0 else rest)
    return torch.stack(rows)


def _placed(t: Tensor, known: Sequence[ClientId], clients: Sequence[ClientId]) -> Tensor:
    """The rows of known clients among those of all, zeros for the others."""
    out = t.new_zeros((len(clients), *t.shape[1:]))
    out[[clients.index(c) for c in known]] = t
    return out


def _through(eps: Tensor, slopes: Tensor, rate: float, mu: float) -> Tensor:
    """eps (clients, numbers) after steps whose Hessians are means of products of slopes (steps, rows, numbers)."""
    out = eps
    for g in slopes:
        out = out - rate * ((out @ g.T) @ g / len(g) + mu * (out - eps))
    return out
