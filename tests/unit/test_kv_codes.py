"""Keys and values in 8 bits: how they are rounded, and attention over them in C and with torch."""

from __future__ import annotations

import math

import pytest
import torch

from tpirt.model.kv_store import Cached, KVLayout
from tpirt.ops.kv_codes import SCALE_DTYPE, from_codes, round_to_codes
from tpirt.ops.native.bindings import Attention, NativeKernels, native_kernels
from tpirt.ops.nn import attention

GROUPS, DIM = [3, 1], 32
KEYS, QUERIES = len(GROUPS), sum(GROUPS)
LAYOUT = KVLayout(KEYS, DIM, torch.float32, 8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(tokens: int, seed: int = 0) -> torch.Tensor:
    """(T, Q + 2 K, D): values of all magnitudes and zeros; in some keys, one number is large."""
    x = random(tokens, QUERIES + 2 * KEYS, DIM, seed=seed)
    scales = torch.tensor([1.0, 0.0, 1e-37, 1e-29, 300.0, 1.0])
    x[:, QUERIES + KEYS :] *= scales[torch.arange(tokens) % len(scales)].view(-1, 1, 1)
    x[::5, QUERIES, 3] = 50.0
    return x


def native(threads: int = 1) -> NativeKernels:
    kernels = native_kernels(threads)
    if kernels is None:
        pytest.skip("no kernels in C here")
    return kernels


def attend(
    kernels: NativeKernels, qkv: torch.Tensor, past: int, cached: Cached, window: int = 0
) -> torch.Tensor:
    """Append and attend in C without a rotation: (T, Q D)."""
    tokens = len(qkv)
    qkv, out = qkv.clone(), torch.empty(tokens, QUERIES * DIM)
    cos, sin = torch.ones(tokens, DIM), torch.zeros(tokens, DIM)
    groups = torch.tensor(GROUPS, dtype=torch.int32)
    assert cached.key_scales is not None
    assert cached.value_scales is not None
    kernels.attend(
        Attention(
            qkv=qkv.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            all_keys=cached.keys.data_ptr(),
            all_values=cached.values.data_ptr(),
            key_scales=cached.key_scales.data_ptr(),
            value_scales=cached.value_scales.data_ptr(),
            groups=groups.data_ptr(),
            out=out.data_ptr(),
            tokens=tokens,
            past=past,
            capacity=cached.length,
            queries=QUERIES,
            keys=KEYS,
            dim=DIM,
            window=window,
        )
    )
    return out


def keys_and_values(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, T, D) each."""
    _, keys, values = qkv.transpose(0, 1).split([QUERIES, KEYS, KEYS])
    return keys, values


def same(ours: Cached, theirs: Cached) -> bool:
    return all(map(torch.equal, ours.tensors, theirs.tensors))


# -- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-25, 1e-3, 1.0, 1e4, 1e37])
def test_the_error_is_half_a_code_and_what_the_scale_is_rounded_by(
    dtype: torch.dtype, magnitude: float
) -> None:
    x = (random(3, 500, 64) * magnitude).to(dtype)
    codes, scales = round_to_codes(x)
    most = x.float().abs().amax(-1, keepdim=True)
    error = (from_codes(codes, scales, torch.float32) - x.float()).abs()
    assert (error <= most / 254 * (1 + 2**-8)).all()
    assert codes.abs().max() == 127


def test_heads_of_nothing_are_0_and_what_is_not_finite_is_seen() -> None:
    x = random(1, 5, DIM)
    x[0, 0], x[0, 1] = 0.0, 1e-37
    x[0, 2, 5], x[0, 3, 6] = math.nan, -math.inf
    codes, scales = round_to_codes(x)
    assert not codes[0, :4].any()
    restored = from_codes(codes, scales, torch.bfloat16)[0]
    assert not restored[:2].any()
    assert restored[2:4].isnan().all()
    assert restored[4].isfinite().all()


def test_scales_take_a_quarter_bit_of_each_of_64_values() -> None:
    whole, rounded = KVLayout(4, 64, torch.bfloat16), KVLayout(4, 64, torch.bfloat16, 8)
    assert whole.token_bytes * 8 == 16 * 2 * 4 * 64
    assert rounded.token_bytes * 8 == 8.25 * 2 * 4 * 64
    assert SCALE_DTYPE.itemsize == 2
    for layout in (whole, rounded):
        room = layout.allocate(128)
        assert sum(tensor.nbytes for tensor in room.tensors) == 128 * layout.token_bytes


def test_tokens_written_one_by_one_have_the_bits_of_all_at_once() -> None:
    keys, values = keys_and_values(heads(50))
    once, parts = LAYOUT.allocate(64), LAYOUT.allocate(64)
    once.write(7, keys, values)
    for start, stop in ((0, 1), (1, 2), (2, 20), (20, 50)):
        parts.write(7 + start, keys[:, start:stop], values[:, start:stop])
    assert same(once.positions(7, 57), parts.positions(7, 57))


@pytest.mark.parametrize(("tokens", "pieces"), [(10, 1), (2000, 2), (5000, 5), (40_000, 5)])
def test_a_bounded_number_of_heads_is_restored_at_once(tokens: int, pieces: int) -> None:
    layout = KVLayout(5, 128, torch.bfloat16, 8)
    cached = layout.allocate(tokens)
    cached.write(0, random(5, tokens, 128), random(5, tokens, 128, seed=1))
    covered = []
    for heads, keys, values in cached.pieces(torch.bfloat16):
        assert keys.nbytes + values.nbytes <= layout.piece_bytes(tokens)
        assert heads.stop - heads.start == 1 or keys.numel() <= 1 << 20
        covered += range(heads.start, heads.stop)
    assert covered == list(range(5))
    assert len(list(cached.pieces(torch.bfloat16))) == pieces


# -- in C ----------------------------------------------------------------------------------------


def test_c_rounds_as_torch_does_bit_for_bit() -> None:
    qkv = heads(24)
    ours, theirs = LAYOUT.allocate(32), LAYOUT.allocate(32)
    attend(native(), qkv, 3, ours)
    theirs.write(3, *keys_and_values(qkv))
    assert same(ours.positions(3, 27), theirs.positions(3, 27))


def test_c_marks_what_is_not_finite() -> None:
    qkv = heads(2)
    qkv[0, QUERIES, 1], qkv[1, -1, 2] = math.inf, math.nan
    ours, theirs = LAYOUT.allocate(8), LAYOUT.allocate(8)
    attend(native(), qkv, 0, ours)
    theirs.write(0, *keys_and_values(qkv))
    for mine, expected in zip(ours.tensors, theirs.tensors, strict=True):
        torch.testing.assert_close(mine[:, :2], expected[:, :2], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("past", [0, 1, 150])
def test_c_attends_as_torch_does_over_what_was_kept(past: int, window: int) -> None:
    cached = LAYOUT.allocate(192)
    cached.write(0, *keys_and_values(heads(past, seed=1)))
    qkv = random(8, QUERIES + 2 * KEYS, DIM)
    got = attend(native(), qkv, past, cached, window)
    ((_, keys, values),) = cached.positions(0, past + 8).pieces(torch.float32)
    queries = qkv[:, :QUERIES].transpose(0, 1)
    expected = attention(queries, keys, values, GROUPS, window or None)
    torch.testing.assert_close(got, expected.transpose(0, 1).reshape(8, -1), atol=1e-4, rtol=1e-5)


def test_bits_in_c_depend_neither_on_chunks_nor_on_threads() -> None:
    past, qkv = 3000, random(8, QUERIES + 2 * KEYS, DIM)
    start = LAYOUT.allocate(3072)
    start.write(0, *keys_and_values(random(past, QUERIES + 2 * KEYS, DIM, seed=1)))
    got = []
    for threads, chunks in ((1, [8]), (2, [8]), (3, [1, 4, 2, 1])):
        cached = Cached(*(tensor.clone() for tensor in start.tensors))
        at, outs = 0, []
        for chunk in chunks:
            outs.append(attend(native(threads), qkv[at : at + chunk], past + at, cached))
            at += chunk
        got.append((torch.cat(outs), cached.positions(0, past + 8)))
    for out, cached in got[1:]:
        assert torch.equal(out, got[0][0])
        assert same(cached, got[0][1])
