"""Keys, certificates, and what a process proves by them.

ECDSA on P-256: gRPC's BoringSSL refuses Ed25519 in certificates.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tpirt.errors import IdentityError
from tpirt.identity.folder import read_key, write_private
from tpirt.identity.names import Subject
from tpirt.printable import printable_line

RENEW_BEFORE = timedelta(days=30)
NAME_LIMIT = 64  # of an X.509 common name

_NAME = NameOID.COMMON_NAME
UNUSABLE = (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension)


def clean_name(text: str) -> str:
    """Make a name that others gave fit for a certificate, a table and a terminal."""
    return printable_line(text).strip()[:NAME_LIMIT] or "unnamed"


class Certificate:
    """A certificate that a cluster's authority issued."""

    def __init__(self, parsed: x509.Certificate):
        """Take a certificate.

        Raises:
            IdentityError: it is not of a tpirt cluster.
        """
        self._parsed = parsed
        try:
            names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            self.subject = Subject.of(names.get_values_for_type(x509.DNSName))
            self.name = clean_name(common_name(parsed.subject))
        except UNUSABLE as exc:
            raise IdentityError("a certificate that is not of a tpirt cluster") from exc

    @classmethod
    def read(cls, data: bytes) -> Certificate:
        """Read PEM or DER.

        Raises:
            IdentityError: it is neither, or not of a tpirt cluster.
        """
        load = x509.load_pem_x509_certificate if b"-----BEGIN" in data else _load_der
        try:
            return cls(load(data))
        except UNUSABLE as exc:
            raise IdentityError("a damaged certificate") from exc

    @property
    def serial(self) -> str:
        """The certificate's number, in hexadecimal."""
        return f"{self._parsed.serial_number:x}"

    @property
    def expires(self) -> datetime:
        """The end of its validity."""
        return self._parsed.not_valid_after_utc

    @property
    def is_valid(self) -> bool:
        """Whether it is valid now, by this machine's clock."""
        return self._parsed.not_valid_before_utc <= datetime.now(UTC) <= self.expires

    @property
    def is_due(self) -> bool:
        """Whether it should be replaced soon."""
        return datetime.now(UTC) > self.expires - RENEW_BEFORE

    @cached_property
    def pem(self) -> bytes:
        """The certificate in PEM."""
        return self._parsed.public_bytes(serialization.Encoding.PEM)

    def check(self, key: bytes, authority: bytes) -> None:
        """Verify that it belongs to a private key and was issued by an authority.

        Raises:
            IdentityError: it was not.
        """
        try:
            self._parsed.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
            fits = self._parsed.public_key() == load_key(key).public_key()
        except (*UNUSABLE, InvalidSignature) as exc:
            raise IdentityError("a certificate of another authority") from exc
        if not fits:
            raise IdentityError("a certificate of another key")


@dataclass(frozen=True)
class Identity:
    """What this process proves: a private key, its certificate, and the cluster's authority.

    One file holds all three, so that they are replaced together.
    """

    path: Path
    key: bytes
    certificate: Certificate
    authority: bytes

    @classmethod
    def load(cls, path: Path) -> Identity | None:
        """Read an identity; None if there is none.

        Raises:
            IdentityError: the file is damaged.
        """
        if (data := read_key(path)) is None:
            return None
        key, rest = split_key(data)
        end = b"-----END CERTIFICATE-----\n"
        first, _, authority = rest.partition(end)
        try:
            certificate = Certificate.read(first + end)
            certificate.check(key, authority)
        except IdentityError as exc:
            raise IdentityError(
                f"{path}: {exc}; remove it, and join the cluster again (a master issues itself "
                "another)"
            ) from exc
        return cls(path, key, certificate, authority)

    @property
    def subject(self) -> Subject:
        """Who this is."""
        return self.certificate.subject

    def save(self) -> None:
        """Write it to its file.

        Raises:
            IdentityError: that fails.
        """
        write_private(self.path, self.key + self.certificate.pem + self.authority)


def new_request() -> tuple[bytes, bytes]:
    """Make a private key and a certificate request for it, both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
    )
    return key_pem(key), request.public_bytes(serialization.Encoding.PEM)


def common_name(name: x509.Name) -> str:
    """The name in a certificate that people gave."""
    found = name.get_attributes_for_oid(_NAME)
    return str(found[0].value) if found else ""


def split_key(data: bytes) -> tuple[bytes, bytes]:
    """Split a file into its private key and the certificates after it."""
    end = b"-----END PRIVATE KEY-----\n"
    key, found, rest = data.partition(end)
    return key + found, rest


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        ValueError, TypeError: it is none of an elliptic curve.
    """
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key on an elliptic curve")
    return key


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Write a private key in PEM, which nothing encrypts."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _load_der(data: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(data)
