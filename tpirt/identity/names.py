"""The names in certificates, which TLS compares: a role, a cluster and an identity.

All are random numbers but the role, for a TLS handshake shows them to everyone on the path. What
people call a device is in the certificate alone, which TLS 1.3 encrypts.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

from tpirt.errors import IdentityError

MASTER, PEER = "master", "peer"

_DOMAIN = "tpirt.internal"
_OWN = re.compile(rf"([0-9a-f]{{16}})\.({MASTER}|{PEER})\.([0-9a-f]{{16}})\.{re.escape(_DOMAIN)}")


class Subject(NamedTuple):
    """What a certificate proves: one identity in one role of one cluster."""

    role: str
    cluster: str
    identity: str

    @classmethod
    def of(cls, names: Iterable[str]) -> Subject:
        """Read the DNS names of a certificate.

        Raises:
            IdentityError: they are not those of exactly one subject.
        """
        found = {name: match for name in names if (match := _OWN.fullmatch(name))}
        if len(found) != 1:
            raise IdentityError("a certificate that is not of a tpirt cluster")
        ((identity, role, cluster),) = (match.groups() for match in found.values())
        return cls(role, cluster, identity)

    @property
    def host(self) -> str:
        """The name that all of this role in this cluster have."""
        return role_host(self.role, self.cluster)

    @property
    def own_host(self) -> str:
        """The name that only this identity has."""
        return f"{self.identity}.{self.host}"


def role_host(role: str, cluster: str) -> str:
    """The name that all certificates of a role in a cluster have."""
    return f"{role}.{cluster}.{_DOMAIN}"


def random_id() -> str:
    """Draw the identity of a device or a cluster."""
    return secrets.token_hex(8)
