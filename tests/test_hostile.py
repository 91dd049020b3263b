"""Hostile peers: nothing that a stranger sends crashes the other side, is taken for what it is not, or takes memory without bound."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("grpc")

import grpc

import hostile
from federations import Outcome
from fedtailor import wire
from fedtailor.config import parse
from fedtailor.core import SERVER, Message
from fedtailor.errors import FedtailorError, RunError
from fedtailor.federation import frames, join, line, post
from fedtailor.federation.dial import Dial
from fedtailor.federation.frames import EXPERIMENT, FINISH, LETTER, LineError, Parcel, pack, said
from fedtailor.federation.line import Line
from fedtailor.federation.member import Limits, Member, Own
from fedtailor.federation.replies import complaint, spent
from fedtailor.federation.serve import Server
from fedtailor.filters import AT, SCALE, SHAPE, chain
from fedtailor.run import Watch
from fedtailor.simulation import build
from hostile import FRAMES, WANTED, Attack, Dice
from owners import Federation, Owners, owners
from test_contract import CASES, arguments


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Owners:
    return owners(tmp_path_factory.mktemp("owners"), folders("bert"))


LOOP = asyncio.new_event_loop()  # never closed: gRPC's poller wakes every loop that ever used it


def rss() -> int:
    return int(psutil.Process().memory_info().rss)


async def fed(line: Line, blobs: list[bytes]) -> None:
    """The line, reading these frames from one who reads nothing itself."""
    waiting = iter(blobs)

    async def read() -> bytes | None:
        return next(waiting, None)

    async def write(frame: bytes) -> None:
        await asyncio.Event().wait()

    await line.run(read, write, {})


def line_to(folder: Path, taken: list[Parcel], limit: int = 1 << 20) -> Line:
    return Line(folder, limit, taken.append, lambda header: header.get("id") == WANTED)


# A line


@pytest.mark.parametrize("kind", FRAMES)
def test_a_bad_frame_ends_the_line(kind: str, tmp_path: Path) -> None:
    dice, taken = Dice(kind), list[Parcel]()
    for _ in range(40):
        with pytest.raises(LineError):
            asyncio.run(fed(line_to(tmp_path, taken), [FRAMES[kind](dice)]))
    assert not taken
    assert not list(tmp_path.iterdir())


def test_what_is_altered_on_the_way_is_whole_or_refused_and_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "CHUNK", 64)
    monkeypatch.setattr(frames, "SPOOL", 200)
    monkeypatch.setattr(line, "SPEAKS", 0.0)  # nobody here ever reads
    dice, taken = Dice(0), list[Parcel]()
    parcels = [hostile.honest(size) for size in (0, 63, 64, 190, 640)]

    async def all_of(count: int) -> int:
        refused = 0
        end = line_to(tmp_path, taken, 1 << 16)
        for _ in range(count):
            end.reset()
            try:
                await fed(end, hostile.mutated(dice.choice(parcels), dice))
            except LineError:
                refused += 1
            for parcel in taken:
                assert parcel.id == WANTED
                assert parcel.size <= 1 << 16
                parcel.discard()
            taken.clear()
            assert len(list(tmp_path.iterdir())) <= 1  # what is half here
        end.reset()
        return refused

    asyncio.run(all_of(300))
    before = rss()
    assert asyncio.run(all_of(5_000)) > 2_500
    assert rss() - before < 32 << 20
    assert not list(tmp_path.iterdir())


def test_parts_of_one_byte_take_the_room_of_their_bytes(tmp_path: Path) -> None:
    size, taken = 200_000, list[Parcel]()
    blobs = [
        hostile.raw(hostile.part(size=size), b"x"),
        *(pack({"is": "part", "id": WANTED, "at": i}, b"x") for i in range(1, size)),
    ]
    before = rss()
    asyncio.run(fed(line_to(tmp_path, taken), blobs))
    assert taken[0].size == size
    assert rss() - before < 8 << 20


def test_who_repeats_and_never_reads_is_cut_off(tmp_path: Path) -> None:
    again = hostile.honest(4)[0]
    with pytest.raises(LineError, match="again"):
        asyncio.run(fed(line_to(tmp_path, []), [again] * 100_000))


def test_a_line_that_cannot_send_ends(tmp_path: Path) -> None:
    async def read() -> bytes | None:
        await asyncio.Event().wait()
        return None

    async def write(frame: bytes) -> None:
        raise ValueError("no")

    async def run() -> None:
        line = line_to(tmp_path, [])
        line.send(Parcel("x", {}, b"y"))
        await line.run(read, write, {})

    with pytest.raises(ConnectionError):
        asyncio.run(asyncio.wait_for(run(), 30))


def test_a_parcel_whose_file_is_gone_is_not_sent_and_holds_up_nothing(tmp_path: Path) -> None:
    wrote: list[bytes] = []
    line = line_to(tmp_path, [])
    line.send(Parcel("gone", {}, tmp_path / "gone"))
    line.send(Parcel("here", {}, b"y"))

    async def run() -> None:
        async def read() -> bytes | None:
            while not wrote:
                await asyncio.sleep(0.01)
            return None

        async def write(frame: bytes) -> None:
            wrote.append(frame)

        await line.run(read, write, {})

    asyncio.run(asyncio.wait_for(run(), 30))
    assert [frames.unpack(frame).header["id"] for frame in wrote] == ["here"]


def test_what_is_printed_moves_no_cursor() -> None:
    assert said("\x1b[2J\nhello\u202e\x00 you") == "[2J hello you"
    assert len(said("x" * 10**6)) == 300


# Replies


@pytest.mark.parametrize("kind", sorted(CASES))
def test_honest_replies_pass_and_others_do_not(kind: str, federation: Callable[..., Outcome]) -> None:
    """For every algorithm, in every exchange: names, shapes, types and numbers are looked at before the algorithm sees them."""
    done = federation(kind, rounds=2, **arguments(kind))
    algorithm, dice, tried = done.world.algorithm, Dice(0), 0
    assert algorithm.check or kind == "pooled"
    for seen in done.log:
        if seen.client == SERVER or not algorithm.check:
            continue
        assert complaint(algorithm, seen.letter, seen.reply, 100) == "", (seen.letter.verb, seen.reply.verb)
        for change in [*hostile.WRONG, "verb", "negative", "numbers"]:
            bad = hostile.wrong(seen.reply, dice, change)
            # How long factors are, and the ends of a model, the algorithm knows; texts of others are as many as they are.
            known = seen.reply.verb in ("rested", "embedded") or (kind == "flora" and seen.letter.verb == "train")
            known = known or (
                seen.reply.verb in ("sent", "shown") and change in ("missing", "longer")
            )  # a batch is as large as it is
            if bad is None or (change == "negative" and "n" not in seen.reply.info) or (known and change in hostile.WRONG):
                continue
            # A change may leave a thing as it was, or be one that an honest client could make.
            if wire.encode(bad._replace(info={})) == wire.encode(seen.reply._replace(info={})) and change in hostile.WRONG:
                continue
            tried += 1
            assert complaint(algorithm, seen.letter, bad, 100), (seen.letter.verb, change)
    assert tried > 20 or kind in ("pooled", "zero-shot")


def test_factors_of_another_form_are_set_aside_by_flora(federation: Callable[..., Outcome]) -> None:
    from fedtailor.algorithms.flora import misfit

    done, dice = federation("flora", rounds=1, **arguments("flora")), Dice(0)
    for seen in done.log:
        if seen.reply.verb == "update":
            assert misfit(seen.reply.body["factors"], done.state["fresh"]) == ""
            for change in hostile.WRONG:
                bad = hostile.wrong(Message("", seen.reply.body["factors"]), dice, change)
                assert bad
                if change != "not finite":
                    assert misfit(bad.body, done.state["fresh"]), change


def test_small_tensors_do_not_become_large_ones_in_filters() -> None:
    thin, wide = torch.ones(60_000, 1, dtype=torch.int8), torch.ones(1, 60_000)
    with pytest.raises(wire.WireError, match="scales"):
        chain(["int8"]).undo(Message("x", {"w": thin, "w" + SCALE: wide}))
    at = torch.arange(100, dtype=torch.int32)
    for shape in ([1001], [10**9], [2**40], [-1, -1]):
        body = {"w": torch.ones(100), "w" + AT: at, "w" + SHAPE: torch.tensor(shape)}
        with pytest.raises(wire.WireError):
            chain(["topk=0.1"]).undo(Message("x", body))


def test_what_a_member_tells_of_its_work_is_a_number_or_nothing() -> None:
    told = [None, "1", [], {}, True, -1, 1e400, math.nan, 10**400, 12.5]
    assert [spent({"flops": x}, "flops") for x in told] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 12.5]


# The server's port


def in_the_way(monkeypatch: pytest.MonkeyPatch, name: str, bad: type[Member]) -> None:
    monkeypatch.setattr(join, "Member", lambda who, *args: (bad if who == name else Member)(who, *args))


def started(three: Owners, folder: Path, names: tuple[str, ...], **sections: Any) -> Federation:
    federation = Federation(three.apart(**sections), folder)
    for name in names:
        federation.member(name, Own(str(three.own[name]), models=(str(three.model),)), wait=False)
    return federation


def test_who_has_no_place_is_not_agreed_with_whatever_it_says(three: Owners) -> None:
    told: list[tuple[str, str]] = []
    line = SimpleNamespace(tell=lambda member, note: told.append((member, note["why"])))
    server = Server(build(parse(three.values())), line, Watch(), None)  # type: ignore[arg-type]
    assert not server._agree("west", {"is": "ready", "holds": "ends"})
    assert told[0][0] == "west"
    assert "not among the members" in told[0][1]


def test_a_storm_at_the_port_changes_nothing(three: Owners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of every bad kind, bombs, connections that say nothing: the honest members' run ends as its simulation does."""
    monkeypatch.setattr(post, "HELLO", 1.0)
    alone = three.simulated(tmp_path / "simulated")
    over = threading.Event()

    class Patient(Member):
        """Keeps the run from ending before everything has been tried."""

        def _answer(self, message: Message, at: Any, view: str) -> tuple[dict[str, Any], Message]:
            assert at.round < 2 or over.wait(200)
            return super()._answer(message, at, view)

    in_the_way(monkeypatch, "south", Patient)
    federation = started(three, tmp_path, ("east", "north", "south"))
    federation.until("^round 1 is over")
    dice = Dice(0)
    kinds = [kind for kind in FRAMES for _ in range(12)]
    attacks = [Attack(f"mallory {i % 40}", [f"{kind}:{dice.randrange(2**32)}"]) for i, kind in enumerate(kinds)]
    attacks += [Attack(name) for name in ("", "x" * 65, "../../etc", " ")]
    attacks += [
        Attack("bomb", ["zeros:67108864"], compressed=True),
        Attack("silent", hello=b"", slow=3),
        Attack("eager", hello=hostile.raw(hostile.part(), b"abcd")),
    ]
    hostile.storm(federation.address, attacks[::3])  # libraries take what they need once
    before = rss()
    found = hostile.storm(federation.address, attacks)
    assert rss() - before < 64 << 20
    assert "OK" not in found
    assert "UNKNOWN" not in found, found  # what an exception that nobody expected would be
    assert found[-2:] == ["INVALID_ARGUMENT"] * 2
    over.set()
    served = federation.end()
    assert isinstance(served.summary, dict), (served.summary, served.notices)
    assert served.summary["state_hash"] == alone["state_hash"]


