"""What a front that trains says of an example is much what it said before: of each row, only what has changed most is sent.

    client  base[row] <- base[row] with the `share` of its numbers that differ most from the hidden states h set to those of h     up
    server  the same to its own copy, which is the hidden states that it goes on with
What is not sent is not lost: it differs from the base the next time as well. Both hold the base in their state, not in a cache. A digest
tells whether the server's is the one that the client means; where it is not (a letter was lost, one side is that of an older checkpoint)
the server asks again, and whole rows come. The gradient that comes back is taken for that of h.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor.core import Tree
from fedtailor.errors import ConfigError
from fedtailor.filters import marked, places_of
from fedtailor.trees import nbytes

OF, AT, VALUES = "of", "at", "values"


def said(share: float, bases: Tree, rows: Sequence[int], hidden: Sequence[Tensor], whole: bool) -> tuple[Tree, Tree]:
    """(what the client holds after it, the body of its message); `hidden`: of each row, unpadded. `whole`: the server has asked again."""
    now = {str(row): h.contiguous() for row, h in zip(rows, hidden, strict=True)}
    held = [] if whole else [row for row in now if row in bases]
    body: Tree = {
        "rows": torch.tensor(rows, dtype=torch.int32),
        "said": {r: h for r, h in now.items() if r not in held},
        OF: digest([]),
    }
    if not held:
        return {**bases, **now}, body
    before = torch.cat([bases[row].reshape(-1) for row in held])
    new = torch.cat([now[row].reshape(-1) for row in held])
    places = largest(new - before, [now[row].numel() for row in held], share)
    body |= {OF: digest([bases[row] for row in held]), AT: marked(places, len(new)), VALUES: new[places]}
    return {**bases, **now, **put(bases, held, places, new[places])}, body


class Received(NamedTuple):
    rows: Tree  # each row of the message as it is now, in their order
    bases: Tree  # what the server holds of this client from now on
    free: float  # bytes that are left for others
    kept: bool  # whether it holds all rows that came whole; else it holds none of them


def received(bases: Tree, body: Tree, free: float) -> Received | None:
    """What a client's message says where the server holds these bases of it; None if it means others.

    Raises:
        ConfigError: no rows, or places and values that do not fit them.
    """
    rows, new = [str(int(row)) for row in body["rows"]], body["said"]
    held = [row for row in rows if row not in new]
    if any(row not in bases for row in held) or digest([bases[row] for row in held]) != body[OF]:
        return None
    changed: Tree = {}
    if held:
        places, values, size = places_of(body[AT]), body[VALUES], sum(bases[row].numel() for row in held)
        if values.shape != places.shape or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < size):
            raise ConfigError(f"its changes are {len(values)} numbers at {len(places)} places of {size}")
        changed = put(bases, held, places, values)
    if not rows:
        raise ConfigError("it names no rows")
    now = {row: changed[row] if row in changed else new[row] for row in rows}
    old = {row: bases[row] for row in new if row in bases}
    left = free + nbytes(old) - nbytes(new)
    if left < 0:
        others = {row: h for row, h in bases.items() if row not in new}
        return Received(now, {**others, **changed}, free + nbytes(old), False)
    return Received(now, {**bases, **now}, left, True)


def largest(change: Tensor, sizes: Sequence[int], share: float) -> Tensor:
    """Places of the share of each row's numbers that are largest, in order; rows of these sizes lie one behind the other."""
    found, start = [], 0
    for size in sizes:
        row = change[start : start + size].abs()
        found.append(start + row.topk(math.ceil(share * size)).indices.sort().values)
        start += size
    return torch.cat(found)


def put(bases: Tree, rows: Sequence[str], places: Tensor, values: Tensor) -> Tree:
    """These rows, one behind the other, with the values at these places."""
    flat = torch.cat([bases[row].reshape(-1) for row in rows])
    flat[places] = values
    pieces = flat.split([bases[row].numel() for row in rows])
    return {row: piece.view(bases[row].shape).clone() for row, piece in zip(rows, pieces, strict=True)}


def digest(rows: Sequence[Tensor]) -> str:
    """Equal for rows that are equal to the bit; of no rows it is empty."""
    found = hashlib.blake2b(digest_size=8)
    for row in rows:
        found.update(row.contiguous().numpy().tobytes())
    return found.hexdigest() if rows else ""
