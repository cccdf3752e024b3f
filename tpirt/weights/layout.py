"""Block files: one block of one rank as a safetensors file with page-aligned data.

A file is read sequentially into one buffer; its tensors are views of that buffer. Format:
https://huggingface.co/docs/safetensors, with the header padded with spaces. The format allows no
holes, so the gaps that align tensors are tensors themselves, named ``gap.N``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch

from tpirt.dtypes import SAFETENSORS_NAMES
from tpirt.ops.buffers import Region
from tpirt.ops.quant import Scheme
from tpirt.ops.quant_linear import QuantMatrix
from tpirt.sharding.blocks import Block, StoredTensor

PAGE_BYTES = 4096

Weight = torch.Tensor | QuantMatrix


class Weights(dict[str, Weight]):
    """A block's weights by name: views of a buffer, for all blocks of a kind that pass through it.

    Attributes:
        prepared: what a consumer made of the views, to compute faster; lives as long as they do.
    """

    __slots__ = ("prepared",)

    def __init__(self, weights: Mapping[str, Weight]):
        super().__init__(weights)
        self.prepared: object | None = None


def block_header(block: Block) -> bytes:
    """Return the file's header: length, JSON, padding to a multiple of 4096 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "block": block.name}}
    for region in _regions(block):
        entries[region.name] = {
            "dtype": SAFETENSORS_NAMES[region.dtype],
            "shape": list(region.shape),
            "data_offsets": [region.offset, region.end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(8 + len(text)) % PAGE_BYTES + len(text)
    return padded.to_bytes(8, "little") + text.ljust(padded)


def file_bytes(block: Block) -> int:
    """Size of the block's file."""
    return len(block_header(block)) + block.nbytes


def view_weights(block: Block, buffer: torch.Tensor, start: int) -> Weights:
    """View a block's weights in ``buffer``, uint8, from ``start`` on; no copy."""
    data = buffer[start : start + block.nbytes]
    views = {
        tensor.name: _view(tensor, data[offset : offset + tensor.nbytes])
        for tensor, offset in zip(block.tensors, block.offsets, strict=True)
    }
    return Weights(views)


def _view(tensor: StoredTensor, buffer: torch.Tensor) -> Weight:
    if not isinstance(tensor.quant, Scheme):
        return tensor.regions[0].view(buffer)
    out_features, in_features = tensor.shape
    return QuantMatrix.of_buffer(tensor.quant, out_features, in_features, buffer)


def _regions(block: Block) -> list[Region]:
    """All regions of a block in file order, gaps included."""
    regions: list[Region] = []
    end = 0
    for tensor, offset in zip(block.tensors, block.offsets, strict=True):
        for part in tensor.regions:
            start = offset + part.offset
            if start > end:
                regions.append(Region(f"gap.{len(regions)}", torch.uint8, (start - end,), end))
            regions.append(replace(part, offset=start))
            end = regions[-1].end
    return regions
