"""``tpirt store``: list, verify and remove the slices on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tpirt.cli.options import Commands, add_parser, sentence
from tpirt.errors import StoreError
from tpirt.terminal import table, width
from tpirt.units import format_bytes

if TYPE_CHECKING:
    from tpirt.weights.store import SliceStore, StoredSlice, UnusableSlice


_HEAD = ("slice", "model", "format", "heads", "columns", "LM head", "size", "not shared")
_SHORT = 12  # digits of an id that are shown; any prefix that no other id has will do


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
            "list slices: id, model, format, shard, size, and what of it no other slice shares",
            None,
        ),
        ("verify", _verify, "read slices and compare checksums", "*"),
        ("rm", _remove, "remove slices", "*"),
    ):
        action = actions.add_parser(name, help=text, description=sentence(text))
        action.add_argument(
            "--store", metavar="DIR", help="folder of slices (default ~/.cache/tpirt/slices)"
        )
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
    store = _open(arguments)
    slices = sorted(store.slices(), key=_place)
    own = store.own_bytes(slices)
    if slices:
        rows = [_row(each, own[each.path]) for each in slices]
        print("\n".join(table([_HEAD, *rows], left=5, columns=width(sys.stdout))))
    unusable = store.unusable()
    for each in unusable:
        print(f"{each.slice_id[:_SHORT]} ({each.model}): {each.reason}")
    if unusable:
        print("`tpirt store rm --unusable` removes what cannot be used")
    print(f"{format_bytes(store.bytes_used())} in {store.root}")


def _place(stored: StoredSlice) -> tuple[str, str, int]:
    """Where a slice is listed: with those of its model and format, in the order of ranks."""
    spec = stored.manifest.spec
    return stored.manifest.model, spec.form_label, spec.shard.q_heads.start


def _row(stored: StoredSlice, own_bytes: int) -> tuple[str, ...]:
    manifest, spec = stored.manifest, stored.manifest.spec
    heads, columns = spec.shard.q_heads, spec.shard.columns
    return (
        manifest.slice_id[:_SHORT],
        manifest.model,
        spec.form_label,
        f"{heads.start}-{heads.stop - 1}",
        f"{columns.start}-{columns.stop - 1}",
        "yes" if spec.shard.first else "no",
        format_bytes(manifest.nbytes),
        format_bytes(own_bytes),
    )


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
            print(f"{stored.manifest.slice_id[:_SHORT]}  good")
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
