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
from tpirt.cli.sigint import interruptible


def add_command(commands: Commands) -> None:
    """Add ``split`` and its options."""
    parser = add_parser(
        commands,
        "split",
        "write every rank's slice ahead of time, to be copied to the peers by hand",
        "tpirt split --model ~/llama --out slices --world-size 4\n"
        "  then on rank 1's device:\n  tpirt peer --listen ... --store slices/rank1",
    )
    add_model_option(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="output folder, with one folder per rank"
    )
    parser.add_argument(
        "--world-size", type=count, required=True, metavar="N", help="number of ranks"
    )
    add_ratio_option(parser)
    add_format_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.cluster.provision import split_model
    from tpirt.cluster.roster import this_peer
    from tpirt.cluster.slice_maker import SliceMaker
    from tpirt.engine.model import open_model
    from tpirt.planning import PlanOptions, plan_model
    from tpirt.units import format_bytes
    from tpirt.weights.store import SliceStore, default_store

    options = PlanOptions(ratio=arguments.ratio, dtype=arguments.dtype, quantize=arguments.quantize)
    model = open_model(arguments.model)
    with model.checkpoint:
        plan = plan_model(model.config, arguments.world_size, this_peer(threads=1), options)
        print(f"dtype {plan.dtype.name} ({plan.dtype.reason})")
        maker = SliceMaker(model.checkpoint, model.config, plan.ranks[0].form)
        out = Path(arguments.out)
        stores = [SliceStore(out / f"rank{rank}") for rank in range(plan.world_size)]
        with ConsoleProgress(quiet=arguments.quiet) as progress, interruptible():
            model.checkpoint.hash_content(progress)
            store = SliceStore(model.store or default_store())
            slices = split_model(maker, plan.partition, stores, store, progress)
    for rank, stored in enumerate(slices):
        print(f"rank {rank}: {stored.path} ({format_bytes(stored.manifest.nbytes)})")
