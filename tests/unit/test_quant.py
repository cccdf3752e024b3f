"""Quantized weights: the rounding only gains, the bytes are the kernel's, the products fit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.nightly import nightly
from tpirt.errors import CheckpointError, ConfigError
from tpirt.ops import quant_kernels, quant_layout, quant_probe, quant_rounding
from tpirt.ops.buffers import ALIGN, page_buffer
from tpirt.ops.quant import AS_THEY_ARE, GROUP_SIZES, Int4, Int8, QuantSpec, Scheme
from tpirt.ops.quant_kernels import DENSE, KERNELS
from tpirt.ops.quant_layout import (
    PORTABLE_LAYOUT,
    Layout,
    local_layout,
    local_regions,
    quantize_rows,
    regions_nbytes,
    view_regions,
)
from tpirt.ops.quant_linear import KernelChoice, QuantMatrix, dequantize, linear
from tpirt.ops.quant_probe import choose_by_time, probe_kernels
from tpirt.ops.quant_rounding import Workspace, int4_tiles, round_int8, rows_at_once

INT4 = [Int4(size) for size in GROUP_SIZES]
SPECS: list[Scheme] = [Int8(), *INT4]
LAYOUTS = [Layout(block, order) for block in (16, 32, 64) for order in ("halves", "pairs")]
EXACT = KernelChoice((), "dense-float32")
BFLOAT16 = KernelChoice((), "dense-bfloat16")


def packed(spec: Scheme) -> KernelChoice:
    """The packed kernel for all rows, where torch has one."""
    names = [
        name
        for name, kernel in KERNELS.items()
        if kernel not in DENSE and kernel.accepts(spec, local_layout())
    ]
    return KernelChoice((), names[0]) if names else EXACT


def random(*shape: int, seed: int = 0, tails: bool = False) -> torch.Tensor:
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return w * w.abs() if tails else w


def int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) and scales (N,)."""
    codes = torch.empty(w.shape, dtype=torch.int8)
    scales = torch.empty(len(w), dtype=torch.bfloat16)
    round_int8(w, codes, scales, Workspace())
    return codes, scales


