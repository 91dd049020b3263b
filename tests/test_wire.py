"""The wire: what is sent is what arrives, and what is not a message is refused before memory is taken for it."""

from __future__ import annotations

import json
import math
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file

from fedtailor import wire
from fedtailor.core import Message, Tree, stream
from fedtailor.errors import FedtailorError
from fedtailor.trees import leaves, tensors, weighted_mean
from fedtailor.wire import TENSOR, WireError, check, decode, encode, read, write
from tiny import same

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
]


def tree_of_everything() -> Tree:
    noise = torch.randn(3, 5, generator=stream(0, "wire"))
    return {
        "by dtype": {str(d).removeprefix("torch."): (noise.abs() * 50).to(d) for d in DTYPES},
        "bool": noise > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(2, 0, dtype=torch.int64),
        "view": torch.arange(12.0).view(3, 4).t()[1:],
        "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
        "text": 'a "text" with ü, \\ and / in it',
        "numbers": {"int": 2**60, "float": 0.1, "negative zero": -0.0, "true": True},
        "none": None,
        "list": [1, 2.5, "x", None, [True, []]],
        "nothing": {},
        "deep": {"a": {"b": {"c": torch.ones(2)}}},
    }


def bits(tree: Tree) -> dict[str, Any]:
    """Leaves by path, tensors as (dtype, shape, bytes): NaN equals NaN, -0.0 is not 0.0."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return repr(leaf)
        return leaf.dtype, tuple(leaf.shape), leaf.contiguous().flatten().view(torch.uint8).tolist() if leaf.numel() else []

    return {path: plain(leaf) for path, leaf in leaves(tree)}


def blob_of(header: Any, data: bytes = b"") -> bytes:
    """A message by hand: the format as its documentation says, independent of the encoder."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def meta(tree: Any, verb: Any = "update", info: Any = None, **more: Any) -> dict[str, Any]:
    said = {"verb": verb, "info": {} if info is None else info, "tree": tree, **more}
    return {"__metadata__": {"fedtailor": json.dumps(said)}}


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = {**meta({"w": TENSOR}), "w": entry()}
EIGHT = struct.pack("<2f", 1.0, -2.0)


# What is sent is what arrives.


def test_what_is_decoded_is_what_was_encoded_bit_for_bit() -> None:
    message = Message("update", tree_of_everything(), {"n": 3.0, "loss": math.inf, "steps": 7})
    got = decode(encode(message))
    assert (got.verb, got.info) == (message.verb, message.info)
    assert bits(got.body) == bits(message.body)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_every_dtype_in_every_shape_survives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = (torch.randn(shape, generator=stream(1, "shape")) * 40).abs().to(dtype)
    got = decode(encode(Message("x", {"a": sent}))).body["a"]
    assert got.dtype == dtype
    assert got.shape == shape
    assert torch.equal(got, sent)


def test_info_may_be_not_a_number_in_the_sense_of_ieee() -> None:
    info = decode(encode(Message("x", {}, {"loss": math.nan, "n": -math.inf}))).info
    assert math.isnan(info["loss"])
    assert info["n"] == -math.inf


def test_a_blob_by_hand_is_decoded_as_the_format_says() -> None:
    got = decode(blob_of(GOOD, EIGHT))
    assert got.verb == "update"
    assert got.body["w"].tolist() == [1.0, -2.0]


def test_any_safetensors_reader_opens_a_message(tmp_path: Path) -> None:
    message = Message("update", tree_of_everything())
    write(message, tmp_path / "m")
    want = dict(tensors(message.body))
    for found in (load(encode(message)), load_file(tmp_path / "m")):
        assert found.keys() == want.keys()
        assert bits(found) == bits(want)


def test_in_memory_and_in_a_file_are_the_same_bytes(tmp_path: Path) -> None:
    message = Message("update", tree_of_everything(), {"n": 1})
    assert write(message, tmp_path / "m") == len(encode(message))
    assert (tmp_path / "m").read_bytes() == encode(message)
    assert bits(read(tmp_path / "m").body) == bits(message.body)


def test_equal_trees_are_equal_bytes_whatever_the_order_of_their_names() -> None:
    a, b = torch.ones(2), torch.zeros(3, dtype=torch.int8)
    assert encode(Message("x", {"a": a, "b": b}, {"n": 1, "m": 2})) == encode(Message("x", {"b": b, "a": a}, {"m": 2, "n": 1}))


