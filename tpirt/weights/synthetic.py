"""A model without a checkpoint: random weights from a seed, generated as bytes of slices.

Its directory has ``config.json``, a tokenizer, ``synthetic.json`` with the seed, and its slices
under ``slices``; see :mod:`tpirt.cluster.synth`. The bytes of a slice depend only on seed, shard,
block, tensor and format. Slices of another split or format are a different model, because weights
are drawn per shard.

Weights are uniform around 0 with the standard deviation of transformers' initialisation, norms
are 1, so hidden states stay bounded for any number of layers. Tied embeddings are drawn untied.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from tpirt.config import ModelConfig
from tpirt.errors import CheckpointError
from tpirt.files import read_regular
from tpirt.ops.buffers import Region, tensor_bytes
from tpirt.ops.quant import Scheme
from tpirt.sharding.blocks import Block, StoredTensor
from tpirt.sharding.partition import Shard
from tpirt.types import ProgressCallback, ignore_progress
from tpirt.weights.layout import block_header
from tpirt.weights.source import BlockBytes

MARKER = "synthetic.json"
SLICES = "slices"

# Version of the generator: incremented when the same seed would give other bytes.
_GENERATION = 3

_STD = 0.02
_UNIFORM_16_BITS = 65536 / math.sqrt(12)  # standard deviation of numbers drawn evenly

_DRAWN_BYTES = 1 << 20  # drawn at once: 4.7 GB/s, against 3.3 for 64 MiB (caches)


class SyntheticCheckpoint:
    """A :class:`tpirt.weights.source.ModelSource` of random weights; closing does nothing.

    Attributes:
        path: the model directory.
        seed: of the weights.
    """

    divisible = False

    def __init__(self, path: Path, config: ModelConfig, seed: int):
        self.path = path
        self.seed = seed
        self._config = config

    @classmethod
    def open(cls, path: Path) -> SyntheticCheckpoint:
        """Open a model directory that :func:`is_synthetic`.

        Raises:
            CheckpointError: ``synthetic.json`` or config.json is missing or invalid.
            ConfigError: config.json is not supported.
        """
        return cls(path, ModelConfig.from_dir(path), read_seed(path))

    @cached_property
    def fingerprint(self) -> str:
        """Identify the model: 32 hex digits from configuration and seed."""
        identity = f"synthetic {_GENERATION} {self.seed} {self._config.to_json()}"
        return hashlib.sha256(identity.encode()).hexdigest()[:32]

    @property
    def slices(self) -> Path:
        """Folder of its slices."""
        return self.path / SLICES

    def gather_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Draw rows of the embedding, (len(rows), H) bfloat16."""
        out = torch.empty(len(rows), self._config.hidden_size, dtype=torch.bfloat16)
        for index, row in enumerate(rows):
            (numbers,) = _int16_pieces(f"{self.seed}/{name}/{row}", [out.shape[1]])
            torch.mul(numbers, _STD / _UNIFORM_16_BITS, out=out[index])
        return out

    gather_cached_rows = gather_rows

    def hash_content(self, progress: ProgressCallback = ignore_progress) -> None:
        """Do nothing: the fingerprint follows from configuration and seed."""

    def cut(
        self, config: ModelConfig, shard: Shard, blocks: Iterable[Block]
    ) -> Generator[BlockBytes]:
        """Draw the bytes of block files, in order."""
        for index, block in enumerate(blocks):
            offset = 0
            for piece in random_block(self.seed, shard, block):
                yield index, offset, piece
                offset += len(piece)

    def close(self) -> None:
        """Do nothing: no file is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


def is_synthetic(path: Path) -> bool:
    """Whether a model directory is synthetic."""
    return (path / MARKER).is_file()


def read_seed(path: Path) -> int:
    """Return the seed of a synthetic model's directory.

    Raises:
        CheckpointError: ``synthetic.json`` is missing or invalid.
    """
    file = path / MARKER
    try:
        seed = json.loads(read_regular(file))["seed"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise CheckpointError(f"{file}: not readable ({exc!r}); run `tpirt synth` again") from exc
    if type(seed) is not int or seed < 0:
        raise CheckpointError(f"{file}: seed: expected a whole number, at least 0, got {seed!r}")
    return seed


def marker_text(seed: int) -> str:
    """The content of ``synthetic.json``."""
    return json.dumps({"seed": seed}) + "\n"


def random_block(seed: int, shard: Shard, block: Block) -> Iterator[memoryview]:
    """Yield a block file's bytes in order, header first, in pieces of about 1 MiB.

    Scales and zero points of a tensor are one piece, at most a sixteenth of the block.
    """
    yield memoryview(block_header(block))
    end = 0
    for tensor, offset in zip(block.tensors, block.offsets, strict=True):
        for region in tensor.regions:
            start = offset + region.offset
            if start > end:
                yield memoryview(bytes(start - end))
            yield from _region_bytes(f"{seed}/{shard}/{block.name}/{region.name}", tensor, region)
            end = start + region.nbytes


def _region_bytes(key: str, tensor: StoredTensor, region: Region) -> Iterator[memoryview]:
    quant = tensor.quant
    if not isinstance(quant, Scheme):
        yield from _plain(key, tensor)
    elif region == tensor.regions[0]:
        stream = _Stream(key)  # any byte is a code or two, and inputs that pad a row are 0
        for nbytes in _parts(region.nbytes, _DRAWN_BYTES):
            yield tensor_bytes(stream.take(nbytes))
    else:
        yield tensor_bytes(quant.even_scales(region, tensor.shape[0], _STD))


def _plain(key: str, tensor: StoredTensor) -> Iterator[memoryview]:
    if "norm" in tensor.name:
        yield tensor_bytes(torch.ones(tensor.shape, dtype=tensor.dtype))
        return
    step = _DRAWN_BYTES // tensor.dtype.itemsize
    for numbers in _int16_pieces(key, _parts(math.prod(tensor.shape), step)):
        yield tensor_bytes(numbers.to(tensor.dtype).mul_(_STD / _UNIFORM_16_BITS))


def _parts(total: int, step: int) -> list[int]:
    return [min(step, total - start) for start in range(0, total, step)]


def _int16_pieces(key: str, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield int16 (size,) for each of ``sizes``: the stream of random numbers that is ``key``'s."""
    stream = _Stream(key)
    for size in sizes:
        yield stream.take(2 * size).view(torch.int16)


class _Stream:
    """The random numbers that are ``key``'s.

    numpy guarantees the same numbers of this generator in all versions.
    """

    def __init__(self, key: str):
        digest = hashlib.sha256(f"{_GENERATION}/{key}".encode()).digest()
        self._numbers = np.random.SFC64(int.from_bytes(digest, "little"))

    def take(self, nbytes: int) -> torch.Tensor:
        """The next bytes, uint8 (nbytes,); what is left of the last 8 is dropped."""
        numbers = self._numbers.random_raw(-(-nbytes // 8)).view(np.uint8)
        return torch.from_numpy(numbers)[:nbytes]
