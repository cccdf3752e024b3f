"""The properties of a peer that planning depends on."""

from __future__ import annotations

from dataclasses import dataclass

from tpirt.planning.memory import PROCESS_BYTES
from tpirt.version import __version__


@dataclass(frozen=True)
class PeerProfile:
    """A rank's process and machine, as reported by the peer.

    Attributes:
        rank: its rank; 0 is the master.
        peer_id: its name in messages: its address, as the user gave it.
        host_id: equal for processes that share the memory of one machine, or of one container.
        memory_bytes: its own memory limit; None for no limit.
        available_bytes: total memory that its process can use; None if unknown.
        threads: compute threads.
        cores: cores of the machine.
        bfloat16: whether products with bfloat16 weights are fast there.
        base_bytes: resident memory of its process without a model.
        reserved_bytes: what its process holds beside: a draft model.
        host_name: what it calls its machine; not unique.
        version: of its tpirt.
    """

    rank: int
    peer_id: str
    host_id: str
    memory_bytes: int | None
    available_bytes: int | None
    threads: int
    cores: int
    bfloat16: bool
    base_bytes: int = PROCESS_BYTES
    reserved_bytes: int = 0
    host_name: str = ""
    version: str = __version__

    @property
    def machine_id(self) -> str:
        """Equal for processes on one machine, also in different containers."""
        return self.host_id.partition("/")[0]
