"""10,000 hostile messages against a server and a member, drawn from a seed, beside a run of three honest members.

    python benchmarks/hostile.py [--tried 10000] [--seed 0]

Three quarters go to the server's port while the run is on, from a process of their own: frames of every bad kind of tests/hostile.py, bombs,
connections that say nothing; most of the rest are letters to a member, and some are replies of a member that lies in every round of a second
run. Accepted is what was not refused; crashed is what ended in an error that is not one line. Needs the packages of the tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import hostile
from fedtailor import wire
from fedtailor.core import Message
from fedtailor.federation import post
from fedtailor.federation.frames import EXPERIMENT, Parcel
from fedtailor.federation.member import Member, Own
from hostile import FRAMES, Attack, Dice
from owners import Federation, Owners, owners
from test_hostile import Liar, in_the_way, letter, member_of, told
from tiny import PADS, tiny, tokenizer


class Row(NamedTuple):
    what: str
    tried: int
    refused: int
    accepted: int
    crashed: int


def model_in(folder: Path) -> Path:
    torch.manual_seed(0)
    tiny("bert").save_pretrained(folder)
    tokenizer(PADS["bert"]).save_pretrained(folder)
    return folder


def at_the_port(address: str, count: int, dice: Dice) -> Row:
    """Each bad kind in turn; names change, for one name may not come often."""
    kinds = [*FRAMES, "silent", "bomb"]
    attacks = []
    for i in range(count):
        kind, name = kinds[i % len(kinds)], f"mallory {i % (count // 12 + 1)}"
        if kind == "silent":
            attacks.append(Attack(name, hello=b"", slow=post.HELLO + 1))
        elif kind == "bomb":
            attacks.append(Attack(name, ["zeros:8388608"], compressed=True))
        else:
            attacks.append(Attack(name, [f"{kind}:{dice.randrange(2**32)}"]))
    ends = Counter(hostile.storm(address, attacks, at_once=64))
    print(f"# how connections ended: {dict(ends.most_common())}", flush=True)
    return Row("frames at the server's port", count, count - ends["OK"] - ends["UNKNOWN"], ends["OK"], ends["UNKNOWN"])


def to_a_member(three: Owners, folder: Path, count: int, dice: Dice) -> Row:
    member, ear = member_of(three, folder)
    member._begin(Parcel("e", {"is": EXPERIMENT}, hostile.experiment(told(three))))
    assert member.world
    good = Message("train", member.world.algorithm.init(member.world.technique.init)["params"])
    blob, accepted, crashed = wire.encode(good), 0, 0
    kinds = ["one axis more", "flat", "another type", "bool", "not finite", "a text", "a tree", "a list"]
    for i in range(count):
        if i % 3 == 0:
            strange = hostile.wrong(good, dice, kinds[i // 3 % len(kinds)])
            parcel = letter(strange or b"", f"l{i}")
        elif i % 3 == 1:
            parcel = letter(blob[: dice.randrange(len(blob) - 9)] + dice.randbytes(dice.randrange(9)), f"l{i}")
        else:
            parcel = letter(
                good, f"l{i}", **{dice.choice(["round", "own"]): dice.choice([None, "x", [], {}, -5, 10**9, "../../x"])}
            )
        try:
            member._letter(parcel)
            accepted += "why" not in ear.sent[-1].note
        except Exception as error:
            crashed += 1
            print(f"# {error!r}")
    return Row("letters to a member", count, count - accepted - crashed, accepted, crashed)


class Patch:
    """In the place of pytest's."""

    def setattr(self, where: Any, name: str, value: Any) -> None:
        setattr(where, name, value)


def joined(federation: Federation, three: Owners) -> Any:
    for name, path in three.own.items():
        federation.member(name, Own(str(path), model=str(three.model)), wait=False)
    return federation.end(3600)


def lied(three: Owners, folder: Path, rounds: int) -> Row:
    in_the_way(Patch(), "south", Liar)  # type: ignore[arg-type]
    done = joined(Federation(three.apart(rounds=rounds, evaluate={"every": 0}), folder), three)
    refused = sum("south set aside" in line for line in done.notices)
    replies = rounds  # the evaluation at the end is one more
    return Row(
        "replies of a lying member",
        replies,
        min(refused, replies),
        replies - min(refused, replies),
        int(not isinstance(done.summary, dict)),
    )


def watched(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what it returns, MB by which this process grew at most)."""
    me, over = psutil.Process(), threading.Event()
    begun = most = me.memory_info().rss

    def look() -> None:
        nonlocal most
        while not over.wait(0.05):
            most = max(most, me.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        return work(), (most - begun) / 1e6
    finally:
        over.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tried", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dice, post.HELLO = Dice(args.seed), 1.0
    rounds = max(2, args.tried // 200)
    frames = args.tried * 3 // 4
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        three = owners(folder, model_in(folder / "model"))
        alone = three.simulated(folder / "simulated", rounds=rounds)
        honest = joined(Federation(three.apart(rounds=rounds), folder / "honest"), three)  # libraries take what they need once
        del honest
        over = threading.Event()

        class Patient(Member):
            """Keeps the run from ending before everything has been tried."""

            def _answer(self, message: Message, at: Any, view: str) -> Any:
                if at.round == rounds:
                    over.wait()
                return super()._answer(message, at, view)

        in_the_way(Patch(), "south", Patient)  # type: ignore[arg-type]
        federation = Federation(three.apart(rounds=rounds), folder / "stormed")
        ended: list[Any] = []
        begun = time.monotonic()

        def stormed() -> Row:
            run = threading.Thread(target=lambda: ended.append(joined(federation, three)))
            run.start()
            try:
                return at_the_port(federation.address, frames, dice)
            finally:
                over.set()
                run.join()

        first, grown = watched(stormed)
        same = isinstance(ended[0].summary, dict) and ended[0].summary["state_hash"] == alone["state_hash"]
        rows = [
            first,
            to_a_member(three, folder / "member", args.tried - frames - rounds, dice),
            lied(three, folder / "lied", rounds),
        ]
    print("| what | tried | refused | accepted | crashed |\n|---|---|---|---|---|")
    total = Row("all", *(sum(row[i] for row in rows) for i in range(1, 5)))
    for row in (*rows, total):
        print(f"| {row.what} | {row.tried:,} | {row.refused:,} | {row.accepted} | {row.crashed} |")
    print(
        f"\nserver's process grew by at most {grown:.0f} MB; honest run's hash that of its simulation: {'yes' if same else 'NO'};"
    )
    print(f"seed {args.seed}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
