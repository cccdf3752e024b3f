"""Looking for devices, and showing what was found."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tpirt.terminal import print_whole, table, width
from tpirt.types import Progress
from tpirt.units import format_bytes

if TYPE_CHECKING:
    from tpirt.cluster.discovery import Sighting
    from tpirt.identity.trust import Trust
    from tpirt.types import ProgressCallback

_TICK_S = 0.2
_HEAD = ("device", "address", "state", "memory", "cores", "disk", "version")
_MOST_NAMES = 3  # of models, in a line


async def surveyed(
    arguments: argparse.Namespace, trust: Trust, *, strangers: bool
) -> tuple[list[Sighting], list[str]]:
    """Look for devices as the options say, with progress on standard error."""
    from tpirt.chat.progress import ConsoleProgress

    with ConsoleProgress() as progress:
        return await search(trust, arguments.seconds, progress, strangers=strangers)


async def search(
    trust: Trust, seconds: float, progress: ProgressCallback, *, strangers: bool
) -> tuple[list[Sighting], list[str]]:
    """Look for devices; see :func:`tpirt.cluster.discovery.survey`."""
    from tpirt.cluster.discovery import survey

    looking = asyncio.create_task(survey(trust, seconds, strangers=strangers))
    started_s, total = time.monotonic(), max(1, round(seconds))
    try:
        while not looking.done():
            done = min(int(time.monotonic() - started_s), total)
            progress(Progress("looking for peers", done, total, "seconds"))
            await asyncio.wait({looking}, timeout=_TICK_S)
        return await looking
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def describe_choice(found: Sequence[Sighting]) -> Iterator[str]:
    """Which devices are used, and why the others are not."""
    if free := [f"{each.name} ({each.address})" for each in found if not each.reason]:
        yield f"using {', '.join(free)}"
    for each in found:
        if each.reason:
            yield f"not using {each.name}: {each.reason}"


def show_peers(found: Sequence[Sighting], notes: Sequence[str], *, json_wanted: bool) -> None:
    """Print what is on the network."""
    _show(found, notes, _HEAD, _peer_row, _models, json_wanted)


def show_status(found: Sequence[Sighting], notes: Sequence[str], *, json_wanted: bool) -> None:
    """Print how the devices of the cluster are."""
    head = (*_HEAD, "load")
    _show(found, notes, head, _status_row, _remarks, json_wanted)


def _show(
    found: Sequence[Sighting],
    notes: Sequence[str],
    head: tuple[str, ...],
    row: Callable[[Sighting], tuple[str, ...]],
    remarks: Callable[[Sighting], Iterator[str]],
    json_wanted: bool,
) -> None:
    for note in notes:
        print(f"tpirt: {note}", file=sys.stderr)
    if json_wanted:
        print_whole(json.dumps([_fields(each) for each in found], indent=2))
        return
    if not found:
        print("no device was found; `tpirt cluster invite` lets one join, `tpirt peer` starts it")
        return
    print("\n".join(table([head, *map(row, found)], left=3, columns=width(sys.stdout))))
    for each in found:
        for remark in [*([each.reason] if each.reason else []), *remarks(each)]:
            print(f"{each.name}: {remark}")


def _peer_row(each: Sighting) -> tuple[str, ...]:
    return (each.name, each.address, _state(each), *_resources(each), each.version)


def _status_row(each: Sighting) -> tuple[str, ...]:
    return (*_peer_row(each), f"{each.status.load:.1f}" if each.status else "")


def _resources(each: Sighting) -> tuple[str, str, str]:
    if each.hello is None or each.status is None:
        return "", "", ""
    limit = each.hello.memory_bytes
    free = each.hello.available_bytes
    return (
        format_bytes(min(limit, free) if limit else free),
        str(each.hello.cores),
        format_bytes(each.status.disk_free_bytes),
    )


def _state(each: Sighting) -> str:
    if each.hello is not None:
        return "busy" if each.reason else "free"
    return "no answer" if each.cluster == "this cluster" and each.member else "not used"


def _models(each: Sighting) -> Iterator[str]:
    models = [model.name for model in each.status.models] if each.status else []
    if models:
        more = f" and {len(models) - _MOST_NAMES} more" if len(models) > _MOST_NAMES else ""
        yield f"has {', '.join(models[:_MOST_NAMES])}{more}"


def _remarks(each: Sighting) -> Iterator[str]:
    if each.member:
        yield f"certificate until {each.member.expires[:10]}"
    if each.status is None:
        if each.member and each.member.met:
            yield f"met last on {each.member.met[:16].replace('T', ' at ')} UTC"
        return
    for model in each.status.models:
        slices = "slice" if model.slices == 1 else "slices"
        yield f"{model.slices} {slices} of {model.name}, {format_bytes(model.bytes)}"
    if each.status.last_error:
        yield f"last error {_ago(each.status.last_error_s)} ago: {each.status.last_error}"


def _ago(seconds: int) -> str:
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} s"


def _fields(each: Sighting) -> dict[str, Any]:
    """A device as JSON has it; what is not known is left out."""
    fields: dict[str, Any] = {
        "name": each.name,
        "identity": each.identity,
        "address": each.address,
        "cluster": each.cluster,
        "version": each.version,
        "state": _state(each),
        "reason": each.reason,
    }
    if each.member is not None:
        fields |= {"certificate_ends": each.member.expires, "met": each.member.met}
    if each.hello is not None and each.status is not None:
        fields |= {
            "memory_bytes": each.hello.memory_bytes,
            "available_bytes": each.hello.available_bytes,
            "cores": each.hello.cores,
            "load": round(each.status.load, 2),
            "disk_free_bytes": each.status.disk_free_bytes,
            "models": [
                {"name": model.name, "slices": model.slices, "bytes": model.bytes}
                for model in each.status.models
            ],
            "last_error": each.status.last_error,
        }
        if each.hello.busy:
            fields |= {"busy_with": each.hello.busy_with, "busy_s": each.hello.busy_s}
    return {name: value for name, value in fields.items() if value not in ("", None)}
