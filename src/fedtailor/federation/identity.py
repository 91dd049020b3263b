"""Who somebody is in a federation: a key, its certificate and the authority that signed it, in files of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedtailor.errors import RunError
from fedtailor.federation import certificates
from fedtailor.federation.certificates import ec, load_pem_private_key, x509
from fedtailor.wire import atomically

OWN = ("identity.key", "identity.pem", "identity-authority.pem")  # no name of an authority's files: they may lie beside them


class Identity(NamedTuple):
    """The parts of an identity; PEM."""

    name: str
    key: bytes
    certificate: bytes
    authority: bytes


def keep(folder: Path, identity: Identity) -> None:
    """Write an identity down, in files that their owner alone can read.

    Raises:
        RunError: its parts do not belong together, or cannot be written.
    """
    key, certificate, authority = identity[1:]
    name = _name(_key(key, "the key"), _certificate(certificate, "the certificate"), _certificate(authority, "the authority"), "")
    if name != identity.name:
        raise RunError(f"the certificate is that of '{name}', not of '{identity.name}'")
    with files(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file, content in zip(OWN, identity[1:], strict=True):
            write_private(folder / file, content)


def identity(folder: Path) -> Identity | None:
    """The identity that `keep` wrote; None where there is none.

    Raises:
        RunError: a file of it is missing or corrupt; its certificate has expired or is not valid yet.
    """
    key, certificate, authority = (folder / name for name in OWN)
    if not any(path.exists() for path in (key, certificate, authority)):
        return None
    return _opened(key, certificate, authority)


def server_identity(folder: Path) -> Identity:
    """The identity of the federation's server.

    Raises:
        RunError: a file of it is missing or corrupt; its certificate has expired or is not valid yet.
    """
    return _opened(folder / "server.key", folder / "server.pem", folder / "authority.pem")


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key from a PEM file.

    Raises:
        RunError: the file is missing or corrupt.
    """
    return _key(_content(path), f"'{path}'")


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate from a PEM file.

    Raises:
        RunError: the file is missing or corrupt.
    """
    return _certificate(_content(path), f"'{path}'")


def write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody but its owner can read at any moment, atomically."""
    atomically(path, lambda temporary: temporary.write_bytes(content), mode=0o600)


@contextlib.contextmanager
def files(folder: Path) -> Iterator[None]:
    """Around work on a folder.

    Raises:
        RunError: in the place of the system's own error.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"'{error.filename or folder}': {error.strerror or error}") from error


def _opened(key: Path, certificate: Path, authority: Path) -> Identity:
    found = read_certificate(certificate)
    name = _name(read_key(key), found, read_certificate(authority), f" in '{key.parent}'")
    start, end, here = found.not_valid_before_utc, found.not_valid_after_utc, certificates.now()
    if here > end:
        raise RunError(
            f"the certificate '{certificate}' expired on {certificates.day(end)}: get a new one, or check this machine's clock"
        )
    if here < start:
        raise RunError(
            f"the certificate '{certificate}' is not valid before {certificates.day(start)}: check this machine's clock"
        )
    return Identity(name, _content(key), _content(certificate), _content(authority))


def _name(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, authority: x509.Certificate, where: str) -> str:
    try:
        certificates.belong(key, certificate, authority)
        return certificates.common_name(certificate)
    except certificates.MALFORMED as error:
        raise RunError(f"the key, the certificate and the authority{where} do not belong together") from error


def _content(path: Path) -> bytes:
    with files(path):
        return path.read_bytes()


def _key(pem: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except certificates.MALFORMED as error:
        raise RunError(f"{what} is not a private key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(f"{what} is not an EC key")
    return key


def _certificate(pem: bytes, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except certificates.MALFORMED as error:
        raise RunError(f"{what} is not a certificate in PEM") from error
