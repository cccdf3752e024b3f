"""Blocks in one call of C, and the choice of kernels that leads there."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpirt.batch import Batch, Segment
from tpirt.cluster import kernels
from tpirt.config import ModelConfig
from tpirt.model import native_blocks
from tpirt.model.attention import Heads, Turn
from tpirt.model.kv_store import KVLayout, KVStore
from tpirt.model.native_blocks import LayerWeights, NativeBlocks
from tpirt.model.products import Products
from tpirt.ops.buffers import page_buffer
from tpirt.ops.native.bindings import NativeKernels, Rounded, native_kernels
from tpirt.ops.native.library import NativeLibrary, load
from tpirt.ops.quant import AS_THEY_ARE, SCHEMES, Int4, Scheme
from tpirt.ops.quant_linear import KernelChoice, MatrixShape, QuantMatrix
from tpirt.ops.quant_regions import matrix_regions, regions_nbytes
from tpirt.ops.quant_rounding import Workspace
from tpirt.ops.rope import RotaryEmbedding
from tpirt.sharding.blocks import Block, StoredTensor
from tpirt.sharding.partition import Span, make_partition
from tpirt.weights.layout import Weights

needs_native = pytest.mark.skipif(native_kernels(1) is None, reason="no kernels in C here")


def matrix(rows: int, inputs: int) -> QuantMatrix:
    nbytes = regions_nbytes(matrix_regions(Int4(), rows, inputs))
    return QuantMatrix.of_buffer(Int4(), rows, inputs, page_buffer(nbytes))


CONFIG: Any = SimpleNamespace(rms_norm_eps=1e-5, hidden_size=32, hidden_act="silu")
HEADS: Any = None


def blocks() -> NativeBlocks:
    products: Any = SimpleNamespace(native=lambda *_: native_kernels(1))
    return NativeBlocks(CONFIG, products, HEADS)


def further_block() -> Weights:
    """An MLP's second block: only the first one has the norm."""
    return Weights({"gate_up_proj.weight": matrix(64, 32), "down_proj.weight": matrix(32, 32)})


@needs_native
def test_an_mlp_that_another_kernel_began_is_not_continued_in_c() -> None:
    x = torch.randn(1, 32)
    assert blocks().mlp([further_block()], x, torch.zeros(1, 32)) is None


@needs_native
def test_a_sum_with_gaps_is_not_added_to_in_c() -> None:
    native = native_kernels(1)
    assert native is not None
    x = native.round(torch.randn(2, 32))
    assert blocks().mlp([further_block()], x, torch.zeros(2, 48)[:, :32]) is None
    assert blocks().mlp([further_block()], x, torch.zeros(2, 32)) is not None


def random_matrix(kind: str, rows: int, inputs: int) -> QuantMatrix | torch.Tensor:
    weight = torch.randn(rows, inputs) / inputs**0.5
    if kind == "none":
        return weight.bfloat16()
    if kind == "float16":
        return weight.half()
    scheme = SCHEMES[kind]
    assert isinstance(scheme, Scheme)
    nbytes = regions_nbytes(matrix_regions(scheme, rows, inputs))
    matrix = QuantMatrix.of_buffer(scheme, rows, inputs, page_buffer(nbytes))
    scheme.round_rows(weight, 0, matrix.codes, matrix.scales, Workspace())
    return matrix


@needs_native
@pytest.mark.parametrize("second", ["none", "int8", "int4"])
@pytest.mark.parametrize("first", ["none", "int8", "int4", "nl4"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_an_mlp_in_one_call_has_the_bits_of_single_operations(
    first: str, second: str, tokens: int
) -> None:
    columns = 24  # not whole groups
    x = torch.randn(tokens, 32)
    pieces = [
        Weights(
            {
                "gate_up_proj.weight": random_matrix(first, 2 * columns, 32),
                "gate_up_proj.bias": torch.randn(2 * columns),
                "down_proj.weight": random_matrix(second, 32, columns),
            }
        )
        for _ in range(2)
    ]
    pieces[0]["norm.weight"] = torch.rand(32)
    kernels = {}
    for name in ("gate_up_proj", "down_proj"):
        weight = pieces[0][f"{name}.weight"]
        plain = isinstance(weight, torch.Tensor)
        shape = MatrixShape(AS_THEY_ARE, *weight.shape) if plain else weight.shape
        kernels[shape] = KernelChoice((), "native-half" if plain else "native")
    products = Products(CONFIG, kernels)
    ours = NativeBlocks(CONFIG, products, HEADS)
    rows: torch.Tensor | Rounded = x
    total: torch.Tensor | None = None
    expected = torch.zeros(tokens, 32)
    normed = products.normed(pieces[0], x, "gate_up_proj")
    for piece in pieces:
        done = ours.mlp([piece], rows, total)
        assert done is not None
        rows, total = done
        gate_up = products.project(normed, piece, "gate_up_proj")
        gated = products.gated(piece, gate_up, "down_proj")
        expected += products.project(gated, piece, "down_proj")
    assert torch.equal(total, expected)
    together = ours.mlp(pieces, x, None)
    assert together is not None
    assert torch.equal(together[1], expected)


SHAPE = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "hidden_size": 48,  # not whole groups
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 10,
    }
)


