"""``tpirt synth``."""

from __future__ import annotations

import argparse
from pathlib import Path

from tpirt.cli.options import (
    Commands,
    add_format_options,
    add_parser,
    add_ratio_option,
    count,
    whole_number,
)
from tpirt.cli.sigint import interruptible


def add_command(commands: Commands) -> None:
    """Add ``synth`` and its options."""
    from tpirt.weights.shapes import SHAPES

    parser = add_parser(
        commands,
        "synth",
        "create a model of any shape with random weights, as slices without a checkpoint",
        "tpirt synth --shape llama-3.1-8b --quantize int4 --world-size 2 --out llama-8b\n"
        "  tpirt generate --model llama-8b --quantize int4 --local 2 --prompt Hello",
    )
    parser.add_argument(
        "--shape",
        required=True,
        metavar="NAME|FILE",
        help=f"{', '.join(SHAPES)}, or a config.json",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the model directory to create")
    parser.add_argument(
        "--world-size", type=count, required=True, metavar="N", help="number of ranks"
    )
    add_ratio_option(parser)
    add_format_options(parser)
    parser.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="seed of the weights (default 0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.cluster.roster import this_peer
    from tpirt.cluster.synth import make_synthetic
    from tpirt.config import ModelConfig
    from tpirt.planning import PlanOptions, plan_model
    from tpirt.units import format_bytes
    from tpirt.weights.shapes import find_shape

    shape = find_shape(arguments.shape)
    config = ModelConfig.from_hf(shape)
    options = PlanOptions(ratio=arguments.ratio, dtype=arguments.dtype, quantize=arguments.quantize)
    plan = plan_model(config, arguments.world_size, this_peer(threads=1), options)
    form = plan.ranks[0].form
    out = Path(arguments.out)
    print(f"dtype {plan.dtype.name} ({plan.dtype.reason})")
    with ConsoleProgress(quiet=arguments.quiet) as progress, interruptible():
        slices = make_synthetic(out, shape, arguments.seed, plan.partition, form, progress)
    for rank, stored in enumerate(slices):
        print(f"rank {rank}: {stored.path} ({format_bytes(stored.manifest.nbytes)})")