def test_tensors_that_share_memory_are_sent_each_by_itself() -> None:
    whole = torch.arange(6.0)
    tree = {"whole": whole, "again": whole, "half": whole[:3], "grad": whole.clone().requires_grad_()}
    got = decode(encode(Message("x", tree))).body
    assert {name: t.tolist() for name, t in got.items()} == {name: t.tolist() for name, t in tree.items()}
    assert load(encode(Message("x", {"half": whole[:3]})))["half"].numel() == 3  # not the memory behind the view


# A file is read tensor by tensor.


def test_a_lazy_tree_is_a_dict_that_reads_when_asked(tmp_path: Path) -> None:
    body = tree_of_everything()
    write(Message("update", body, {"n": 2}), tmp_path / "m")
    message = read(tmp_path / "m", lazy=True)
    tree = message.body
    assert (message.verb, message.info) == ("update", {"n": 2})
    assert isinstance(tree, dict)
    assert set(tree) == set(body)
    assert len(tree) == len(body)
    assert "text" in tree
    assert bits(tree) == bits(body)
    assert bits(dict(tree.items())) == bits(body)
    assert bits(dict(zip(tree, tree.values(), strict=True))) == bits(body)
    assert tree.get("missing") is None
    assert tree.get("missing", 3) == 3
    assert torch.equal(tree.get("scalar"), body["scalar"])
    assert torch.equal(tree["deep"]["a"]["b"].get("c"), torch.ones(2))
    with pytest.raises(KeyError):
        tree["missing"]


def test_what_a_lazy_tree_gives_belongs_to_the_caller(tmp_path: Path) -> None:
    write(Message("x", {"w": torch.ones(3)}), tmp_path / "m")
    tree = read(tmp_path / "m", lazy=True).body
    tree["w"].mul_(5)
    assert tree["w"].tolist() == [1.0, 1.0, 1.0]


def test_a_lazy_tree_whose_file_goes_away_says_so(tmp_path: Path) -> None:
    write(Message("x", {"w": torch.ones(3)}), tmp_path / "m")
    tree = read(tmp_path / "m", lazy=True).body
    (tmp_path / "m").unlink()
    with pytest.raises(WireError, match="m: 'w' cannot be read"):
        tree["w"]


def test_the_mean_of_lazy_trees_is_the_mean_of_the_trees(tmp_path: Path) -> None:
    bodies = [{"a": torch.randn(4, 3, generator=stream(i, "a")), "h": {"b": torch.randn(5).half()}} for i in range(3)]
    for i, body in enumerate(bodies):
        write(Message("x", body), tmp_path / str(i))
    lazy = [read(tmp_path / str(i), lazy=True).body for i in range(3)]
    assert same(weighted_mean(lazy, [1, 2, 3]), weighted_mean(bodies, [1, 2, 3]))


