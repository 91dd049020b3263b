"""What a parcel's content is in a FLARE call: bytes where it is small, a list of tensors of bytes where it is large, as FLARE streams those."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedtailor.errors import RunError
from fedtailor.federation.frames import SPOOL

LARGE = 2 << 20
"""Bytes from which they are tensors: benchmarks/flare_calls.py."""
PIECE = 8 << 20
"""Bytes of one tensor: what FLARE copies at once."""


def packed(content: bytes | Path) -> Any:
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    if size < LARGE:
        return content.read_bytes() if isinstance(content, Path) else content
    return [torch.frombuffer(piece, dtype=torch.uint8) for piece in _pieces(content)]


def unpacked(cargo: Any, folder: Path, limit: int) -> bytes | Path:
    """The content; a large one is a file, which belongs to who takes it.

    Raises:
        RunError: it is no content, or larger than the limit.
    """
    pieces = [memoryview(cargo)] if isinstance(cargo, bytes) else [_bytes_of(tensor) for tensor in _listed(cargo)]
    size = sum(len(piece) for piece in pieces)
    if size > limit:
        raise RunError(f"parcel of {size} bytes refused: the limit is {limit}")
    if size <= SPOOL:
        return b"".join(pieces)
    path = folder / f"arriving-{secrets.token_hex(8)}"
    try:
        with path.open("wb") as file:
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        raise RunError(f"{folder}: cannot write a parcel ({error.strerror})") from error
    return path


def _pieces(content: bytes | Path) -> Iterator[bytearray]:
    if isinstance(content, bytes):
        yield from (bytearray(content[at : at + PIECE]) for at in range(0, len(content), PIECE))
        return
    with content.open("rb") as file:
        while piece := file.read(PIECE):
            yield bytearray(piece)


def _listed(cargo: Any) -> list[Any]:
    if not isinstance(cargo, list):
        raise RunError(f"a parcel cannot be {type(cargo).__name__}")
    return cargo


def _bytes_of(tensor: Any) -> memoryview:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise RunError("a large parcel is a list of tensors of bytes, and this is not")
    return tensor.contiguous().numpy().data