class Liar(Member):
    """Replies with something else each time, and with what it has replied before."""

    dice = Dice(1)

    def _answer(self, message: Message, at: Any, view: str) -> tuple[dict[str, Any], Message]:
        note, reply = super()._answer(message, at, view)
        bad = next(
            bad
            for _ in range(99)
            if (
                bad := hostile.wrong(
                    reply,
                    self.dice,
                    self.dice.choice(["missing", "longer", "flat", "another type", "not finite", "a text", "verb"]),
                )
            )
        )
        note = {**note, "flops": hostile.odd(self.dice), "examples": hostile.odd(self.dice), "own": hostile.odd(self.dice)}
        return note, bad


def test_a_lying_member_is_as_one_who_is_not_there(three: Owners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way(monkeypatch, "south", Liar)
    rounds = 6
    lied = started(three, tmp_path / "lied", ("east", "north", "south"), rounds=rounds).end()
    assert isinstance(lied.summary, dict), (lied.summary, lied.notices)
    assert sum("south set aside" in line for line in lied.notices) >= rounds

    class Silent(Member):
        def _answer(self, message: Message, at: Any, view: str) -> tuple[dict[str, Any], Message]:
            raise RunError("not today")

    in_the_way(monkeypatch, "south", Silent)
    silent = started(three, tmp_path / "silent", ("east", "north", "south"), rounds=rounds).end()
    assert isinstance(silent.summary, dict), (silent.summary, silent.notices)
    assert lied.summary["state_hash"] == silent.summary["state_hash"]


def test_names_and_connections_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "NAMES", 50)
    server = post.Post("127.0.0.1:0", tmp_path, 1 << 20, post.Keys())
    server.open()
    try:
        address = f"127.0.0.1:{server.port}"
        one = hostile.storm(address, [Attack("mallory", [b"?"])] * 60)
        assert one.count("RESOURCE_EXHAUSTED") + one.count("INTERNAL") >= 20  # the second where it was still writing
        many = hostile.storm(address, [Attack(f"m{i}", [b"?"]) for i in range(200)])
        assert many.count("INVALID_ARGUMENT") >= 150  # who is gone makes room
        assert len(server.members) <= 50
        assert server._lines.keys() == server.members.keys()
        deadline = time.monotonic() + 10
        while any(known.since is not None for known in server.members.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(known.since is not None for known in server.members.values())
    finally:
        server.close(0.1)


# A member


class Ear:
    """In the place of a member's line: keeps what it is given to send."""

    def __init__(self) -> None:
        self.sent: list[Parcel] = []

    def send(self, parcel: Parcel) -> None:
        self.sent.append(parcel)

    def drain(self, seconds: float) -> None:
        pass


def told(three: Owners, **sections: Any) -> dict[str, Any]:
    """What a server sends first."""
    from fedtailor.folder import written

    experiment = three.apart(**sections)
    facts = {"kind": "text", "labels": list(experiment.data.labels), "pairs": False, "clients": ["east"]}
    return {"experiment": written(experiment), "facts": facts}


def member_of(three: Owners, folder: Path, limits: Limits = Limits()) -> tuple[Member, Ear]:
    ear = Ear()
    own = Own(str(three.own["east"]), models=(str(three.model),))
    return Member("east", ear, folder, own, limits), ear  # type: ignore[arg-type]


def letter(message: Message | bytes, id: str, **changed: Any) -> Parcel:
    note = {"is": LETTER, "round": 1, "step": 1, "view": "", "own": "", "kept": "", **changed}
    return Parcel(id, note, message if isinstance(message, bytes) else wire.encode(message))


def test_a_member_refuses_bad_letters_and_goes_on(three: Owners, tmp_path: Path) -> None:
    member, ear = member_of(three, tmp_path)
    member._begin(Parcel("e", {"is": EXPERIMENT}, hostile.experiment(told(three))))
    assert "why" not in ear.sent[-1].note
    world, dice = member.world, Dice(0)
    assert world
    good = Message("train", world.algorithm.init(world.technique.init)["params"])
    member._letter(letter(good, "good"))
    assert "why" not in ear.sent[-1].note
    blob, own = wire.encode(good), member.shelf.now
    bad: list[Parcel] = []
    kinds = ["one axis more", "flat", "another type", "bool", "not finite", "a text", "a tree", "a list"]
    for i in range(60):
        strange = hostile.wrong(good, dice, dice.choice(kinds))
        assert strange
        bad.append(letter(strange, f"a{i}"))
        cut = bytearray(blob)
        cut[dice.randrange(200)] ^= 1 + dice.randrange(255)
        bad += [letter(blob[: dice.randrange(len(blob))], f"b{i}"), letter(b"\xff" * 16 + bytes(cut), f"c{i}")]
        bad.append(
            letter(good, f"d{i}", **{dice.choice(["round", "step", "own"]): dice.choice([None, "x", [], {}, -1e99, "../../x"])})
        )
    bad += [letter(good, f"e{n}", round=n) for n in (-1, 3, 10**12)]
    for parcel in bad:
        member._letter(parcel)
        assert ear.sent[-1].id == parcel.id
        assert "why" in ear.sent[-1].note, parcel.note
    assert member.shelf.now == own or not member.shelf.now
    member._letter(letter(good, "again"))
    assert "why" not in ear.sent[-1].note


def test_a_letter_that_comes_again_is_answered_and_not_worked_on(
    three: Owners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, ear = member_of(three, tmp_path)
    member._begin(Parcel("e", {"is": EXPERIMENT}, hostile.experiment(told(three))))
    assert member.world
    good = letter(Message("train", member.world.algorithm.init(member.world.technique.init)["params"]), "one")
    member._letter(good)
    first = ear.sent[-1]
    monkeypatch.setattr(member, "_answer", lambda *args: pytest.fail("it worked again"))
    for _ in range(5):
        member._letter(good)
        assert ear.sent[-1] == first


def test_going_back_to_an_earlier_round_allows_no_more(three: Owners, tmp_path: Path) -> None:
    member, ear = member_of(three, tmp_path, Limits(epochs=1))
    member._begin(Parcel("e", {"is": EXPERIMENT}, hostile.experiment(told(three))))
    assert member.world
    good = Message("train", member.world.algorithm.init(member.world.technique.init)["params"])
    whys = []
    for i, round in enumerate([1, 2, 1, 2, 1]):
        member._letter(letter(good, f"l{i}", round=round))
        whys.append("passes" in str(ear.sent[-1].note.get("why", "")))
    assert whys == [False, False, True, True, True]


def test_a_letter_before_the_experiment_waits_for_it(three: Owners, tmp_path: Path) -> None:
    """A server writes one where a member was started again and its greeting is still to come. One: a server cannot fill the memory."""
    member, ear = member_of(three, tmp_path)
    large = tmp_path / "large"
    large.write_bytes(b"x")
    member._letter(letter(b"", "x")._replace(content=large))
    member._letter(letter(Message("train"), "y"))
    assert not ear.sent
    assert not large.exists()
    member._begin(Parcel("e", {"is": EXPERIMENT}, hostile.experiment(told(three))))
    assert [(parcel.id, parcel.note["is"]) for parcel in ear.sent] == [("e", "ready"), ("y", LETTER)]


def test_the_end_before_the_experiment_is_refused(three: Owners, tmp_path: Path) -> None:
    member, _ = member_of(three, tmp_path)
    with pytest.raises(RunError, match="not begun"):
        member._finish(Parcel("f", {"is": FINISH}, b""))


def experiments(three: Owners, folder: Path) -> dict[str, Any]:
    def but(**sections: Any) -> dict[str, Any]:
        values = told(three)
        for name, value in sections.items():
            values["experiment"][name] = {**values["experiment"][name], **value} if isinstance(value, dict) else value
        return values

    honest = told(three)
    return {
        "code": but(algorithm={"kind": "evil.py:run"}),
        "a path in the technique": but(technique={"kind": "retriever", "generator": str(folder)}),
        "unknown keys": but(shell="rm"),
        "rounds": but(rounds=-1),
        "clients as a text": {**honest, "facts": {**honest["facts"], "clients": "east"}},
        "labels as numbers": {**honest, "facts": {**honest["facts"], "labels": [1, 2]}},
        "other labels": {**honest, "facts": {**honest["facts"], "labels": ["a", "b"]}},
        "more facts": {**honest, "facts": {**honest["facts"], "x": 1}},
        "no facts": {"experiment": honest["experiment"]},
        "a list": [],
        "a number": 7,
    }


def test_an_experiment_that_is_none_is_told_in_a_line(three: Owners, tmp_path: Path) -> None:
    for name, values in experiments(three, tmp_path).items():
        member, ear = member_of(three, tmp_path / "home")
        with pytest.raises(FedtailorError) as refused:
            member._begin(Parcel("e", {"is": EXPERIMENT}, hostile.experiment(values)))
        assert "\n" not in str(refused.value).strip(), name
        assert "why" in ear.sent[-1].note, name


def test_a_model_that_is_none_is_not_kept(three: Owners, tmp_path: Path) -> None:
    member, _ = member_of(three, tmp_path)
    member._begin(Parcel("e", {"is": EXPERIMENT}, hostile.experiment(told(three))))
    assert member.world
    tree = member.world.technique.init
    nan = {name: t * math.nan for name, t in tree.items()}
    for body in ({}, {"broadcast": tree}, {"broadcast": tree, "told": 1}, {"broadcast": nan, "told": {"state_hash": "x"}}):
        with pytest.raises(FedtailorError):
            member._finish(Parcel("f", {"is": FINISH, "own": ""}, wire.encode(Message(FINISH, body))))


def test_a_server_that_does_not_keep_to_the_protocol_is_left(tmp_path: Path) -> None:
    """A dialler gives up with a line, whatever the server says."""
    dice = Dice(0)
    sent = [FRAMES[kind](dice) for kind in FRAMES if kind not in ("unasked", "oversized")]

    async def play(blobs: list[bytes]) -> list[Any]:
        server = grpc.aio.server(options=hostile.UNLIMITED)
        turn = iter(blobs)

        async def attach(requests: Any, context: Any) -> None:
            await context.read()
            await context.write(pack({"is": "welcome", "session": "s", "held": hostile.odd(dice)}))
            await context.write(next(turn))
            await context.read()

        handlers = {"Attach": grpc.stream_stream_rpc_method_handler(attach)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(post.SERVICE, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ends = []
        for _ in blobs:
            dial = Dial(f"127.0.0.1:{port}", "east", None, tmp_path, 1 << 20, lambda line: None)
            dial.open()
            ends.append(await asyncio.to_thread(dial.inbox.get, True, 30))
            await asyncio.to_thread(dial.close)
        await server.stop(0)
        return ends

    ends = LOOP.run_until_complete(play(sent))
    assert all(isinstance(end, RunError) and "protocol" in str(end) for end in ends), ends


def test_the_dice_are_the_same_every_time() -> None:
    draws = [[FRAMES[kind](Dice(3)) for kind in FRAMES] for _ in range(2)]
    assert draws[0] == draws[1]
    assert random.Random(3).random() == Dice(3).random()
