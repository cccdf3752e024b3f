"""Keys and certificates: those of a cluster's authority, and those that it issues.

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
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tpirt.errors import IdentityError
from tpirt.identity.folder import read, write_private
from tpirt.identity.names import MASTER, PEER, Subject, random_id, role_host
from tpirt.printable import printable_line

VALID = timedelta(days=365)
RENEW_BEFORE = timedelta(days=30)

_AUTHORITY_VALID = timedelta(days=20 * 365)
_BACKDATED = timedelta(days=30)  # a small device without a battery starts with yesterday's clock
_NAME_LIMIT = 64  # of an X.509 common name
_NAME = NameOID.COMMON_NAME
_UNUSABLE = (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension)


def clean_name(text: str) -> str:
    """Make a name that others gave fit for a certificate, a table and a terminal."""
    return printable_line(text).strip()[:_NAME_LIMIT] or "unnamed"


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
            self.name = clean_name(_common_name(parsed.subject))
        except _UNUSABLE as exc:
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
        except _UNUSABLE as exc:
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
            fits = self._parsed.public_key() == _load_key(key).public_key()
        except (*_UNUSABLE, InvalidSignature) as exc:
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
        if (data := read(path)) is None:
            return None
        key, rest = _split(data)
        end = b"-----END CERTIFICATE-----\n"
        first, _, authority = rest.partition(end)
        try:
            certificate = Certificate.read(first + end)
            certificate.check(key, authority)
        except IdentityError as exc:
            raise IdentityError(f"{path}: {exc}; remove it, and join the cluster again") from exc
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


class Authority:
    """A cluster's authority, on its master."""

    def __init__(self, key: bytes, certificate: bytes):
        """Use a private key and its certificate, in PEM.

        Raises:
            IdentityError: they are not an authority's.
        """
        self.pem = certificate
        self._key_pem = key
        try:
            self._key = _load_key(key)
            self._parsed = x509.load_pem_x509_certificate(certificate)
            self.name = clean_name(_common_name(self._parsed.subject))
            unit = self._parsed.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
            self.cluster = str(unit[0].value)
        except (*_UNUSABLE, IndexError) as exc:
            raise IdentityError("a damaged authority") from exc

    @classmethod
    def create(cls, name: str) -> Authority:
        """Make the authority of a new cluster."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(_NAME, clean_name(name)),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, random_id()),
            ]
        )
        public = key.public_key()
        usage = _usage(key_cert_sign=True, crl_sign=True)
        parsed = (
            _builder(subject, subject, public, _AUTHORITY_VALID)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(_key_pem(key), parsed.public_bytes(serialization.Encoding.PEM))

    @classmethod
    def load(cls, path: Path) -> Authority | None:
        """Read an authority; None if there is none.

        Raises:
            IdentityError: the file is damaged.
        """
        if (data := read(path)) is None:
            return None
        try:
            return cls(*_split(data))
        except IdentityError as exc:
            raise IdentityError(f"{path}: {exc}; restore it from a copy") from exc

    def save(self, path: Path) -> None:
        """Write key and certificate.

        Raises:
            IdentityError: that fails.
        """
        write_private(path, self._key_pem + self.pem)

    def issue(
        self, request: bytes, role: str, name: str, identity: str, valid: timedelta = VALID
    ) -> Certificate:
        """Sign the public key of a request; nothing else in it is used.

        Raises:
            IdentityError: not a request, or its sender does not have the key.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            public = asked.public_key()
            honest = asked.is_signature_valid
        except (*_UNUSABLE, InvalidSignature) as exc:
            raise IdentityError("a damaged certificate request") from exc
        if not (honest and isinstance(public, ec.EllipticCurvePublicKey)):
            raise IdentityError("a certificate request that its key does not sign")
        if not isinstance(public.curve, ec.SECP256R1):
            raise IdentityError(f"a key on {public.curve.name}, expected P-256")
        subject = Subject(role, self.cluster, identity)
        # A master answers no calls, so its certificate is of no use to a server.
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        uses += [ExtendedKeyUsageOID.SERVER_AUTH] if role == PEER else []
        sans = [x509.DNSName(subject.host), x509.DNSName(subject.own_host)]
        issuer = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        parsed = (
            _builder(
                x509.Name([x509.NameAttribute(_NAME, clean_name(name))]),
                self._parsed.subject,
                public,
                valid,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(sans), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return Certificate(parsed)

    def issue_own(self, path: Path, identity: str) -> Identity:
        """Make the master's own identity: a new key and its certificate."""
        key, request = new_request()
        certificate = self.issue(request, MASTER, self.name, identity)
        return Identity(path, key, certificate, self.pem)

    @property
    def peer_host(self) -> str:
        """The name that all peers of the cluster have."""
        return role_host(PEER, self.cluster)


def new_request() -> tuple[bytes, bytes]:
    """Make a private key and a certificate request for it, both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
    )
    return _key_pem(key), request.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, valid: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + valid)
    )


def _usage(**used: bool) -> x509.KeyUsage:
    unused = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(**{**unused, **used})


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(_NAME)
    return str(found[0].value) if found else ""


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Split a file into its private key and the certificates after it."""
    end = b"-----END PRIVATE KEY-----\n"
    key, found, rest = data.partition(end)
    return key + found, rest


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key on an elliptic curve")
    return key


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _load_der(data: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(data)
