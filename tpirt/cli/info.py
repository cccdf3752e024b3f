"""``tpirt info``."""

from __future__ import annotations

import argparse
from pathlib import Path

from tpirt.cli.options import (
    Commands,
    add_format_options,
    add_model_option,
    add_parser,
    add_ratio_option,
    count,
)
from tpirt.errors import MemoryLimitError


def add_command(commands: Commands) -> None:
    """Add ``info`` and its options."""
    parser = add_parser(
        commands,
        "info",
        "tell what a model is and what memory each rank will need",
        "tpirt info --model ~/llama --world-size 4 --window 4 --context 4096",
    )
    add_model_option(parser)
    parser.add_argument("--world-size", type=count, default=1, metavar="N", help="default 1")
    add_ratio_option(parser)
    parser.add_argument("--window", type=count, metavar="N", help="blocks held (default: all)")
    parser.add_argument(
        "--context", type=count, metavar="N", help="tokens (default: the model's, at most 4096)"
    )
    add_format_options(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from tpirt.cluster.machine import int4_layout
    from tpirt.cluster.roster import this_peer
    from tpirt.engine.dtype import choose_dtype
    from tpirt.engine.engine import BUNDLED_MODEL, open_model
    from tpirt.model.memory import DEFAULT_CHUNK_TOKENS, PROCESS_BYTES, SLACK_BYTES, plan_rank
    from tpirt.ops.quant import QuantSpec
    from tpirt.sharding.format import WeightFormat
    from tpirt.sharding.partition import make_plan
    from tpirt.units import format_bytes
    from tpirt.weights.names import expected_tensors
    from tpirt.weights.streamer import plan_streaming

    path = Path(arguments.model) if arguments.model else BUNDLED_MODEL
    model = open_model(path)
    model.checkpoint.close()
    config = model.config
    parameters = sum(_product(shape) for shape in expected_tensors(config).values())
    dtype = choose_dtype(config, arguments.dtype, [this_peer(threads=1)])
    context = arguments.context or min(config.context_length, 4096)
    if context > config.context_length:
        raise MemoryLimitError(
            f"context {context}: the model's is {config.context_length} tokens at most"
        )
    plan = make_plan(config, arguments.world_size, arguments.ratio)
    form = WeightFormat(dtype.dtype, QuantSpec.parse(arguments.quantize), int4_layout())
    console = Console(highlight=False)
    console.begin_capture()  # printed below: rich would end the process when nobody reads
    console.print(
        f"{path.resolve().name}: {config.model_type}, {parameters:,} parameters, "
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} KV), "
        f"MLP {config.intermediate_size}, vocabulary {config.vocab_size}, "
        f"context {config.context_length}"
    )
    console.print(
        f"checkpoint in {config.dtype}; runs in {dtype.name} ({dtype.reason}), "
        f"quantized: {form.quant}"
    )
    window = f"window {arguments.window} blocks" if arguments.window else "all resident"
    console.print(f"memory per rank: {window}, context {context} tokens")
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=False)
    for column in ("rank", "heads", "MLP", "weights", "block", "held", "KV", "work", "needs"):
        table.add_column(column, justify="right", no_wrap=True, min_width=6)
    for rank in range(plan.world_size):
        row = plan_rank(config, plan, rank, form, DEFAULT_CHUNK_TOKENS)
        window_plan = plan_streaming(row.block_bytes, arguments.window)
        held = window_plan.held_bytes(row.block_bytes)
        kv = row.kv_token_bytes * context
        work = row.activation_bytes + SLACK_BYTES
        table.add_row(
            str(rank),
            str(row.shard.q_heads.size),
            str(row.shard.columns.size),
            *(
                format_bytes(size)
                for size in (
                    sum(row.block_bytes),
                    max(row.block_bytes),
                    held,
                    kv,
                    work,
                    PROCESS_BYTES + held + kv + work,
                )
            ),
        )
    console.print(table)
    console.print(
        f"needs = held + KV + work + about {format_bytes(PROCESS_BYTES)} for Python and torch"
    )
    print(console.end_capture(), end="")


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
