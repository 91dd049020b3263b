"""Who may speak to a federation's server: tokens, certificates and the ledger, against `cryptography`'s verifiers and real TLS."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from commands import Printed
from fedtailor.errors import ConfigError, RunError
from fedtailor.federation import certificates, keys
from fedtailor.federation.keys import Identity, Refused, Token
from fedtailor.simulation import safe

PEM = serialization.Encoding.PEM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.init(tmp_path / "keys")
    return tmp_path / "keys"


def joined(folder: Path, name: str, token: Token | None = None) -> Identity:
    """What a client does: it reads its token, asks, and is enrolled."""
    token = token or keys.read_token(keys.invite(folder, name))
    key, csr = keys.request(token.name)
    return Identity(name, key, keys.enrol(folder, token.certificate, csr), token.authority)


def later(monkeypatch: pytest.MonkeyPatch, **by: float) -> None:
    moment = datetime.now(UTC) + timedelta(**by)
    monkeypatch.setattr(certificates, "now", lambda: moment)


def verifiers(authority: bytes) -> tuple[Any, Any]:
    builder = PolicyBuilder().store(Store([x509.load_pem_x509_certificate(authority)]))
    return builder.build_client_verifier(), builder.build_server_verifier(x509.DNSName("fedtailor-server"))


def csr_with(key: Any, name: str = "ann", ca: bool = False, digest: Any = None) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("fedtailor-server")]), critical=False)
    return builder.sign(key, digest).public_bytes(PEM)


def test_an_invited_client_enrols_and_is_known_by_its_certificate(folder: Path, tmp_path: Path) -> None:
    assert keys.members(folder) == []
    token = keys.read_token(keys.invite(folder, "ann"))
    assert token.name == "ann"
    assert [(name, state) for name, state, _ in keys.members(folder)] == [("ann", "invited")]
    ann = joined(folder, "ann", token)
    assert keys.member_of(folder, ann.certificate) == "ann"
    day = (datetime.now(UTC) + timedelta(days=825)).date()
    assert keys.members(folder) in ([("ann", "enrolled", str(day))], [("ann", "enrolled", str(day - timedelta(days=1)))])
    assert keys.identity(tmp_path / "own") is None
    keys.keep(tmp_path / "own", ann)
    assert keys.identity(tmp_path / "own") == ann
    assert keys.server_identity(folder).name == "server"
    assert keys.server_identity(folder).authority == ann.authority


def test_a_token_is_used_once(folder: Path) -> None:
    token = keys.read_token(keys.invite(folder, "ann"))
    ann = joined(folder, "ann", token)
    with pytest.raises(Refused, match="used"):
        joined(folder, "ann", token)
    assert keys.member_of(folder, ann.certificate) == "ann"


def test_an_expired_invitation_is_refused_on_both_sides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = keys.invite(folder, "ann", hours=2)
    token = keys.read_token(text)
    later(monkeypatch, hours=1.9)
    keys.read_token(text)
    later(monkeypatch, hours=2.1)
    with pytest.raises(ConfigError, match=r"expired on .* if this machine's clock is right"):
        keys.read_token(text)
    with pytest.raises(Refused, match="the invitation of 'ann' expired"):
        joined(folder, "ann", token)
    later(monkeypatch, minutes=-4)  # a clock that is a little late
    keys.read_token(text)
    later(monkeypatch, minutes=-10)
    with pytest.raises(ConfigError, match=r"not valid before .* check this machine's clock"):
        keys.read_token(text)


def test_a_new_invitation_voids_the_unused_one(folder: Path) -> None:
    old = keys.read_token(keys.invite(folder, "ann"))
    new = keys.read_token(keys.invite(folder, "ann"))
    with pytest.raises(Refused, match="invitation of 'ann' was replaced"):
        joined(folder, "ann", old)
    joined(folder, "ann", new)


def test_a_member_who_lost_its_key_keeps_its_place_until_it_has_a_new_one(folder: Path) -> None:
    old = joined(folder, "ann")
    token = keys.read_token(keys.invite(folder, "ann"))
    assert keys.member_of(folder, old.certificate) == "ann"
    assert [state for _, state, _ in keys.members(folder)] == ["enrolled"]
    new = joined(folder, "ann", token)
    assert keys.member_of(folder, new.certificate) == "ann"
    with pytest.raises(Refused, match="certificate of 'ann' was replaced"):
        keys.member_of(folder, old.certificate)


def test_who_is_revoked_is_out_until_invited_again(folder: Path) -> None:
    ann, bob = joined(folder, "ann"), joined(folder, "bob")
    pending = keys.read_token(keys.invite(folder, "ann"))
    keys.revoke(folder, "ann")
    with pytest.raises(Refused, match="certificate of 'ann' was revoked"):
        keys.member_of(folder, ann.certificate)
    with pytest.raises(Refused, match="invitation of 'ann' was revoked"):
        joined(folder, "ann", pending)
    assert keys.member_of(folder, bob.certificate) == "bob"
    assert [(name, state) for name, state, _ in keys.members(folder)] == [("ann", "revoked"), ("bob", "enrolled")]
    again = joined(folder, "ann")
    assert keys.member_of(folder, again.certificate) == "ann"
    with pytest.raises(Refused, match="revoked"):
        keys.member_of(folder, ann.certificate)
    with pytest.raises(ConfigError, match="did you mean 'ann'"):
        keys.revoke(folder, "anne")


def test_an_expired_member_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = joined(folder, "ann")
    keys.keep(tmp_path / "own", ann)
    later(monkeypatch, days=826)
    with pytest.raises(Refused, match="certificate of 'ann' expired on"):
        keys.member_of(folder, ann.certificate)
    with pytest.raises(RunError, match=r"expired on .* clock"):
        keys.identity(tmp_path / "own")
    later(monkeypatch, days=-1)
    with pytest.raises(RunError, match=r"not valid before .* check this machine's clock"):
        keys.identity(tmp_path / "own")
    later(monkeypatch, days=4000)
    with pytest.raises(RunError, match=r"the authority .* expired"):
        keys.invite(folder, "bob")


def test_nothing_outlives_the_authority(tmp_path: Path) -> None:
    keys.init(tmp_path, days=10)
    ann = joined(tmp_path, "ann")
    ends = [x509.load_pem_x509_certificate(pem).not_valid_after_utc for pem in (ann.certificate, ann.authority)]
    assert ends[0] == ends[1]


def test_certificates_of_another_authority_are_unknown(folder: Path, tmp_path: Path) -> None:
    keys.init(tmp_path / "other")
    foreign = joined(tmp_path / "other", "ann")
    joined(folder, "ann")
    with pytest.raises(Refused, match="unknown certificate"):
        keys.member_of(folder, foreign.certificate)
    with pytest.raises(Refused, match="unknown invitation"):
        joined(folder, "ann", keys.read_token(keys.invite(tmp_path / "other", "ann")))
    for pem in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", foreign.key, b"x" * 100_000):
        with pytest.raises(Refused):
            keys.member_of(folder, pem)


def test_an_invitation_is_no_membership_and_the_other_way_round(folder: Path) -> None:
    token = keys.read_token(keys.invite(folder, "ann"))
    with pytest.raises(Refused, match="an invitation"):
        keys.member_of(folder, token.certificate)
    ann = joined(folder, "ann", token)
    with pytest.raises(Refused, match="not an invitation"):
        keys.enrol(folder, ann.certificate, keys.request("ann")[1])
    with pytest.raises(Refused, match="unknown"):
        keys.member_of(folder, keys.server_identity(folder).certificate)


@pytest.mark.parametrize("name", ["ann", "a_b", "-x", "...", "A.b-", "x" * certificates.MAX_NAME])
def test_an_independent_verifier_accepts_the_chains_for_their_own_usage_alone(folder: Path, name: str) -> None:
    member, server = joined(folder, name), keys.server_identity(folder)
    of_clients, of_servers = verifiers(server.authority)
    client_leaf, server_leaf = (x509.load_pem_x509_certificate(one.certificate) for one in (member, server))
    assert of_clients.verify(client_leaf, []).subjects == [x509.DNSName(name)]
    assert of_servers.verify(server_leaf, [])[0] == server_leaf
    for verifier, leaf in ((of_clients, server_leaf), (of_servers, client_leaf)):
        with pytest.raises(VerificationError):
            verifier.verify(leaf, [])


def test_a_member_can_certify_nobody(folder: Path) -> None:
    """Its certificate, used as an authority's, is not one to the verifier."""
    ann = joined(folder, "ann")
    own = x509.load_pem_x509_certificate(ann.certificate)
    key = serialization.load_pem_private_key(ann.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    until = own.not_valid_after_utc
    child = certificates.sign(own, key, "bob", certificates.new_key().public_key(), until, certificates.CALLS, "bob")
    with pytest.raises(VerificationError):
        verifiers(ann.authority)[0].verify(child, [own])


def test_nothing_but_the_key_is_taken_from_a_request(folder: Path) -> None:
    token = keys.read_token(keys.invite(folder, "ann"))
    key = ec.generate_private_key(ec.SECP256R1())
    pem = keys.enrol(folder, token.certificate, csr_with(key, "server", ca=True, digest=hashes.SHA256()))
    found = x509.load_pem_x509_certificate(pem)
    assert found.public_key() == key.public_key()
    assert found.subject.rfc4514_string() == "CN=ann"
    extensions = found.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == [x509.DNSName("ann")]
    assert keys.member_of(folder, pem) == "ann"


def test_an_unsound_request_is_refused_and_leaves_the_invitation_unused(folder: Path) -> None:
    token = keys.read_token(keys.invite(folder, "ann"))
    good = keys.request("ann")[1]
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(PEM)
    unsound = {
        "not signed": forged,
        "not an EC P-256": csr_with(ec.generate_private_key(ec.SECP384R1()), digest=hashes.SHA256()),
        "is not an EC": csr_with(rsa.generate_private_key(65537, 1024), digest=hashes.SHA256()),
        "key is not an": csr_with(ed25519.Ed25519PrivateKey.generate()),
        "not a certificate signing request": good[:-200],
        "limit": good + b" " * 100_000,
    }
    for words, csr in unsound.items():
        with pytest.raises(Refused, match=words):
            keys.enrol(folder, token.certificate, csr)
    keys.enrol(folder, token.certificate, good)


def test_a_token_that_is_cut_or_garbled_is_a_line_to_the_user(folder: Path) -> None:
    text = keys.invite(folder, "ann")
    assert text.startswith("ft1.")
    assert text.isascii()
    assert len(text) < 2000
    assert keys.read_token(f" {text}\n") == keys.read_token(text)
    bad = [text[:n] for n in range(len(text))]
    bad += [text[:n] + ("A" if text[n] != "A" else "B") + text[n + 1 :] for n in range(0, len(text), 7)]
    bad += [text[:-1] + c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=+/ é\0" if c != text[-1]]
    bad += [f"{text}A", f"{text}=", text + text, text.replace("ft1.", "ft2."), text[:50] + "\n" + text[50:], "ft1." + "A" * 10**7]
    for one in bad:
        with pytest.raises(ConfigError) as told:
            keys.read_token(one)
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 200


def test_a_token_whose_parts_are_not_of_one_authority_is_refused(folder: Path, tmp_path: Path) -> None:
    """Whole and with a right digest, but not written by one `invite`."""
    from fedtailor.federation.tokens import write_token

    keys.init(tmp_path / "other")
    ann, other = keys.read_token(keys.invite(folder, "ann")), keys.read_token(keys.invite(tmp_path / "other", "ann"))
    certificate, foreign = (x509.load_pem_x509_certificate(one.certificate) for one in (ann, other))
    root, foreign_root = (x509.load_pem_x509_certificate(one.authority) for one in (ann, other))
    key = serialization.load_pem_private_key(ann.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert keys.read_token(write_token(root, certificate, key)) == ann
    for parts in ((foreign_root, certificate, key), (root, foreign, key), (root, certificate, certificates.new_key())):
        with pytest.raises(ConfigError, match="garbled"):
            keys.read_token(write_token(*parts))


def test_keys_are_their_owners_alone(folder: Path, tmp_path: Path) -> None:
    keys.keep(tmp_path / "own", joined(folder, "ann"))
    for where in (folder, tmp_path / "own"):
        assert where.stat().st_mode & 0o777 == 0o700
        assert {p.name: p.stat().st_mode & 0o777 for p in where.iterdir()} == {p.name: 0o600 for p in where.iterdir()}


def test_keys_are_never_readable_by_others_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    write = Path.write_bytes

    def watched(path: Path, content: bytes) -> int:
        size = write(path, content)
        seen.append(path.stat().st_mode & 0o077)
        return size

    monkeypatch.setattr(Path, "write_bytes", watched)
    (tmp_path / "open").mkdir(mode=0o755)
    keys.init(tmp_path / "open")
    assert seen == [0] * 5
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o700


def test_an_authority_is_never_overwritten(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ConfigError, match="has an authority already"):
        keys.init(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_of_enrolments_at_the_same_time_with_one_token_one_succeeds(folder: Path) -> None:
    for _ in range(5):
        token = keys.read_token(keys.invite(folder, "ann"))

        def attempt(_: int, token: Token = token) -> bytes | None:
            try:
                return joined(folder, "ann", token).certificate
            except Refused:
                return None

        with ThreadPoolExecutor(4) as pool:
            found = [pem for pem in pool.map(attempt, range(4)) if pem]
        assert len(found) == 1
        assert keys.member_of(folder, found[0]) == "ann"


def test_invitations_at_the_same_time_are_all_written_down(folder: Path) -> None:
    names = [f"client{n}" for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: keys.invite(folder, name), names))
    assert {name for name, _, _ in keys.members(folder)} == set(names)


@pytest.mark.parametrize("name", ["", ".", "..", "server", "a b", "a/b", "../a", "é", "a\n", "invite:a", "x" * 58, "\0"])
def test_names_that_nobody_can_have(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no member can have the name") as told:
        keys.invite(folder, name)
    assert "\n" not in str(told.value)


def test_every_name_that_is_allowed_stays_as_it_is_in_files() -> None:
    allowed = []
    for name in [chr(c) for c in range(0x180)] + [a + b for a in "a._-/ :" for b in "a._-/ :"] + ["server", "servers"]:
        try:
            allowed.append(certificates.check_name(name))
        except ConfigError:
            continue
    assert len(allowed) > 70
    assert [safe(name) for name in allowed] == allowed


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf"), 1e9])
def test_hours_that_no_invitation_can_last(folder: Path, hours: float) -> None:
    with pytest.raises(ConfigError, match="hours"):
        keys.invite(folder, "ann", hours)


def test_an_identity_with_a_missing_or_corrupt_file_is_told(folder: Path, tmp_path: Path) -> None:
    ann, bob, own = joined(folder, "ann"), joined(folder, "bob"), tmp_path / "own"
    for name in ("identity.key", "identity.pem", "identity-authority.pem"):
        keys.keep(own, ann)
        whole = (own / name).read_bytes()
        for bad in (whole[: len(whole) // 2], b"", b"\xff" * 50):
            (own / name).write_bytes(bad)
            with pytest.raises(RunError, match=name):
                keys.identity(own)
        (own / name).unlink()
        with pytest.raises(RunError, match=name):
            keys.identity(own)
    keys.keep(own, ann)
    (own / "identity.key").write_bytes(bob.key)
    with pytest.raises(RunError, match="belong together"):
        keys.identity(own)
    for wrong in (ann._replace(key=bob.key), ann._replace(name="bob"), ann._replace(certificate=b"")):
        with pytest.raises(RunError):
            keys.keep(tmp_path / "none", wrong)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}x", '[{"name": "ann"}]', "null", '"text"'])
def test_a_corrupt_ledger_lets_nobody_in(folder: Path, content: str) -> None:
    ann = joined(folder, "ann")
    (folder / "members.json").write_text(content, encoding="utf-8")
    for call in (lambda: keys.member_of(folder, ann.certificate), lambda: keys.members(folder), lambda: keys.invite(folder, "b")):
        with pytest.raises(RunError, match="corrupt"):
            call()


def greeted(server: Identity, client: Identity, folder: Path) -> str:
    """What a server with this identity answers to this client, over mutual TLS: the member's name or its refusal."""

    def greet(asked: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return keys.member_of(folder, context.auth_context()["x509_pem_cert"][0]).encode()
        except Refused as error:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise

    handler = grpc.method_handlers_generic_handler("t", {"greet": grpc.unary_unary_rpc_method_handler(greet)})
    with ThreadPoolExecutor(2) as pool:
        listening = grpc.server(pool)
        listening.add_generic_rpc_handlers((handler,))
        trusted = grpc.ssl_server_credentials([(server.key, server.certificate)], server.authority, require_client_auth=True)
        port = listening.add_secure_port("127.0.0.1:0", trusted)
        listening.start()
        try:
            own = grpc.ssl_channel_credentials(client.authority, client.key, client.certificate)
            options = [("grpc.ssl_target_name_override", "fedtailor-server")]
            with grpc.secure_channel(f"127.0.0.1:{port}", own, options) as channel:
                return channel.unary_unary("/t/greet")(b"", timeout=10).decode()  # type: ignore[no-any-return]
        finally:
            listening.stop(0).wait()


def test_tls_lets_members_in_and_nobody_else(folder: Path, tmp_path: Path) -> None:
    keys.init(tmp_path / "other")
    server, ann, foreign = keys.server_identity(folder), joined(folder, "ann"), joined(tmp_path / "other", "ann")
    token = keys.read_token(keys.invite(folder, "bob"))
    assert greeted(server, ann, folder) == "ann"
    # Its own authority's name would keep the foreign client from calling: let it trust the server, so that the server decides.
    for stranger in (foreign, foreign._replace(authority=ann.authority)):
        with pytest.raises(grpc.RpcError) as refused:
            greeted(server, stranger, folder)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.RpcError) as refused:  # a member may not pose as the server
        greeted(ann, ann, folder)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.RpcError, match="an invitation"):  # TLS knows it, the ledger not as a member
        greeted(server, Identity(token.name, token.key, token.certificate, token.authority), folder)
    keys.revoke(folder, "ann")
    with pytest.raises(grpc.RpcError, match="revoked"):
        greeted(server, ann, folder)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., Printed]) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed("keys list").code == 2
    assert not (tmp_path / "keys").exists()
    assert typed("keys init") == Printed(0, "keys\n", "")
    assert typed("keys init").code == 2
    printed = typed("keys invite ann --hours 1")
    assert printed.code == 0
    assert keys.read_token(printed.out).name == "ann"
    assert len(printed.out.splitlines()) == len(printed.err.splitlines()) == 1
    assert "fedtailor join HOST:PORT --token TOKEN --data PATH" in printed.err
    token = json.loads(typed("keys invite bob --json").out)["token"]
    joined(tmp_path / "keys", "bob", keys.read_token(token))
    assert json.loads(typed("keys revoke ann --json").out) == {"name": "ann", "state": "revoked"}
    told = json.loads(typed("keys list --json").out)
    assert [(one["name"], one["state"]) for one in told] == [("ann", "revoked"), ("bob", "enrolled")]
    assert [line.split() for line in typed("keys list").out.splitlines()] == [list(one.values()) for one in told]
    assert json.loads(typed("keys init --keys other --json").out) == {"keys": "other"}


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("keys invite ann --keys none", 2, "fedtailor keys init"),
        ("keys revoke nobody", 2, "nobody was invited yet"),
        ("keys invite 'a b'", 2, "no member can have the name"),
        ("keys invite ann --hours 0", 2, "hours"),
        ("keys invite ann --hours many", 2, "--help"),
        ("keys invent ann", 2, "--help"),
        ("keys init --keys keys/server.pem", 4, "keys/server.pem"),
        ("keys list --keys broken", 4, "members.json"),
        ("keys invite ann --keys broken", 4, "authority.key"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_documented_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., Printed], command: str, code: int, words: str
) -> None:
    monkeypatch.chdir(folder.parent)
    keys.init(Path("broken"))
    for name in ("members.json", "authority.key"):
        Path("broken", name).unlink()
    printed = typed(command)
    assert (printed.code, printed.out) == (code, "")
    assert len(printed.err.splitlines()) == 1
    assert words in printed.err


def test_without_cryptography_the_commands_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., Printed]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("keys", "identity", "tokens", "certificates"):
        monkeypatch.delitem(sys.modules, f"fedtailor.federation.{name}")
        monkeypatch.delattr(f"fedtailor.federation.{name}")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    printed = typed("keys init")
    assert printed.code == 2
    assert "pip install 'fedtailor[grpc]'" in printed.err
    assert typed("keys --help").code == 0
    assert not list(tmp_path.iterdir())