MEMORY = """
import resource, shutil, sys
from pathlib import Path
import torch
from fedtailor.core import Message
from fedtailor.trees import weighted_mean
from fedtailor.wire import read, write
torch.set_num_threads(1)
folder, many = Path(sys.argv[1]), 14
write(Message("x", {"a": torch.ones(1 << 22), "b": {"c": torch.ones(1 << 22)}}), folder / "0")
for i in range(1, many):
    shutil.copyfile(folder / "0", folder / str(i))
def peak(count):
    trees = [read(folder / str(i), lazy=True).body for i in range(count)]
    mean = weighted_mean(trees, [1.0] * count)
    assert abs(float(mean["a"][0]) - 1) < 1e-6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = peak(2)
print(peak(many) - few)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_for_a_mean_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 24 << 10  # 14 files of 32 MiB; twelve more than before take less than one


# What is not a message is refused.


def _nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\x00" * 7,
    "empty header": blob_of(b""),
    "header longer than the message": struct.pack("<Q", 1000) + b"{}",
    "header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header over the limit": blob_of(b" " * (wire.MAX_HEADER + 1)),
    "header is not JSON": blob_of(b"\x80\x04pickle."),
    "header is not UTF-8": blob_of(b'{"__metadata__": "\xff\xfe"}'),
    "header is a list": blob_of([]),
    "header is a number": blob_of(3),
    "header of brackets": blob_of(b"[" * 200_000),
    "no metadata": blob_of({"w": entry()}, EIGHT),
    "metadata is a text": blob_of({"__metadata__": "x"}),
    "metadata of somebody else": blob_of({"__metadata__": {"format": "pt"}}),
    "our metadata is a number": blob_of({"__metadata__": {"fedtailor": 3}}),
    "our metadata is not JSON": blob_of({"__metadata__": {"fedtailor": "{"}}),
    "our metadata is a list": blob_of({"__metadata__": {"fedtailor": "[]"}}),
    "our metadata is brackets": blob_of({"__metadata__": {"fedtailor": "[" * 200_000}}),
    "an integer of 10,000 digits": blob_of({"__metadata__": {"fedtailor": "9" * 10_000}}),
    "verb is a number": blob_of(meta({}, verb=3)),
    "verb is missing": blob_of({"__metadata__": {"fedtailor": '{"info": {}, "tree": {}}'}}),
    "info is a list": blob_of(meta({}, info=[1])),
    "info holds a text": blob_of(meta({}, info={"n": "3"})),
    "info holds a bool": blob_of(meta({}, info={"n": True})),
    "info holds none": blob_of(meta({}, info={"n": None})),
    "info holds a tree": blob_of(meta({}, info={"n": {}})),
    "tree is a list": blob_of(meta([])),
    "tree is a tensor": blob_of({**meta(TENSOR), "": entry()}, EIGHT),
    "tree too deep": blob_of({"__metadata__": {"fedtailor": f'{{"verb": "x", "info": {{}}, "tree": {_nested(30)}}}'}}),
    "tree far too deep": blob_of({"__metadata__": {"fedtailor": f'{{"verb": "x", "info": {{}}, "tree": {_nested(20_000)}}}'}}),
    "tree with a path for a name": blob_of({**meta({"a/w": TENSOR}), "a/w": entry()}, EIGHT),
    "one tensor at two places": blob_of({**meta({"a/w": TENSOR, "a": {"w": TENSOR}}), "a/w": entry()}, EIGHT),
    "a tree in a list": blob_of(meta({"a": [{"b": 1}]})),
    "a tensor in a list": blob_of(meta({"a": [TENSOR]})),
    "a list too deep": blob_of(meta({"a": json.loads("[" * 40 + "]" * 40)})),
    "tensor missing from the tree": blob_of({**meta({}), "w": entry()}, EIGHT),
    "tensor missing from the blob": blob_of(meta({"w": TENSOR})),
    "tensor under another name": blob_of({**meta({"v": TENSOR}), "w": entry()}, EIGHT),
    "trailing bytes": blob_of(GOOD, EIGHT + b"\x00"),
    "bytes missing": blob_of(GOOD, EIGHT[:-1]),
    "trailing bytes without a tensor": blob_of(meta({}), b"\x00"),
    "overlap": blob_of({**meta({"v": TENSOR, "w": TENSOR}), "v": entry(), "w": entry(offsets=[4, 12])}, EIGHT + EIGHT[:4]),
    "the same bytes twice": blob_of({**meta({"v": TENSOR, "w": TENSOR}), "v": entry(), "w": entry()}, EIGHT),
    "gap": blob_of({**meta({"v": TENSOR, "w": TENSOR}), "v": entry(), "w": entry(offsets=[9, 17])}, EIGHT + EIGHT + b"\x00"),
    "gap at the start": blob_of({**meta({"w": TENSOR}), "w": entry(offsets=[4, 12])}, EIGHT + EIGHT[:4]),
    "offsets backwards": blob_of({**meta({"w": TENSOR}), "w": entry(offsets=[8, 0])}, EIGHT),
    "offsets negative": blob_of({**meta({"w": TENSOR}), "w": entry(offsets=[-8, 0])}, EIGHT),
    "offsets beyond the blob": blob_of({**meta({"w": TENSOR}), "w": entry([1 << 38], [0, 1 << 40])}, EIGHT),
    "three offsets": blob_of({**meta({"w": TENSOR}), "w": entry(offsets=[0, 4, 8])}, EIGHT),
    "offsets are texts": blob_of({**meta({"w": TENSOR}), "w": entry(offsets=["0", "8"])}, EIGHT),
    "offsets are floats": blob_of({**meta({"w": TENSOR}), "w": entry(offsets=[0.0, 8.0])}, EIGHT),
    "offsets are bools": blob_of({**meta({"w": TENSOR}), "w": entry([0], offsets=[False, False])}),
    "shape too small": blob_of({**meta({"w": TENSOR}), "w": entry([1])}, EIGHT),
    "shape too large": blob_of({**meta({"w": TENSOR}), "w": entry([3])}, EIGHT),
    "shape negative": blob_of({**meta({"w": TENSOR}), "w": entry([-2])}, EIGHT),
    "shape of two negatives": blob_of({**meta({"w": TENSOR}), "w": entry([-1, -2])}, EIGHT),
    "shape is a number": blob_of({**meta({"w": TENSOR}), "w": entry(2)}, EIGHT),
    "shape of floats": blob_of({**meta({"w": TENSOR}), "w": entry([2.0])}, EIGHT),
    "shape of bools": blob_of({**meta({"w": TENSOR}), "w": entry([True, 2])}, EIGHT),
    "shape of two to the 124": blob_of({**meta({"w": TENSOR}), "w": entry([2**62, 2**62])}, EIGHT),
    "shape that wraps around to 2": blob_of({**meta({"w": TENSOR}), "w": entry([2**63 + 1, 2])}, EIGHT),
    "empty shape beyond 64 bits": blob_of({**meta({"w": TENSOR}), "w": entry([0, 2**70], [0, 0])}),
    "empty shape whose strides wrap": blob_of({**meta({"w": TENSOR}), "w": entry([0, 2**62, 2**62], [0, 0])}),
    "empty shape of two to the 80": blob_of({**meta({"w": TENSOR}), "w": entry([2**40, 2**40, 0], [0, 0])}),
    "rank of 10,000": blob_of({**meta({"w": TENSOR}), "w": entry([1] * 9_999 + [2])}, EIGHT),
    "dtype unknown": blob_of({**meta({"w": TENSOR}), "w": entry(dtype="F128")}, EIGHT),
    "dtype of another size": blob_of({**meta({"w": TENSOR}), "w": entry(dtype="F64")}, EIGHT),
    "dtype is a list": blob_of({**meta({"w": TENSOR}), "w": entry(dtype=["F32"])}, EIGHT),
    "dtype is none": blob_of({**meta({"w": TENSOR}), "w": entry(dtype=None)}, EIGHT),
    "entry is none": blob_of({**meta({"w": TENSOR}), "w": None}, EIGHT),
    "entry is a text": blob_of({**meta({"w": TENSOR}), "w": "F32"}, EIGHT),
    "entry without a shape": blob_of({**meta({"w": TENSOR}), "w": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_message_is_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(WireError):
        decode(HOSTILE[case])
    (tmp_path / "m").write_bytes(HOSTILE[case])
    for lazy in (False, True):
        with pytest.raises(WireError):
            read(tmp_path / "m", lazy=lazy)


REFUSAL = """
import resource, sys
from pathlib import Path
from fedtailor.wire import WireError, decode
blobs = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
def refuse(blob):
    try:
        decode(blob)
    except WireError:
        return
    raise SystemExit("accepted")
