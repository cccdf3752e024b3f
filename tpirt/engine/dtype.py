"""Choosing the dtype that weights are kept and multiplied in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpirt.cluster.roster import PeerProfile
from tpirt.config import ModelConfig
from tpirt.errors import ConfigError
from tpirt.sharding.format import DTYPES


@dataclass(frozen=True)
class ChosenDtype:
    """``float32`` or ``bfloat16``, and why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """torch's own."""
        return DTYPES[self.name]


def choose_dtype(config: ModelConfig, asked: str, peers: Sequence[PeerProfile]) -> ChosenDtype:
    """Take what was asked for, or what the checkpoint and every peer's CPU suggest.

    Raises:
        ConfigError: an unknown dtype.
    """
    if asked in DTYPES:
        return ChosenDtype(asked, "as asked")
    if asked != "auto":
        raise ConfigError(f"dtype {asked!r}: expected auto, float32 or bfloat16")
    if config.dtype == "float32":
        return ChosenDtype("float32", "the checkpoint's own")
    lacking = [peer.peer_id for peer in peers if not peer.bfloat16]
    if lacking:
        return ChosenDtype("float32", f"no native bfloat16 on {', '.join(lacking)}")
    return ChosenDtype("bfloat16", f"checkpoint in {config.dtype}, all CPUs have bfloat16")
