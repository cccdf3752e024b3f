"""Choose the dtype of weights and products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpirt.config import ModelConfig
from tpirt.dtypes import RUN_DTYPES
from tpirt.planning.options import AUTO
from tpirt.planning.profile import PeerProfile

AS_ASKED = "as asked"


@dataclass(frozen=True)
class ChosenDtype:
    """``float32`` or ``bfloat16``, and the reason."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return RUN_DTYPES[self.name]


def choose_dtype(config: ModelConfig, asked: str, peers: Sequence[PeerProfile]) -> ChosenDtype:
    """Return the requested dtype; for ``auto``, one that suits the checkpoint and all CPUs."""
    if asked != AUTO:
        return ChosenDtype(asked, AS_ASKED)
    if config.dtype == "float32":
        return ChosenDtype("float32", "the checkpoint's own")
    lacking = [peer.peer_id for peer in peers if not peer.bfloat16]
    if lacking:
        return ChosenDtype("float32", f"no native bfloat16 on {', '.join(lacking)}")
    return ChosenDtype("bfloat16", f"checkpoint in {config.dtype}, all CPUs have bfloat16")
