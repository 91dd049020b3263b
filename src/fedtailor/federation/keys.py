"""A federation's own certificate authority: who may speak to its server, and how they come to it.

`init` makes the authority, `invite` a one-time token, `enrol` turns an invitation into a member's certificate. members.json is
a ledger of every certificate ever signed, by fingerprint: what is not on it as valid is refused, so no list of revoked
certificates can be forgotten. TLS does not know the ledger: a server asks `member_of` about every call. Everything is signed
with EC P-256 by `cryptography`; nothing here is our own cryptography.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from fedtailor.core import SERVER
from fedtailor.errors import ConfigError, RunError, nearest
from fedtailor.federation import certificates
from fedtailor.federation.certificates import ec, hashes, x509
from fedtailor.federation.identity import (
    Identity,
    files,
    identity,
    keep,
    read_certificate,
    read_key,
    server_identity,
    write_private,
)
from fedtailor.federation.tokens import Token, read_token, write_token

__all__ = [
    "Identity",
    "Refused",
    "Token",
    "enrol",
    "identity",
    "init",
    "invite",
    "keep",
    "may_look",
    "member_of",
    "members",
    "operator_identity",
    "read_token",
    "request",
    "revoke",
    "server_identity",
]

SERVER_DNS = "fedtailor-server"  # what the server's certificate is for, wherever the server runs
OPERATOR = "operator:"  # no member's name, as it has a colon
LEDGER = "members.json"
MAX_HOURS = 24 * 365
MAX_PEM = 16384  # bytes; one certificate takes fewer than 1000


class Refused(RunError):
    """A certificate or a request that the federation does not accept."""


class Issued(NamedTuple):
    """One certificate that the authority has signed: a line of members.json."""

    fingerprint: str
    name: str
    kind: str  # "invite" or "member"
    state: str  # "valid", "replaced" or "revoked"; an invitation also "used"
    expires: str


class Authority(NamedTuple):
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def init(folder: Path, days: int = 3650) -> None:
    """Make a federation's authority and its server's certificate; the folder becomes its owner's alone.

    Raises:
        ConfigError: the folder has an authority already.
        RunError: it cannot be written.
    """
    until = certificates.now() + timedelta(days=days)
    with files(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder):
            if (folder / "authority.pem").exists():
                raise ConfigError(f"'{folder}' has an authority already: name another folder")
            folder.chmod(0o700)
            root, server = certificates.new_key(), certificates.new_key()
            authority = Authority(certificates.root(root, until), root)
            certificate = certificates.sign(*authority, SERVER, server.public_key(), until, certificates.SERVES, SERVER_DNS)
            write_private(folder / "server.key", certificates.private_pem(server))
            write_private(folder / "server.pem", certificate.public_bytes(certificates.Encoding.PEM))
            _save(folder, [])
            write_private(folder / "authority.key", certificates.private_pem(root))
            # Last: with it the folder has an authority. What a kill leaves before that can be made again.
            write_private(folder / "authority.pem", authority.certificate.public_bytes(certificates.Encoding.PEM))


def invite(folder: Path, name: str, hours: float = 24) -> str:
    """A one-time token with which `name` can enrol. An unused one for the same name is void from now on.

    Raises:
        ConfigError: no such name or number of hours can be; the folder has no authority.
        RunError: a file is missing, corrupt or cannot be written; the authority has expired.
    """
    certificates.check_name(name)
    if not 0 < hours <= MAX_HOURS:
        raise ConfigError(f"an invitation cannot be valid for {hours:g} hours: more than 0, at most {MAX_HOURS}")
    with _ledger(folder):
        authority, key = _authority(folder), certificates.new_key()
        until = certificates.now() + timedelta(hours=hours)
        certificate = certificates.sign(*authority, f"{certificates.INVITE}{name}", key.public_key(), until, certificates.CALLS)
        _save(folder, [*_marked(_load(folder), name, "replaced", "invite"), _issued(certificate, name, "invite")])
    return write_token(authority.certificate, certificate, key)


def enrol(folder: Path, bootstrap_pem: bytes, csr_pem: bytes, days: int = 825) -> bytes:
    """The PEM of a member's certificate, for the key of the request and the name of the invitation. Uses the invitation up.

    That the caller holds the invitation's key is TLS's to prove: `bootstrap_pem` is what the peer of a connection showed.

    Raises:
        Refused: the invitation is unknown, used, replaced, revoked or expired; the request is not a sound one.
        ConfigError: the folder has no authority.
        RunError: a file is missing, corrupt or cannot be written; the authority has expired.
    """
    public = _requested(csr_pem)
    bootstrap = _peer(bootstrap_pem)
    with _ledger(folder):
        authority, issued = _authority(folder), _load(folder)
        name = _valid(bootstrap, issued, "invite").name
        until = certificates.now() + timedelta(days=days)
        certificate = certificates.sign(*authority, name, public, until, certificates.CALLS, name)
        kept = _marked(_marked(issued, name, "used", "invite"), name, "replaced", "member")
        _save(folder, [*kept, _issued(certificate, name, "member")])
    return certificate.public_bytes(certificates.Encoding.PEM)


def member_of(folder: Path, cert_pem: bytes) -> str:
    """The name of the member whose certificate this is.

    Raises:
        Refused: the certificate is not one of this federation, or was revoked or replaced, or has expired.
        ConfigError: the folder has no authority.
        RunError: members.json is missing or corrupt.
    """
    certificate = _peer(cert_pem)
    with files(folder):
        return _valid(certificate, _load(folder), "member").name


def operator_identity(folder: Path) -> Identity:
    """An identity of an hour for who holds the authority's key: it may ask how the federation is getting on, and nothing else.

    Raises:
        ConfigError: the folder has no authority. RunError: a file is missing or corrupt; the authority has expired.
    """
    with _ledger(folder):
        authority, key = _authority(folder), certificates.new_key()
        until = certificates.now() + timedelta(hours=1)
        certificate = certificates.sign(*authority, OPERATOR, key.public_key(), until, certificates.CALLS)
    shown = certificate.public_bytes(certificates.Encoding.PEM)
    return Identity(OPERATOR, certificates.private_pem(key), shown, authority.certificate.public_bytes(certificates.Encoding.PEM))


def may_look(folder: Path, cert_pem: bytes) -> str:
    """The name of a member or of the operator; TLS has checked that the authority signed it and that it has not expired.

    Raises: as `member_of`.
    """
    named = _peer(cert_pem).subject.get_attributes_for_oid(certificates.NameOID.COMMON_NAME)
    if named and named[0].value == OPERATOR:
        return OPERATOR
    return member_of(folder, cert_pem)


def revoke(folder: Path, name: str) -> None:
    """Void everything that `name` holds: its certificate, and an invitation. It may be invited again.

    Raises:
        ConfigError: nobody has this name; the folder has no authority.
        RunError: a file is missing, corrupt or cannot be written.
    """
    with _ledger(folder):
        issued = _load(folder)
        if name not in (known := {one.name for one in issued}):
            raise ConfigError(f"no member '{name}': " + (nearest(name, known) if known else "nobody was invited yet"))
        _save(folder, _marked(_marked(issued, name, "revoked", "invite"), name, "revoked", "member"))


def members(folder: Path) -> list[tuple[str, str, str]]:
    """(name, "invited", "enrolled" or "revoked", the day it expires) of everybody who was ever invited, by name.

    Raises:
        ConfigError: the folder has no authority.
        RunError: members.json is missing or corrupt.
    """
    with files(folder):
        issued = _load(folder)
    found = []
    for name in sorted({one.name for one in issued}):
        own = [one for one in issued if one.name == name]
        # An invitation for a lost key changes nothing until it is used.
        shown = next((one for one in own if one.kind == "member" and one.state == "valid"), own[-1])
        state = "revoked" if shown.state != "valid" else "enrolled" if shown.kind == "member" else "invited"
        found.append((name, state, shown.expires[:10]))
    return found


def request(name: str) -> tuple[bytes, bytes]:
    """A new private key and the request to certify it, both PEM.

    Raises:
        ConfigError: nobody can have this name.
    """
    key = certificates.new_key()
    return certificates.private_pem(key), certificates.requested(certificates.check_name(name), key)


def _requested(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a request: all that is taken from it."""
    try:
        csr = x509.load_pem_x509_csr(_bounded(csr_pem, "request"))
        public, signed = csr.public_key(), csr.is_signature_valid
    except certificates.MALFORMED as error:
        raise Refused("the request is not a certificate signing request") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise Refused("the request's key is not an EC P-256 key")
    if not signed:
        raise Refused("the request is not signed with its own key")
    return public


