"""What a slice is of, and what it contains.

A *slice* is one rank's part of a model in one format: block files and a manifest. Its spec follows
from the plan; its id also covers the digest of every unit, so that one id never means two contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from tpirt.config import ModelConfig
from tpirt.errors import ConfigError, StoreError
from tpirt.printable import printable_line
from tpirt.sharding.blocks import Block, rank_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import Shard, Span
from tpirt.sharding.units import Unit, block_units, most_units
from tpirt.weights.layout import block_header, file_bytes
from tpirt.weights.unit_bytes import unit_nbytes

FORMAT_VERSION = 5
MANIFEST = "manifest.json"

# An order of 100,000 units (405 B parameters on two ranks) has 3.2 MiB.
MAX_ORDER_BYTES = 4 << 20
_MAX_VALUES = 20_000  # in an order's JSON: parsed, each takes 60 bytes and more
_MAX_UNITS = 1 << 20  # of a whole model
_MAX_VOCABULARY = 1 << 22

DIGEST_BYTES = 16
NO_DIGEST = bytes(DIGEST_BYTES)  # stands for a unit that is lacking, or whose digest is unknown

_WRONG_FIELDS = (ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError)


def unit_digest(content: memoryview | bytes) -> bytes:
    """Return the digest of a unit's canonical bytes: 16 bytes of SHA-256, safe against forgery."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


@dataclass(frozen=True)
class SliceSpec:
    """One rank's part of a model in one format: everything else follows.

    Attributes:
        fingerprint: of the model's content.
        model: its name, for people.
        config: its shape.
        form: of the weights.
        shard: what the rank holds.
        own: the units are not those of other shards: synthetic weights are drawn for one shard.
    """

    fingerprint: str
    model: str
    config: ModelConfig
    form: WeightFormat
    shard: Shard
    own: bool = False

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The rank's blocks, in the order of use."""
        return rank_blocks(self.config, self.shard, self.form)

    @cached_property
    def units(self) -> tuple[tuple[Unit, ...], ...]:
        """The units of each block."""
        return tuple(block_units(self.config, block) for block in self.blocks)

    @cached_property
    def places(self) -> tuple[tuple[int, Unit], ...]:
        """All units in order, each with the index of its block: a unit's number is its index."""
        return tuple((index, unit) for index, units in enumerate(self.units) for unit in units)

    def has_units(self, count: int) -> bool:
        """Tell whether there are ``count`` units, at no more expense than listing so many."""
        if self.config.num_hidden_layers > count:  # each has a block, and that a unit
            return False
        found = 0
        for block in self.blocks:
            found += len(block_units(self.config, block))
            if found > count:
                return False
        return found == count

    @cached_property
    def nbytes(self) -> int:
        """Size of all block files."""
        return sum(file_bytes(block) for block in self.blocks)

    @property
    def form_label(self) -> str:
        """Describe the format, such as ``int8``."""
        dtype, quantize = self.form.names
        return dtype if quantize == "none" else quantize

    @property
    def shard_label(self) -> str:
        """Describe the shard, such as ``heads 0-3, columns 0-511, LM head``."""
        heads, columns = self.shard.q_heads, self.shard.columns
        return (
            f"heads {heads.start}-{heads.stop - 1}, columns "
            f"{columns.start}-{columns.stop - 1}{', LM head' if self.shard.first else ''}"
        )

    @property
    def label(self) -> str:
        """Describe format and shard."""
        return f"{self.form_label}, {self.shard_label}"

    @cached_property
    def space(self) -> str:
        """Equal for two specs if units of equal keys have equal bytes in both."""
        dtype, quantize = self.form.names
        shard = asdict(self.shard) if self.own else None
        return _hash([FORMAT_VERSION, self.fingerprint, dtype, quantize, shard])

    @cached_property
    def key(self) -> str:
        """Identify the spec: 24 hex digits."""
        sizes = [(block.name, file_bytes(block)) for block in self.blocks]
        return _hash([self.space, self.form.names, asdict(self.shard), sizes])

    def unit_bytes(self, number: int) -> int:
        """Size of a unit's canonical bytes."""
        index, unit = self.places[number]
        return unit_nbytes(self.blocks[index], unit)

    def fields(self) -> dict[str, Any]:
        """Return JSON-ready fields; :meth:`from_fields` gives an equal spec back."""
        dtype, quantize = self.form.names
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "dtype": dtype,
            "quantize": quantize,
            "shard": asdict(self.shard),
            "own": self.own,
            "config": json.loads(self.config.to_json()),
        }

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> SliceSpec:
        """Parse what may come from a stranger: nothing large follows from a few bytes.

        Raises:
            StoreError: another format version, an unknown or missing field, or a shard that is no
                part of the model.
        """
        try:
            fields = dict(fields)
            if (version := fields.pop("format_version")) != FORMAT_VERSION:
                named = repr(version)[:40]
                raise StoreError(
                    f"slice manifest of format {named}, this tpirt reads {FORMAT_VERSION}"
                )
            config = ModelConfig.from_json(json.dumps(fields.pop("config")))
            form = WeightFormat.named(*(fields.pop(n) for n in ("dtype", "quantize")))
            shard = _shard(config, dict(fields.pop("shard")))
            texts = {name: _text(fields.pop(name)) for name in ("fingerprint", "model")}
            own = fields.pop("own")
            if type(own) is not bool or fields:
                raise ValueError(f"unexpected {own if not fields else sorted(fields)}")
        except _WRONG_FIELDS as exc:
            reason = printable_line(f"{type(exc).__name__} {exc}")
            raise StoreError(f"not a slice manifest: {reason}"[:300]) from exc
        if most_units(config) > _MAX_UNITS or config.vocab_size > _MAX_VOCABULARY:
            raise StoreError("slice manifest: a model of more parts than any that is supported")
        return cls(config=config, form=form, shard=shard, own=own, **texts)


