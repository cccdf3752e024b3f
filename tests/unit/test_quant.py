"""Quantized weights: the rounding only gains, the bytes are as documented, the products fit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpirt.errors import CheckpointError, ConfigError
from tpirt.ops import (
    plain_kernels,
    quant,
    quant_kernels,
    quant_matrix,
    quant_probe,
    quant_rounding,
)
from tpirt.ops.buffers import ALIGN, page_buffer
from tpirt.ops.native.bindings import native_kernels
from tpirt.ops.plain_kernels import PLAIN_KERNELS
from tpirt.ops.quant import AS_THEY_ARE, Codebook, Int4, Int8, QuantSpec, Scheme
from tpirt.ops.quant_kernels import DENSE, KERNELS
from tpirt.ops.quant_linear import (
    ROWS_UNIT,
    KernelChoice,
    QuantMatrix,
    dequantize,
    is_as_among_few,
    linear,
)
from tpirt.ops.quant_probe import choose_by_time, probe_kernels
from tpirt.ops.quant_regions import matrix_regions, regions_nbytes, view_regions
from tpirt.ops.quant_rounding import Workspace, int4_tiles, rows_at_once
from tpirt.ops.quant_words import (
    LARGEST_SCALE,
    on_codebook_grid,
    on_grid,
    split_codebook_words,
    split_words,
    to_codebook_words,
    to_words,
)
from tpirt.ops.tiles import (
    pack_bytes,
    pack_groups,
    pack_nibbles,
    unpack_bytes,
    unpack_groups,
    unpack_nibbles,
)
from tpirt.testing.processes import run_python

MXFP4 = (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)
SPECS: list[Scheme] = [Int8(), Int4(), Codebook()]
EXACT = KernelChoice((), "dense-float32")
BFLOAT16 = KernelChoice((), "dense-bfloat16")
NATIVE = KernelChoice((), "native")

HAS_NATIVE = native_kernels(1) is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="no kernels in C here")
# How weights are rounded and dequantized: in C, and by torch where C is missing.
WAYS = [pytest.param(True, marks=needs_native, id="native"), pytest.param(False, id="torch")]
DRAWN_WAYS = st.booleans() if HAS_NATIVE else st.just(False)


def random(*shape: int, seed: int = 0, tails: bool = False) -> torch.Tensor:
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return w * w.abs() if tails else w


def without_native(patch: pytest.MonkeyPatch) -> None:
    for module in (quant, quant_kernels):
        patch.setattr(module, "available_kernels", lambda: None)
    patch.setattr(quant, "native_kernels", lambda threads: None)


def stored(spec: Scheme, w: torch.Tensor, *starts: int, native: bool = HAS_NATIVE) -> torch.Tensor:
    """The bytes of ``w``, quantized whole, or in parts from ``starts`` on."""
    regions = matrix_regions(spec, *w.shape)
    # Memory used before: every byte of every code is written.
    buffer = page_buffer(regions_nbytes(regions)).fill_(255)
    codes, scales = view_regions(regions, buffer)
    scales.zero_()
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            without_native(patch)
        for start, stop in pairwise((*(starts or [0]), len(w))):
            part = codes[start // 16 : -(-stop // 16)]
            spec.round_rows(w[start:stop], start, part, scales, Workspace())
    buffer[regions[0].end : regions[1].offset] = 0
    buffer[regions[1].end :] = 0
    return buffer


def matrix_of(
    spec: Scheme, w: torch.Tensor, offset: int = 0, native: bool = HAS_NATIVE
) -> QuantMatrix:
    """Quantize ``w`` into memory ``offset`` bytes into a page."""
    content = stored(spec, w, native=native)
    place = page_buffer(len(content) + offset)[offset:].copy_(content)
    return QuantMatrix.of_buffer(spec, *w.shape, place)


def levels_of(matrix: QuantMatrix) -> torch.Tensor:
    """Codes, int32 (Np, Kp), after the words of native.h: byte (j, r, i) of a tile."""
    blocks, groups, _ = matrix.codes.shape
    if isinstance(matrix.spec, Int8):
        tiles = matrix.codes.view(blocks, groups, 8, 16, 4)  # input 4 j + i
    else:
        halves = matrix.codes.view(blocks, groups, 4, 1, 16, 4)  # inputs 8 j + i and 8 j + 4 + i
        tiles = torch.cat((halves & 15, halves >> 4), 3).view(blocks, groups, 8, 16, 4)
    return tiles.permute(0, 3, 1, 2, 4).reshape(16 * blocks, 32 * groups).int()


def values_of(matrix: QuantMatrix) -> torch.Tensor:
    """The weights, float32 (N, K), after the words of native.h and of the schemes."""
    levels = levels_of(matrix)
    if isinstance(matrix.spec, Int8):
        values = levels * matrix.scales.unsqueeze(1)
    else:
        words = matrix.scales.transpose(1, 2).reshape(len(levels), -1, 1).int() & 0xFFFF
        scale = torch.exp2((words >> 11) - 27.0) * (1 + (words >> 7 & 15) / 16)
        if isinstance(matrix.spec, Codebook):
            levels = torch.tensor(matrix.spec.levels)[levels]
            offset = 2.0 * ((words & 127) - 64)
        else:
            offset = ((words & 127) - 64 - 8 * 12).float() * (1 / 12)
        values = ((levels.view(len(levels), -1, 32) + offset) * scale).flatten(1)
    return values[: matrix.out_features, : matrix.in_features]


def rounded(spec: Scheme, w: torch.Tensor, native: bool = HAS_NATIVE) -> torch.Tensor:
    return values_of(matrix_of(spec, w, native=native))


def min_max(w: torch.Tensor, *, middle: bool) -> torch.Tensor:
    """The best 16 levels without refinement, and zero points that words can hold.

    Args:
        middle: whether the levels are around the middle, as in C, or begin at the lowest weight.
    """
    x = w.view(len(w), -1, 32)
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    reach = torch.maximum(low / -13.25, high / 12.25).clamp(min=2.0**-27)
    scale = torch.maximum((high - low) / 15, reach)
    first = (low + high) / 2 - 7.5 * scale if middle else low
    stored_scale, _ = on_grid(torch.stack((scale, scale)))
    zero = first + 8 * (stored_scale if middle else scale)
    stored_scale, zero = on_grid(torch.stack((scale, zero)))
    codes = ((x - zero) * stored_scale.reciprocal()).round().clamp(-8, 7)
    return (codes * stored_scale + zero).view(w.shape)


def group_errors(values: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Squared error of each group (N, G)."""
    error = values.double() - w
    padded = torch.nn.functional.pad(error, (0, -w.shape[1] % 32))
    return padded.pow(2).view(len(w), -1, 32).sum(2)


