"""The options of a deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpirt.batch import Algorithm, CommDtype
from tpirt.dtypes import RUN_DTYPES
from tpirt.errors import ConfigError, MemoryLimitError
from tpirt.ops.quant import QuantSpec
from tpirt.weights.stream_plan import MIN_SLOTS

AUTO = "auto"
KV_BITS = {AUTO: None, "int8": 8}  # by ``PlanOptions.kv``


@dataclass(frozen=True)
class CollectiveOptions:
    """How partial sums are combined; None means automatic."""

    algorithm: Algorithm | None = None
    comm_dtype: CommDtype | None = None

    @classmethod
    def parse(cls, collective: str, comm_dtype: str) -> CollectiveOptions:
        """Parse ``--collective`` and ``--comm-dtype``.

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
        """The comm dtype of partial sums in ``dtype``; by default ``dtype`` itself."""
        if self.comm_dtype is not None:
            return self.comm_dtype
        return CommDtype.keeping(dtype)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of a deployment; validated on construction.

    Attributes:
        ratio: relative share of each rank, the master first; by default even.
        window: maximum weight blocks in memory per rank, at least 2.
        memory_bytes: maximum resident memory of each rank's process; by default a share of the
            free memory.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        quantize: quantization of the projections: ``none``, ``int8``, ``int4`` or ``nl4``; with the
            last two the LM head and a few others have 8 bits. ``auto`` is the first of none, int8
            and int4 with which every rank keeps all weights in memory; int4 if none does.
        kv: how keys and values are cached: ``int8``, or ``auto``: in the dtype.
        collective: all-reduce algorithm: ``star``, ``one-shot``, ``two-shot``, or ``auto``, which
            depends on measured links.
        comm_dtype: dtype of partial sums between ranks: ``float32``, ``bfloat16``, ``int8``, or
            ``auto``: float32 for a float32 run, else bfloat16.
        chunk_tokens: maximum tokens of a prefill step; by default it follows from memory limits.
        context: maximum tokens of a conversation, for which every rank must have the memory; by
            default the model's maximum, as far as the memory lasts.
        kv_tokens: maximum tokens whose keys and values are in memory at once, of all conversations
            together; by default the memory limits decide.

    Raises:
        ConfigError: an option has an invalid value.
        MemoryLimitError: the window is too small.
    """

    ratio: Sequence[float] | None = None
    window: int | None = None
    memory_bytes: int | None = None
    dtype: str = AUTO
    quantize: str = "none"
    kv: str = AUTO
    collective: str = AUTO
    comm_dtype: str = AUTO
    chunk_tokens: int | None = None
    context: int | None = None
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < MIN_SLOTS:
            raise MemoryLimitError(
                f"window {self.window}: at least {MIN_SLOTS} blocks are needed, one in use and "
                "one being read"
            )
        check_range("window", self.window, 2**31 - 1)
        check_range("memory_bytes", self.memory_bytes, 2**63 - 1)
        check_range("chunk_tokens", self.chunk_tokens, 2**31 - 1)
        check_range("context", self.context, 2**31 - 1)
        check_range("kv_tokens", self.kv_tokens, 2**31 - 1)
        if self.dtype not in (AUTO, *RUN_DTYPES):
            raise ConfigError(f"dtype {self.dtype!r}: expected auto, float32 or bfloat16")
        if self.quantize != AUTO:
            QuantSpec.parse(self.quantize)
        if self.kv not in KV_BITS:
            raise ConfigError(f"kv {self.kv!r}: expected {' or '.join(KV_BITS)}")
        CollectiveOptions.parse(self.collective, self.comm_dtype)


def check_range(name: str, value: int | None, most: int) -> None:
    """Check that an option is None or from 1 to ``most``.

    Raises:
        ConfigError: it is not.
    """
    if value is not None and not 1 <= value <= most:
        raise ConfigError(f"{name}: expected a number from 1 to {most}, got {value}")
