"""The one-time token of an invitation: what a first connection over mutual TLS needs, in one word to copy.

`ft1.` and, in base64 for URLs: 8 bytes of a digest, then the authority's certificate, the invitation's and its private key, DER,
each after its length in 2 bytes. The digest is there for copying mistakes alone; what guards the federation is the key.
"""

from __future__ import annotations

import base64
import hashlib
from typing import NamedTuple

from fedtailor.errors import ConfigError
from fedtailor.federation import certificates
from fedtailor.federation.certificates import Encoding, ec, x509

PREFIX = "ft1."
DIGEST = 8
MAX_TOKEN = 8192  # characters; ours have about 1600


class Token(NamedTuple):
    """What a token holds; PEM."""

    name: str
    authority: bytes
    certificate: bytes
    key: bytes


def write_token(authority: x509.Certificate, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> str:
    """The text of a token."""
    private = key.private_bytes(Encoding.DER, certificates.PrivateFormat.PKCS8, certificates.NoEncryption())
    ders = (authority.public_bytes(Encoding.DER), certificate.public_bytes(Encoding.DER), private)
    body = b"".join(len(der).to_bytes(2, "big") + der for der in ders)
    return PREFIX + _text(hashlib.sha256(body).digest()[:DIGEST] + body)


def read_token(text: str) -> Token:
    """What a token holds, if it is whole and of now.

    Raises:
        ConfigError: it is not a token, is cut or garbled, or has expired.
    """
    text = text.strip()
    if not text.startswith(PREFIX):
        raise ConfigError(f"this is not a token: one begins with '{PREFIX}'")
    if len(text) > MAX_TOKEN:
        raise ConfigError(f"a token of {len(text)} characters: none has more than {MAX_TOKEN}")
    try:
        token, certificate = _parsed(text.removeprefix(PREFIX))
    except (*certificates.MALFORMED, ConfigError) as error:
        raise ConfigError("the token is cut or garbled: copy all of it, or ask for a new one") from error
    start, end, here = certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificates.now()
    if here > end:
        raise ConfigError(f"the token expired on {certificates.day(end)}, if this machine's clock is right: ask for a new one")
    if here < start:
        raise ConfigError(f"the token is not valid before {certificates.day(start)}: check this machine's clock")
    return token


def _text(blob: bytes) -> str:
    return base64.urlsafe_b64encode(blob).rstrip(b"=").decode()


def _parsed(encoded: str) -> tuple[Token, x509.Certificate]:
    blob = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    digest, body = blob[:DIGEST], blob[DIGEST:]
    # Decoding forgives some last characters; we do not.
    if _text(blob) != encoded or hashlib.sha256(body).digest()[:DIGEST] != digest:
        raise ValueError("not as it was written")
    first, second, private = _ders(body)
    authority, certificate = x509.load_der_x509_certificate(first), x509.load_der_x509_certificate(second)
    key = certificates.load_der_private_key(private, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an EC key")
    certificates.belong(key, certificate, authority)
    kind, colon, name = certificates.common_name(certificate).partition(":")
    if kind + colon != certificates.INVITE:
        raise ValueError("not an invitation")
    pems = (authority.public_bytes(Encoding.PEM), certificate.public_bytes(Encoding.PEM), certificates.private_pem(key))
    return Token(certificates.check_name(name), *pems), certificate


def _ders(body: bytes) -> list[bytes]:
    found = []
    while body:
        end = 2 + int.from_bytes(body[:2], "big")
        if end > len(body):
            raise ValueError("cut")
        found.append(body[2:end])
        body = body[end:]
    return found