def int4(
    w: torch.Tensor, size: int, *, refine: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (N, G g), scales and zero points (N, G)."""
    groups = -(-w.shape[1] // size)
    codes = torch.empty(len(w), groups * size, dtype=torch.uint8)
    scale_zero = torch.empty(2, groups, len(w), dtype=torch.bfloat16)
    for inputs, levels, pairs in int4_tiles(w, size, Workspace(), refine=refine):
        codes[:, inputs] = levels.t().to(torch.uint8)
        scale_zero[:, inputs.start // size : inputs.stop // size] = pairs
    return codes, scale_zero[0].t(), scale_zero[1].t()


def int4_values(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, inputs: int
) -> torch.Tensor:
    size = codes.shape[1] // max(1, scales.shape[1])
    scale, zero = (x.float().repeat_interleave(size, 1) for x in (scales, zeros))
    return ((codes.float() - 8) * scale + zero)[:, :inputs]


def values_of(spec: Scheme, w: torch.Tensor) -> torch.Tensor:
    """The weights that the codes stand for."""
    if isinstance(spec, Int8):
        codes, scales = int8(w)
        return codes.float() * scales.float().unsqueeze(1)
    assert isinstance(spec, Int4)
    return int4_values(*int4(w, spec.group_size), w.shape[1])


def local_of(spec: Scheme, w: torch.Tensor, layout: Layout, *starts: int) -> torch.Tensor:
    """Quantize ``w`` whole, or in parts from ``starts`` on."""
    regions = local_regions(spec, *w.shape, layout)
    # Memory used before: every byte of every code is written.
    buffer = page_buffer(regions_nbytes(regions)).fill_(255)
    codes, scales = view_regions(regions, buffer)
    scales.zero_()
    rows = 1 if isinstance(spec, Int8) else layout.block
    for start, stop in pairwise((*(starts or [0]), len(w))):
        part = codes[start // rows : -(-stop // rows)]
        quantize_rows(spec, layout, w[start:stop], start, part, scales, Workspace())
    buffer[regions[0].end : regions[1].offset] = 0
    buffer[regions[1].end :] = 0
    return buffer


def matrix_of(
    spec: Scheme, w: torch.Tensor, layout: Layout | None = None, offset: int = 0
) -> tuple[QuantMatrix, torch.Tensor]:
    """Quantize ``w`` into local form, ``offset`` bytes into a page; and what it stands for."""
    layout = layout or local_layout() or PORTABLE_LAYOUT
    local = local_of(spec, w, layout)
    place = page_buffer(len(local) + offset)[offset:].copy_(local)
    return QuantMatrix.of_buffer(spec, *w.shape, layout, place), values_of(spec, w)


def group_errors(w: torch.Tensor, size: int, *, refine: bool) -> torch.Tensor:
    codes, scales, zeros = int4(w, size, refine=refine)
    error = int4_values(codes, scales, zeros, w.shape[1]) - w
    missing = codes.shape[1] - w.shape[1]
    padded = torch.nn.functional.pad(error.double(), (0, missing))
    return padded.pow(2).view(*scales.shape, size).sum(2)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quant_layout, quant_kernels):
        monkeypatch.setattr(module, "find_kernel", lambda name: None)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The choice


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", AS_THEY_ARE),
        ("int8", Int8()),
        ("int4", Int4(64)),
        ("int4:32", Int4(32)),
        ("int4:128", Int4(128)),
    ],
)
def test_spec_is_parsed_and_printed(text: str, spec: QuantSpec) -> None:
    assert QuantSpec.parse(text) == spec
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("text", ["", "4", "INT4", "int4:", "int4:256", "int4:+32", "int8:32"])
def test_other_words_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"quantize .*expected none, int8, int4"):
        QuantSpec.parse(text)


# Rounding


def test_int8_is_the_nearest_of_255_levels() -> None:
    w = random(5, 70, tails=True)
    scales = int8(w)[1]
    assert torch.equal(scales, (w.abs().amax(1) / 127).bfloat16())
    off = (values_of(Int8(), w) - w).abs()
    # The largest weight may be clipped by what rounding its scale to bfloat16 takes away.
    assert bool((off <= scales.float().unsqueeze(1) * (0.5 + 127 / 256)).all())
    assert off.pow(2).mean().sqrt() < scales.float().max() * 0.3


def test_int4_baseline_spans_the_group() -> None:
    w = random(3, 64)
    codes, scales, zeros = int4(w, 32, refine=False)
    groups = w.view(3, 2, 32)
    step = (groups.amax(2) - groups.amin(2)) / 15
    assert torch.equal(scales, step.bfloat16())
    torch.testing.assert_close(zeros.float(), groups.amin(2) + 8 * step, rtol=2**-8, atol=1e-6)
    assert codes.view(3, 2, 32).amin() == 0
    assert codes.amax() == 15


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("tails", [False, True])
def test_refinement_lowers_the_error(size: int, tails: bool) -> None:
    w = random(64, 512, tails=tails)
    plain, refined = (group_errors(w, size, refine=refine).sum() for refine in (False, True))
    assert refined < 0.9 * plain  # squared: 5 % of the norm


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    inputs=st.integers(1, 150),
    size=st.sampled_from(GROUP_SIZES),
    scale=st.sampled_from([1e-35, 1e-20, 1e-3, 1.0, 1e10]),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    kept=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 1000),
)
def test_refinement_is_never_worse_in_any_group(
    rows: int, inputs: int, size: int, scale: float, offset: float, kept: float, seed: int
) -> None:
    chosen = random(rows, inputs, seed=seed + 1).abs() <= kept * 5
    w = (random(rows, inputs, seed=seed, tails=True) * chosen + offset) * scale
    plain = group_errors(w, size, refine=False)
    refined = group_errors(w, size, refine=True)
    if inputs % size == 0:
        assert bool((refined <= plain * (1 + 1e-4) + (1e-6 * w.abs().max().double()) ** 2).all())
    spread = (w.amax(1) - w.amin(1)).double() + w.abs().amax(1) * 2**-7 + 1e-29
    assert bool((refined.sum(1) <= inputs * spread**2).all())


def test_weights_on_sixteen_levels_are_kept_exactly() -> None:
    # A checkpoint that was trained for, or converted from, 4 bits.
    codes = torch.randint(0, 16, (8, 128), generator=torch.Generator().manual_seed(0))
    codes[:, 0::32], codes[:, 1::32] = 0, 15
    w = (codes.float() - 8) * 0.0625 + 0.25
    assert torch.equal(values_of(Int4(32), w), w)


@pytest.mark.parametrize("value", [0.0, 0.375, -2.0])
def test_a_constant_matrix_is_kept_exactly(value: float) -> None:
    w = torch.full((3, 40), value)
    assert torch.equal(values_of(Int4(32), w), w)
    assert torch.allclose(values_of(Int8(), w), w, rtol=0.005, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_weights_that_are_not_finite_are_refused(spec: Scheme, bad: float) -> None:
    w = random(700, 400)
    w[555, 3] = bad
    with pytest.raises(CheckpointError, match="expected finite weights, got inf or nan"):
        values_of(spec, w)


@pytest.mark.parametrize(("rows", "inputs"), [(0, 64), (4, 0), (0, 0)])
def test_empty_matrices_have_empty_codes(rows: int, inputs: int) -> None:
    w = torch.empty(rows, inputs)
    assert all(values_of(spec, w).shape == w.shape for spec in SPECS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_is_taken(dtype: torch.dtype) -> None:
    w = random(4, 64).to(dtype)
    for spec in SPECS:
        assert torch.equal(values_of(spec, w), values_of(spec, w.float()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_rows_beside(spec: Scheme, threads: None) -> None:
    w = random(301, 2000, tails=True)
    torch.set_num_threads(1)
    whole = values_of(spec, w)
    torch.set_num_threads(3)
    assert torch.equal(values_of(spec, w), whole)
    assert torch.equal(values_of(spec, w[100:217]), whole[100:217])


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_tiles_cover_all_inputs(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = random(3, 1000)
    whole = int4(w, size)
    monkeypatch.setattr(quant_rounding, "_TILE", 400 * 3)
    tiles = [inputs for inputs, _, _ in int4_tiles(w, size, Workspace())]
    assert len(tiles) > 2
    assert (tiles[0].start, tiles[-1].stop) == (0, whole[0].shape[1])
    assert all(before.stop == after.start for before, after in pairwise(tiles))
    for again, want in zip(int4(w, size), whole, strict=True):
        assert torch.equal(again, want)


def test_rows_at_once_are_whole_blocks_of_every_layout() -> None:
    for inputs in (0, 1, 2048, 3000, 28672, 1 << 20):
        assert rows_at_once(inputs) % max(layout.block for layout in LAYOUTS) == 0
        assert rows_at_once(inputs) * inputs <= max(1 << 19, 64 * inputs)


# Bytes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_regions_are_aligned_views_that_do_not_overlap(spec: Scheme) -> None:
    regions = local_regions(spec, 100, 200, PORTABLE_LAYOUT)
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
        nbytes = regions_nbytes(local_regions(spec, 4096, 4096, PORTABLE_LAYOUT))
        assert nbytes * 8 / 4096**2 == pytest.approx(spec.bits, rel=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    layout=st.sampled_from(LAYOUTS),
    rows=st.integers(1, 150),
    inputs=st.integers(1, 300),
    cut=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_matrix_quantized_in_parts_has_the_same_bytes(
    spec: Scheme, layout: Layout, rows: int, inputs: int, cut: int, seed: int
) -> None:
    w = random(rows, inputs, seed=seed)
    starts = range(0, rows, cut * layout.block)
    assert torch.equal(local_of(spec, w, layout, *starts), local_of(spec, w, layout))


@settings(max_examples=60, deadline=None)
@given(
    spec=st.sampled_from(INT4),
    layout=st.sampled_from(LAYOUTS),
    rows=st.integers(1, 150),
    inputs=st.integers(1, 300),
)
def test_local_bytes_are_the_codes_and_scales(
    spec: Scheme, layout: Layout, rows: int, inputs: int
) -> None:
    w = random(rows, inputs)
    codes, scales, zeros = int4(w, spec.group_size)
    regions = local_regions(spec, rows, inputs, layout)
    packed, scale_zero = view_regions(regions, local_of(spec, w, layout))
    assert torch.equal(scale_zero[:, :rows, 0], scales.t())
    assert torch.equal(scale_zero[:, :rows, 1], zeros.t())
    assert not scale_zero[:, rows:].any()
    half = layout.block // 2
    for row in range(rows):
        block, inside = divmod(row, layout.block)
        halves = layout.order == "halves"
        byte, high = (inside % half, inside // half) if halves else divmod(inside, 2)
        assert torch.equal(packed[block, :, byte] >> 4 * high & 15, codes[row])


@pytest.mark.skipif(local_layout() is None, reason="torch has no 4-bit kernel here")
def test_local_bytes_are_what_torch_packs() -> None:
    layout = local_layout()
    assert layout is not None
    w = random(layout.block * 3, 128)
    codes = int4(w, 64)[0]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
    local = local_of(Int4(64), w, layout)
    assert torch.equal(local[: packed.numel()], packed.view(-1))


def test_layouts_have_names() -> None:
    for layout in LAYOUTS:
        assert Layout.named(layout.name) == layout
    assert Layout.named("int4-48-halves") is None


def test_a_packing_kernel_of_unknown_layout_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = lambda codes, tiles: codes[:, 0::2].to(torch.uint8)  # noqa: E731
    monkeypatch.setattr(quant_layout, "find_kernel", lambda name: strange)
    assert local_layout() is None


# Products


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("rows", "inputs"), [(64, 128), (100, 200), (5, 7), (130, 333)])
@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 33])
def test_products_are_those_of_the_dequantized_weights(
    spec: Scheme, rows: int, inputs: int, tokens: int
) -> None:
    matrix, weights = matrix_of(spec, random(rows, inputs))
    assert torch.allclose(dequantize(matrix), weights, rtol=1e-6, atol=1e-6)
    x = random(tokens, inputs, seed=2)
    want = x @ weights.t()
    torch.testing.assert_close(linear(x, matrix, EXACT), want, rtol=1e-5, atol=1e-4)
    scale = inputs**0.5
    for choice in (packed(spec), BFLOAT16):
        got = linear(x, matrix, choice)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.01, atol=0.01 * scale)
        half = linear(x.bfloat16(), matrix, choice)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), want, rtol=0.01, atol=0.02 * scale)


@settings(max_examples=40, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    layout=st.sampled_from(LAYOUTS),
    rows=st.integers(1, 140),
    inputs=st.integers(1, 300),
    tokens=st.integers(1, 9),
)
def test_every_layout_multiplies_without_its_kernel(
    spec: Scheme, layout: Layout, rows: int, inputs: int, tokens: int
) -> None:
    matrix, weights = matrix_of(spec, random(rows, inputs), layout)
    x = random(tokens, inputs, seed=3)
    torch.testing.assert_close(linear(x, matrix, EXACT), x @ weights.t(), rtol=1e-4, atol=1e-4)


def test_activations_may_be_strided_or_unaligned() -> None:
    matrix, weights = matrix_of(Int8(), random(20, 64))
    wide = random(3, 200).bfloat16()
    flat = random(1, 193).bfloat16()[:, 1:65]
    for x in (wide[:, 7:71], flat):
        want = x.float() @ weights.t()
        got = linear(x, matrix, packed(matrix.spec)).float()
        torch.testing.assert_close(got, want, rtol=0.01, atol=0.1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_slice_by_columns_has_groups_of_its_own(spec: Scheme) -> None:
    w, x = random(40, 300), random(2, 300, seed=4)
    parts = [(0, 37), (37, 170), (170, 300)]
    total = torch.zeros(2, 40)
    want = torch.zeros(2, 40)
    for start, stop in parts:
        matrix, weights = matrix_of(spec, w[:, start:stop])
        total += linear(x[:, start:stop], matrix, EXACT)
        want += x[:, start:stop] @ weights.t()
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_bits_do_not_depend_on_the_place_in_memory(spec: Scheme, count: int, threads: None) -> None:
    torch.set_num_threads(count)
    w = random(200, 520)
    matrices = [matrix_of(spec, w, offset=offset)[0] for offset in (0, 0, 64, 192)]
    for choice in (packed(spec), BFLOAT16, EXACT):
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
def test_only_dense_products_may_depend_on_threads(spec: Scheme, threads: None) -> None:
    matrix, _ = matrix_of(spec, random(200, 520))
    for tokens in (1, 3, 40, 128):
        x = random(tokens, 520, seed=5)

        def by_threads(choice: KernelChoice, x: torch.Tensor = x) -> list[torch.Tensor]:
            products = []
            for count in (1, 3):
                torch.set_num_threads(count)
                products.append(linear(x, matrix, choice))
            return products

        if packed(spec) != EXACT:
            assert torch.equal(*by_threads(packed(spec)))
        # Sums over K that threads share are rounded elsewhere: one bfloat16 step, 2^-7, at most.
        torch.testing.assert_close(*by_threads(BFLOAT16), rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(*by_threads(EXACT), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packed_rows_do_not_see_each_other(spec: Scheme) -> None:
    matrix, _ = matrix_of(spec, random(64, 128))
    x = random(7, 128, seed=6)
    if packed(spec) != EXACT:
        apart = torch.cat([linear(row, matrix, packed(spec)) for row in x.split(1)])
        assert torch.equal(linear(x, matrix, packed(spec)), apart)


def test_the_choice_decides_by_rows() -> None:
    matrix, _ = matrix_of(Int4(32), random(64, 96))
    x = random(9, 96, seed=7)
    few = packed(matrix.spec)
    choice = KernelChoice(((4, few.rest), (8, "dense-bfloat16")), "dense-float32")
    for rows, same in ((1, few), (4, few), (5, BFLOAT16), (8, BFLOAT16), (9, EXACT)):
        assert torch.equal(linear(x[:rows], matrix, choice), linear(x[:rows], matrix, same))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matrices_are_dequantized_in_bounded_pieces(spec: Scheme) -> None:
    matrix, _ = matrix_of(spec, random(500, 200))
    pieces = [tuple(piece.shape) for _, piece in matrix.pieces(torch.float32, 100 * 256)]
    assert len(pieces) > 3
    assert all(rows * width <= 100 * 256 for rows, width in pieces)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dense_products_of_several_pieces(spec: Scheme) -> None:
    matrix, weights = matrix_of(spec, random(2100, 600))
    assert len(list(matrix.pieces(torch.float32))) > 1
    x = random(3, 600, seed=8)
    torch.testing.assert_close(linear(x, matrix, EXACT), x @ weights.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_a_part_of_a_matrix_is_a_matrix(spec: Scheme, dense: bool) -> None:
    choice = EXACT if dense else packed(spec)
    matrix, _ = matrix_of(spec, random(300, 500), local_layout() or PORTABLE_LAYOUT)
    x = random(3, 500, seed=2)
    whole = linear(x, matrix, choice)
    for start, stop in ((0, 128), (128, 300), (192, 193), (0, 300), (64, 64)):
        part = matrix.part(start, stop)
        assert part.shape == (spec, stop - start, 500)
        torch.testing.assert_close(linear(x, part, choice), whole[:, start:stop])


# The probe


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_probe_answers_for_any_shape(spec: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_probe, "_PROBE_S", 0.0)
    for rows, inputs in ((5, 7), (300, 500)):
        choice = probe_kernels(spec, rows, inputs, local_layout())
        assert choice.rest in ("dense-bfloat16", "dense-float32")
        assert {name for _, name in choice.steps} <= {packed(spec).rest}
        assert set(choice.timings_ms) == {choice.rest, packed(spec).rest}
        assert all(set(times) == {1, 4, 8, 32, 128} for times in choice.timings_ms.values())


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
        probe = pool.submit(probe_kernels, Int4(64), 64, 128, local_layout())
        while not probe.done():
            assert torch.get_num_threads() == 3
            wait([probe], 0.01)
        assert pool.submit(torch.get_num_threads).result() == 2
    assert seen == {"probe": {1}, "new thread": {3}}
    assert all(ms < 10 for times in probe.result().timings_ms.values() for ms in times.values())


def test_the_threshold_is_where_dense_overtakes() -> None:
    dense = {1: 10.0, 4: 10.0, 8: 10.0, 32: 11.0, 128: 15.0}
    for times, most in (
        ({1: 1.0, 4: 2.0, 8: 4.0, 32: 16.0, 128: 64.0}, 16),
        ({1: 1.0, 4: 1.0, 8: 2.0, 32: 6.0, 128: 24.0}, 64),
        ({1: 11.0, 4: 2.0, 8: 4.0, 32: 8.0, 128: 12.0}, 0),
        ({1: 0.1, 4: 0.1, 8: 0.2, 32: 0.3, 128: 1.0}, 1024),
    ):
        choice = choose_by_time({"few": times, "dense": dense}, "dense")
        assert choice == KernelChoice(((most, "few"),) if most else (), "dense")
    assert choose_by_time({"dense": dense}, "dense") == KernelChoice((), "dense")


def test_each_kernel_gets_the_rows_where_it_is_fastest() -> None:
    timings = {
        "a": {1: 1.0, 4: 4.0, 8: 8.0, 32: 32.0, 128: 128.0},
        "b": {1: 3.0, 4: 3.0, 8: 4.0, 32: 13.0, 128: 49.0},
        "dense": {1: 20.0, 4: 20.0, 8: 20.0, 32: 20.0, 128: 20.0},
    }
    choice = choose_by_time(timings, "dense")
    assert choice == KernelChoice(((1, "a"), (32, "b")), "dense")
    assert choice.timings_ms == timings


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_kernels_everything_still_works(spec: Scheme) -> None:
    assert local_layout() is None
    choice = probe_kernels(spec, 70, 90, None)
    assert choice.steps == ()
    matrix, weights = matrix_of(spec, random(70, 90), PORTABLE_LAYOUT)
    x = random(2, 90, seed=9)
    torch.testing.assert_close(linear(x, matrix, choice), x @ weights.t(), rtol=0.01, atol=0.1)


LESSER_CPU = """
import torch
from tpirt.ops.quant import Int4
from tpirt.ops.quant_layout import *
from tpirt.ops.quant_linear import *
spec, rows, inputs, layout = Int4(32), 100, 128, local_layout()
local = torch.zeros(regions_nbytes(local_regions(spec, rows, inputs, layout)), dtype=torch.uint8)
local.random_(0, 256)
matrix = QuantMatrix.of_buffer(spec, rows, inputs, layout, local)
matrix.scales.copy_(torch.rand(matrix.scales.shape))
x = torch.randn(5, inputs)
got, want = linear(x, matrix, KernelChoice((), "torch-int4")), x @ dequantize(matrix).t()
torch.testing.assert_close(got, want, rtol=0.02, atol=1.0)
print(layout.name)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 vectors")
@pytest.mark.parametrize(
    ("capability", "name"), [("avx2", "int4-32-halves"), nightly("default", "int4-32-pairs")]
)
def test_lesser_cpus_have_layouts_of_their_own(capability: str, name: str) -> None:
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(
        [sys.executable, "-c", LESSER_CPU], env=env, capture_output=True, text=True, timeout=100
    )
    assert result.stdout.strip() == name, result.stderr
