"""The authority of a cluster, which issues certificates; it is on the master."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tpirt.errors import IdentityError
from tpirt.identity.certificates import (
    UNUSABLE,
    Certificate,
    Identity,
    clean_name,
    common_name,
    key_pem,
    load_key,
    new_request,
    split_key,
)
from tpirt.identity.folder import read_key, write_private
from tpirt.identity.names import MASTER, PEER, Subject, random_id

VALID = timedelta(days=365)

_AUTHORITY_VALID = timedelta(days=20 * 365)
_BACKDATED = timedelta(days=30)  # a small device without a battery starts with yesterday's clock


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
            self._key = load_key(key)
            self._parsed = x509.load_pem_x509_certificate(certificate)
            self.name = clean_name(common_name(self._parsed.subject))
            unit = self._parsed.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
            self.cluster = str(unit[0].value)
        except (*UNUSABLE, IndexError) as exc:
            raise IdentityError("a damaged authority") from exc

    @classmethod
    def create(cls, name: str) -> Authority:
        """Make the authority of a new cluster."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, clean_name(name)),
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
        return cls(key_pem(key), parsed.public_bytes(serialization.Encoding.PEM))

    @classmethod
    def load(cls, path: Path) -> Authority | None:
        """Read an authority; None if there is none.

        Raises:
            IdentityError: the file is damaged.
        """
        if (data := read_key(path)) is None:
            return None
        try:
            return cls(*split_key(data))
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
        except (*UNUSABLE, InvalidSignature) as exc:
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
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, clean_name(name))]),
                self._parsed.subject,
                public,
                valid,
                # Not from now on: one that was issued while the clock was ahead would be good for
                # nothing once it is right again.
                self._parsed.not_valid_before_utc,
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


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    valid: timedelta,
    since: datetime | None = None,
) -> x509.CertificateBuilder:
    """``since``: when it becomes valid, by default some days ago."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(since or now - _BACKDATED)
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
