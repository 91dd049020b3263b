"""X.509 certificates with EC P-256 keys, as a federation uses them: what is in them. All calls of `cryptography` that make any."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from fedtailor.core import SERVER
from fedtailor.errors import ConfigError

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_der_private_key,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as missing:
    raise ConfigError("keys need cryptography, which is not installed: pip install 'fedtailor[grpc]'") from missing

# For the modules beside this one: the import is guarded here alone.
__all__ = [
    "Encoding",
    "NameOID",
    "NoEncryption",
    "PrivateFormat",
    "ec",
    "hashes",
    "load_der_private_key",
    "load_pem_private_key",
    "x509",
]

SERVES, CALLS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
INVITE = "invite:"  # begins the common name of an invitation, and no member's: a name has no colon
MAX_NAME = 64 - len(INVITE)  # X.509 ends a common name at 64 characters
SKEW = timedelta(minutes=5)  # clocks may differ by this much
MALFORMED = (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion)  # what bad bytes raise


def now() -> datetime:
    """The clock of everything about keys."""
    return datetime.now(UTC)


def day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def check_name(name: str) -> str:
    """The name, if a member can have it: it stands in certificates, in file names and on the wire as it is.

    Raises:
        ConfigError: none can.
    """
    # ASCII: the alternative name of a certificate holds nothing else.
    if not re.fullmatch(rf"[\w.\-]{{1,{MAX_NAME}}}", name, re.ASCII) or name in (".", "..", SERVER):
        raise ConfigError(
            f"no member can have the name {name[:80]!a}: 1 to {MAX_NAME} of a-z, A-Z, 0-9, '_', '-' and '.', and not '{SERVER}'"
        )
    return name


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def requested(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The PEM of a request to certify a key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def root(key: ec.EllipticCurvePrivateKey, until: datetime) -> x509.Certificate:
    """An authority's certificate, signed by itself; it may sign others, and those may not."""
    public, name = key.public_key(), _subject("fedtailor authority")
    builder = _builder(name, public, name, until, public, x509.BasicConstraints(ca=True, path_length=0), signs=True)
    return builder.sign(key, hashes.SHA256())


def sign(
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    name: str,
    public: ec.EllipticCurvePublicKey,
    until: datetime,
    usage: x509.ObjectIdentifier,
    dns: str | None = None,
) -> x509.Certificate:
    """A certificate for a public key, good for one usage, which does not outlive its authority."""
    end = min(until, authority.not_valid_after_utc)
    leaf = x509.BasicConstraints(ca=False, path_length=None)
    builder = _builder(_subject(name), public, authority.subject, end, key.public_key(), leaf, signs=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if dns is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(dns)]), critical=False)
    return builder.sign(key, hashes.SHA256())


def belong(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Returns if the key is the certificate's and the authority has signed it.

    Raises:
        ValueError: they do not belong together.
        TypeError: one of them is of a type that we never make.
        InvalidSignature: a signature is not the authority's.
    """
    if key.public_key() != certificate.public_key():
        raise ValueError("the key is another certificate's")
    certificate.verify_directly_issued_by(authority)
    authority.verify_directly_issued_by(authority)


def common_name(certificate: x509.Certificate) -> str:
    """The one common name of a certificate.

    Raises:
        ValueError: it has none, or several.
    """
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(name.value)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    until: datetime,
    signer: ec.EllipticCurvePublicKey,
    basic: x509.BasicConstraints,
    signs: bool,
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - SKEW)
        .not_valid_after(until)
        .add_extension(basic, critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )
