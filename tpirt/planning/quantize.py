"""Choose the quantization of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpirt.ops.quant import QuantSpec
from tpirt.planning.dtype import AS_ASKED
from tpirt.planning.memory import MemoryBudget
from tpirt.planning.options import AUTO
from tpirt.units import format_bytes

CANDIDATES = ("none", "int8", "int4")  # what ``auto`` tries, largest first


@dataclass(frozen=True)
class ChosenQuant:
    """How weights are quantized, and the reason."""

    spec: QuantSpec
    reason: str


def choose_quant(asked: str, budgets: Sequence[MemoryBudget]) -> ChosenQuant:
    """Return the requested quantization; for ``auto``, the first of none, int8, int4 that fits.

    It fits if every rank keeps all weights in memory. If none does, it is int4.

    Args:
        asked: as in :class:`~tpirt.planning.PlanOptions`.
        budgets: of all ranks, by rank, without quantization.
    """
    if asked != AUTO:
        return ChosenQuant(QuantSpec.parse(asked), AS_ASKED)
    reason = "all weights fit in memory"
    for spec in map(QuantSpec.parse, CANDIDATES):
        tried = [budget.quantized(spec) for budget in budgets]
        short = [rank for rank, budget in enumerate(tried) if not budget.fits]
        if not short:
            return ChosenQuant(spec, reason)
        first = tried[short[0]]
        size = format_bytes(first.weights_bytes)
        reason = f"{size} in {first.form.numbers} do not fit rank {short[0]}"
    return ChosenQuant(spec, f"the smallest, yet {reason}")
