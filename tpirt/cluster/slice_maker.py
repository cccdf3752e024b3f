"""Cut the units of slices out of the model, or find slices in the master's store."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from tpirt.config import ModelConfig
from tpirt.errors import StoreError
from tpirt.ops.buffers import page_buffer, tensor_bytes
from tpirt.sharding.blocks import Block, Split, StoredTensor
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Shard, Span
from tpirt.sharding.units import Unit
from tpirt.weights.hub import model_name
from tpirt.weights.layout import file_bytes
from tpirt.weights.manifest import NO_DIGEST, Manifest, SliceSpec
from tpirt.weights.source import ModelSource
from tpirt.weights.store import SliceStore, StoredSlice
from tpirt.weights.unit_bytes import BlockUnits


@dataclass
class SliceMaker:
    """Makes slices of one model in one format."""

    checkpoint: ModelSource
    config: ModelConfig
    form: WeightFormat
    _specs: dict[Shard, SliceSpec] = field(default_factory=dict, init=False, repr=False)
    _made: dict[Shard, Manifest] = field(default_factory=dict, init=False, repr=False)

    def spec(self, shard: Shard) -> SliceSpec:
        """Return the cached spec of a rank's slice; hashes the model if necessary."""
        if shard not in self._specs:
            source = self.checkpoint
            name = model_name(source.path)
            self._specs[shard] = SliceSpec(
                source.fingerprint, name, self.config, self.form, shard, own=not source.divisible
            )
        return self._specs[shard]

    def manifest(self, shard: Shard) -> Manifest:
        """Return the manifest of a rank's slice, which was provided or cut before."""
        return self._made[shard]

    def made(self, manifest: Manifest, store: SliceStore) -> None:
        """Remember a slice's content for later runs."""
        self._made[manifest.shard] = manifest
        store.remember(manifest)

    def stored(self, shard: Shard, store: SliceStore) -> StoredSlice | None:
        """Find a rank's slice with the content that this machine knows; None if there is none.

        Damaged slices are ignored.
        """
        digests = store.known(self.spec(shard))
        if NO_DIGEST in digests:
            return None
        manifest = Manifest.of(self.spec(shard), digests)
        with contextlib.suppress(StoreError):
            found = store.find(manifest.slice_id)
            if found is not None:
                self._made[shard] = found.manifest
            return found
        return None

    def cut(self, shard: Shard, numbers: Sequence[int]) -> Generator[tuple[int, memoryview]]:
        """Cut units out of the model; yields (number, canonical bytes), in order.

        Works ahead in threads until the generator is exhausted or closed. Memory: the wanted
        part of one block.

        Raises:
            CheckpointError: a read failed, or a weight to be quantized is not finite.
        """
        spec = self.spec(shard)
        jobs = [self._job(spec, index, wanted) for index, wanted in _by_block(spec, numbers)]
        for job, content in self._blocks(shard, jobs):
            view = BlockUnits(job.block, content[len(content) - job.block.nbytes :])
            for number, unit in zip(job.numbers, job.units, strict=True):
                yield number, view.get(unit)

    def cut_blocks(
        self, shard: Shard, indices: Sequence[int]
    ) -> Generator[tuple[int, torch.Tensor]]:
        """Cut whole blocks; yields (index of block, its file as uint8), in order.

        Raises:
            CheckpointError: a read failed, or a weight to be quantized is not finite.
        """
        blocks = self.spec(shard).blocks
        jobs = [_Job(blocks[index], (), ()) for index in indices]
        for index, (_, content) in zip(indices, self._blocks(shard, jobs), strict=True):
            yield index, content

    def _job(self, spec: SliceSpec, index: int, numbers: Sequence[int]) -> _Job:
        units = [spec.places[number][1] for number in numbers]
        block = spec.blocks[index]
        if not self.checkpoint.divisible or len(units) == len(spec.units[index]):
            return _Job(block, tuple(numbers), tuple(units))
        return _Job(*_reduced(block, dict(zip(numbers, units, strict=True))))

    def _blocks(self, shard: Shard, jobs: Sequence[_Job]) -> Generator[tuple[_Job, torch.Tensor]]:
        pieces = self.checkpoint.cut(self.config, shard, [job.block for job in jobs])
        try:
            for job in jobs:
                size = file_bytes(job.block)
                content, done = page_buffer(size), 0
                memory = tensor_bytes(content)
                while done < size:
                    _, offset, data = next(pieces)
                    memory[offset : offset + len(data)] = data
                    done += len(data)
                if not self.checkpoint.divisible:
                    BlockUnits(job.block, content[size - job.block.nbytes :]).clear_padding()
                yield job, content
        finally:
            pieces.close()


@dataclass(frozen=True)
class _Job:
    """A block to cut, and its wanted units with their numbers."""

    block: Block
    numbers: tuple[int, ...]
    units: tuple[Unit, ...]


def _by_block(spec: SliceSpec, numbers: Iterable[int]) -> Iterator[tuple[int, list[int]]]:
    for index, group in groupby(numbers, lambda number: spec.places[number][0]):
        yield index, list(group)


def _reduced(
    block: Block, wanted: dict[int, Unit]
) -> tuple[Block, tuple[int, ...], tuple[Unit, ...]]:
    """A block of only the wanted units: fewer rows, and one tensor per run of columns."""
    tensors: list[StoredTensor] = []
    units: list[Unit] = []
    for index, tensor in enumerate(block.tensors):
        theirs = [unit for unit in wanted.values() if unit.tensor == index]
        for run in _runs(tensor, theirs):
            made, moved = _stack(tensor, run, len(tensors))
            tensors.append(made)
            units += moved
    return Block(block.name, tuple(tensors)), tuple(wanted), tuple(units)


def _runs(tensor: StoredTensor, units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Group units that can be one tensor: any rows, or neighbouring columns."""
    run: list[Unit] = []
    for unit in units:
        if run and _by_columns(tensor) and not _adjoin(run[-1], unit):
            yield run
            run = []
        run.append(unit)
    if run:
        yield run


def _by_columns(tensor: StoredTensor) -> bool:
    return tensor.pieces[0].split in (Split.Q_COLUMNS, Split.MLP_COLUMNS)


def _adjoin(left: Unit, right: Unit) -> bool:
    return (
        left.columns is not None
        and right.columns is not None
        and (left.columns.stop == right.columns.start)
    )


def _stack(
    tensor: StoredTensor, run: Sequence[Unit], index: int
) -> tuple[StoredTensor, list[Unit]]:
    """Make a tensor of a run; returns it with the run's units as it has them."""
    name = f"{index}.{tensor.name}"
    pieces = [unit.piece(tensor) for unit in run]
    first, last = run[0].columns, run[-1].columns
    if _by_columns(tensor) and first is not None and last is not None:
        assert pieces[0].columns is not None
        start = pieces[0].columns.start
        columns = Span(start, start + last.stop - first.start)
        piece = replace(pieces[0], columns=columns)
        made = replace(tensor, name=name, shape=(piece.rows.size, columns.size), pieces=(piece,))
        return made, [
            replace(unit, tensor=index, columns=_moved(unit.columns, -first.start)) for unit in run
        ]
    moved, rows = [], 0
    for unit in run:
        moved.append(replace(unit, tensor=index, rows=Span(rows, rows + unit.rows.size)))
        rows += unit.rows.size
    made = replace(tensor, name=name, shape=(rows, *tensor.shape[1:]), pieces=tuple(pieces))
    return made, moved


def _moved(span: Span | None, by: int) -> Span | None:
    return None if span is None else Span(span.start + by, span.stop + by)
