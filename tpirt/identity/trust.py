"""What a process proves of itself, and whom it believes.

The rule for all of tpirt: on loopback nothing is proved or encrypted. Beyond it, both sides have a
certificate of one cluster, or both are told ``--insecure``.
"""

from __future__ import annotations

import logging
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tpirt.errors import IdentityError
from tpirt.identity.folder import config_folder
from tpirt.identity.names import MASTER, random_id

if TYPE_CHECKING:
    from tpirt.identity.certificates import Certificate, Identity
    from tpirt.identity.registry import Registry

_log = logging.getLogger("tpirt.cluster")

INSECURE = "TPIRT_INSECURE"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
IDENTITY_FILE, AUTHORITY_FILE, REGISTRY_FILE = "identity.pem", "authority.pem", "members.json"


class Trust:
    """The identity of a process in a role; read when first needed, for it takes 15 MB."""

    def __init__(self, role: str, folder: str | Path | None = None, *, insecure: bool = False):
        """Use the identity for ``role`` in ``folder``, by default this user's.

        ``insecure`` uses none, beyond loopback as well; so does ``TPIRT_INSECURE=1``.

        Raises:
            IdentityError: ``TPIRT_INSECURE`` is neither on nor off.
        """
        self.role = role
        self.insecure = insecure or _insecure_by_environment()
        self._given = folder

    @property
    def folder(self) -> Path:
        """Where its files are.

        Raises:
            IdentityError: there is no home directory, and no folder is given.
        """
        return config_folder(self._given) / self.role

    @cached_property
    def identity(self) -> Identity | None:
        """What this process proves; None if it has nothing to prove.

        Raises:
            IdentityError: it has a damaged one.
        """
        if self.insecure:
            return None
        try:
            path = self.folder / IDENTITY_FILE
        except IdentityError:
            return None
        if not path.exists() and not self._is_master:
            return None
        from tpirt.identity.certificates import Identity

        identity = Identity.load(path)
        if not self._is_master or (identity and not identity.certificate.is_due):
            return identity
        try:
            return self._issued(path, identity)
        except IdentityError as exc:
            if identity is None:
                raise
            until = f"{identity.certificate.expires:%Y-%m-%d}"
            _log.warning(f"this device's certificate, good until {until}, was not replaced: {exc}")
            return identity

    @property
    def _is_master(self) -> bool:
        """Whether the authority of a cluster is here, which issues the master's identity."""
        return self.role == MASTER and (self.folder / AUTHORITY_FILE).exists()

    def _issued(self, path: Path, before: Identity | None) -> Identity | None:
        """The master's next identity, or another one if it was lost.

        Raises:
            IdentityError: the authority is damaged, or the disk full or read-only.
        """
        from tpirt.identity.authority import Authority

        authority = Authority.load(self.folder / AUTHORITY_FILE)
        if authority is None:  # removed just now
            return before
        following = authority.issue_own(path, before.subject.identity if before else random_id())
        following.save()
        return following

    def replace(self, identity: Identity) -> None:
        """Prove another identity from now on, which is written to the disk first."""
        identity.save()
        self.__dict__["identity"] = identity

    @property
    def registry(self) -> Registry:
        """The master's register."""
        from tpirt.identity.registry import Registry

        return Registry(self.folder / REGISTRY_FILE)

    def check(self, certificate: Certificate) -> None:
        """Check that a peer whose certificate TLS has verified is still welcome.

        Raises:
            IdentityError: this master did not issue it, or has revoked it.
        """
        if self.role == MASTER:
            self.registry.check(certificate)


def _insecure_by_environment() -> bool:
    """Whether ``TPIRT_INSECURE`` is on; what is neither on nor off is refused."""
    text = os.environ.get(INSECURE, "")
    if (value := text.strip().lower()) in _OFF:
        return False
    if value not in _ON:
        raise IdentityError(f"{INSECURE}={text!r}: expected 1, or 0 to be authenticated")
    return True


class _Local(Trust):
    """For processes of one machine: they prove nothing, and trust nobody beyond loopback."""

    @property
    def identity(self) -> None:
        """Nothing to prove."""


LOCAL = _Local(MASTER)