@dataclass(frozen=True)
class BlockFile:
    """One block file of a slice.

    Attributes:
        name: of the block.
        nbytes: size of the file.
        content: identifies the bytes: 24 hex digits of the units' digests and the file's header.
        digests: of the block's units, 16 bytes each.
        xxh3_128: checksum of the file, compared when it is first read; empty if it is elsewhere.
    """

    name: str
    nbytes: int
    content: str
    digests: bytes
    xxh3_128: str = ""

    @classmethod
    def of(cls, block: Block, digests: bytes, xxh3_128: str = "") -> BlockFile:
        """Describe a block's file; its bytes follow from header and units."""
        content = hashlib.sha256(block_header(block) + digests).hexdigest()[:24]
        return cls(block.name, file_bytes(block), content, digests, xxh3_128)

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a slice contains."""

    spec: SliceSpec
    blocks: tuple[BlockFile, ...]

    @classmethod
    def of(cls, spec: SliceSpec, digests: Sequence[bytes]) -> Manifest:
        """Describe a slice that lies elsewhere, from all its units' digests in order."""
        files, start = [], 0
        for block, units in zip(spec.blocks, spec.units, strict=True):
            files.append(BlockFile.of(block, b"".join(digests[start : start + len(units)])))
            start += len(units)
        return cls(spec, tuple(files))

    @cached_property
    def slice_id(self) -> str:
        """Identify the slice with its content: 24 hex digits."""
        return _hash([self.spec.key, [block.content for block in self.blocks]])

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint

    @property
    def model(self) -> str:
        return self.spec.model

    @property
    def form(self) -> WeightFormat:
        return self.spec.form

    @property
    def shard(self) -> Shard:
        return self.spec.shard

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def digests(self) -> list[bytes]:
        """The digests of all units, in order."""
        joined = b"".join(block.digests for block in self.blocks)
        return split_digests(joined)

    def to_json(self) -> str:
        """Serialise; :meth:`from_json` gives an equal manifest back."""
        blocks = [
            {"name": b.name, "xxh3_128": b.xxh3_128, "digests": b.digests.hex()}
            for b in self.blocks
        ]
        return json.dumps({**self.spec.fields(), "slice_id": self.slice_id, "blocks": blocks})

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Parse a manifest.

        Raises:
            StoreError: not a manifest, one of another format version, or one whose blocks are not
                those of its spec.
        """
        fields = parse_fields(text)
        slice_id, entries = fields.pop("slice_id", None), fields.pop("blocks", None)
        spec = SliceSpec.from_fields(fields)
        try:
            files = tuple(
                BlockFile.of(block, bytes.fromhex(entry["digests"]), _text(entry["xxh3_128"]))
                for block, entry in zip(spec.blocks, entries, strict=True)
                if entry["name"] == block.name
            )
        except (ValueError, KeyError, TypeError) as exc:
            raise StoreError(f"not a slice manifest: {exc}"[:300]) from exc
        manifest = cls(spec, files)
        counts = [DIGEST_BYTES * len(units) for units in spec.units]
        if manifest.slice_id != slice_id or [len(f.digests) for f in files] != counts:
            raise StoreError("slice manifest: its blocks are not those of its model and shard")
        return manifest


@dataclass(frozen=True)
class SliceOrder:
    """What a master asks of a store: which units it holds, or to make a slice.

    Attributes:
        spec: of the slice.
        digests: of its units. In a question, as far as the master knows them; otherwise of those
            that the store takes from its own slices, and NO_DIGEST for those that come.
    """

    spec: SliceSpec
    digests: list[bytes]

    def to_json(self) -> str:
        """Serialise; :meth:`from_json` gives an equal order back."""
        joined = b"".join(self.digests).hex()
        return json.dumps({**self.spec.fields(), "digests": joined})

    @classmethod
    def from_json(cls, text: str) -> SliceOrder:
        """Parse what may come from a stranger; takes time, so call it in a thread.

        Raises:
            StoreError: too large, not an order, or one whose digests do not fit its spec.
        """
        if len(text) > MAX_ORDER_BYTES:
            raise StoreError(
                f"slice manifest of {len(text):,} bytes: expected at most {MAX_ORDER_BYTES:,}"
            )
        if sum(map(text.count, ",[{")) > _MAX_VALUES:
            raise StoreError(f"not a slice manifest: more than {_MAX_VALUES:,} values")
        fields = parse_fields(text)
        joined = fields.pop("digests", None)
        spec = SliceSpec.from_fields(fields)
        try:
            digests = split_digests(bytes.fromhex(joined))
        except (ValueError, TypeError) as exc:
            raise StoreError(f"not a slice manifest: digests: {exc}") from exc
        if not spec.has_units(len(digests)) or len(digests[-1]) != DIGEST_BYTES:
            raise StoreError(
                f"not a slice manifest: {len(digests)} digests are not those of its units"
            )
        return cls(spec, digests)


def parse_fields(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        StoreError: not an object.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise StoreError(f"not a slice manifest: {exc}") from exc
    if not isinstance(fields, dict):
        raise StoreError(f"not a slice manifest: expected an object, got {type(fields).__name__}")
    return fields


def split_digests(joined: bytes) -> list[bytes]:
    """Cut joined digests into one per unit."""
    return [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)]


def _shard(config: ModelConfig, fields: dict[str, Any]) -> Shard:
    first = fields.pop("first")
    spans = {name: Span(*span) for name, span in fields.items()}
    shard = Shard(**spans, first=first)
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    for span, size in zip((shard.q_heads, shard.kv_heads, shard.columns), sizes, strict=True):
        if not (type(span.start) is type(span.stop) is int and 0 <= span.start < span.stop <= size):
            raise ValueError(f"shard {tuple(span)} of {size}")
    if type(first) is not bool:
        raise ValueError(f"shard: first is {first!r}")
    return shard


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 300:
        raise ValueError("expected a short text")
    return printable_line(value)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]
