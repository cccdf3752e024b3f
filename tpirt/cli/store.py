"""``tpirt store``: what slices lie on this machine, whether they are whole, and away with them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tpirt.cli.options import Commands, add_parser
from tpirt.errors import StoreError

if TYPE_CHECKING:
    from tpirt.weights.store import SliceStore


def add_command(commands: Commands) -> None:
    """Add ``store`` and its actions."""
    parser = add_parser(
        commands,
        "store",
        "list, verify or remove the slices kept on this machine",
        "tpirt store ls\n  tpirt store verify\n  tpirt store rm 3f2a91",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, run, text, ids in (
        ("ls", _list, "list slices: id, model, form, share, size", None),
        ("verify", _verify, "read slices whole and compare their checksums", "*"),
        ("rm", _remove, "remove slices", "+"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--store", metavar="DIR", help="default ~/.cache/tpirt/slices")
        if ids is not None:
            action.add_argument(
                "ids", nargs=ids, metavar="ID", help="a slice's id or the beginning of it"
            )
        action.set_defaults(run=run)


def _open(arguments: argparse.Namespace) -> SliceStore:
    from tpirt.weights.store import SliceStore, default_store

    return SliceStore(Path(arguments.store) if arguments.store else default_store())


def _list(arguments: argparse.Namespace) -> None:
    from tpirt.units import format_bytes

    store = _open(arguments)
    total = 0
    for stored in store.slices():
        manifest = stored.manifest
        total += manifest.nbytes
        form = manifest.dtype if manifest.quantize == "none" else manifest.quantize
        shard = manifest.shard
        print(
            f"{manifest.slice_id}  {manifest.model}  {form}  heads {shard.q_heads.start}-"
            f"{shard.q_heads.stop - 1}, columns {shard.columns.start}-{shard.columns.stop - 1}"
            f"{', LM head' if shard.first else ''}  {format_bytes(manifest.nbytes)}"
        )
    print(f"{format_bytes(total)} in {store.root}")


def _verify(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress

    damaged = []
    with ConsoleProgress() as progress:
        for stored in _open(arguments).matching(arguments.ids):
            try:
                stored.verify(progress)
            except StoreError as exc:
                damaged.append(str(exc))
                continue
            progress.close()
            print(f"{stored.manifest.slice_id}  good")
    if damaged:
        raise StoreError("; ".join(damaged))


def _remove(arguments: argparse.Namespace) -> None:
    store = _open(arguments)
    for stored in store.matching(arguments.ids):
        store.remove(stored)
        print(f"removed {stored.path}")