def _peer(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_bounded(pem, "certificate"))
    except certificates.MALFORMED as error:
        raise Refused("the peer's certificate is not one") from error


def _bounded(pem: bytes, what: str) -> bytes:
    if len(pem) > MAX_PEM:
        raise Refused(f"a {what} of {len(pem)} bytes: the limit is {MAX_PEM}")
    return pem


def _valid(certificate: x509.Certificate, issued: list[Issued], kind: str) -> Issued:
    """The ledger's line of a certificate of this kind, if it says that it is valid and the clock agrees."""
    fingerprint = _fingerprint(certificate)
    found = next((one for one in issued if one.fingerprint == fingerprint), None)
    what = {"invite": "invitation", "member": "certificate"}[kind]
    if found is None:
        raise Refused(f"unknown {what}: this federation's authority did not issue it")
    if found.kind != kind:
        is_a = (
            "a certificate of a member, not an invitation" if kind == "invite" else "an invitation, not a certificate: join first"
        )
        raise Refused(f"what '{found.name}' shows is {is_a}")
    if found.state != "valid":
        raise Refused(
            f"the {what} of '{found.name}' was {found.state}" + (" by a newer one" if found.state == "replaced" else "")
        )
    if certificates.now() > certificate.not_valid_after_utc:
        raise Refused(f"the {what} of '{found.name}' expired on {certificates.day(certificate.not_valid_after_utc)}")
    return found


