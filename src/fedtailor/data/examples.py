"""Encoded examples: one store for everybody, and each client a list of row numbers into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # a label that no loss counts


class Store(NamedTuple):
    """Encoded rows, each once. `ragged` columns hold tokens end to end; row i is flat[offsets[i]:offsets[i+1]]."""

    ragged: Mapping[str, np.ndarray]  # input_ids, token_type_ids, labels of a language model
    offsets: np.ndarray  # (rows + 1,)
    fixed: Mapping[str, Tensor]  # (rows, ...): labels of a classifier, pixel_values
    pads: Mapping[str, int]  # what fills a ragged column

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row; images count as one."""
        return np.diff(self.offsets) if self.ragged else np.ones(self.rows, dtype=np.int64)


def store(columns: Mapping[str, Sequence[Any]], pads: Mapping[str, int]) -> Store:
    """A store of these columns: those named in `pads` are ragged lists of ints, the others become tensors."""
    ragged = {name: columns[name] for name in pads if name in columns}
    rows = len(next(iter(columns.values())))
    first = next(iter(ragged.values()), None)
    sizes = [len(row) for row in first] if first is not None else [1] * rows
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    flat = {name: np.concatenate([np.asarray(r, dtype=np.int32) for r in rows_]) for name, rows_ in ragged.items()}
    fixed = {
        name: value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        for name, value in columns.items()
        if name not in pads
    }
    return Store(flat, offsets, fixed, {name: pads[name] for name in ragged})


class Subset:
    """The rows of a store that one client holds; the `Examples` of core.py."""

    def __init__(self, source: Store, rows: Sequence[int] | np.ndarray, beside: Mapping[str, Tensor] | None = None) -> None:
        self.source = source
        self.rows = np.asarray(rows, dtype=np.int64)
        self.beside = beside or {}  # (own rows, ...): columns that the store, which is everybody's, does not have

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        starts = self.source.offsets
        return starts[self.rows + 1] - starts[self.rows] if self.source.ragged else np.ones(len(self), dtype=np.int64)

    def take(self, rows: Sequence[int] | np.ndarray) -> Subset:
        at = np.asarray(rows, dtype=np.int64)
        return Subset(self.source, self.rows[at], {name: t[torch.from_numpy(at)] for name, t in self.beside.items()})

    def having(self, name: str, column: Tensor) -> Subset:
        return Subset(self.source, self.rows, {**self.beside, name: column})

    def column(self, name: str) -> Tensor:
        return self.beside[name] if name in self.beside else self.source.fixed[name][torch.from_numpy(self.rows)]

    def batch(self, rows: Sequence[int] | np.ndarray, width: int, size: int) -> dict[str, Tensor]:
        """Tensors of shape (size, width) for ragged columns and (size, ...) for fixed ones.

        Rows beyond `len(rows)` are padding: one visible token (so that no attention row is empty) and no label.
        """
        own = np.asarray(rows, dtype=np.int64)
        chosen = self.rows[own]
        out: dict[str, Tensor] = {}
        if self.source.ragged:
            starts, ends = self.source.offsets[chosen], self.source.offsets[chosen + 1]
            for name, flat in self.source.ragged.items():
                table = np.full((size, width), self.source.pads[name], dtype=np.int64)
                for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
                    table[i, : end - start] = flat[start:end]
                out[name] = torch.from_numpy(table)
            mask = np.zeros((size, width), dtype=np.int64)
            mask[: len(chosen)] = np.arange(width) < (ends - starts)[:, None]
            mask[len(chosen) :, 0] = 1
            out["attention_mask"] = torch.from_numpy(mask)
        places = {**dict.fromkeys(self.source.fixed, chosen), **dict.fromkeys(self.beside, own)}
        for name, column in {**self.source.fixed, **self.beside}.items():
            part = column[torch.from_numpy(places[name])]
            if size > len(chosen):
                filler = torch.zeros((size - len(chosen), *part.shape[1:]), dtype=part.dtype)
                part = torch.cat([part, filler.fill_(IGNORED) if name == "labels" else filler])
            out[name] = part
        return out