def native_choice(weight: QuantMatrix | torch.Tensor) -> tuple[MatrixShape, KernelChoice]:
    if isinstance(weight, torch.Tensor):
        shape = MatrixShape(AS_THEY_ARE, *weight.shape)
        return shape, KernelChoice((), "native-half")
    return weight.shape, KernelChoice((), "native")


@needs_native
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("qk", "v", "out"),
    [("none", "none", "none"), ("int8", "int8", "int8"), ("int4", "int8", "int4")],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_in_one_call_has_the_bits_of_single_operations(
    qk: str, v: str, out: str, biased: bool, tokens: int
) -> None:
    w = Weights({"norm.weight": torch.rand(48)})
    for name, kind, shape in (
        ("qk_proj", qk, (96, 48)),
        ("v_proj", v, (32, 48)),
        ("o_proj", out, (48, 64)),
    ):
        w[f"{name}.weight"] = random_matrix(kind, *shape)
        if biased:
            w[f"{name}.bias"] = torch.randn(shape[0])
    kernels = dict(native_choice(w[f"{name}.weight"]) for name in ("qk_proj", "v_proj", "o_proj"))
    products = Products(SHAPE, kernels)
    (shard,) = make_partition(SHAPE, 1).shards
    batch = Batch((Segment(0, 0, tokens, tokens, tokens),))
    cos, sin = RotaryEmbedding(SHAPE).tables(batch.segments)
    hidden = torch.randn(tokens, 48)
    cached = []
    for together in (True, False):
        turn = Turn(cos, sin, torch.bfloat16)
        kv = KVStore(2, KVLayout(2, 16, torch.bfloat16, None))
        kv.prepare(batch.segments)
        heads = Heads(SHAPE, shard, kv, torch.bfloat16)
        if together:
            got = NativeBlocks(SHAPE, products, heads).attention(w, hidden, batch, turn, 0)
        else:
            x = products.normed(w, hidden, "qk_proj")
            parts = (products.project(x, w, name) for name in ("qk_proj", "v_proj"))
            attended = heads.attend(w, *parts, batch, turn, 0)
            expected = products.project(attended, w, "o_proj")
        positions = kv.layer(0, batch.segments[0]).positions(0, tokens)
        cached.append((positions.keys.clone(), positions.values.clone()))
    assert got is not None
    assert torch.equal(got, expected)
    assert all(torch.equal(one, other) for one, other in zip(*cached, strict=True))


# -- layers in one call ------------------------------------------------------------------------

LAYERS, HEAD, QUERIES, KEYS, WIDTH, COLUMNS = 3, 16, 4, 2, 48, 24


def layer_config() -> Any:
    return SimpleNamespace(
        rms_norm_eps=1e-5,
        hidden_size=WIDTH,
        hidden_act="silu",
        head_dim=HEAD,
        num_attention_heads=QUERIES,
        num_key_value_heads=KEYS,
        num_hidden_layers=LAYERS,
        sliding_windows=(None, 3, None),
    )


