"""What a user of a federation gets wrong: one line each, the documented exit code, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("grpc")

import tomli_w

from commands import Printed
from fedtailor.federation import certificates, keys
from fedtailor.federation.doors import server_doors
from fedtailor.federation.member import Limits, Own
from fedtailor.folder import plain
from owners import Federation, Owners, federated, owners
from test_deployed import Process, free_port


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Owners:
    return owners(tmp_path_factory.mktemp("owners"), folders("bert"))


@pytest.fixture
def experiment(three: Owners, tmp_path: Path) -> Path:
    path = tmp_path / "e.toml"
    path.write_text(tomli_w.dumps(plain(three.apart())), encoding="utf-8")
    return path


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody else listens, and says nothing."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("serve {e} --keys nowhere", 2, "keys init"),
        ("serve nowhere.toml --insecure", 2, "does not exist"),
        ("serve {e} --insecure --at here", 2, "HOST:PORT"),
        ("serve {e} --insecure --at 127.0.0.1:99999", 2, "HOST:PORT"),
        ("serve {e} --insecure --at 127.0.0.1:{taken}", 4, "cannot listen on"),
        ("serve {e} --insecure --set data.labels=[]", 2, "data.labels"),
        ("serve {e} --insecure --set data.kind=auto", 2, "data.kind"),
        ("serve {e} --insecure --set algorithm.kind=pooled", 2, "use run"),
        ("run {e}", 2, "use serve and join"),
        ("join server --insecure --name a --data {d}", 2, "HOST:PORT"),
        ("join 127.0.0.1:1 --data {d}", 2, "keys invite"),
        ("join 127.0.0.1:1 --token ft1.abc --data {d}", 2, "token"),
        ("join 127.0.0.1:1 --token @nowhere --data {d}", 2, "cannot be read"),
        ("join 127.0.0.1:1 --insecure --name a", 2, "--data PATH"),
        ("join 127.0.0.1:1 --insecure --data {d}", 2, "--name NAME"),
        ("join 127.0.0.1:1 --name a --data {d}", 2, "--insecure"),
        ("join 127.0.0.1:1 --insecure --name a --data nowhere.csv", 3, "nowhere.csv"),
        ("join 127.0.0.1:1 --insecure --name a --data {d} --pair one", 2, "FIRST,SECOND"),
        ("status 127.0.0.1:1 --insecure", 4, "cannot reach 127.0.0.1:1"),
        ("status 127.0.0.1:1", 2, "keys init"),
        ("joyn 127.0.0.1:1", 2, "join"),
    ],
)
def test_one_line_and_its_code(
    words: str, code: int, told: str, three: Owners, experiment: Path, taken: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, typed: Callable[..., Printed],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    printed = typed(words.format(e=experiment, d=three.own["east"], taken=taken))
    said = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert (printed.code, len(said)) == (code, 1), printed
    assert told in said[0]
    assert not (tmp_path / "runs").exists()


def test_a_token_at_a_port_where_nobody_is(
    tmp_path: Path, three: Owners, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., Printed]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys.init(tmp_path / "keys")
    token = keys.invite(tmp_path / "keys", "east")
    printed = typed(f"join 127.0.0.1:{free_port()} --token {token} --data {three.own['east']}")
    assert printed.code == 4
    assert "is the server started" in printed.err


def test_a_clock_that_is_wrong_and_a_certificate_that_has_expired(
    tmp_path: Path, three: Owners, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., Printed]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys.init(tmp_path / "keys")
    token = keys.read_token(keys.invite(tmp_path / "keys", "east"))
    key, request = keys.request("east")
    signed = keys.enrol(tmp_path / "keys", token.certificate, request, days=10)
    keys.keep(tmp_path / "member", keys.Identity("east", key, signed, token.authority))
    for days, told in ((20, "expired"), (-20, "clock")):
        monkeypatch.setattr(certificates, "now", lambda days=days: datetime.now(UTC) + timedelta(days=days))
        printed = typed(f"join 127.0.0.1:1 --data {three.own['east']}")
        assert printed.code == 4
        assert told in printed.err


@pytest.mark.parametrize(
    ("own", "limits", "told"),
    [
        (Own(text="nothing"), Limits(), "no column 'nothing'"),
        (Own(models=("nowhere",)), Limits(), "nowhere"),
        (Own(), Limits(epochs=0.5), "(--epochs)"),
        (Own(data="{bad}"), Limits(), "not among the training labels"),
    ],
)
def test_a_member_that_does_not_suit_is_told_and_tells(
    own: Own, limits: Limits, told: str, three: Owners, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nfox,good\ndog,wrong\n", encoding="utf-8")
    federation = Federation(three.apart(clients={"count": 1}), tmp_path)
    own = own._replace(data=str(bad) if own.data else str(three.own["east"]), models=own.models or (str(three.model),))
    federation.member("east", own, limits=limits)
    assert told in federation.notices[-1] or told in "".join(federation.notices)
    ended = federation.wait("east")
    assert isinstance(ended, Exception)
    assert told in str(ended)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (Limits(verbs=frozenset({"answer"})), "verb 'train' is not allowed here"),
        (Limits(bytes=1000.0), "(--mb-a-round)"),
    ],
)
def test_a_server_that_asks_for_more_than_is_allowed_is_refused(limits: Limits, told: str, three: Owners, tmp_path: Path) -> None:
    served = federated(three, tmp_path, limits=limits)
    assert told in " ".join(served.notices)
    assert isinstance(served.summary, Exception)  # nobody was heard
    assert "no client was heard" in str(served.summary)


def test_another_tokenizer_another_backbone(three: Owners, tmp_path: Path, folders: Callable[[str], Path]) -> None:
    federation = Federation(three.apart(clients={"count": 1}), tmp_path)
    federation.member("east", Own(str(three.own["east"]), models=(str(folders("roberta")),)))
    assert "its backbone (the weights) differs from the server's" in str(federation.wait("east"))


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ((), "--model {bert}=FOLDER --model {wide}=FOLDER"),
        (("{bert}",), "--model {bert}=FOLDER --model {wide}=FOLDER"),
        (("{wide}={wide}",), "name your copy of it with --model FOLDER"),
        (("{wide}={wide}", "{bert}", "more"), "'more' is one too many"),
        (("{wide}={other}", "{bert}"), "the backbone of its kind (the weights) differs from the server's"),
    ],
)
def test_the_models_of_a_kind(
    models: tuple[str, ...], told: str, three: Owners, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    at = {name: str(folders(family)) for name, family in (("bert", "bert"), ("wide", "distilbert"), ("other", "roberta"))}
    kinds = [{"model": {"name": at["wide"]}}]
    federation = Federation(three.apart(algorithm={"kind": "local"}, clients={"count": 1, "kinds": kinds}), tmp_path)
    federation.member("east", Own(str(three.own["east"]), models=tuple(given.format(**at) for given in models)))
    assert told.format(**at) in str(federation.wait("east"))


def test_other_public_examples(three: Owners, tmp_path: Path) -> None:
    """Members speak of public examples by number: one with others would be misunderstood."""
    federation = Federation(three.apart(algorithm={"kind": "distil", "rows": 8}, clients={"count": 1}), tmp_path)
    federation.member("east", Own(str(three.own["east"]), models=(str(three.model),), public=str(three.test)))
    assert "its set of public examples differs from the server's" in str(federation.wait("east"))


def test_an_unknown_and_a_revoked_member_are_refused(three: Owners, tmp_path: Path, typed: Callable[..., Printed]) -> None:
    folder = tmp_path / "keys"
    keys.init(folder)
    federation = Federation(three.apart(clients={"count": 1}), tmp_path, server_doors(folder))
    member, home = f"join {federation.address} --data {three.own['east']} --home", tmp_path / "east"
    token = keys.invite(folder, "east")
    keys.revoke(folder, "east")
    printed = typed(f"{member} {home} --token {token}")
    assert printed.code == 4
    assert "revoked" in printed.err
    keys.init(tmp_path / "others")
    stranger = keys.invite(tmp_path / "others", "east")
    printed = typed(f"{member} {home} --token {stranger}")
    assert printed.code == 4
    assert "authority" in printed.err
    assert typed(f"status {federation.address} --keys {folder} --json").code == 0
    assert typed(f"status {federation.address} --keys {tmp_path / 'others'}").code == 4


def test_ctrl_c_on_either_side(three: Owners, experiment: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    server = Process(
        tmp_path / "server.log", "serve", str(experiment), "--insecure", "--at", address, "--out", str(tmp_path / "run")
    )
    data = ("--data", str(three.own["east"]), "--home", str(tmp_path / "home"))
    member = Process(tmp_path / "member.log", "join", address, "--insecure", "--name", "east", *data)
    try:
        server.until("1 of 3 members are attached: east")
        member.until("attached to")
        for process, told in ((member, "join again to go on"), (server, "add --resume")):
            os.kill(process.pid, signal.SIGINT)
            assert process.end(30) == 130
            assert told in process.log.read_text()
    finally:
        server.kill()
        member.kill()
