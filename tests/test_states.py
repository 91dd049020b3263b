"""Checkpoints: what was committed is what is resumed, after a kill at any step and never from a damaged file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import wire
from fedtailor.core import Message, Tree, stream
from fedtailor.engines import states as module
from fedtailor.engines.states import MANIFEST, States
from fedtailor.errors import RunError
from tiny import same


def tree(value: float) -> Tree:
    noise = torch.randn(3, 4, generator=stream(0, "states"))
    return {"params": {"w": noise + value, "half": noise.half(), "log": [1, "x"]}, "count": 3, "name": f"round {value}"}


ENGINE = {"clock": 1.5, "under_way": {}}


def committed(folder: Path, round: int = 1, clients: tuple[str, ...] = ("c0", "c1")) -> States:
    states = States(folder)
    for client in clients:
        states.write_own(client, tree(10.0 + len(client)))
    states.commit(round, tree(float(round)), ENGINE, {"bytes": round})
    return states


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_what_is_committed_is_what_is_resumed(tmp_path: Path) -> None:
    states = committed(tmp_path)
    again = States(tmp_path)
    found = again.resume()
    assert found is not None
    assert same(list(found), [1, tree(1.0), ENGINE, {"bytes": 1}])
    assert same(again.read_own("c0"), tree(12.0))
    assert again.read_own("nobody") == {}
    assert again.hash(found[1]) == states.hash(tree(1.0))
    assert again.own == states.own


def test_a_large_state_is_read_and_hashed_without_a_copy_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = committed(tmp_path).hash(tree(1.0))
    monkeypatch.setattr(module, "LARGE", 0)
    again = States(tmp_path)
    found = again.resume()
    assert found is not None
    server, kept = found[1], files(tmp_path)
    assert again.hash(server) == straight
    assert files(tmp_path) == kept
    again.commit(2, tree(2.0), ENGINE, {})  # the file that was read is gone, and its pages are not
    assert same(server, tree(1.0))
    server["params"]["w"].zero_()  # nobody should; the checkpoint would not notice
    assert same(States(tmp_path).resume()[1], tree(2.0))  # type: ignore[index]


def test_an_empty_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    assert States(tmp_path / "new" / "run").resume() is None


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    committed(tmp_path / "a")
    straight = committed(tmp_path / "b")
    resumed = States(tmp_path / "a")
    resumed.resume()
    for states in (straight, resumed):
        states.write_own("c1", tree(5.0))
        states.write_own("c2", tree(6.0))
        states.commit(2, tree(2.0), ENGINE, {})
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert resumed.hash(tree(2.0)) == straight.hash(tree(2.0))
    for client in ("c0", "c1", "c2"):
        assert same(resumed.read_own(client), straight.read_own(client))


def test_only_the_last_checkpoint_stays_on_disk(tmp_path: Path) -> None:
    states = committed(tmp_path)
    for round in range(2, 6):
        states.write_own("c0", tree(round))
        states.write_own("c0", tree(round + 0.5))
        states.commit(round, tree(round), ENGINE, {})
    assert len(files(tmp_path)) == len([MANIFEST, "server", "engine", "c0", "c1"])


def test_a_round_of_many_writes_leaves_one_file_more(tmp_path: Path) -> None:
    """Split learning writes a client's state at every step; those of the checkpoint stay, of the others only the last."""
    states = States(tmp_path)
    states.write_own("a", {"x": torch.zeros(3)})
    states.commit(1, {}, {}, {})
    for step in range(5):
        states.write_own("a", {"x": torch.full((3,), float(step))})
    assert len(list(tmp_path.glob("own-a-*"))) == 2
    again = States(tmp_path)
    assert again.resume() is not None
    assert torch.equal(again.read_own("a")["x"], torch.zeros(3))


def test_own_states_after_the_last_commit_are_not_part_of_it(tmp_path: Path) -> None:
    states = committed(tmp_path)
    states.write_own("c0", tree(99.0))
    states.write_own("c9", tree(99.0))
    assert same(states.read_own("c0"), tree(99.0))
    again = States(tmp_path)
    again.resume()
    assert same(again.read_own("c0"), tree(12.0))
    assert again.read_own("c9") == {}


