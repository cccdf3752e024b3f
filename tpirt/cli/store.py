"""``tpirt store``: list, verify and remove the slices on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tpirt.cli.options import Commands, add_parser
from tpirt.errors import StoreError

if TYPE_CHECKING:
    from tpirt.weights.store import SliceStore, StoredSlice, UnusableSlice


def add_command(commands: Commands) -> None:
    """Add ``store`` and its actions."""
    parser = add_parser(
        commands,
        "store",
        "list, verify or remove the slices kept on this machine",
        "tpirt store ls\n  tpirt store verify\n  tpirt store rm 3f2a91\n"
        "  tpirt store rm --unusable",
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, run, text, ids in (
        (
            "ls",
            _list,
            "list slices: id, model, format, shard, size, and size not shared with others",
            None,
        ),
        ("verify", _verify, "read slices and compare checksums", "*"),
        ("rm", _remove, "remove slices", "*"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--store", metavar="DIR", help="default ~/.cache/tpirt/slices")
        if ids is not None:
            action.add_argument(
                "ids", nargs=ids, metavar="ID", help="id of a slice, or a prefix of it"
            )
        if run is _remove:
            action.add_argument(
                "--unusable", action="store_true", help="those that this tpirt cannot use"
            )
        action.set_defaults(run=run)


def _open(arguments: argparse.Namespace) -> SliceStore:
    from tpirt.weights.store import SliceStore, default_store

    return SliceStore(Path(arguments.store) if arguments.store else default_store())


def _list(arguments: argparse.Namespace) -> None:
    from tpirt.units import format_bytes

    store = _open(arguments)
    slices = store.slices()
    own = store.own_bytes(slices)
    for stored in slices:
        manifest, spec = stored.manifest, stored.manifest.spec
        print(
            f"{manifest.slice_id}  {manifest.model}  {spec.form_label}  {spec.shard_label}  "
            f"{format_bytes(manifest.nbytes)}, {format_bytes(own[stored.path])} not shared"
        )
    for each in store.unusable():
        print(f"{each.slice_id}  {each.model}  {each.reason}")
    print(f"{format_bytes(store.bytes_used())} in {store.root}")


def _verify(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.weights.store import UnusableSlice

    damaged = []
    with ConsoleProgress() as progress:
        for stored in _open(arguments).matching(arguments.ids):
            if isinstance(stored, UnusableSlice):
                damaged.append(f"{stored.path}: {stored.reason}")
                continue
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
    chosen: list[StoredSlice | UnusableSlice] = []
    if arguments.unusable:
        chosen += store.unusable()
    elif not arguments.ids:
        raise StoreError("give the ids of slices to remove, or --unusable")
    if arguments.ids:
        chosen += store.matching(arguments.ids)
    for stored in chosen:
        store.remove(stored)
        print(f"removed {stored.path}")
