"""The wire format: one safetensors blob whose metadata carries a bounded JSON header. Never pickle.

Layout: 8 bytes little-endian header length, JSON header, tensor bytes: any safetensors reader opens it. The header's
`__metadata__.fedtailor` holds the verb, the numbers and the tree's shape; a leaf that is a tensor is named there by its
path. Sizes are checked against the bytes at hand before memory is taken for anything.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from fedtailor.core import Message, Tree
from fedtailor.errors import FedtailorError
from fedtailor.trees import SEPARATOR, tensors

MAX_HEADER = 4 << 20
MAX_BYTES = 8 << 30
MAX_DEPTH = 16
MAX_RANK = 16
RESERVED = "__metadata__"  # where safetensors keeps what is not a tensor
TENSOR = "\x00"  # in the skeleton, stands where a tensor was; no text may be this
MEASURED, LONGEST = ("loss",), len("-2.2250738585072014e-308")
"""Numbers of a message that nobody knows before: each is given the room of the longest, so that its bytes can be told before it is there."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WireError(FedtailorError):
    """A message that is refused, and why."""


class Entry(NamedTuple):
    """A tensor in a blob: offsets count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def encode(message: Message, max_header: int = MAX_HEADER) -> bytes:
    """The bytes of a message; `max_header` bounds its names, texts and lists.

    Raises:
        WireError: a leaf that is neither tensor, text, number, bool, None nor a list of those, and whatever `decode` refuses.
    """
    blob: bytes = save(*_prepare(message))
    _bounded(blob[:8], max_header)
    return blob


def decode(blob: bytes | bytearray | memoryview | mmap.mmap, max_bytes: int = MAX_BYTES, max_header: int = MAX_HEADER) -> Message:
    """The message in `blob`. Its tensors share the blob's memory and must not be written to.

    Raises:
        WireError: anything that is not exactly one well-formed message of at most `max_bytes`.
    """
    if len(blob) > max_bytes:
        raise WireError(f"message of {len(blob)} bytes refused: the limit is {max_bytes}")
    message, entries, start = _head(bytes(blob[:8]), lambda n: bytes(blob[8 : 8 + n]), len(blob), max_header)
    memory = blob if isinstance(blob, bytearray | mmap.mmap) else bytearray(blob)  # torch takes no read-only buffer

    def tensor(path: str) -> Tensor:
        dtype, shape, begin, end = entries[path]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=start + begin).view(shape)

    return message._replace(body=_fill(message.body, tensor, ""))


def write(message: Message, path: Path, max_header: int = MAX_HEADER) -> int:
    """Encode straight into a file, atomically, without a second copy in memory; returns its size in bytes.

    Raises:
        WireError: as `encode`.
        OSError: the file cannot be written.
    """
    parts, metadata = _prepare(message)

    def save_to(temporary: Path) -> None:
        with saving(path):
            save_file(parts, str(temporary), metadata)
        with temporary.open("rb") as file:
            _bounded(file.read(8), max_header)

    return atomically(path, save_to)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Around calls of safetensors, which tells of a full disk in an exception of its own.

    Raises:
        OSError: in the place of that exception, with the system's own number.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def read(
    path: Path, lazy: bool = False, max_bytes: int = MAX_BYTES, mapped: bool = False, max_header: int = MAX_HEADER
) -> Message:
    """The message in a file. With `lazy`, each tensor is read when it is asked for and belongs to the caller; with `mapped`, its tensors
    are the file's own pages, which the system may take back, also when the file's name is gone.

    Raises:
        WireError: the file is missing, truncated or malformed.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise WireError(f"{path}: {size} bytes, the limit is {max_bytes}")
        if mapped and size:
            with path.open("rb") as file:
                return decode(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), max_bytes, max_header)
        if not lazy:
            return decode(bytearray(path.read_bytes()), max_bytes, max_header)
        with path.open("rb") as file:
            message, entries, start = _head(file.read(8), file.read, size, max_header)
    except OSError as error:
        raise WireError(f"{path}: cannot be read ({error.strerror})") from error

    def tensor(name: str) -> Tensor:
        whole = torch.empty(entries[name].shape, dtype=entries[name].dtype)
        try:
            # Not mapped: pages of a file that are mapped count for the process like a second copy.
            with path.open("rb") as file:
                file.seek(start + entries[name].start)
                if file.readinto(whole.reshape(-1).view(torch.uint8).numpy().data) != whole.nbytes:
                    raise WireError(f"{path}: '{name}' is cut short")
        except OSError as error:
            raise WireError(f"{path}: '{name}' cannot be read ({error.strerror})") from error
        return whole

    return message._replace(body=LazyTree(message.body, tensor))


