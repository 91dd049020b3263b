"""Strangers: what they send over a line and in replies, drawn from a seed, and somebody who sends it to a port."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import grpc
import torch

from fedtailor import wire
from fedtailor.core import Message, Tree
from fedtailor.federation.frames import CHUNK, MAX_FRAME, Parcel, frames, pack
from fedtailor.federation.post import NAME, OPTIONS, SERVICE

Dice = random.Random
WANTED = "a-parcel-that-was-asked-for"
UNLIMITED = [(k, v) for k, v in OPTIONS if "length" not in k and "compression" not in k] + [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


# Frames


def raw(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame by hand, which `pack` would refuse."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(4, "big") + text + payload


def part(**changed: Any) -> dict[str, Any]:
    return {"is": "part", "id": WANTED, "size": 4, "at": 0, "note": {}, **changed}


def odd(dice: Dice) -> Any:
    """A value of a type that nobody expects."""
    return dice.choice(
        [None, True, -1, 1.5, 10**400, "", "x" * 999, [], [[[]]], {}, {"a": {"b": None}}, "\x1b[2J", "\u202e", 2**63]
    )


FRAMES: dict[str, Callable[[Dice], bytes]] = {
    "empty": lambda dice: b"",
    "truncated": lambda dice: raw(part(), b"abcd")[: dice.randrange(1, 20)],
    "noise": lambda dice: b"\x00\x00" + dice.randbytes(dice.randrange(2, 400)),
    "header longer than the frame": lambda dice: raw(part(), length=dice.choice([10**4, 2**31, 2**32 - 1])),
    "oversized": lambda dice: raw(part(size=2 * CHUNK), bytes(MAX_FRAME)),
    "no object": lambda dice: raw(dice.choice([b"[]", b"7", b"null", b'"part"', b"{", b"\xff\xfe", b""])),
    "no kind": lambda dice: raw({"id": WANTED, "is": dice.choice([None, 1, [], {}])}),
    "deep": lambda dice: raw(b'{"is":"part","id":' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
    "not a number": lambda dice: raw(
        b'{"is":"part","id":"%s","size":%s,"at":0,"note":{}}'
        % (WANTED.encode(), dice.choice([b"NaN", b"-Infinity", b"1e999", b"1" * 5000]))
    ),
    "unknown verb": lambda dice: raw({"is": dice.choice(["hello", "welcome", "exec", "bye!", "PART", "\x1b[2J", ""])}),
    "unasked": lambda dice: raw(part(id=f"another-{dice.random()}"), b"abcd"),
    "not announced": lambda dice: raw({"is": "part", "id": WANTED, "at": dice.randrange(9)}, b"abcd"),
    "out of order": lambda dice: raw(part(at=dice.choice([1, 3, -1, 2**40, "0", None])), b"abcd"),
    "more than was said": lambda dice: raw(part(size=dice.randrange(4)), b"abcd"),
    "nothing of something": lambda dice: raw(part(size=9)),
    "too large": lambda dice: raw(part(size=dice.choice([2**33 + 1, 2**62, 10**300])), b"abcd"),
    "size of another type": lambda dice: raw(part(size=dice.choice([None, "4", 4.0, True, [4], -4])), b"abcd"),
    "note of another type": lambda dice: raw(part(note=dice.choice([None, 1, "x", []])), b"abcd"),
    "id of another type": lambda dice: raw(part(id=dice.choice([None, 1, 2.5, [], {}, True])), b"abcd"),
}
"""Each kind is refused wherever it comes."""


def mutated(blobs: Sequence[bytes], dice: Dice) -> list[bytes]:
    """Frames of an honest parcel: cut, changed, doubled, left out, in another order."""
    out = list(blobs)
    for _ in range(dice.randint(1, 3)):
        at, kind = dice.randrange(len(out)), dice.randrange(6)
        if kind == 0:
            out[at] = out[at][: dice.randrange(len(out[at]) + 1)]
        elif kind == 1:
            data = bytearray(out[at])
            for _ in range(dice.randint(1, 4)):
                if data:
                    data[dice.randrange(min(len(data), 120))] = dice.randrange(256)
            out[at] = bytes(data)
        elif kind == 2:
            out.insert(at, out[dice.randrange(len(out))])
        elif kind == 3 and len(out) > 1:
            del out[at]
        elif kind == 4:
            dice.shuffle(out)
        else:
            out[at] = (
                FRAMES[dice.choice(list(FRAMES))](dice) if dice.random() < 0.2 else out[at] + dice.randbytes(dice.randint(1, 30))
            )
    return out


def honest(size: int, id: str = WANTED) -> list[bytes]:
    return list(frames(Parcel(id, {"is": "letter"}, bytes(i % 251 for i in range(size)))))


# Replies


def altered(body: Tree, change: Callable[[dict[str, Any], str, torch.Tensor], None], dice: Dice) -> Tree | None:
    """The body with one of its tensors changed; None where it has none."""
    places: list[tuple[str, ...]] = []

    def find(tree: Any, path: tuple[str, ...]) -> None:
        for name in tree:
            if isinstance(tree[name], dict):
                find(tree[name], (*path, name))
            elif isinstance(tree[name], torch.Tensor):
                places.append((*path, name))

    find(body, ())
    if not places:
        return None
    *path, name = dice.choice(places)

    def copied(tree: Tree, depth: int) -> Tree:
        out = dict(tree)
        if depth == len(path):
            change(out, name, out[name])
        else:
            out[path[depth]] = copied(out[path[depth]], depth + 1)
        return out

    return copied(body, 0)


def put(make: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any], str, torch.Tensor], None]:
    return lambda tree, name, tensor: tree.__setitem__(name, make(tensor))


def poisoned(t: torch.Tensor) -> torch.Tensor:
    """Not a number in it; of whole numbers, which have no such thing, another type."""
    if not t.is_floating_point() or not t.numel():
        return t.double() + float("nan")
    out = t.clone().view(-1)
    out[-1] = float("inf") if len(out) % 2 else float("nan")
    return out.view(t.shape)


WRONG: dict[str, Callable[[dict[str, Any], str, torch.Tensor], None]] = {
    "missing": lambda tree, name, tensor: tree.__delitem__(name),
    "renamed": lambda tree, name, tensor: tree.update({name + "x": tree.pop(name)}),
    "longer": put(lambda t: torch.cat([t, t[:1]]) if t.dim() and len(t) else torch.zeros(3, dtype=t.dtype)),
    "one axis more": put(lambda t: t[None]),
    "flat": put(lambda t: t.reshape(-1) if t.dim() > 1 else t.reshape(1, -1)),
    "another type": put(lambda t: t.to(torch.bfloat16 if t.is_floating_point() else torch.float32)),
    "bool": put(lambda t: t.bool()),
    "not finite": put(poisoned),
    "a text": put(lambda t: "x"),
    "a tree": put(lambda t: {"x": t}),
    "a list": put(lambda t: [1, 2]),
    "one too many": lambda tree, name, tensor: tree.update({"stranger": tensor}),
}


def wrong(reply: Message, dice: Dice, kind: str = "") -> Message | None:
    """A reply with one thing wrong; None where it has no tensor."""
    kind = kind or dice.choice([*WRONG, "verb", "negative", "numbers"])
    if kind == "verb":
        return reply._replace(verb=dice.choice(["", "exec", "lost", "train", "UPDATE", "answer"]))
    if kind == "negative":
        return reply._replace(info={**reply.info, "n": dice.choice([-1.0, -1e-9, 1e29, 2.0**40, float("nan"), float("inf")])})
    if kind == "numbers":
        return reply._replace(info={**reply.info, "loss": dice.choice([float("nan"), float("-inf"), 10**400])})
    body = altered(dict(reply.body), WRONG[kind], dice)
    return None if body is None else reply._replace(body=body)


# The port


def made(frame: bytes | str) -> bytes:
    """A frame, or one that is only made where it is sent: "kind:seed", "zeros:bytes"."""
    if isinstance(frame, bytes):
        return frame
    kind, _, number = frame.rpartition(":")
    return bytes(int(number)) if kind == "zeros" else FRAMES[kind](Dice(int(number)))


async def attack(
    channel: Any, name: str, sent: Iterable[bytes | str], hello: bytes | None = None, compressed: bool = False, slow: float = 0
) -> str:
    """How the server ends a connection that sends this: the name of the status."""
    call = channel.stream_stream(f"/{SERVICE}/Attach")(
        metadata=((NAME, name),) if name else None, compression=grpc.Compression.Gzip if compressed else None
    )
    try:
        await call.write(pack({"is": "hello", "session": "", "held": {}}) if hello is None else hello)
        for frame in sent:
            await call.write(made(frame))
            await asyncio.sleep(slow)
        if not slow:
            await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
        pass
    return str((await call.code()).name)


class Attack(NamedTuple):
    """A connection: who says to be there, what it sends, and how."""

    name: str
    frames: Sequence[bytes | str] = ()
    hello: bytes | None = None
    compressed: bool = False
    slow: float = 0.0


async def storming(address: str, attacks: Sequence[Attack], at_once: int) -> list[str]:
    found: list[str] = []
    async with grpc.aio.insecure_channel(address, options=UNLIMITED) as channel:
        for start in range(0, len(attacks), at_once):
            some = attacks[start : start + at_once]
            found += await asyncio.gather(*(asyncio.wait_for(attack(channel, *one), 60) for one in some))
    return found


def storm(address: str, attacks: Sequence[Attack], at_once: int = 16) -> list[str]:
    """How each ends. A process of its own sends them: gRPC's loops in one process get into each other's way."""
    given = json.dumps([address, attacks, at_once], default=lambda blob: {"base64": base64.b64encode(blob).decode()})
    ran = subprocess.run([sys.executable, __file__], input=given, capture_output=True, text=True, check=False, timeout=1800)
    assert ran.returncode == 0, ran.stderr
    return list(json.loads(ran.stdout))


def experiment(values: Any) -> bytes:
    """What a server sends first."""
    return wire.encode(Message("experiment", {"values": json.dumps(values)}))


if __name__ == "__main__":
    address, attacks, at_once = json.load(sys.stdin, object_hook=lambda found: base64.b64decode(found["base64"]))
    print(json.dumps(asyncio.run(storming(address, [Attack(*one) for one in attacks], at_once))))
