"""``tpirt split``."""

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


def add_command(commands: Commands) -> None:
    """Add ``split`` and its options."""
    parser = add_parser(
        commands,
        "split",
        "write every rank's slice ahead of time, to be copied to the peers by hand",
        "tpirt split --model ~/llama --out slices --world-size 4\n"
        "  then on rank 1's device: tpirt peer --listen ... --store slices/rank1",
    )
    add_model_option(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="one folder per rank in here")
    parser.add_argument("--world-size", type=count, required=True, metavar="N")
    add_ratio_option(parser)
    add_format_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.cluster.machine import int4_layout
    from tpirt.cluster.provision import split_model
    from tpirt.cluster.roster import this_peer
    from tpirt.cluster.slice_maker import SliceMaker
    from tpirt.engine.dtype import choose_dtype
    from tpirt.engine.engine import BUNDLED_MODEL, open_model
    from tpirt.ops.quant import QuantSpec
    from tpirt.sharding.format import WeightFormat
    from tpirt.sharding.partition import make_plan
    from tpirt.units import format_bytes
    from tpirt.weights.store import SliceStore

    model = open_model(Path(arguments.model) if arguments.model else BUNDLED_MODEL)
    with model.checkpoint:
        plan = make_plan(model.config, arguments.world_size, arguments.ratio)
        dtype = choose_dtype(model.config, arguments.dtype, [this_peer(threads=1)])
        print(f"dtype {dtype.name} ({dtype.reason})")
        form = WeightFormat(dtype.dtype, QuantSpec.parse(arguments.quantize), int4_layout())
        maker = SliceMaker(model.checkpoint, model.config, form)
        out = Path(arguments.out)
        stores = [SliceStore(out / f"rank{rank}") for rank in range(plan.world_size)]
        with ConsoleProgress(quiet=arguments.quiet) as progress:
            model.checkpoint.hash_content(progress)
            slices = split_model(maker, plan, stores, SliceStore(model.store), progress)
    for rank, stored in enumerate(slices):
        print(f"rank {rank}: {stored.path} ({format_bytes(stored.manifest.nbytes)})")
