"""The structures of ``bindings.py`` have the fields of ``native.h``, at the same places."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch

from tpirt.ops.native import bindings
from tpirt.ops.native.compiling import SOURCES

STRUCTURES: dict[type[ctypes.Structure], str] = {
    bindings.Attention: "attention",
    bindings.Matrix: "matrix",
    bindings.AttentionBlock: "attention_block",
    bindings.MlpBlock: "mlp_block",
    bindings.HeadBlock: "head_block",
    bindings.Layer: "layer",
    bindings.KVRoom: "kv_room",
    bindings.SequenceRows: "sequence",
}
ROUNDED = {"codes": "x.q", "scales": "x.scale", "sums": "x.sum", "groups": "x.groups"}  # of an MLP
KINDS = {
    "Q4": bindings._KINDS[torch.uint8],
    "NL4": bindings._CODEBOOK,
    "Q8": bindings._KINDS[torch.int8],
    "BF16": bindings._KINDS[torch.bfloat16],
    "F16": bindings._KINDS[torch.float16],
}
NUMBERS = {ctypes.c_long: "long", ctypes.c_int: "int", ctypes.c_float: "float"}


def conditions(kind: type[ctypes.Structure], name: str) -> Iterator[str]:
    """What C must find true of a structure."""
    yield f"sizeof({name}) == {ctypes.sizeof(kind)}"
    for field, held, *_ in kind._fields_:
        place = getattr(kind, field)
        there = ROUNDED.get(field, field) if kind is bindings.MlpBlock else field
        value = f"(({name} *)0)->{there}"
        yield f"offsetof({name}, {there}) == {place.offset}"
        yield f"sizeof({value}) == {place.size}"
        number = NUMBERS.get(held, "")
        cases = "".join(f"{each}: {int(each == number)}, " for each in NUMBERS.values())
        yield f"_Generic({value}, {cases}default: {int(not number)})"


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a compiler")
def test_fields_are_where_c_has_them() -> None:
    claims = [each for kind, name in STRUCTURES.items() for each in conditions(kind, name)]
    claims += [f"{name} == {number}" for name, number in KINDS.items()]
    source = '#include "native.h"\n' + "".join(
        f'_Static_assert({claim}, "{claim}");\n' for claim in claims
    )
    command = ["cc", "-std=c11", "-fsyntax-only", f"-I{SOURCES}", "-xc", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_every_structure_is_compared() -> None:
    assert set(STRUCTURES) == set(ctypes.Structure.__subclasses__()) & {
        each for each in vars(bindings).values() if isinstance(each, type)
    }