def input_levels(x: torch.Tensor) -> torch.Tensor:
    """What the native kernel makes of inputs: 8 bits per 32; float64."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    most = padded.abs().amax(2, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # rounded as in C; 127 / most is not
    codes = torch.where(most > 0, padded * inverse, 0.0).round()
    return (codes.double() * (most / 127)).flatten(1)[:, : x.shape[1]]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The choice


@pytest.mark.parametrize(
    ("text", "spec"),
    [("none", AS_THEY_ARE), ("int8", Int8()), ("int4", Int4()), ("nl4", Codebook())],
)
def test_spec_is_parsed_and_printed(text: str, spec: QuantSpec) -> None:
    assert QuantSpec.parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize("text", ["", "4", "INT4", "int4:", "int4:64", "int8:32"])
def test_other_words_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"quantize .*expected none, int8, int4, nl4"):
        QuantSpec.parse(text)


# Tiles


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 5), groups=st.integers(1, 6), data=st.data())
def test_tiles_are_in_the_documented_order_and_back(
    blocks: int, groups: int, data: st.DataObject
) -> None:
    rows, inputs = 16 * blocks, 32 * groups
    codes = torch.randint(0, 16, (rows, inputs), generator=torch.Generator().manual_seed(rows))
    nibbles = torch.full((blocks, groups, 256), 255, dtype=torch.uint8)
    columns = codes.t().contiguous().to(torch.uint8)  # any strides: they come transposed
    pack_nibbles(columns.t(), nibbles)
    assert torch.equal(unpack_nibbles(nibbles), codes.to(torch.uint8))
    signed = codes.to(torch.int8) - 8
    wide = torch.full((blocks, groups, 512), 127, dtype=torch.int8)
    pack_bytes(signed, wide)
    assert torch.equal(unpack_bytes(wide), signed)
    words = codes[:, :groups].to(torch.int16)
    packed = torch.empty(blocks, groups, 16, dtype=torch.int16)
    pack_groups(words, packed)
    assert torch.equal(unpack_groups(packed), words)
    row = data.draw(st.integers(0, rows - 1), "row")
    column = data.draw(st.integers(0, inputs - 1), "input")
    block, r = divmod(row, 16)
    group, k = divmod(column, 32)
    byte = nibbles[block, group, k // 8 * 64 + 4 * r + k % 4]
    assert byte >> 4 * (k % 8 // 4) & 15 == codes[row, column]
    assert wide[block, group, k // 4 * 64 + 4 * r + k % 4] == signed[row, column]
    assert packed[block, group, r] == words[row, group]


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 150), inputs=st.integers(1, 300), seed=st.integers(0, 99))
def test_the_bytes_are_codes_and_scales_and_padding_is_0(
    spec: Scheme, native: bool, rows: int, inputs: int, seed: int
) -> None:
    """Where units are put together, nothing writes padding rows: both must have equal bytes."""
    w = random(rows, inputs, seed=seed)
    matrix = matrix_of(spec, w, native=native)
    assert not levels_of(matrix)[rows:].any()
    by_row = matrix.scales if matrix.scales.ndim == 1 else unpack_groups(matrix.scales)
    assert not by_row[rows:].any()
    values = values_of(matrix)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            without_native(patch)
        assert torch.equal(dequantize(matrix), values)
        factors = spec.output_scales(matrix.scales)
        for dtype in (torch.float32, torch.bfloat16):
            rebuilt = torch.cat([piece.clone() for _, piece in matrix.pieces(dtype, 16 * 64)])
            plain = levels_of(matrix).float() if factors is not None else dequantize(matrix)
            assert torch.equal(rebuilt[:rows, :inputs], plain[:rows, :inputs].to(dtype))


# Words: scale and zero point


def test_every_word_is_read_as_documented_and_written_back() -> None:
    words = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    scale, offset = split_words(words)
    assert torch.equal(to_words(scale, scale * (offset + 8)), words)
    unsigned = words.int() & 0xFFFF
    assert torch.equal(scale, torch.exp2((unsigned >> 11) - 27.0) * (1 + (unsigned >> 7 & 15) / 16))
    torch.testing.assert_close(offset + 8, ((unsigned & 127) - 64) / 12, rtol=0, atol=1e-6)
    assert scale.min() == 2.0**-27
    assert scale.max() == LARGEST_SCALE


@given(scale=st.floats(2.0**-27, LARGEST_SCALE, width=32), zero=st.floats(-5.25, 5.25, width=32))
def test_scales_are_kept_to_3_percent_and_zero_points_to_a_24th(scale: float, zero: float) -> None:
    fit = torch.tensor([[scale], [scale * zero]])
    kept = on_grid(fit)
    assert abs(kept[0] - fit[0]) <= scale / 32
    # Where the stored scale is smaller, the zero point may be out of a word's reach.
    clipped = min(max(scale * zero, float(kept[0] * -64 / 12)), float(kept[0] * 63 / 12))
    assert abs(kept[1] - clipped) <= kept[0] * (1 / 24 + 1e-5)
    assert torch.equal(on_grid(kept), kept)
    read, offset = split_words(to_words(kept[0], kept[1]))
    assert torch.equal(read, kept[0])
    torch.testing.assert_close(read * (offset + 8), kept[1], rtol=1e-5, atol=1e-6 * scale)


def test_every_codebook_word_is_read_as_documented_and_written_back() -> None:
    words = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    scale, offset = split_codebook_words(words)
    assert torch.equal(scale, split_words(words)[0])
    assert torch.equal(offset, 2.0 * ((words.int() & 127) - 64))
    assert torch.equal(to_codebook_words(scale, offset), words)
    kept_scale, kept_offset = on_codebook_grid(scale, offset)
    assert torch.equal(kept_scale, scale)
    assert torch.equal(kept_offset, offset)


# Rounding


@pytest.mark.parametrize("native", WAYS)
def test_uneven_levels_lose_less(native: bool) -> None:
    w = random(64, 512)
    even = group_errors(rounded(Int4(), w, native), w).sum()
    # Squared. Measured 0.93 in C and by torch.
    assert group_errors(rounded(Codebook(), w, native), w).sum() < 0.96 * even


@pytest.mark.parametrize("native", WAYS)
def test_weights_in_mxfp4_are_kept_exactly(native: bool) -> None:
    """Its levels in halves; a scale is a power of 2."""
    codes = torch.randint(0, 16, (20, 4, 32), generator=torch.Generator().manual_seed(0))
    codes[..., 0], codes[..., 1] = 0, 15
    scales = 2.0 ** torch.arange(-6, -2).view(4, 1)
    w = (torch.tensor(MXFP4)[codes] / 2 * scales).flatten(1)
    assert torch.equal(rounded(Codebook(MXFP4), w, native), w)


def test_int8_is_the_nearest_of_255_levels() -> None:
    w = random(5, 70, tails=True)
    scales = matrix_of(Int8(), w).scales[:5]
    torch.testing.assert_close(scales, w.abs().amax(1) / 127, rtol=1e-6, atol=0)
    off = (rounded(Int8(), w) - w).abs()
    assert bool((off <= scales.unsqueeze(1) * 0.5001).all())


def test_int4_baseline_spans_the_group() -> None:
    w = random(16, 64)
    tiles = list(int4_tiles(w, 16, Workspace(), refine=False))
    (_, codes, words) = tiles[0]
    assert len(tiles) == 1
    groups = w.view(16, 2, 32)
    step = ((groups.amax(2) - groups.amin(2)) / 15).t()
    scale, offset = split_words(words)
    assert bool(((scale / step - 1).abs() <= 1 / 32).all())
    by_group = codes.view(2, 32, 16)
    assert by_group.amin(1).max() <= 1
    assert by_group.amax(1).min() >= 14
    values = (by_group.float() + offset.unsqueeze(1)) * scale.unsqueeze(1)
    torch.testing.assert_close(
        values.permute(2, 0, 1).reshape(16, 64), min_max(w, middle=False), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("tails", [False, True])
def test_refinement_lowers_the_error(tails: bool, native: bool) -> None:
    w = random(64, 512, tails=tails)
    plain = group_errors(min_max(w, middle=native), w).sum()
    # Squared. Measured 0.87 and 0.82 by torch, 0.82 and 0.76 in C.
    assert group_errors(rounded(Int4(), w, native), w).sum() < (0.85 if native else 0.9) * plain


@settings(max_examples=80, deadline=None)
@given(
    native=DRAWN_WAYS,
    rows=st.integers(1, 20),
    groups=st.integers(1, 5),
    scale=st.sampled_from([1e-5, 1e-3, 1.0, 10.0]),
    offset=st.sampled_from([0.0, 1.0, -10.0]),
    kept=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 1000),
)
def test_refinement_is_never_worse_in_any_group(
    native: bool, rows: int, groups: int, scale: float, offset: float, kept: float, seed: int
) -> None:
    inputs = 32 * groups
    chosen = random(rows, inputs, seed=seed + 1).abs() <= kept * 5
    w = (random(rows, inputs, seed=seed).clamp(-5, 5) * chosen + offset) * scale
    plain = group_errors(min_max(w, middle=native), w)
    refined = group_errors(rounded(Int4(), w, native), w)
    assert bool((refined <= plain * (1 + 1e-4) + (1e-6 * w.abs().max().double()) ** 2).all())


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_on_one_side_of_0_are_within_reach(sign: int, native: bool) -> None:
    """Zero points end 5.3 scales from 0: the scale grows until all weights are between levels."""
    w = sign * (1 + random(40, 96).abs().clamp(max=3) / 3)
    reach = w.abs().amax() / (12.25 if sign > 0 else 13.25)
    # An even error of half a step has a deviation of 0.29 steps.
    assert (rounded(Int4(), w, native) - w).pow(2).mean().sqrt() < 0.3 * reach
    assert (rounded(Int8(), w, native) - w).abs().max() <= 0.51 * w.abs().max() / 127


@pytest.mark.parametrize("native", WAYS)
def test_weights_on_sixteen_levels_are_kept_exactly(native: bool) -> None:
    # A checkpoint that was trained for, or converted from, 4 bits.
    codes = torch.randint(0, 16, (8, 128), generator=torch.Generator().manual_seed(0))
    codes[:, 0::32], codes[:, 1::32] = 0, 15
    w = (codes.float() - 8) * 0.0625 + 0.25
    assert torch.equal(rounded(Int4(), w, native), w)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("value", [0.375, -2.0, 1.0, 1e-5, 200.0])
def test_a_constant_matrix_is_kept_to_a_part_of_a_step(value: float, native: bool) -> None:
    w = torch.full((3, 40), value)
    # The stored scale is up to 1/32 less than what reaches the weights, at a zero point's end.
    step = abs(value) / 12.25
    assert (rounded(Int4(), w, native) - w).abs().max() <= 0.4 * step
    assert torch.allclose(rounded(Int8(), w, native), w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zeros_stay_exactly_0(spec: Scheme, native: bool) -> None:
    w = random(20, 96)
    w[:, 32:64] = 0  # a group
    w[7] = 0  # and a whole row
    values = rounded(spec, w, native)
    assert not values[:, 32:64].any()
    assert not values[7].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_weights_that_are_not_finite_are_refused(spec: Scheme, native: bool, bad: float) -> None:
    w = random(700, 400)
    w[555, 3] = bad
    with pytest.raises(CheckpointError, match="expected finite weights, got inf or nan"):
        rounded(spec, w, native)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_beyond_the_largest_scale_are_refused(sign: int, native: bool) -> None:
    w = random(20, 40)
    w[3, 33] = sign * 216.0
    assert rounded(Int4(), w, native)[3, 33] == pytest.approx(sign * 216, rel=0.04)
    w[3, 34] = -sign * 216.0
    assert rounded(Int4(), w, native)[3, 34] == pytest.approx(-sign * 216, abs=40)
    w[3, 33] = sign * 218.0
    with pytest.raises(CheckpointError, match="weights up to 217 for 4 bits, got 218; use int8"):
        rounded(Int4(), w, native)
    assert rounded(Int8(), w, native)[3, 33] == pytest.approx(sign * 218, rel=1e-5)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize(("rows", "inputs"), [(0, 64), (4, 0), (0, 0)])
def test_empty_matrices_have_empty_codes(rows: int, inputs: int, native: bool) -> None:
    w = torch.empty(rows, inputs)
    assert all(matrix_of(spec, w, native=native).codes.numel() == 0 for spec in SPECS)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_is_taken(dtype: torch.dtype, native: bool) -> None:
    w = random(4, 64).to(dtype)
    for spec in SPECS:
        same = stored(spec, w.float(), native=native)
        assert torch.equal(stored(spec, w, native=native), same)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_rows_beside(
    spec: Scheme, native: bool, threads: None
) -> None:
    w = random(301, 2000, tails=True)
    torch.set_num_threads(1)
    whole = rounded(spec, w, native)
    torch.set_num_threads(3)
    assert torch.equal(rounded(spec, w, native), whole)
    assert torch.equal(rounded(spec, w[101:217], native), whole[101:217])


def test_tiles_cover_all_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(16, 1000)
    whole = stored(Int4(), w, native=False)
    monkeypatch.setattr(quant_rounding, "_TILE", 200 * 16)
    parts = [inputs for inputs, _, _ in int4_tiles(w, 16, Workspace())]
    assert len(parts) > 2
    assert (parts[0].start, parts[-1].stop) == (0, 1024)
    assert all(before.stop == after.start for before, after in pairwise(parts))
    assert torch.equal(stored(Int4(), w, native=False), whole)


def test_rows_at_once_are_whole_tiles() -> None:
    for inputs in (0, 1, 2048, 3000, 28672, 1 << 20):
        assert rows_at_once(inputs) % ROWS_UNIT == 0
        assert rows_at_once(inputs) * inputs <= max(1 << 19, 64 * inputs)


# Bytes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_regions_are_aligned_views_that_do_not_overlap(spec: Scheme) -> None:
    regions = matrix_regions(spec, 100, 200)
    buffer = page_buffer(regions_nbytes(regions))
    end = 0
    for region, tensor in zip(regions, view_regions(regions, buffer), strict=True):
        assert region.offset % ALIGN == 0
        assert region.offset >= end
        end = region.offset + region.nbytes
        assert tensor.data_ptr() == buffer.data_ptr() + region.offset
        assert tensor.is_contiguous()
    assert end <= len(buffer)


def test_bits_are_what_is_stored() -> None:
    for spec in SPECS:
        nbytes = regions_nbytes(matrix_regions(spec, 4096, 4096))
        assert nbytes * 8 / 4096**2 == pytest.approx(spec.bits, rel=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    native=DRAWN_WAYS,
    rows=st.integers(1, 150),
    inputs=st.integers(1, 300),
    cut=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_matrix_quantized_in_parts_has_the_same_bytes(
    spec: Scheme, native: bool, rows: int, inputs: int, cut: int, seed: int
) -> None:
    w = random(rows, inputs, seed=seed)
    parts = stored(spec, w, *range(0, rows, 16 * cut), native=native)
    assert torch.equal(parts, stored(spec, w, native=native))


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    rows=st.integers(1, 100),
    inputs=st.integers(1, 200),
    data=st.data(),
)
def test_units_are_rows_of_codes_whatever_the_tiles(
    spec: Scheme, rows: int, inputs: int, data: st.DataObject
) -> None:
    """A matrix put together of rectangles, in any order, has the bytes of the whole one."""
    whole = matrix_of(spec, random(rows, inputs))
    width = spec.padded_in_features(inputs)
    step = data.draw(st.sampled_from([32, 64]), "step") if spec.column_step(0, 1) else width
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, rows)), "cuts") - {rows}), rows]
    rectangles = [
        (slice(top, bottom), slice(left, min(left + step, width)))
        for top, bottom in pairwise(cuts)
        for left in range(0, width, step)
    ]
    empty = torch.zeros(regions_nbytes(matrix_regions(spec, rows, inputs)) + 64, dtype=torch.uint8)
    target = QuantMatrix.of_buffer(spec, rows, inputs, empty[-empty.data_ptr() % 64 :])
    source, sink = (spec.units(each.codes, each.scales) for each in (whole, target))
    for down, across in data.draw(st.permutations(rectangles), "order"):
        size = (down.stop - down.start, across.stop - across.start)
        unit = [torch.empty(r.shape, dtype=r.dtype) for r in spec.unit_regions(*size)]
        source.get(down, across, *unit)
        levels = levels_of(whole)[down, across]
        if isinstance(spec, Int4):
            levels = levels[:, 0::2] + 16 * levels[:, 1::2]
        assert torch.equal(unit[0], levels.to(unit[0].dtype))
        sink.put(down, across, *unit)
    sink.flush()
    assert torch.equal(target.codes, whole.codes)
    assert torch.equal(target.scales, whole.scales)


# Products


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("rows", "inputs"), [(64, 128), (100, 200), (5, 7), (130, 333)])
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 33])
def test_dense_products_are_those_of_the_dequantized_weights(
    spec: Scheme, rows: int, inputs: int, tokens: int
) -> None:
    matrix = matrix_of(spec, random(rows, inputs))
    x = random(tokens, inputs, seed=2)
    want = x @ values_of(matrix).t()
    torch.testing.assert_close(linear(x, matrix, EXACT), want, rtol=1e-5, atol=1e-4)
    scale = inputs**0.5
    got = linear(x, matrix, BFLOAT16)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.01, atol=0.01 * scale)
    half = linear(x.bfloat16(), matrix, BFLOAT16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=0.01, atol=0.02 * scale)


@needs_native
@settings(max_examples=80, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    rows=st.integers(1, 140),
    inputs=st.integers(1, 300),
    tokens=st.integers(1, 20) | st.just(40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tails=st.booleans(),
    seed=st.integers(0, 99),
)
def test_native_products_are_exact_but_for_8_bits_of_input(
    spec: Scheme,
    rows: int,
    inputs: int,
    tokens: int,
    dtype: torch.dtype,
    tails: bool,
    seed: int,
) -> None:
    matrix = matrix_of(spec, random(rows, inputs, seed=seed, tails=tails))
    x = random(tokens, inputs, seed=seed + 1, tails=tails).to(dtype)
    weights, levels = values_of(matrix).double(), input_levels(x)
    got = linear(x, matrix, NATIVE)
    assert (got.shape, got.dtype) == ((tokens, rows), dtype)
    # 4 bits: levels and zero points are summed apart, so terms are up to 13 scales, not w.
    terms = levels.abs() @ weights.abs().amax(1, keepdim=True).expand_as(weights).t()
    step = 2.0**-24 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
    allowed = 16 * 2.0**-24 * terms + step * got.double().abs() + 1e-30
    assert bool(((got.double() - levels @ weights.t()).abs() <= allowed).all())
    # And the 8 bits are half a step of 127 from the inputs.
    off = torch.nn.functional.pad((levels - x).abs(), (0, -inputs % 32)).view(tokens, -1, 32)
    most = torch.nn.functional.pad(x.float().abs(), (0, -inputs % 32)).view(tokens, -1, 32).amax(2)
    assert bool((off.amax(2) <= 0.5001 * most / 127).all())


@needs_native
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_rounding_gaussian_inputs_costs(spec: Scheme) -> None:
    """8 bits per 32 inputs cost 0.5 % of the product, bfloat16 0.2 to 0.3 %."""
    matrix, x = matrix_of(spec, random(256, 1024)), random(8, 1024, seed=2)
    want = x @ values_of(matrix).t()
    assert (linear(x, matrix, NATIVE) - want).norm() < 0.007 * want.norm()
    assert (linear(x, matrix, BFLOAT16) - want).norm() < 0.004 * want.norm()


@needs_native
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (33, 65), (256, 512), (2100, 600)])
def test_native_bits_depend_neither_on_other_rows_nor_on_threads(
    spec: Scheme, rows: int, inputs: int, threads: None
) -> None:
    matrix, x = matrix_of(spec, random(rows, inputs)), random(40, inputs, seed=6)
    torch.set_num_threads(1)
    apart = torch.cat([linear(row, matrix, NATIVE) for row in x.split(1)])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for tokens in (*range(1, 10), 40):
            assert torch.equal(linear(x[:tokens], matrix, NATIVE), apart[:tokens])
            assert torch.equal(linear(x[-tokens:], matrix, NATIVE), apart[-tokens:])


@needs_native
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_several_threads_may_multiply_at_once(spec: Scheme, threads: None) -> None:
    """Of two calls one has the pool, and the other works alone: the same bits."""
    torch.set_num_threads(2)
    matrix, x = matrix_of(spec, random(2100, 600)), random(3, 600, seed=6)
    want = linear(x, matrix, NATIVE)
    with ThreadPoolExecutor(3) as pool:
        products = pool.map(lambda _: linear(x, matrix, NATIVE), range(60))
        assert all(torch.equal(product, want) for product in products)


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("place", [0, 40, 99])
def test_inputs_that_are_not_finite_are_seen_in_all_outputs_of_their_row(
    spec: Scheme, bad: float, place: int
) -> None:
    matrix, x = matrix_of(spec, random(37, 100)), random(5, 100, seed=6)
    want = linear(x, matrix, NATIVE)
    x[3, place] = bad
    got = linear(x, matrix, NATIVE)
    assert bool(got[3].isnan().all())
    assert torch.equal(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]])


@needs_native
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_inputs_of_any_size_have_their_products(spec: Scheme) -> None:
    matrix, x = matrix_of(spec, random(37, 100)), random(3, 100, seed=6)
    assert not linear(torch.zeros_like(x), matrix, NATIVE).any()
    for size in (1e-20, 1e20):
        want = linear(x, matrix, NATIVE) * size
        torch.testing.assert_close(
            linear(x * size, matrix, NATIVE), want, rtol=1e-2, atol=0.01 * size
        )
    assert not linear(x * 1e-38, matrix, NATIVE).any()  # below 1e-30, as 0


@pytest.mark.parametrize("choice", [EXACT, pytest.param(NATIVE, marks=needs_native)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_activations_may_be_strided_or_unaligned(spec: Scheme, choice: KernelChoice) -> None:
    matrix = matrix_of(spec, random(20, 63))
    for dtype in (torch.bfloat16, torch.float32):
        wide, flat = random(3, 200).to(dtype), random(1, 193).to(dtype)
        for x in (wide[:, 7:70], wide.t()[7:70, :].t(), flat[:, 1:64]):
            plain = x.contiguous().clone()
            assert torch.equal(linear(x, matrix, choice), linear(plain, matrix, choice))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_slice_by_columns_has_groups_of_its_own(spec: Scheme) -> None:
    w, x = random(40, 300), random(2, 300, seed=4)
    total = torch.zeros(2, 40)
    want = torch.zeros(2, 40)
    for start, stop in ((0, 37), (37, 170), (170, 300)):
        matrix = matrix_of(spec, w[:, start:stop])
        total += linear(x[:, start:stop], matrix, EXACT)
        want += x[:, start:stop] @ values_of(matrix).t()
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_bits_do_not_depend_on_the_place_in_memory(spec: Scheme, count: int, threads: None) -> None:
    torch.set_num_threads(count)
    w = random(200, 520)
    matrices = [matrix_of(spec, w, offset) for offset in (0, 0, 64, 192)]
    for choice in (*[NATIVE] * HAS_NATIVE, BFLOAT16, EXACT):
        for tokens in (1, 3, 40, 128):
            x = random(tokens, 520, seed=5)
            want, *others = [linear(x, matrix, choice) for matrix in matrices]
            assert all(torch.equal(other, want) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 3])
def test_nor_do_those_of_plain_weights(dtype: torch.dtype, count: int, threads: None) -> None:
    """Torch's own product must not choose by alignment: ring buffers and resident ones differ."""
    torch.set_num_threads(count)
    for rows, inputs in ((200, 520), (256, 512), (96, 4864), (130, 333)):
        w = random(rows, inputs).to(dtype)
        places = [page_buffer(w.nbytes + offset)[offset:] for offset in (0, 0, 64, 192)]
        copies = [place.view(dtype).view(rows, inputs).copy_(w) for place in places]
        for tokens in (1, 3, 40, 128):
            x = random(tokens, inputs, seed=5).to(dtype)
            want, *others = [torch.nn.functional.linear(x, copy) for copy in copies]
            assert all(torch.equal(other, want) for other in others)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dense_products_depend_little_on_threads(spec: Scheme, threads: None) -> None:
    matrix = matrix_of(spec, random(200, 520))
    for tokens in (1, 3, 40, 128):
        x = random(tokens, 520, seed=5)

        def by_threads(choice: KernelChoice, x: torch.Tensor = x) -> list[torch.Tensor]:
            products = []
            for count in (1, 3):
                torch.set_num_threads(count)
                products.append(linear(x, matrix, choice))
            return products

        # Sums over K that threads share are rounded elsewhere: one bfloat16 step, 2^-7, at most.
        torch.testing.assert_close(*by_threads(BFLOAT16), rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(*by_threads(EXACT), rtol=1e-5, atol=1e-4)


@needs_native
def test_the_choice_decides_by_rows() -> None:
    matrix = matrix_of(Int4(), random(64, 96))
    x = random(9, 96, seed=7)
    choice = KernelChoice(((4, "native"), (8, "dense-bfloat16")), "dense-float32")
    for rows, same in ((1, NATIVE), (4, NATIVE), (5, BFLOAT16), (8, BFLOAT16), (9, EXACT)):
        assert torch.equal(linear(x[:rows], matrix, choice), linear(x[:rows], matrix, same))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("spec", [AS_THEY_ARE, *SPECS], ids=str)
def test_a_row_has_the_same_bits_among_as_many_as_are_alike(
    spec: QuantSpec, count: int, threads: None
) -> None:
    """In torch's bfloat16 a long sum depends on the number of rows, at some of these."""
    torch.set_num_threads(count)
    w, x = random(32, 2048), random(200, 2048, seed=9)
    matrix = matrix_of(spec, w) if isinstance(spec, Scheme) else w.bfloat16()
    name = "dense-bfloat16" if isinstance(spec, Scheme) else "torch-bfloat16"
    choice = KernelChoice((), name)
    sizes = (2, 16, 32, 33, 64, 200)
    alike = [rows for rows in sizes if is_as_among_few(choice, rows)]
    assert alike == [2, 16, 32]
    alone = torch.cat([linear(x[row : row + 1], matrix, choice) for row in range(16)])
    for rows in alike:
        assert torch.equal(linear(x[:rows], matrix, choice)[:16], alone[:rows])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matrices_are_dequantized_in_bounded_pieces(spec: Scheme) -> None:
    matrix = matrix_of(spec, random(500, 200))
    pieces = [tuple(piece.shape) for _, piece in matrix.pieces(torch.float32, 100 * 256)]
    assert len(pieces) > 3
    assert all(rows * width <= 100 * 256 for rows, width in pieces)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dense_products_of_several_pieces(spec: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_matrix, "PIECE_BYTES", 1 << 20)
    matrix = matrix_of(spec, random(1100, 300))
    assert len(list(matrix.pieces(torch.float32))) > 1
    x = random(3, 300, seed=8)
    want = x @ values_of(matrix).t()
    torch.testing.assert_close(linear(x, matrix, EXACT), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("choice", [EXACT, pytest.param(NATIVE, marks=needs_native)])
def test_a_part_of_a_matrix_is_a_matrix(spec: Scheme, choice: KernelChoice) -> None:
    matrix = matrix_of(spec, random(300, 500))
    x = random(3, 500, seed=2)
    whole = linear(x, matrix, choice)
    for start, stop in ((0, 128), (128, 300), (192, 193), (0, 300), (64, 64)):
        part = matrix.part(start, stop)
        assert part.shape == (spec, stop - start, 500)
        got = linear(x, part, choice)
        if choice == NATIVE:
            assert torch.equal(got, whole[:, start:stop])
        torch.testing.assert_close(got, whole[:, start:stop])


# Weights in 16 bits


@pytest.mark.parametrize("name", PLAIN_KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_with_weights_in_16_bits(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = PLAIN_KERNELS[name]
    if not kernel.accepts(AS_THEY_ARE):
        pytest.skip("no kernels in C here")
    monkeypatch.setattr(plain_kernels, "PIECE_BYTES", 4 * 7 * 90)  # the last piece is short
    weight, x = random(50, 90).to(dtype), random(3, 90, seed=9)
    want = x @ weight.float().t()
    exact = kernel.inputs is torch.float32
    lost = (kernel(x, weight).float() - want).norm() / want.norm()
    assert lost < (1e-6 if exact else 0.006)
    assert weight.dtype is dtype


@needs_native
def test_float16_is_rounded_to_bfloat16_as_by_torch() -> None:
    native = native_kernels(2)
    assert native is not None
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)[5:]  # of all magnitudes
    weight = bits.view(torch.float16)
    got = torch.empty(len(weight), dtype=torch.bfloat16)
    native.narrow(weight, got)
    want = weight.bfloat16()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


# The probe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_probed_in_their_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()

    def noted(x: torch.Tensor, weight: torch.Tensor, choice: KernelChoice) -> torch.Tensor:
        seen.add(weight.dtype)
        return linear(x, weight, choice)

    monkeypatch.setattr(quant_probe, "_PROBE_S", 0.0)
    monkeypatch.setattr(quant_probe, "linear", noted)
    choice = probe_kernels(AS_THEY_ARE, 50, 90, dtype)
    assert seen == {dtype}
    assert choice.rest in PLAIN_KERNELS


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_probe_answers_for_any_shape(spec: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_probe, "_PROBE_S", 0.0)
    for rows, inputs in ((5, 7), (300, 500)):
        choice = probe_kernels(spec, rows, inputs)
        others = {"native"} if HAS_NATIVE else set()
        assert choice.rest in {kernel.name for kernel in DENSE}
        assert {name for _, name in choice.steps} <= others
        assert set(choice.timings_ms) == {choice.rest, *others}
        assert all(set(times) == {1, 32, 128} for times in choice.timings_ms.values())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_where_inputs_must_not_be_rounded_products_are_in_float32(spec: Scheme) -> None:
    choice = probe_kernels(spec, 300, 500, torch.float32)
    assert {choice.kernel(rows) for rows in (1, 4, 100, 10_000)} == {"dense-float32"}


def test_the_probe_counts_one_thread_and_leaves_others_theirs(
    monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    seen: dict[str, set[int]] = {"probe": set(), "new thread": set()}

    def see(who: str) -> None:
        seen[who].add(torch.get_num_threads())

    def disturbed(x: torch.Tensor, matrix: QuantMatrix, choice: KernelChoice) -> torch.Tensor:
        see("probe")
        other = threading.Thread(target=see, args=("new thread",))
        other.start()
        other.join()
        time.sleep(0.01)
        return linear(x, matrix, choice)

    monkeypatch.setattr(quant_probe, "linear", disturbed)
    torch.set_num_threads(2)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
        # The caller may be a thread that took over another number before.
        torch.set_num_threads(3)
        probe = pool.submit(probe_kernels, Int4(), 64, 128)
        while not probe.done():
            assert torch.get_num_threads() == 3
            wait([probe], 0.01)
        assert pool.submit(torch.get_num_threads).result() == 2
    assert seen == {"probe": {1}, "new thread": {3}}
    assert all(ms < 10 for times in probe.result().timings_ms.values() for ms in times.values())


def test_the_threshold_is_where_dense_overtakes() -> None:
    dense = {1: 10.0, 32: 11.0, 128: 15.0}
    for times, most in (
        ({1: 1.0, 32: 16.0, 128: 64.0}, 16),
        ({1: 1.0, 32: 6.0, 128: 24.0}, 64),
        ({1: 11.0, 32: 8.0, 128: 12.0}, 0),
        ({1: 0.1, 32: 0.3, 128: 1.0}, 1024),
    ):
        choice = choose_by_time({"few": times, "dense": dense}, "dense")
        assert choice == KernelChoice(((most, "few"),) if most else (), "dense")
    assert choose_by_time({"dense": dense}, "dense") == KernelChoice((), "dense")


def test_the_kernel_of_one_row_is_that_of_16() -> None:
    """A row's bits must not depend on guesses, even where another one would be quicker."""
    timings = {
        "a": {1: 1.0, 32: 32.0, 128: 128.0},
        "b": {1: 3.0, 32: 13.0, 128: 49.0},
        "dense": {1: 4.0, 32: 20.0, 128: 20.0},
    }
    choice = choose_by_time(timings, "dense")
    assert choice == KernelChoice(((16, "a"), (32, "b")), "dense")
    assert choice.timings_ms == timings


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_native_kernels_everything_still_works(
    spec: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_native(monkeypatch)
    assert not KERNELS["native"].accepts(spec)
    choice = probe_kernels(spec, 70, 90)
    assert choice.steps == ()
    matrix = matrix_of(spec, random(70, 90), native=False)
    x = random(2, 90, seed=9)
    want = x @ values_of(matrix).t()
    torch.testing.assert_close(linear(x, matrix, choice), want, rtol=0.01, atol=0.1)


def test_native_kernels_can_be_switched_off() -> None:
    code = "from tpirt.ops.native.bindings import native_kernels; print(native_kernels(1))"
    env = os.environ | {"TPIRT_NATIVE": "off"}
    done = run_python("-c", code, env=env, text=True)
    assert done.stdout.strip() == "None", done.stderr
