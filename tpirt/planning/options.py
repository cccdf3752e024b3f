"""What a user can ask of a deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpirt.batch import Algorithm, CommDtype
from tpirt.errors import ConfigError, MemoryLimitError
from tpirt.ops.quant import QuantSpec
from tpirt.sharding.format import DTYPES
from tpirt.weights.stream_plan import MIN_SLOTS

AUTO = "auto"


@dataclass(frozen=True)
class CollectiveOptions:
    """How partial sums are combined; None leaves it to us."""

    algorithm: Algorithm | None = None
    comm_dtype: CommDtype | None = None

    @classmethod
    def parse(cls, collective: str, comm_dtype: str) -> CollectiveOptions:
        """Read the values of ``--collective`` and ``--comm-dtype``.

        Raises:
            ConfigError: an unknown value.
        """
        try:
            algorithm = None if collective == AUTO else Algorithm(collective)
        except ValueError:
            names = ", ".join([AUTO, *(known.value for known in Algorithm)])
            raise ConfigError(f"collective {collective!r}: expected one of {names}") from None
        try:
            return cls(algorithm, None if comm_dtype == AUTO else CommDtype(comm_dtype))
        except ValueError:
            names = ", ".join([AUTO, *(known.value for known in CommDtype)])
            raise ConfigError(f"comm_dtype {comm_dtype!r}: expected one of {names}") from None

    def comm_dtype_for(self, dtype: torch.dtype) -> CommDtype:
        """The form of sums where products are of ``dtype``: no finer than they are."""
        if self.comm_dtype is not None:
            return self.comm_dtype
        return CommDtype.keeping(dtype)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options that decide who holds what; validated when made.

    Attributes:
        ratio: relative share of each rank, the master first; even when absent.
        window: most weight blocks in memory per rank, at least 2.
        memory_bytes: most resident memory of each rank's process; a share of what is free when
            absent.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        quantize: ``none``, ``int8``, ``int4`` or ``int4:GROUP`` with 32, 64 or 128: how the
            projections are stored; the LM head is kept in 8 bits at least.
        collective: how partial sums are combined: ``star``, ``one-shot``, ``two-shot``, or
            ``auto``, which decides by measured links.
        comm_dtype: dtype of the sums between ranks: ``float32``, ``bfloat16``, ``int8``, or
            ``auto``: float32 for a float32 run, else bfloat16.
        chunk_tokens: most tokens of a prefill step; chosen by the memory limits when absent.

    Raises:
        ConfigError: an option has an invalid value.
        MemoryLimitError: the window is too small.
    """

    ratio: Sequence[float] | None = None
    window: int | None = None
    memory_bytes: int | None = None
    dtype: str = AUTO
    quantize: str = "none"
    collective: str = AUTO
    comm_dtype: str = AUTO
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < MIN_SLOTS:
            raise MemoryLimitError(
                f"window {self.window}: at least {MIN_SLOTS} blocks are needed, one in use and "
                "one being read"
            )
        check_range("window", self.window, 2**31 - 1)
        check_range("memory_bytes", self.memory_bytes, 2**63 - 1)
        check_range("chunk_tokens", self.chunk_tokens, 2**31 - 1)
        if self.dtype not in (AUTO, *DTYPES):
            raise ConfigError(f"dtype {self.dtype!r}: expected auto, float32 or bfloat16")
        QuantSpec.parse(self.quantize)
        CollectiveOptions.parse(self.collective, self.comm_dtype)


def check_range(name: str, value: int | None, most: int) -> None:
    """Check that an option is absent or from 1 to ``most``.

    Raises:
        ConfigError: it is neither.
    """
    if value is not None and not 1 <= value <= most:
        raise ConfigError(f"{name}: expected a number from 1 to {most}, got {value}")
