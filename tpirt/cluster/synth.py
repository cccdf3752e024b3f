"""Make synthetic models: a model directory of any shape with slices, without a checkpoint."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from tpirt.cluster.provision import write_slice
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.config import ModelConfig
from tpirt.errors import CheckpointError, ConfigError, StoreError
from tpirt.files import free_bytes
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Partition
from tpirt.text.byte_level import MIN_VOCAB_SIZE, write_byte_level_tokenizer
from tpirt.types import Progress, ProgressCallback
from tpirt.weights.shapes import Shape
from tpirt.weights.store import SliceStore, StoredSlice
from tpirt.weights.synthetic import MARKER, SyntheticCheckpoint, marker_text

# Slices written in parallel, because one writer waits for the disk after every block. With 1, 2,
# 3, 4 on 2 cores: 0.7, 0.9, 1.3, 1.1 GB/s.
_WRITERS = 3

_CONFIG = "config.json"


class _StoppedError(Exception):
    """Raised in writing threads when another one has failed, or Ctrl-C was pressed."""


def make_synthetic(
    out: Path,
    shape: Shape,
    seed: int,
    partition: Partition,
    form: WeightFormat,
    progress: ProgressCallback,
) -> list[StoredSlice]:
    """Make a synthetic model, or add slices to one; existing whole slices stay.

    The bytes follow from shape, seed, partition and format. Memory: three blocks.

    Args:
        out: the model directory, created if missing.
        shape: content of its config.json.
        seed: of the weights.
        partition: whose slices are made.
        form: of the weights.
        progress: called with the bytes written, also from other threads.

    Returns:
        The slices, by rank.

    Raises:
        ConfigError: the vocabulary is too small for a tokenizer.
        CheckpointError: ``out`` has another model, or cannot be written.
        StoreError: the disk is too small (nothing was written), or a slice cannot be written.
    """
    config = ModelConfig.from_hf(shape)
    if config.vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size {config.vocab_size}: a synthetic model's tokenizer has {MIN_VOCAB_SIZE} "
            "tokens at least; give a shape with a larger vocabulary"
        )
    source = SyntheticCheckpoint(out, config, seed)
    _check_folder(source)
    maker = SliceMaker(source, config, form)
    store = SliceStore(source.slices)
    missing = [r for r, s in enumerate(partition.shards) if maker.stored(s, store) is None]
    total = sum(maker.spec(partition.shards[rank]).nbytes for rank in missing)
    _check_room(store, total)
    _write_files(out, shape, config, seed)
    stop, lock, done = threading.Event(), threading.Lock(), 0

    def make(rank: int) -> None:
        before = 0

        def report(step: Progress) -> None:
            nonlocal before, done
            if stop.is_set():
                raise _StoppedError
            with lock:
                done += step.done - before
                before = step.done
                progress(Progress("making slices", done, total))

        write_slice(maker, partition, rank, store, report)

    with ThreadPoolExecutor(_WRITERS) as pool:
        futures = [pool.submit(make, rank) for rank in missing]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # other writers are no longer needed
            pool.shutdown(cancel_futures=True)
    for future in futures:
        with contextlib.suppress(_StoppedError):
            future.result()
    found = [maker.stored(shard, store) for shard in partition.shards]
    return [stored for stored in found if stored is not None]


def _check_folder(wanted: SyntheticCheckpoint) -> None:
    """Reject a folder with another model; continue an unfinished one."""
    out = wanted.path
    marker = (out / MARKER).exists()
    if not marker and ((out / _CONFIG).exists() or any(out.glob("*.safetensors"))):
        raise CheckpointError(f"{out}: holds a model that is not synthetic; choose another --out")
    if not (marker and (out / _CONFIG).exists()):
        return
    there = SyntheticCheckpoint.open(out)
    if there.fingerprint != wanted.fingerprint:
        what = "seed" if there.seed != wanted.seed else "shape"
        raise CheckpointError(
            f"{out}: holds a synthetic model of another {what} (its seed is {there.seed}); choose "
            "another --out, or remove it"
        )


def _check_room(store: SliceStore, needed: int) -> None:
    """Raise StoreError unless the disk has room for all slices together."""
    free = free_bytes(store.root)
    if free is not None and free < needed:
        raise StoreError(
            f"{store.root}: the slices need {needed:,} bytes, the disk has {free:,} free; make "
            "room, or choose another --out or fewer bits (--quantize int4)"
        )


def _write_files(out: Path, shape: Shape, config: ModelConfig, seed: int) -> None:
    """Write all but the slices; config.json is last, and marks the folder as complete."""
    if (out / _CONFIG).exists():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text(marker_text(seed), encoding="utf-8")
        write_byte_level_tokenizer(out, config.vocab_size)
        (out / _CONFIG).write_text(json.dumps(dict(shape), indent=1), encoding="utf-8")
    except OSError as exc:
        raise CheckpointError(f"{out}: cannot be written: {exc.strerror}") from exc