def layer_weights(kind: str, biases: bool, qk_norms: bool) -> LayerWeights:
    """An attention, and an MLP of two blocks."""
    rows = (QUERIES + KEYS) * HEAD
    attention = Weights(
        {
            "norm.weight": torch.rand(WIDTH),
            "qk_proj.weight": random_matrix(kind, rows, WIDTH),
            "v_proj.weight": random_matrix(kind, KEYS * HEAD, WIDTH),
            "o_proj.weight": random_matrix(kind, WIDTH, QUERIES * HEAD),
        }
    )
    if biases:
        attention["qk_proj.bias"] = torch.randn(rows)
        attention["v_proj.bias"] = torch.randn(KEYS * HEAD)
        attention["o_proj.bias"] = torch.randn(WIDTH)
    if qk_norms:
        attention["q_norm.weight"], attention["k_norm.weight"] = torch.rand(2, HEAD)
    pieces = [
        Weights(
            {
                "gate_up_proj.weight": random_matrix(kind, 2 * COLUMNS, WIDTH),
                "down_proj.weight": random_matrix(kind, WIDTH, COLUMNS),
            }
        )
        for _ in range(2)
    ]
    pieces[0]["norm.weight"] = torch.rand(WIDTH)
    if biases:
        pieces[0]["down_proj.bias"] = torch.randn(WIDTH)
    return attention, pieces


def new_blocks(config: Any, kv_bits: int | None, past: int, segment: Segment) -> NativeBlocks:
    """Blocks over ``past`` cached positions of a sequence, the same ones at each call."""
    layout = KVLayout(KEYS, HEAD, torch.bfloat16, kv_bits)
    kv = KVStore(LAYERS, layout)
    before = Segment(0, 0, past, 0, past)
    kv.prepare([before])
    for layer, (keys, values) in enumerate(torch.randn(LAYERS, 2, KEYS, past, HEAD).bfloat16()):
        kv.append(layer, before, keys, values)
    kv.commit([before])
    kv.prepare([segment])
    shard: Any = SimpleNamespace(q_heads=Span(0, QUERIES), kv_heads=Span(0, KEYS))
    products: Any = SimpleNamespace(native=lambda *_: native_kernels(1))
    return NativeBlocks(config, products, Heads(config, shard, kv, torch.bfloat16))


def kernel_sets() -> list[NativeKernels]:
    """Every set of instructions that this CPU has."""
    path = load().path
    assert path is not None
    library = ctypes.CDLL(str(path))
    runs = filter(library.tp_set_runs, range(library.tp_sets()))
    return [NativeKernels(path, index, 2) for index in runs]


