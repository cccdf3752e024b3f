"""``tpirt info``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tpirt.cli.options import (
    Commands,
    add_format_options,
    add_kv_option,
    add_model_option,
    add_parser,
    add_ratio_option,
    count,
    noted,
)
from tpirt.terminal import table, width
from tpirt.units import format_bytes

if TYPE_CHECKING:
    from tpirt.config import ModelConfig
    from tpirt.planning import RankPlan
    from tpirt.sharding.format import WeightFormat

_HEAD = ("rank", "heads", "MLP", "weights", "block", "held", "KV", "work", "needs")


def add_command(commands: Commands) -> None:
    """Add ``info`` and its options."""
    parser = add_parser(
        commands,
        "info",
        "describe a model and the memory that each rank needs (config.json is enough)",
        "tpirt info --model ~/llama --world-size 4 --window 4 --context 4096",
    )
    add_model_option(parser)
    parser.add_argument(
        "--world-size", type=count, default=1, metavar="N", help="number of ranks (default 1)"
    )
    add_ratio_option(parser)
    parser.add_argument(
        "--window",
        type=count,
        metavar="N",
        help="most weight blocks in memory per rank (default: all)",
    )
    parser.add_argument(
        "--context", type=count, metavar="N", help="tokens (default: the model's, at most 4096)"
    )
    add_format_options(parser)
    add_kv_option(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.cluster.roster import this_peer
    from tpirt.engine.model import BUNDLED_MODEL
    from tpirt.ops.native.library import load
    from tpirt.planning import PlanOptions, plan_model
    from tpirt.weights.hub import find_model, model_name

    options = PlanOptions(
        ratio=arguments.ratio,
        window=arguments.window,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        kv=arguments.kv,
        context=arguments.context,
    )
    path = find_model(arguments.model) if arguments.model else BUNDLED_MODEL
    config, checked = _config(path)
    context = arguments.context or min(config.context_length, 4096)
    plan = plan_model(config, arguments.world_size, this_peer(threads=1), options)
    print(_description(model_name(path), config))
    if not checked:
        print("from config.json alone: there is no whole model to check")
    print(
        f"checkpoint in {config.dtype}; runs in {plan.dtype.name} ({plan.dtype.reason}), "
        f"quantized: {_quantized(config, plan.ranks[0].form)}, KV cache in {plan.kv_numbers}"
    )
    window = f"window {arguments.window} blocks" if arguments.window else "all resident"
    with ConsoleProgress() as progress, noted(progress):
        native = load(progress=progress)
    print(native.summary_of(plan.dtype.name))
    print(f"memory per rank: {window}, context {context} tokens\n")
    rows = [_HEAD, *(_row(rank, context) for rank in plan.ranks)]
    print("\n".join(table(rows, left=0, columns=width(sys.stdout))))
    process = format_bytes(plan.ranks[0].budget.base_bytes)
    print(f"\nneeds = held + KV + work + about {process} for Python and torch")


def _config(path: Path) -> tuple[ModelConfig, bool]:
    """The configuration, and whether the rest of the model is there; if so, it is checked."""
    from tpirt.config import ModelConfig
    from tpirt.engine.model import open_model
    from tpirt.weights.synthetic import is_synthetic

    has_weights = is_synthetic(path) or any(path.glob("*.safetensors"))
    if has_weights and (path / "tokenizer.json").exists():
        model = open_model(path)
        model.checkpoint.close()
        return model.config, True
    return ModelConfig.from_dir(path), False


def _description(name: str, config: ModelConfig) -> str:
    from tpirt.weights.names import expected_tensors

    parameters = sum(math.prod(shape) for shape in expected_tensors(config).values())
    return (
        f"{name}: {config.model_type}, {parameters:,} parameters, "
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} KV), "
        f"MLP {config.intermediate_size}, vocabulary {config.vocab_size}, "
        f"context {config.context_length}"
    )


def _quantized(config: ModelConfig, form: WeightFormat) -> str:
    from tpirt.ops.quant import Scheme
    from tpirt.sharding.blocks import weight_bits

    if not isinstance(form.quant, Scheme):
        return str(form.quant)
    return f"{form.quant} ({weight_bits(config, form):.2f} bits a weight)"


def _row(rank: RankPlan, context: int) -> tuple[str, ...]:
    budget = rank.budget
    held = rank.streaming.held_bytes(budget.block_bytes)
    kv = budget.kv_bytes(context)
    work = budget.step_bytes() + budget.process_bytes - budget.base_bytes
    sizes = (
        *(budget.weights_bytes, max(budget.block_bytes), held),
        *(kv, work, held + kv + work + budget.base_bytes),
    )
    counts = (rank.peer.rank, rank.shard.q_heads.size, rank.shard.columns.size)
    return (*map(str, counts), *map(format_bytes, sizes))
