"""The block file: one block of one rank as a safetensors file whose data begins page-aligned.

One block is one sequential read into one buffer; its tensors are views of that buffer. Format:
https://huggingface.co/docs/safetensors, the header padded with spaces as the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from tpirt.parallel.sharding import Block

PAGE_BYTES = 4096

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def block_header(block: Block) -> bytes:
    """Return the file's head: length, JSON, padding up to a multiple of 4096 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "block": block.name}}
    offset = 0
    for tensor in block.tensors:
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(8 + len(text)) % PAGE_BYTES + len(text)
    return padded.to_bytes(8, "little") + text.ljust(padded)


def file_bytes(block: Block) -> int:
    """Size of the block's file."""
    return len(block_header(block)) + block.nbytes


def view_tensors(block: Block, buffer: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """View a block's data, uint8 ``buffer`` (>= block.nbytes,), as its tensors; no copy."""
    views, offset = {}, 0
    for tensor in block.tensors:
        raw = buffer[offset : offset + tensor.nbytes]
        views[tensor.name] = raw.view(tensor.dtype).view(tensor.shape)
        offset += tensor.nbytes
    return views