@needs_native
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("biases", "qk_norms", "kv_bits"), [(0, 0, None), (1, 0, 8), (0, 1, 8)])
@pytest.mark.parametrize("kind", ["none", "float16", "int8", "int4"])
def test_layers_in_one_call_have_the_bits_of_single_blocks(
    kind: str,
    biases: int,
    qk_norms: int,
    kv_bits: int | None,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, past = layer_config(), 5
    weights = [layer_weights(kind, bool(biases), bool(qk_norms)) for _ in range(LAYERS)]
    segment = Segment(0, past, tokens, tokens, past + tokens)
    batch = Batch((segment,))
    cos, sin = torch.rand(2, tokens, HEAD)
    start, seed = torch.randn(tokens, WIDTH), torch.initial_seed()
    results = []

    def fresh() -> tuple[NativeBlocks, list[LayerWeights], torch.Tensor]:
        """The same blocks, cache and rows each time."""
        torch.manual_seed(seed)
        unused = [(Weights(first), [*map(Weights, pieces)]) for first, pieces in weights]
        return new_blocks(config, kv_bits, past, segment), list(unused), start.clone()

    for each in kernel_sets():
        monkeypatch.setattr(native_blocks, "present_kernels", lambda each=each: each)
        ours, layers, one_by_one = fresh()
        turn = Turn(cos, sin, torch.bfloat16)
        for number, (attention, pieces) in enumerate(layers):
            partial = ours.attention(attention, one_by_one, batch, turn, number)
            assert partial is not None
            one_by_one += partial
            done = ours.mlp(pieces, one_by_one, None)
            assert done is not None
            if number < LAYERS - 1:
                one_by_one += done[1]
        ours, layers, together = fresh()
        turn = Turn(cos, sin, torch.bfloat16)
        for first, stop in ((0, 2), (2, LAYERS)):
            run = ours.chain(layers[first:stop], batch, turn, first)
            assert run is not None
            total = ours.layers(run, together)
            if stop < LAYERS:
                together += total
        assert torch.equal(total, done[1])
        assert torch.equal(together, one_by_one)
        results.append(total)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_native
def test_layers_whose_kinds_of_rows_differ_are_no_chain() -> None:
    weights = [layer_weights(kind, False, False) for kind in ("int4", "none", "int4")]
    segment = Segment(0, 2, 1, 1, 3)
    turn = Turn(*torch.rand(2, 1, HEAD), torch.bfloat16)
    ours = new_blocks(layer_config(), None, 2, segment)
    assert ours.chain(weights, Batch((segment,)), turn, 0) is None
    assert ours.chain(weights[:1], Batch((segment,)), turn, 0) is not None


@needs_native
def test_layers_that_drop_rows_are_no_chain() -> None:
    weights = [layer_weights("int4", False, False) for _ in range(LAYERS)]
    segment = Segment(0, 2, 2, 1, 4)  # of two tokens, the last one's result is wanted
    cos, sin = torch.rand(2, 2, HEAD)
    ours = new_blocks(layer_config(), None, 2, segment)
    batch, turn = Batch((segment,)), Turn(cos, sin, torch.bfloat16)
    assert ours.chain(weights, batch, turn, 0) is None
    assert ours.chain(weights[:2], batch, turn, 0) is not None


# -- the LM head in one call -------------------------------------------------------------------


def head_pieces(kind: str, *rows: int) -> list[Weights]:
    pieces = [Weights({"lm_head.weight": random_matrix(kind, n, WIDTH)}) for n in rows]
    pieces[0]["norm.weight"] = torch.rand(WIDTH)
    return pieces


@needs_native
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", ["none", "float16", "int8", "int4"])
def test_a_head_in_one_call_has_the_bits_of_single_products(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, x, results = head_pieces(kind, 64, 32, 20), torch.randn(tokens, WIDTH), []
    ours = new_blocks(layer_config(), None, 0, Segment(0, 0, 1, 1, 1))
    assert ours.suits_head(pieces, tokens)
    assert not ours.suits_head(pieces, 0)
    for each in kernel_sets():
        monkeypatch.setattr(native_blocks, "present_kernels", lambda each=each: each)
        weight = pieces[0]["norm.weight"]
        assert isinstance(weight, torch.Tensor)
        normed = each.norm(x, weight, CONFIG.rms_norm_eps)
        expected = []
        for piece in pieces:
            matrix = native_blocks._matrix(piece, "lm_head")
            rows = each.round(normed) if matrix.rounds else normed
            expected.append(each.product(matrix, rows))
        results.append(ours.head(pieces, x))
        assert torch.equal(results[-1], torch.cat(expected, dim=1))
    assert all(torch.equal(result, results[0]) for result in results)


@needs_native
@pytest.mark.parametrize("kind", ["int8", "int4", "nl4"])
def test_long_products_of_many_rows_have_equal_bits_in_all_sets(kind: str) -> None:
    """Beyond what a set takes at once: 16 and 128 rows, 32 groups, one row at a time."""
    weights = Weights({"w.weight": random_matrix(kind, 48, 33 * 32)})
    matrix, x = native_blocks._matrix(weights, "w"), torch.randn(16 + 128 + 9, 33 * 32)
    plain, *others = kernel_sets()
    expected = plain.product(matrix, plain.round(x))
    for each in others:
        assert torch.equal(each.product(matrix, each.round(x)), expected)
        assert torch.equal(each.product(matrix, each.round(x[-2:])), expected[-2:])


@needs_native
def test_a_head_with_gaps_between_its_pieces_is_not_one_call() -> None:
    ours = new_blocks(layer_config(), None, 0, Segment(0, 0, 1, 1, 1))
    assert not ours.suits_head(head_pieces("int4", 20, 64), 1)
    assert not ours.suits_head([*head_pieces("int4", 64), *head_pieces("none", 64)], 1)
    assert ours.suits_head(head_pieces("int4", 64, 20), 1)


def test_kernels_are_measured_again_when_there_are_others_in_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []

    def probe(*shape: object) -> KernelChoice:
        measured.append(shape)
        return KernelChoice((), "dense-float32")

    monkeypatch.setattr(kernels, "probe_kernels", probe)
    tensor = StoredTensor("w", (32, 32), torch.bfloat16, (), Int4())
    for found in ("", "", "avx2", "avx2", "", "avx2"):  # each once
        monkeypatch.setattr(kernels, "load", lambda found=found: NativeLibrary(set_name=found))
        kernels.choose_kernels(tmp_path, [Block("b", (tensor,))], torch.bfloat16)
    assert len(measured) == 2
