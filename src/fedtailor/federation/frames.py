"""What goes over a line: frames of at most a mebibyte, each a bounded JSON header and bytes. Parcels are cut into them and put together
again, large ones on disk; after a cut a parcel goes on where it stopped."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor.errors import RunError

CHUNK = 1 << 20
MAX_FRAME_HEADER = 64 << 10
MAX_FRAME = CHUNK + MAX_FRAME_HEADER + 4
SPOOL = 1 << 20
"""Bytes from which a parcel waits on disk instead of in memory."""

Header = Mapping[str, Any]


def said(words: Any, most: int = 300) -> str:
    """What the other side says, as one line that is safe to print: a terminal obeys what is not printable."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(words)[: 4 * most]).split())[:most]


class LineError(RunError):
    """The other side does not keep to the protocol: the line is closed."""


class Frame(NamedTuple):
    header: Header
    payload: memoryview | bytes = b""


def pack(header: Header, payload: memoryview | bytes = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_FRAME_HEADER:
        raise LineError(f"header of {len(text)} bytes: the limit is {MAX_FRAME_HEADER}")
    return b"".join((len(text).to_bytes(4, "big"), text, payload))


def unpack(frame: bytes) -> Frame:
    """Raises:
    LineError: anything that is not exactly one frame.
    """
    if len(frame) < 4 or len(frame) > MAX_FRAME:
        raise LineError(f"frame of {len(frame)} bytes refused")
    length = int.from_bytes(frame[:4], "big")
    if length > MAX_FRAME_HEADER or 4 + length > len(frame):
        raise LineError(f"frame with a header of {length} bytes refused")
    try:
        header = json.loads(frame[4 : 4 + length], parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise LineError("frame with a malformed header refused") from error
    if not isinstance(header, dict) or not isinstance(header.get("is"), str):
        raise LineError("frame without a kind refused")
    return Frame(header, memoryview(frame)[4 + length :])


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


EXPERIMENT, READY, LETTER, FINISH = "experiment", "ready", "letter", "finish"
"""What a parcel is, by its note: the experiment and a member's answer to it, a letter or its reply, and the model at the end."""
VALID, TEST = "valid", "test"
"""Whose rows a letter of an evaluation is about."""


class Parcel(NamedTuple):
    """Something large with a name: a letter or a reply. The same id is the same parcel, however often it is sent."""

    id: str
    note: Header  # what it is; small
    content: bytes | Path

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def discard(self) -> None:
        """Nobody wants it: a file of it goes."""
        if isinstance(self.content, Path):
            self.content.unlink(missing_ok=True)


def frames(parcel: Parcel, start: int = 0) -> Iterator[bytes]:
    """The parcel's frames from this byte on; the first says what it is."""
    size = parcel.size
    head = {"is": "part", "id": parcel.id, "size": size, "note": dict(parcel.note)}
    view = memoryview(parcel.content) if isinstance(parcel.content, bytes) else None
    file = None if view is not None else parcel.content.open("rb")  # type: ignore[union-attr]
    try:
        at = start
        while True:
            if view is not None:
                piece: memoryview | bytes = view[at : at + CHUNK]
            else:
                assert file
                file.seek(at)
                piece = file.read(CHUNK)
            yield pack({**head, "at": at}, piece)
            at += len(piece)
            head = {"is": "part", "id": parcel.id}
            if at >= size or not len(piece):
                return
    finally:
        if file:
            file.close()


class Arriving:
    """A parcel that is on its way: as many bytes as its first frame announced, in order; memory is taken as they come."""

    def __init__(self, header: Header, folder: Path, limit: int) -> None:
        try:
            self.id, size, note = header["id"], header["size"], header["note"]
        except KeyError as error:
            raise LineError("part of a parcel that was not announced") from error
        if not isinstance(self.id, str) or not isinstance(note, dict) or type(size) is not int or not 0 <= size <= limit:
            raise LineError(f"parcel of {size!s:.30} bytes refused: the limit is {limit}")
        self.size, self.note, self.held = size, note, 0
        self._path, self._file = None, None
        if size > SPOOL:
            handle, name = tempfile.mkstemp(dir=folder, prefix="arriving-")
            self._path, self._file = Path(name), os.fdopen(handle, "wb")
        self._bytes = bytearray()  # not a list of parts: parts of one byte each would take fifty times their size

    def add(self, header: Header, payload: memoryview | bytes) -> bool:
        """Whether the parcel is complete now.

        Raises:
            LineError: bytes that do not follow, or more than were announced.
        """
        if header.get("at") != self.held or self.held + len(payload) > self.size or (not len(payload) and self.size):
            raise LineError("part of a parcel out of order refused")
        if self._file:
            self._file.write(payload)
        else:
            self._bytes += payload
        self.held += len(payload)
        return self.held == self.size

    def parcel(self) -> Parcel:
        """The whole; a file of it belongs to who takes it."""
        if self._file:
            self._file.close()
        return Parcel(self.id, self.note, self._path or bytes(self._bytes))

    def drop(self) -> None:
        if self._file:
            self._file.close()
        if self._path:
            self._path.unlink(missing_ok=True)