def test_a_client_that_gives_up_its_state_has_none(tmp_path: Path) -> None:
    states = committed(tmp_path)
    states.write_own("c0", {})
    assert states.read_own("c0") == {}
    states.commit(2, tree(2.0), ENGINE, {})
    again = States(tmp_path)
    again.resume()
    assert again.read_own("c0") == {}
    assert same(again.read_own("c1"), tree(12.0))


# The hash.


def test_equal_states_have_equal_hashes_whatever_their_history(tmp_path: Path) -> None:
    one, other = States(tmp_path / "a"), States(tmp_path / "b")
    one.write_own("x", tree(1.0))
    one.write_own("y", tree(2.0))
    for value in (7.0, 2.0):
        other.write_own("y", tree(value))
    other.write_own("x", dict(reversed(tree(1.0).items())))
    assert one.hash(tree(3.0)) == other.hash(tree(3.0))
    one.commit(1, tree(3.0), ENGINE, {})
    assert one.hash(tree(3.0)) == other.hash(tree(3.0))


def test_anything_that_differs_changes_the_hash(tmp_path: Path) -> None:
    def of(name: str, server: Tree, **own: Tree) -> str:
        states = States(tmp_path / name)
        for client, state in own.items():
            states.write_own(client, state)
        return states.hash(server)

    nearly = tree(1.0)
    nearly["params"]["w"][2, 3] = torch.nextafter(nearly["params"]["w"][2, 3], torch.tensor(9.0))
    hashes = [
        of("a", tree(1.0), x=tree(2.0), y=tree(3.0)),
        of("b", nearly, x=tree(2.0), y=tree(3.0)),
        of("c", tree(1.0), x=tree(3.0), y=tree(2.0)),
        of("d", tree(1.0), x=tree(2.0)),
        of("e", tree(1.0), x=tree(2.0), z=tree(3.0)),
        of("f", tree(1.0), x=nearly, y=tree(3.0)),
        of("g", {**tree(1.0), "name": "other"}, x=tree(2.0), y=tree(3.0)),
    ]
    assert len(set(hashes)) == len(hashes)


# Damage.


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x00")


