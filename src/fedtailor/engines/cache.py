"""A bounded cache of tensors in a file, with a list of what lies where: it survives a kill as the checkpoint does, and where it is lost
all the same, what it held is asked for again."""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from fedtailor.errors import RunError


class Place(NamedTuple):
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize  # type: ignore[no-any-return]


class Cache:
    """First come, first kept: rows are asked for in turn, and what is turned out for a newcomer would be asked for next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # there is one place in a file to read from, and steps are answered by several threads
        self._places: dict[str, Place] = {}
        self._size = 0
        self._folder: Path | None = None  # a temporary one until it is said where
        self._data: IO[bytes] | None = None
        self._list: IO[bytes] | None = None

    def lie(self, folder: Path) -> None:
        """Be in this folder from now on, empty; `load` finds what a killed run left there."""
        self._folder, self._places, self._size, self._data = folder, {}, 0, None

    def keep(self, items: Mapping[str, Tensor], room: float) -> bool:
        """Whether all of these are kept now; none is where they would take more than `room` bytes with what is there.

        Raises:
            RunError: the disk is full.
        """
        with self._lock:
            return self._keep(items, room)

    def _keep(self, items: Mapping[str, Tensor], room: float) -> bool:
        new = {name: t.detach().cpu().contiguous() for name, t in items.items() if name not in self._places}
        if self._size + sum(t.numel() * t.element_size() for t in new.values()) > room:
            return False
        data, lines = self._files()
        try:
            for name, tensor in new.items():
                place = Place(self._size, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                data.seek(place.start)
                data.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
                lines.write(json.dumps([name, *place]).encode() + b"\n")
                self._places[name] = place
                self._size += place.size
            data.flush()
            lines.flush()
        except OSError as error:
            raise RunError(f"{self._folder}: cannot write the cache ({error.strerror}): free space, then --resume") from error
        return True

    def recall(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of these that are there."""
        found: dict[str, Tensor] = {}
        for name in names:
            place = self._places.get(name)
            if place and self._data:
                with self._lock:
                    self._data.seek(place.start)
                    blob = bytearray(self._data.read(place.size))
                flat = torch.frombuffer(blob, dtype=torch.uint8) if blob else torch.empty(0, dtype=torch.uint8)
                found[name] = flat.view(getattr(torch, place.dtype)).reshape(place.shape)
        return found

    def dump(self) -> dict[str, int]:
        """How far the files are good: what comes after was written after the checkpoint."""
        return {"entries": len(self._places), "bytes": self._size}

    def load(self, dumped: Mapping[str, Any]) -> None:
        """What was there at the checkpoint, if the files still have it; else nothing."""
        folder, entries = self._folder, int(dumped["entries"])
        if not entries or folder is None or not (folder / "cache.bin").is_file() or not (folder / "cache.jsonl").is_file():
            return
        try:
            lines = (folder / "cache.jsonl").read_bytes().splitlines()[:entries]
            told = [json.loads(line) for line in lines]
            places = {name: Place(start, tuple(shape), dtype) for name, start, shape, dtype in told}
        except (ValueError, TypeError):
            return
        if len(places) < entries or (folder / "cache.bin").stat().st_size < int(dumped["bytes"]):
            return
        (folder / "cache.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        self._open(folder, "r+b", "ab")
        self._places, self._size = places, int(dumped["bytes"])

    def remove(self) -> None:
        """The run is over: nobody will ask again."""
        if self._folder and self._data:
            for name in ("cache.bin", "cache.jsonl"):
                (self._folder / name).unlink(missing_ok=True)

    def _files(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._data is None or self._list is None:
            if self._folder is None:
                temporary = tempfile.TemporaryDirectory(prefix="fedtailor-")
                weakref.finalize(self, temporary.cleanup)
                self._folder = Path(temporary.name)
            self._open(self._folder, "w+b", "wb")
        assert self._data
        assert self._list
        return self._data, self._list

    def _open(self, folder: Path, data: str, lines: str) -> None:
        self._data, self._list = (folder / "cache.bin").open(data), (folder / "cache.jsonl").open(lines)
        for file in (self._data, self._list):
            weakref.finalize(self, file.close)
