"""Choose the dtype of weights and products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpirt.config import ModelConfig
from tpirt.dtypes import WEIGHT_DTYPES
from tpirt.planning.options import AUTO
from tpirt.planning.profile import PeerProfile

AS_ASKED = "as asked"


@dataclass(frozen=True)
class ChosenDtype:
    """``float32`` or ``bfloat16``, and the reason.

    Attributes:
        name: of attention, the KV cache and sums.
        stored: of weights that are not quantized; None for the same.
    """

    name: str
    reason: str
    stored: str | None = None

    @property
    def weights(self) -> torch.dtype:
        """Of weights that are not quantized."""
        return WEIGHT_DTYPES[self.stored or self.name]


def choose_dtype(
    config: ModelConfig, asked: str, peers: Sequence[PeerProfile], *, quantized: bool = False
) -> ChosenDtype:
    """Return the requested dtype; for ``auto``, one that suits the checkpoint and all CPUs.

    Quantized products round their inputs to 8 bits, unless float32 is asked for; float32 beside
    them would gain nothing.
    """
    if asked != AUTO:
        return ChosenDtype(asked, AS_ASKED)
    if config.dtype == "float32" and not quantized:
        return ChosenDtype("float32", "the checkpoint's own")
    lacking = [peer.peer_id for peer in peers if not peer.bfloat16]
    if lacking:
        return ChosenDtype("float32", f"no fast bfloat16 on {', '.join(lacking)}")
    if quantized:
        return ChosenDtype("bfloat16", "beside quantized weights")
    if config.dtype == "float16":
        return ChosenDtype("bfloat16", "weights in float16, as the checkpoint", stored="float16")
    return ChosenDtype("bfloat16", f"checkpoint in {config.dtype}")