class LazyTree(dict[str, Any]):
    """A tree on disk: reading a name reads that tensor and keeps nothing, so memory does not grow with trees."""

    def __init__(self, skeleton: Mapping[str, Any], tensor: Callable[[str], Tensor], prefix: str = "") -> None:
        super().__init__(skeleton)
        self._tensor, self._prefix = tensor, prefix

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Mapping):
            return LazyTree(value, self._tensor, f"{self._prefix}{name}{SEPARATOR}")
        return self._tensor(self._prefix + name) if value == TENSOR else value

    def __iter__(self) -> Iterator[str]:
        """Its being here makes `{**tree}` and `dict(tree)` ask for each item, where they would copy what stands for tensors."""
        return super().__iter__()

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        return ((name, self[name]) for name in self)

    def values(self) -> Iterator[Any]:  # type: ignore[override]
        return (self[name] for name in self)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (it is what this is)


def check(message: Message, verb: str | None = None, like: Mapping[str, Any] | None = None) -> Message:
    """The message itself, if its verb, tensor names, shapes and dtypes are the expected ones.

    Raises:
        WireError: names the first difference.
    """
    if verb is not None and message.verb != verb:
        raise WireError(f"verb '{message.verb}' where '{verb}' was expected")
    if like is not None:
        got, want = dict(tensors(message.body)), dict(tensors(like))
        for name in sorted(got.keys() | want.keys()):
            if name not in got or name not in want:
                raise WireError(f"tensor '{name}' is {'missing' if name in want else 'not expected'}")
            if got[name].shape != want[name].shape or got[name].dtype != want[name].dtype:
                raise WireError(
                    f"tensor '{name}' is {got[name].dtype} {list(got[name].shape)}, "
                    f"expected {want[name].dtype} {list(want[name].shape)}"
                )
    return message


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomically(path: Path, write_to: Any, mode: int = 0o644) -> int:
    """Write a file through a synced temporary one beside it: a kill at any byte leaves the old file or the new one.

    Until it is whole nobody but its owner can read it, whatever `mode` it gets in the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(handle)
    temporary = Path(name)
    try:
        write_to(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        temporary.chmod(mode)
        temporary.replace(path)
        return size
    finally:
        temporary.unlink(missing_ok=True)


def _prepare(message: Message) -> tuple[dict[str, Tensor], dict[str, str]]:
    parts: dict[str, Tensor] = {}
    info = dict(message.info)
    if not isinstance(message.verb, str) or not all(isinstance(k, str) and _is_number(v) for k, v in info.items()):
        raise WireError(f"'{message.verb}': the verb on the wire is a text, and info holds numbers by name")
    header = {"verb": message.verb, "info": info, "tree": _skeleton(message.body, "", parts, set(), 0)}
    if RESERVED in parts:
        raise WireError(f"'{RESERVED}': the wire format keeps this name for itself")
    room = sum(LONGEST - len(json.dumps(info[name])) for name in MEASURED if name in info)
    return parts, {"fedtailor": json.dumps(header, separators=(",", ":"), sort_keys=True) + " " * room}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bounded(first: bytes, most: int) -> None:
    length = int.from_bytes(first, "little")
    if length > most:
        raise WireError(f"header of {length} bytes: names, texts and lists take more than the limit of {most}")


def _name(name: Any, path: str, depth: int) -> str:
    if depth > MAX_DEPTH:
        raise WireError(f"tree deeper than {MAX_DEPTH}")
    if not isinstance(name, str) or SEPARATOR in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise WireError(f"{path + str(name)!a}: a name on the wire is a text without '{SEPARATOR}'")
    return name


def _plain(value: Any, path: str, depth: int = 0) -> Any:
    if isinstance(value, list | tuple) and depth <= MAX_DEPTH:
        for item in value:
            _plain(item, path, depth + 1)
    elif not isinstance(value, str | int | float | bool | None) or value == TENSOR:
        raise WireError(f"'{path}': a {type(value).__name__}{' in a list' if depth else ''} cannot cross the wire")
    return value


def _skeleton(value: Any, path: str, parts: dict[str, Tensor], pointers: set[int], depth: int) -> Any:
    """The tree with its tensors taken out into `parts`, each with memory of its own (`pointers`), as safetensors needs them."""
    if isinstance(value, Mapping):
        return {
            _name(name, path, depth): _skeleton(leaf, f"{path}{name}{SEPARATOR}", parts, pointers, depth + 1)
            for name, leaf in value.items()
        }
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES.values() or value.layout != torch.strided:
            raise WireError(f"'{path[:-1]}': a tensor of {value.dtype}, {value.layout} cannot cross the wire")
        own = value.detach().cpu().contiguous()
        if own.untyped_storage().nbytes() != own.nbytes or own.data_ptr() in pointers:  # a view, or the same memory once more
            own = own.clone()
        if own.nbytes:  # all that is empty lies at 0
            pointers.add(own.data_ptr())
        parts[path[: -len(SEPARATOR)]] = own
        return TENSOR
    return _plain(value, path[: -len(SEPARATOR)])


def _fill(skeleton: Mapping[str, Any], tensor: Any, prefix: str) -> Tree:
    out: Tree = {}
    for name, value in skeleton.items():
        if isinstance(value, dict):
            out[name] = _fill(value, tensor, f"{prefix}{name}{SEPARATOR}")
        else:
            out[name] = tensor(prefix + name) if value == TENSOR else value
    return out


def _head(first: bytes, more: Any, size: int, most: int) -> tuple[Message, dict[str, Entry], int]:
    """(message whose body is still the skeleton, tensors by path, where their bytes start), everything checked."""
    if len(first) < 8:
        raise WireError(f"message of {size} bytes is too short to be one")
    length = int.from_bytes(first, "little")
    if length > most or 8 + length > size:
        raise WireError(f"header of {length} bytes refused (message {size} bytes, limit {most})")
    try:
        header = json.loads(more(length))
        meta = json.loads(header.pop(RESERVED)["fedtailor"])
        verb, info, skeleton = meta["verb"], meta["info"], meta["tree"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"malformed header ({type(error).__name__})") from error
    if not isinstance(verb, str) or not isinstance(info, dict) or not isinstance(skeleton, dict):
        raise WireError("malformed header: verb, info or tree of a wrong type")
    if not all(_is_number(v) for v in info.values()):
        raise WireError("malformed header: info holds something that is not a number")
    entries = {path: _entry(path, raw) for path, raw in header.items()}
    position = 0
    for path, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise WireError(f"tensor '{path}' does not start where the last one ended")
        position = entry.end
    if 8 + length + position != size:
        raise WireError(f"message of {size} bytes where its header says {8 + length + position}")
    named = set(_paths(skeleton, "", 0))
    if named != entries.keys():
        raise WireError(f"tree and tensors differ: {sorted(named ^ entries.keys())[:3]}")
    return Message(verb, skeleton, info), entries, 8 + length


def _entry(path: str, raw: Any) -> Entry:
    try:
        dtype, shape, (start, end) = DTYPES[raw["dtype"]], tuple(raw["shape"]), raw["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"tensor '{path}' has no valid dtype, shape or offsets") from error
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or len(shape) > MAX_RANK:
        raise WireError(f"tensor '{path}' has an impossible shape")
    count = math.prod(shape)
    # Strides count the other axes of an empty tensor too, and torch holds them in 63 bits.
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise WireError(f"tensor '{path}' has an impossible shape")
    if end - start != count * dtype.itemsize:
        raise WireError(f"tensor '{path}' of shape {list(shape)} does not fit its {end - start} bytes")
    return Entry(dtype, shape, start, end)


def _paths(skeleton: Mapping[str, Any], prefix: str, depth: int) -> Iterator[str]:
    for name, value in skeleton.items():
        _name(name, prefix, depth)
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}{SEPARATOR}", depth + 1)
        elif value == TENSOR:
            yield prefix + name
        else:
            _plain(value, prefix + name)
