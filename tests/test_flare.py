"""What carries parcels where FLARE runs, and the jobs that go there; without FLARE."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

pytest.importorskip("grpc")

from commands import Printed
from fedtailor import wire
from fedtailor.config import parse
from fedtailor.errors import ConfigError, RunError
from fedtailor.federation.frames import Parcel
from fedtailor.federation.member import Limits, Member
from fedtailor.federation.member import Own as Given
from fedtailor.federation.serve import Standing, gather
from fedtailor.flare import calls, cargo
from fedtailor.flare.brought import brought
from fedtailor.flare.calls import Calls, Site
from fedtailor.flare.desk import Desk
from fedtailor.flare.job import digest_of, files, opened
from fedtailor.folder import written
from fedtailor.run import Watch
from owners import Owners, owners

OWN = {"name": "j", "data": {"name": "own", "kind": "text", "labels": ["a", "b"]}, "clients": {"count": 2}}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Owners:
    return owners(tmp_path_factory.mktemp("owners"), folders("bert"))


def site_of(desk: Desk) -> Site:
    return Site(lambda id, note, load, s, _: desk.deliver(id, dict(note), load, s), lambda id, s, _: desk.collect(id, s))


def of(post: Calls, kind: str, seconds: float = 20) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            event = post.events.get(timeout=0.1)
        except queue.Empty:
            continue
        if event.kind == kind:
            return event
    raise AssertionError(f"no event '{kind}'")


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[Callable[..., Calls]]:
    made: list[Calls] = []

    def make(site: Site, least: int = 0, limit: int = wire.MAX_BYTES) -> Calls:
        made.append(Calls({"a": site}, tmp_path, limit, least))
        return made[-1]

    yield make
    for post in made:
        post.close()


def test_a_federation_over_calls_ends_in_the_bits_of_the_simulation(three: Owners, tmp_path: Path) -> None:
    desks: dict[str, Desk] = {}
    for name, path in three.own.items():
        desks[name] = Desk()
        (tmp_path / name).mkdir()
        desks[name].open(tmp_path / name, wire.MAX_BYTES)
        member = Member(name, desks[name], tmp_path / name, Given(str(path), models=(str(three.model),)), Limits())
        threading.Thread(target=lambda m=member, d=desks[name]: (m.serve(), d.end("")), daemon=True).start()
    post = Calls({name: site_of(desk) for name, desk in desks.items()}, tmp_path, wire.MAX_BYTES, 1)
    prefix = {"technique": {"kind": "prefix", "length": 3}}
    try:
        summary = gather(three.apart(**prefix), tmp_path / "run", post, Watch(), Standing("owners", 2))
    finally:
        post.close()
    alone = three.simulated(tmp_path / "simulated", **prefix)
    same = ["state_hash", "global_test", "clients_mean", "bytes_total", "flops_total"]
    assert {k: summary[k] for k in same} == {k: alone[k] for k in same}
    assert all((tmp_path / name / "adapter" / "adapter_config.json").is_file() for name in three.own)


@pytest.mark.parametrize("size", [0, 5, cargo.LARGE - 1, cargo.LARGE, 2 * cargo.PIECE + 3])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_load_is_what_was_packed(tmp_path: Path, size: int, on_disk: bool) -> None:
    blob = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    (tmp_path / "given").write_bytes(blob)
    packed = cargo.packed(tmp_path / "given" if on_disk else blob)
    assert isinstance(packed, bytes) == (size < cargo.LARGE)
    found = cargo.unpacked(packed, tmp_path, size)
    assert (found if isinstance(found, bytes) else found.read_bytes()) == blob
    if size:
        with pytest.raises(RunError, match="the limit"):
            cargo.unpacked(packed, tmp_path, size - 1)


@pytest.mark.parametrize("load", ["text", None, [b"bytes"], {"a": 1}])
def test_what_is_no_load_is_refused(tmp_path: Path, load: Any) -> None:
    with pytest.raises(RunError):
        cargo.unpacked(load, tmp_path, 100)


def test_a_lost_call_is_made_again_and_takes_effect_once(
    tmp_path: Path, lane: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "PAUSE", 0.01)
    desk, tries = Desk(), []
    desk.open(tmp_path, 100)

    def deliver(id: str, note: Mapping[str, Any], load: Any, seconds: float, patience: float) -> Mapping[str, Any]:
        tries.append(id)
        answer = desk.deliver(id, dict(note), load, 0.0)
        if len(tries) < 3:
            raise TimeoutError("lost on the way back")
        return answer

    post = lane(Site(deliver, site_of(desk).collect))
    post.send("a", Parcel("1", {"is": "letter"}, b"hello"))
    assert of(post, "detached").member == "a"
    assert of(post, "attached").header == {"fresh": False}
    assert desk.inbox.get(timeout=5) == Parcel("1", {"is": "letter"}, b"hello")
    desk.send(Parcel("1", {"n": 3}, b"reply"))
    assert of(post, "parcel").parcel == Parcel("1", {"n": 3}, b"reply")
    assert len(tries) >= 3
    assert desk.inbox.empty()


def test_a_reply_that_nobody_waits_for_is_passed_over(tmp_path: Path, lane: Callable[..., Calls]) -> None:
    desk = Desk()
    desk.open(tmp_path, 100)
    post = lane(site_of(desk))
    post.send("a", Parcel("1", {}, b""))
    desk.inbox.get(timeout=5)
    post.recall("a", "1")
    post.send("a", Parcel("2", {}, b""))
    desk.send(Parcel("1", {}, b"late"))
    desk.inbox.get(timeout=15)
    desk.send(Parcel("2", {}, b"now"))
    assert of(post, "parcel").parcel.content == b"now"


@pytest.mark.parametrize("why", ["its data is not there", "the reply is no parcel"])
def test_a_run_without_members_ends_and_says_why(tmp_path: Path, lane: Callable[..., Calls], why: str) -> None:
    desk = Desk()
    desk.open(tmp_path, 100)
    post = lane(site_of(desk), least=1)
    post.send("a", Parcel("1", {}, b""))
    desk.inbox.get(timeout=5)
    desk.end(why)
    with pytest.raises(RunError, match=f"too few members are left.*a: {why}"):
        of(post, "parcel")


def test_a_job_is_three_files_of_values(three: Owners) -> None:
    found = files(parse(OWN), ["b", "a"])
    assert sorted(found) == ["app/config/config_fed_client.json", "app/config/config_fed_server.json", "meta.json"]
    meta, server, client = json.loads(found["meta.json"]), *(json.loads(found[name]) for name in sorted(found)[1::-1])
    assert (meta["min_clients"], meta["mandatory_clients"]) == (2, ["b", "a"])
    assert meta["deploy_map"] == {"app": ["server", "b", "a"]}
    args = server["components"][0]["args"]
    assert digest_of(args["experiment"]) == args["digest"]
    assert client["components"][0]["path"] == "fedtailor.flare.site.Participant"
    assert found == files(parse(OWN), ["b", "a"])
    assert json.loads(files(parse(OWN))["meta.json"])["deploy_map"] == {"app": ["@ALL"]}


def test_the_server_opens_what_was_submitted_and_nothing_else() -> None:
    args = json.loads(files(parse(OWN))["app/config/config_fed_server.json"])["components"][0]["args"]
    lines, digest = args["experiment"], args["digest"]
    assert written(opened(lines, digest, ["a", "b"])) == written(parse(OWN))
    with pytest.raises(ConfigError, match="not what was submitted"):
        opened([line.replace("count = 2", "count = 1") for line in lines], digest, ["a", "b"])
    with pytest.raises(ConfigError, match=r"clients.count is 2, and the job runs at 1 sites \(a\)"):
        opened(lines, digest, ["a"])
    code = [line for line in lines if not line.startswith('kind = "fedavg"')]
    at = code.index("[algorithm]") + 1
    code[at:at] = ['kind = "mine.py:f"']
    with pytest.raises(ConfigError, match="is code"):
        opened(code, digest_of(code), ["a", "b"])


@pytest.mark.parametrize(
    ("changes", "sites", "told"),
    [
        ({"algorithm": {"kind": "mine.py:f"}}, [], "is code: a job carries none"),
        ({"algorithm": {"kind": "pooled"}}, [], "use run"),
        ({}, ["a"], "clients.count is 2, but --sites names 1"),
    ],
)
def test_what_no_job_can_carry(changes: dict[str, Any], sites: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        files(parse({**OWN, **changes}), sites)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "name the site's data"),
        ('data = "x"\ndate = "y"', "unknown key 'date': did you mean 'data'"),
        ("data = 3", "data cannot be 3"),
        ('data = "x"\nepochs = true', "epochs cannot be True"),
        ('data = "x"\npair = ["a"]', "two columns"),
        ("data = ", "cannot be read"),
    ],
)
def test_a_site_that_says_something_wrong_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "fedtailor.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        brought(tmp_path, "a")


def test_one_file_may_serve_several_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all.toml").write_text(
        'data = "{site}.csv"\nmb_a_round = 2\npair = ["p", "q"]\nverbs = ["train"]', encoding="utf-8"
    )
    monkeypatch.setenv("FEDTAILOR_MEMBER", str(tmp_path / "all.toml"))
    found = brought(Path("nowhere"), "north")
    assert found.own == Given("north.csv", pair=("p", "q"))
    for text, models in (('"here"', ("here",)), ('["a=here", "b=there"]', ("a=here", "b=there"))):
        (tmp_path / "one.toml").write_text(f'data = "x.csv"\nmodel = {text}', encoding="utf-8")
        monkeypatch.setenv("FEDTAILOR_MEMBER", str(tmp_path / "one.toml"))
        assert brought(Path("nowhere"), "north").own.models == models
    monkeypatch.setenv("FEDTAILOR_MEMBER", str(tmp_path / "all.toml"))
    assert (found.limits.bytes, found.limits.verbs) == (2e6, frozenset({"train"}))
    monkeypatch.setenv("FEDTAILOR_MEMBER", str(tmp_path / "{site}.toml"))
    with pytest.raises(ConfigError, match=r"north\.toml' is not there"):
        brought(Path("nowhere"), "north")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--to flower --export x", "--to cannot be 'flower': "),
        ("--to nvflare", "either --admin KIT"),
        ("--to nvflare --admin x --export y", "either --admin KIT"),
        ("--to nvflare --export x --wait", "--wait goes with --admin"),
        ("--to nvflare --export x --sites a,server", "'server' is no name of a site"),
        ("--to nvflare --export x --sites a,a", "names a site twice"),
    ],
)
def test_wrong_options_of_submit(typed: Callable[..., Printed], words: str, told: str) -> None:
    printed = typed(f"submit e.toml {words}")
    assert printed.code == 2
    assert told in printed.err


def test_submit_without_flare_names_the_extra(
    tmp_path: Path, typed: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "e.toml").write_text(tomli_w.dumps(OWN), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "nvflare", None)
    monkeypatch.delitem(sys.modules, "nvflare.collab", raising=False)
    printed = typed(f"submit {tmp_path / 'e.toml'} --to nvflare --admin {tmp_path}")
    assert printed.code == 2
    assert "pip install 'fedtailor[nvflare]'" in printed.err.replace("\n", " ")


def test_an_exported_job_is_what_is_sent_and_nothing_else_is_written_over(tmp_path: Path, typed: Callable[..., Printed]) -> None:
    (tmp_path / "e.toml").write_text(tomli_w.dumps(OWN), encoding="utf-8")
    command = f"submit {tmp_path / 'e.toml'} --to nvflare --export {tmp_path / 'jobs'} --json"
    assert json.loads(typed(command).out) == {"folder": str(tmp_path / "jobs" / "j")}
    found = {p.relative_to(tmp_path / "jobs" / "j").as_posix(): p for p in (tmp_path / "jobs").rglob("*.*") if p.is_file()}
    assert {name: path.read_text(encoding="utf-8") for name, path in found.items()} == files(parse(OWN))
    assert typed(command).code == 0
    (tmp_path / "jobs" / "j" / "notes.txt").touch()
    assert "holds something else (notes.txt)" in typed(command).err.replace("\n", " ")
