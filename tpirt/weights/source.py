"""Sources of weights that slices are cut from."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from tpirt.config import ModelConfig
from tpirt.sharding.blocks import Block
from tpirt.sharding.partition import Shard
from tpirt.types import ProgressCallback

# Index of a block, offset in its file, bytes.
BlockBytes = tuple[int, int, memoryview]


class ModelSource(Protocol):
    """The weights of one model: of a checkpoint, or random.

    Attributes:
        path: the model directory.
        divisible: whether any rectangle of a tensor can be cut, and is equal for all shards;
            otherwise only whole blocks can be cut, and units belong to one shard.
    """

    path: Path
    divisible: bool

    @property
    def fingerprint(self) -> str:
        """Identify the content: 32 hex digits. Call :meth:`hash_content` before the first use."""

    def hash_content(self, progress: ProgressCallback = ...) -> None:
        """Prepare :attr:`fingerprint`; may read all weights."""

    def gather_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Read rows of the embedding by number: (len(rows), H)."""

    def gather_cached_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor | None:
        """As :meth:`gather_rows`, without waiting for a disk; None if that cannot be."""

    def cut(
        self, config: ModelConfig, shard: Shard, blocks: Iterable[Block]
    ) -> Generator[BlockBytes]:
        """Yield the bytes of block files, in order.

        Raises:
            CheckpointError: a read failed, or a weight to be quantized is not finite.
        """

    def close(self) -> None:
        """Close all files."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