refuse(b"")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for blob in blobs:
    refuse(blob)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_refusing_takes_no_memory_for_what_a_message_claims_to_hold(tmp_path: Path) -> None:
    for i, blob in enumerate(HOSTILE.values()):
        (tmp_path / str(i)).write_bytes(blob)
    ran = subprocess.run([sys.executable, "-c", REFUSAL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 32 << 10  # the largest claims are far beyond any machine; parsing 4 MiB of header takes a few


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    blob = encode(Message("update", {"a": torch.ones(3), "h": {"b": torch.zeros(2, 2).half()}}, {"n": 1}))
    for end in range(len(blob)):
        with pytest.raises(WireError):
            decode(blob[:end])
    for end in range(0, len(blob), 17):
        (tmp_path / "m").write_bytes(blob[:end])
        with pytest.raises(WireError):
            read(tmp_path / "m", lazy=True)


def test_a_message_over_the_limit_is_refused_and_one_at_the_limit_is_not(tmp_path: Path) -> None:
    message = Message("update", {"a": torch.ones(100)})
    size = write(message, tmp_path / "m")
    assert decode(encode(message), max_bytes=size).verb == "update"
    with pytest.raises(WireError, match=f"{size}.*limit is {size - 1}"):
        decode(encode(message), max_bytes=size - 1)
    for lazy in (False, True):
        assert read(tmp_path / "m", lazy=lazy, max_bytes=size).verb == "update"
        with pytest.raises(WireError, match="limit"):
            read(tmp_path / "m", lazy=lazy, max_bytes=size - 1)


def test_a_file_that_is_missing_or_a_folder_is_a_wire_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        for lazy in (False, True):
            with pytest.raises(WireError, match=path.name):
                read(path, lazy=lazy)
    assert issubclass(WireError, FedtailorError)


def mutated(blob: bytes, dice: random.Random) -> bytes:
    """Bytes flipped, cut, inserted, swapped or overwritten; or one token of the header replaced by another."""
    data = bytearray(blob)
    kind = dice.randrange(7)
    at = dice.randrange(len(data))
    header = 8 + int.from_bytes(blob[:8], "little")
    if kind == 0:
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
    elif kind == 1:
        data[dice.randrange(header)] ^= 1 << dice.randrange(8)
    elif kind == 2:
        del data[at : at + dice.randint(1, 20)]
    elif kind == 3:
        data[at:at] = dice.randbytes(dice.randint(1, 20))
    elif kind == 4:
        other = dice.randrange(len(data))
        data[at : at + 8] = data[other : other + 8]
    elif kind == 5:
        data[:8] = struct.pack("<Q", dice.choice([0, 1, header - 9, header - 7, len(data), 2**31, 2**63, 2**64 - 1]))
    else:
        # The length stays honest, so that what is behind the header's JSON is reached.
        text = blob[8:header].decode()
        tokens = ["0", "-1", "1e9", "null", "[]", "{}", '"F32"', '"BOOL"', "99999999999999999999", "true", "NaN", "2", "8", "F16"]
        old = dice.choice(
            ["F32", "F16", '"v"', "0", "1", "2", "4", "8", "[", "{", "shape", "a", "w", "\\\\u0000", "info", "tree", ":", ","]
        )
        places = [i for i in range(len(text)) if text.startswith(old, i)]
        if places:
            place = dice.choice(places)
            text = text[:place] + dice.choice(tokens) + text[place + len(old) :]
        return blob_of(text.encode(), blob[header:])
    return bytes(data)


def test_any_mutation_of_a_message_is_decoded_or_refused() -> None:
    dice = random.Random(0)
    valid = [
        encode(Message("v", {"w": torch.arange(4.0), "a": {"b": torch.ones(2, 2).half()}}, {"n": 2, "loss": 0.5})),
        encode(Message("v", {"t": "text", "l": [1, 2, None], "e": torch.empty(0, 4), "i": torch.arange(3)})),
        encode(Message("v", {}, {"n": 1})),
    ]
    refused = 0
    for _ in range(2_000):
        blob = mutated(dice.choice(valid), dice)
        try:
            message = decode(blob)
        except WireError:
            refused += 1
            continue
        # What was accepted is a message: it is sent on and arrives as it is.
        assert bits(decode(encode(message)).body) == bits(message.body)
    assert 500 < refused < 1_900  # both ends were reached


# What cannot arrive is not sent.


def _deep(depth: int) -> Tree:
    return {"a": _deep(depth - 1)} if depth else {}


UNSENT: dict[str, Message] = {
    "an object": Message("x", {"a": object()}),
    "bytes": Message("x", {"a": b"x"}),
    "a set": Message("x", {"a": {1}}),
    "a list of tensors": Message("x", {"a": [torch.ones(1)]}),
    "a list of trees": Message("x", {"a": [{"b": 1}]}),
    "the text that stands for a tensor": Message("x", {"a": TENSOR}),
    "a name that is a number": Message("x", {1: torch.ones(1)}),  # type: ignore[dict-item]
    "a name with a slash": Message("x", {"a/b": torch.ones(1)}),
    "a name that is no text in UTF-8": Message("x", {"\ud800": torch.ones(1)}),
    "the name that safetensors keeps": Message("x", {"__metadata__": torch.ones(1)}),
    "complex numbers": Message("x", {"a": torch.ones(1, dtype=torch.complex64)}),
    "float8": Message("x", {"a": torch.ones(1).to(torch.float8_e4m3fn)}),
    "a sparse tensor": Message("x", {"a": torch.ones(1).to_sparse()}),
    "a verb that is a number": Message(3),  # type: ignore[arg-type]
    "a text in info": Message("x", {}, {"n": "3"}),  # type: ignore[dict-item]
    "a bool in info": Message("x", {}, {"n": True}),
    "a tensor in info": Message("x", {}, {"n": torch.ones(())}),  # type: ignore[dict-item]
    "a tree too deep": Message("x", _deep(40)),
    "a header over the limit": Message("x", {"a": list(range(700_000))}),
}


@pytest.mark.parametrize("case", UNSENT)
def test_what_could_not_be_decoded_is_not_encoded(case: str, tmp_path: Path) -> None:
    with pytest.raises(WireError):
        encode(UNSENT[case])
    with pytest.raises(WireError):
        write(UNSENT[case], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("depth", range(14, 20))
def test_a_tree_is_encoded_exactly_when_it_can_be_decoded(depth: int) -> None:
    tree: Any = {"w": torch.ones(2)}
    for _ in range(depth):
        tree = {"a": tree}
    by_hand = blob_of({**meta(json.loads('{"a":' * depth + '{"w":"\\u0000"}' + "}" * depth)), "a/" * depth + "w": entry()}, EIGHT)
    accepted = []
    for attempt in (lambda: decode(by_hand), lambda: encode(Message("x", tree))):
        try:
            attempt()
            accepted.append(True)
        except WireError:
            accepted.append(False)
    assert accepted == [depth <= wire.MAX_DEPTH] * 2


# A message is compared with what was expected.


@pytest.mark.parametrize(
    ("verb", "body", "said"),
    [
        ("train", {"w": torch.ones(2), "h": {"b": torch.ones(1)}}, "verb 'train' where 'update' was expected"),
        ("update", {"h": {"b": torch.ones(1)}}, "tensor 'w' is missing"),
        ("update", {"w": torch.ones(2), "h": {}}, "tensor 'h/b' is missing"),
        ("update", {"w": torch.ones(2), "h": {"b": torch.ones(1)}, "x": torch.ones(1)}, "tensor 'x' is not expected"),
        (
            "update",
            {"w": torch.ones(3), "h": {"b": torch.ones(1)}},
            r"tensor 'w' is torch.float32 \[3\], expected torch.float32 \[2\]",
        ),
        ("update", {"w": torch.ones(2).half(), "h": {"b": torch.ones(1)}}, "tensor 'w' is torch.float16"),
    ],
)
def test_check_names_the_first_difference(verb: str, body: Tree, said: str) -> None:
    like = {"w": torch.zeros(2), "h": {"b": torch.zeros(1)}, "text": "not compared"}
    with pytest.raises(WireError, match=said):
        check(Message(verb, body), "update", like)


def test_check_gives_back_the_message_it_was_given() -> None:
    message = Message("update", {"w": torch.ones(2)})
    assert check(message) is message
    assert check(message, "update", {"w": torch.zeros(2)}) is message


# A file is the old one or the new one.


def _half(path: Path) -> None:
    path.write_bytes(b"half of the new")
    raise RuntimeError("power cut")


def _none(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(("writer", "error"), [(_half, RuntimeError), (_none, FileNotFoundError)])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(
    writer: Callable[[Path], None], error: type[Exception], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    assert wire.atomically(path, lambda p: p.write_bytes(b"old")) == 3
    with pytest.raises(error):
        wire.atomically(path, writer)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    wire.atomically(path, lambda p: p.write_bytes(b"new"))
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from fedtailor.core import Message
from fedtailor.wire import write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    write(Message("x", {"w": torch.ones(1 << 20)}), Path(sys.argv[1]))
except OSError as error:
    print("OSError")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(tmp_path: Path) -> None:
    write(Message("x", {"w": torch.ones(2)}), tmp_path / "m")
    ran = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "m")], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "OSError", ran.stderr
    assert read(tmp_path / "m").body["w"].tolist() == [1.0, 1.0]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_tree_on_disk_can_be_spread_and_copied(tmp_path: Path) -> None:
    message = Message("update", {"a": torch.arange(3.0), "deep": {"b": torch.ones(2)}, "n": 3})
    write(message, tmp_path / "m")
    lazy = read(tmp_path / "m", lazy=True).body
    for copy in ({**lazy}, dict(lazy), {**{}, **lazy}, lazy | {}):
        assert torch.equal(copy["a"], message.body["a"])
        assert torch.equal({**copy["deep"]}["b"], message.body["deep"]["b"])
        assert copy["n"] == 3
