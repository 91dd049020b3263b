"""Lines that are cut: every parcel arrives once and whole, whatever byte the cut falls on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("grpc")

from fedtailor.federation import frames as framing
from fedtailor.federation import remote
from fedtailor.federation.frames import Arriving, Frame, LineError, Parcel, frames, pack, unpack
from fedtailor.federation.line import Line
from fedtailor.federation.member import Own
from owners import Federation, Owners, owners
from proxies import Proxy, every


class Wire:
    """Two lines joined by frames; the connection ends after so many of them."""

    def __init__(self, here: Line, there: Line, budget: int) -> None:
        self.lines, self.budget = (here, there), budget

    async def connect(self) -> None:
        here, there = self.lines
        pipes: tuple[asyncio.Queue[bytes | None], asyncio.Queue[bytes | None]] = (asyncio.Queue(), asyncio.Queue())

        def writer(pipe: asyncio.Queue[bytes | None]) -> Callable[[bytes], object]:
            async def write(frame: bytes) -> None:
                self.budget -= 1
                if self.budget < 0:
                    for each in pipes:
                        each.put_nowait(None)
                    raise OSError("cut")
                await pipe.put(frame)

            return write

        held = here.held(), there.held()
        async with asyncio.timeout(10):
            talks = [here.run(pipes[1].get, writer(pipes[0]), held[1]), there.run(pipes[0].get, writer(pipes[1]), held[0])]  # type: ignore[arg-type]
            watch = asyncio.create_task(self._until_idle(pipes))
            await asyncio.gather(*talks, return_exceptions=True)
            watch.cancel()

    async def _until_idle(self, pipes: tuple[asyncio.Queue[bytes | None], ...]) -> None:
        while not all(line.idle for line in self.lines):
            await asyncio.sleep(0)
        for pipe in pipes:
            pipe.put_nowait(None)


def test_each_parcel_arrives_once_whatever_frames_a_cut_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "CHUNK", 7)
    draw = random.Random(0)
    for _ in range(60):
        got: tuple[list[Parcel], list[Parcel]] = ([], [])
        lines = tuple(Line(tmp_path, 1 << 20, each.append) for each in got)
        sent: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})
        for number in range(draw.randint(1, 6)):
            side, content = draw.randrange(2), draw.randbytes(draw.choice([0, 1, 7, 8, 50, 200]))
            sent[1 - side][f"p{number}"] = content
            lines[side].send(Parcel(f"p{number}", {"number": number}, content))
        connections = 0
        while not all(line.idle for line in lines):
            connections += 1
            assert connections < 500
            asyncio.run(Wire(*lines, draw.choice([3, 5, 9, 30])).connect())
        for arrived, wanted in zip(got, sent, strict=True):
            assert [(p.id, p.content) for p in arrived] == list(wanted.items())


def test_a_large_parcel_goes_through_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "SPOOL", 10)
    whole = Parcel("large", {"round": 1}, random.Random(1).randbytes(3 << 20))
    (tmp_path / "sent").write_bytes(whole.content)  # type: ignore[arg-type]
    for parcel in (whole, whole._replace(content=tmp_path / "sent")):
        pieces = [unpack(frame) for frame in frames(parcel)]
        assert len(pieces) == 3
        arriving = Arriving(pieces[0].header, tmp_path, 1 << 30)
        assert [arriving.add(*piece) for piece in pieces] == [False, False, True]
        arrived = arriving.parcel().content
        assert isinstance(arrived, Path)
        assert arrived.read_bytes() == whole.content


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0",
        b"\0\0\0\xff{}",
        pack({"is": "part"})[:-1],
        b"\0\0\0\2[]",
        b"\0\0\0\2{}",
        b"\xff\xff\xff\xff",
        b"\0\0\0\4{\xff}}",
    ],
)
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(LineError):
        unpack(frame)


@pytest.mark.parametrize(
    "header",
    [
        {"size": -1},
        {"size": 1 << 40},
        {"size": "9"},
        {"size": True},
        {"size": 1.5},
        {"size": 9, "note": []},
        {"size": 9, "at": 3},
    ],
)
def test_what_is_no_parcel_is_refused(header: dict[str, object], tmp_path: Path) -> None:
    line = Line(tmp_path, 100, lambda parcel: None)
    with pytest.raises(LineError):
        line._take(Frame({"is": "part", "id": "a", "note": {}, "at": 0, **header}, b"x"))


def test_nobody_sends_what_was_not_asked_for(tmp_path: Path) -> None:
    line = Line(tmp_path, 100, lambda parcel: None, lambda header: header["id"] == "mine")
    with pytest.raises(LineError, match="nobody asked"):
        line._take(Frame({"is": "part", "id": "other", "note": {}, "size": 1, "at": 0}, b"x"))


def test_a_run_over_lines_that_are_cut_in_the_middle_of_messages(
    tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning, letters from files, in frames of 4 kB; a cut every 60 kB that members send."""
    two: Owners = owners(tmp_path, folders("bert"), names=("north", "south"))
    sections = {"technique": {"kind": "full"}, "algorithm": {"kind": "scaffold"}, "train": {"optimizer": "sgd"}}
    alone = two.simulated(tmp_path / "simulated", **sections)
    monkeypatch.setattr(framing, "CHUNK", 4096)
    monkeypatch.setattr(remote, "LARGE", 1000)
    federation = Federation(two.apart(**sections), tmp_path)
    with Proxy(int(federation.address.rpartition(":")[2]), every(60_000, 8)) as proxy:
        federation.address = f"127.0.0.1:{proxy.port}"
        for name, path in two.own.items():
            federation.member(name, Own(str(path), models=(str(two.model),)), wait=False)
        served = federation.end()
    assert isinstance(served.summary, dict), (served.summary, served.notices)
    assert proxy.cut >= 3
    assert any("is cut off" in line for line in served.notices)
    assert served.summary["state_hash"] == alone["state_hash"]
    assert served.summary["bytes_total"] == alone["bytes_total"]
