"""The properties of a peer that planning depends on."""

from __future__ import annotations

from dataclasses import dataclass

from tpirt.ops.quant_layout import Layout
from tpirt.planning.memory import PROCESS_BYTES


@dataclass(frozen=True)
class PeerProfile:
    """One rank's process and machine, as it described itself.

    Attributes:
        rank: its rank; 0 is the master.
        peer_id: its name in messages.
        host_id: equal for processes that share one machine's memory and cores.
        memory_bytes: its own memory limit; None without one.
        available_bytes: memory that its process can hold in all; None if unknown.
        threads: compute threads.
        cores: cores of the machine.
        bfloat16: whether its CPU multiplies bfloat16 natively.
        int4_layout: the order in which its 4-bit kernel expects the codes.
        base_bytes: resident memory of its process before it holds anything of a model.
    """

    rank: int
    peer_id: str
    host_id: str
    memory_bytes: int | None
    available_bytes: int | None
    threads: int
    cores: int
    bfloat16: bool
    int4_layout: Layout
    base_bytes: int = PROCESS_BYTES