def _fingerprint(certificate: x509.Certificate) -> str:
    return certificate.fingerprint(hashes.SHA256()).hex()


def _issued(certificate: x509.Certificate, name: str, kind: str) -> Issued:
    return Issued(_fingerprint(certificate), name, kind, "valid", certificate.not_valid_after_utc.isoformat())


def _marked(issued: list[Issued], name: str, state: str, kind: str) -> list[Issued]:
    """The ledger in which what `name` holds of this kind is no longer valid, but `state`."""
    return [one._replace(state=state) if (one.name, one.kind, one.state) == (name, kind, "valid") else one for one in issued]


def _authority(folder: Path) -> Authority:
    certificate, key = read_certificate(folder / "authority.pem"), read_key(folder / "authority.key")
    if certificates.now() > (end := certificate.not_valid_after_utc):
        raise RunError(f"the authority in '{folder}' expired on {certificates.day(end)}: check this machine's clock")
    return Authority(certificate, key)


def _load(folder: Path) -> list[Issued]:
    _made(folder)
    try:
        issued = [Issued(**line) for line in json.loads((folder / LEDGER).read_text(encoding="utf-8"))]
        if not all(isinstance(text, str) for one in issued for text in one):
            raise TypeError("a line of another type")
    except (ValueError, TypeError) as error:
        raise RunError(f"'{folder / LEDGER}' is corrupt") from error
    return issued


def _save(folder: Path, issued: list[Issued]) -> None:
    write_private(folder / LEDGER, json.dumps([one._asdict() for one in issued], indent=1).encode())


def _made(folder: Path) -> None:
    if not (folder / "authority.pem").exists():
        raise ConfigError(f"'{folder}' has no authority: fedtailor keys init makes one")


@contextlib.contextmanager
def _ledger(folder: Path) -> Iterator[None]:
    """Around what changes the ledger of an authority."""
    _made(folder)  # before a lock is left in a folder that is none of ours
    with files(folder), _locked(folder):
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time reads and writes the ledger, among threads and among processes."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