@pytest.mark.parametrize("damage", [_cut, _empty, _flip, _longer, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stem", ["server", "engine", "own-c0", "own-c1"])
def test_a_damaged_state_is_a_run_error_that_names_the_file(damage: Callable[[Path], Any], stem: str, tmp_path: Path) -> None:
    committed(tmp_path)
    (path,) = tmp_path.glob(f"{stem}-*")
    damage(path)
    with pytest.raises(RunError, match=path.name) as caught:
        States(tmp_path).resume()
    assert "\n" not in str(caught.value)


MANIFESTS = {
    "nothing": b"",
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"3",
    "none": b"null",
    "no manifest in it": b"{}",
    "no sum in it": json.dumps({"manifest": "{}"}).encode(),
    "a manifest that is no text": json.dumps({"manifest": {}, "sha256": ""}).encode(),
    "a wrong sum": json.dumps({"manifest": "{}", "sha256": "00"}).encode(),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_damaged_manifest_is_a_run_error_that_names_it(case: str, tmp_path: Path) -> None:
    committed(tmp_path)
    before = files(tmp_path)
    (tmp_path / MANIFEST).write_bytes(MANIFESTS[case])
    with pytest.raises(RunError, match=MANIFEST):
        States(tmp_path).resume()
    assert files(tmp_path) == before  # nothing is swept on the word of a broken manifest


def test_every_flipped_byte_and_every_truncation_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    committed(tmp_path)
    path = tmp_path / MANIFEST
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(RunError, match=MANIFEST):
                States(tmp_path).resume()
    path.write_bytes(whole)
    assert States(tmp_path).resume() is not None


def test_an_own_state_that_was_altered_while_running_is_a_run_error(tmp_path: Path) -> None:
    states = committed(tmp_path)
    _flip(tmp_path / states.own["c0"])
    with pytest.raises(RunError, match="own-c0"):
        states.read_own("c0")


# A kill at any step.


class Killed(BaseException):
    """Nothing catches it: a `finally` runs, as it does not after a real kill, so leftovers are tried apart."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, after: bool) -> Iterator[list[str]]:
    """Raise `Killed` before or after the step-th (from 0) touch of the disk; gives the names of the steps that ran."""
    ran: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            last = len(ran) == step
            ran.append(name)
            if last and not after:
                raise Killed(name)
            result = real(*args, **options)
            if last:
                raise Killed(name)
            return result

        return call

    with monkeypatch.context() as patched:
        for where, names in (
            (os, ["fsync"]),
            (Path, ["replace", "chmod", "unlink", "write_text"]),
            (wire.tempfile, ["mkstemp"]),
            (wire, ["save_file"]),
        ):
            for name in names:
                patched.setattr(where, name, watched(name, getattr(where, name)))
        yield ran


def second(states: States) -> None:
    states.write_own("c1", tree(21.0))
    states.write_own("c2", tree(22.0))
    states.commit(2, tree(2.0), {"clock": 2.5, "under_way": {}}, {"bytes": 2})


def checkpoint(folder: Path) -> list[Any]:
    """Everything that a resume gives."""
    states = States(folder)
    found = states.resume()
    assert found is not None
    return [*found, {client: states.read_own(client) for client in sorted(states.own)}, states.hash(found[1])]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_step_leaves_the_first_checkpoint_or_the_second(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checkpoint(committed(tmp_path / "first").folder)
    done = committed(tmp_path / "second")
    second(done)
    both = [first, checkpoint(tmp_path / "second")]
    reached, survived = [], []
    for step in range(200):
        folder = tmp_path / f"kill-{step}"
        states = committed(folder)
        with killed_at(step, monkeypatch, after) as ran:
            try:
                second(states)
                break
            except Killed as kill:
                reached.append(str(kill))
        (folder / ".writing-left").write_bytes(b"what a real kill leaves behind")
        got = checkpoint(folder)
        survived.append([same(got, want) for want in both].index(True))
        assert len(files(folder)) == len([MANIFEST, "server", "engine"]) + len(got[4])  # leftovers are swept
        # The run goes on from there and ends where it would have ended.
        again = States(folder)
        again.resume()
        if survived[-1] == 0:
            second(again)
        assert same(checkpoint(folder), both[1])
    assert len(ran) == len(reached) > 20  # every step was tried, and then one run without a kill
    assert {"mkstemp", "save_file", "fsync", "chmod", "replace", "unlink", "write_text"} == set(reached)
    assert survived == sorted(survived)  # the first, up to one moment, and the second from then on
    assert set(survived) == {0, 1}


def test_a_state_that_was_half_written_under_its_final_name_is_never_read(tmp_path: Path) -> None:
    committed(tmp_path)
    want = checkpoint(tmp_path)
    (tmp_path / "own-c1-00000005.safetensors").write_bytes(b"half")
    (tmp_path / "server-00000007.safetensors").write_bytes(b"")
    assert same(checkpoint(tmp_path), want)


def test_a_kill_before_the_first_checkpoint_leaves_nothing_to_resume(tmp_path: Path) -> None:
    states = States(tmp_path)
    states.write_own("c0", tree(1.0))
    assert States(tmp_path).resume() is None
    assert files(tmp_path) == set()


def test_a_full_disk_is_a_run_error_and_the_run_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = committed(tmp_path)
    want = checkpoint(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("save_file", "write_text"):
        with monkeypatch.context() as patched:
            patched.setattr(wire if step == "save_file" else Path, step, full)
            with pytest.raises(RunError, match="No space left"):
                states.commit(2, tree(2.0), ENGINE, {})
        assert same(checkpoint(tmp_path), want)
    second(states)
    assert checkpoint(tmp_path)[0] == 2


def test_a_tree_a_client_fits_into_a_checkpoint(tmp_path: Path) -> None:
    """Names of 700 trees are more than a stranger's message may have."""
    many = {
        f"client-{i:05d}": {f"encoder.layer.{k}.attention.self.value.lora_A.weight": torch.ones(1) for k in range(26)}
        for i in range(1500)
    }
    with pytest.raises(wire.WireError, match="header"):
        wire.encode(Message("state", many))
    states = States(tmp_path)
    states.commit(1, {"trees": many}, ENGINE, {})
    assert len(states.hash({"trees": many})) == 64
    again = States(tmp_path).resume()
    assert again is not None
    assert again[1]["trees"].keys() == many.keys()
