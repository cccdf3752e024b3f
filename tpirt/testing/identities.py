"""Clusters whose certificates are made without an invitation."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from tpirt.cluster.membership import authority_of, create_cluster
from tpirt.identity.authority import VALID
from tpirt.identity.certificates import Identity, new_request
from tpirt.identity.names import MASTER, PEER, random_id
from tpirt.identity.trust import IDENTITY_FILE, Trust


class MadeCluster:
    """A cluster in a folder.

    Attributes:
        folder: of the master's identity.
        master: what the master proves.
    """

    def __init__(self, folder: Path, name: str = "home"):
        self.folder = folder
        self.master = Trust(MASTER, folder)
        create_cluster(self.master, name)

    def peer(self, folder: Path, name: str = "kitchen", valid: timedelta = VALID) -> Trust:
        """Give a device an identity as a peer."""
        path = folder / PEER / IDENTITY_FILE
        self.master.registry.add(
            name, lambda free: self.identity(path, PEER, free, valid).certificate, ""
        )
        return Trust(PEER, folder)

    def identity(
        self, path: Path, role: str, name: str = "kitchen", valid: timedelta = VALID
    ) -> Identity:
        """Make an identity of any role and write it to a file."""
        authority = authority_of(self.master)
        key, request = new_request()
        certificate = authority.issue(request, role, name, random_id(), valid)
        identity = Identity(path, key, certificate, authority.pem)
        identity.save()
        return identity
