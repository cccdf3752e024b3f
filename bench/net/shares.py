"""Less of the machine for a device: a share of its cores, a rate of its disks; cgroup v1 and v2."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.lib.cgroup import remove_group
from bench.net.spec import LinkError

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 5_000  # short: with the usual 100 ms a device would stand still for most of it
_LEAST_QUOTA_US = 1_000
_PREFIX = "tpirt-links"
_NO_DISKS = ("loop", "ram", "zram", "dm-", "md")


@dataclass(frozen=True)
class Share:
    """What a device gets of this machine; None is all of it.

    Attributes:
        cores: such as 0.5.
        disk_bytes_per_s: of reads, from each disk; a whole number.
    """

    cores: float | None = None
    disk_bytes_per_s: float | None = None


class ShareGroup:
    """The cgroups that hold a device's processes to its share."""

    def __init__(self, device: int, share: Share):
        """Make them.

        Raises:
            LinkError: this system or these rights do not allow it.
        """
        self._folders: list[Path] = []
        try:
            for controller, settings in _settings(share).items():
                self._make(controller, f"{_PREFIX}-{os.getpid()}-{device}", settings)
        except OSError as exc:
            self.close()
            raise LinkError(
                f"device {device}: no limit on its share of the machine can be set "
                f"({exc.strerror}): that needs root and cgroups; leave --cores and --disk out"
            ) from exc

    def enter(self) -> None:
        """Put the calling process in: for ``preexec_fn``."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        """Remove them; the processes inside must be on their way out."""
        for folder in self._folders:
            remove_group(folder)

    def _make(self, controller: str, name: str, settings: list[tuple[str, str]]) -> None:
        if (_ROOT / "cgroup.controllers").exists():  # version 2
            (_ROOT / "cgroup.subtree_control").write_text("+cpu +io")
            folder = _ROOT / name
        else:
            folder = _ROOT / controller / name
        folder.mkdir(exist_ok=folder in self._folders)
        if folder not in self._folders:
            self._folders.append(folder)
        for file, text in settings:
            (folder / file).write_text(text)


def remove_leftovers() -> None:
    """Remove what runs left behind that were killed."""
    for folder in [*_ROOT.glob(f"{_PREFIX}-*"), *_ROOT.glob(f"*/{_PREFIX}-*")]:
        pid = folder.name.removeprefix(f"{_PREFIX}-").partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _settings(share: Share) -> dict[str, list[tuple[str, str]]]:
    """What to write into which file, by controller."""
    version2 = (_ROOT / "cgroup.controllers").exists()
    settings: dict[str, list[tuple[str, str]]] = {}
    if share.cores is not None:
        period = max(_PERIOD_US, int(_LEAST_QUOTA_US / share.cores))
        quota = int(share.cores * period)
        settings["cpu"] = (
            [("cpu.max", f"{quota} {period}")]
            if version2
            else [("cpu.cfs_period_us", str(period)), ("cpu.cfs_quota_us", str(quota))]
        )
    if share.disk_bytes_per_s is not None:
        rate = int(share.disk_bytes_per_s)
        settings["blkio"] = [
            ("io.max", f"{disk} rbps={rate}")
            if version2
            else ("blkio.throttle.read_bps_device", f"{disk} {rate}")
            for disk in _disks()
        ]
    return settings


def _disks() -> Iterator[str]:
    """``major:minor`` of every real disk."""
    for folder in Path("/sys/block").iterdir():
        if not folder.name.startswith(_NO_DISKS):
            yield (folder / "dev").read_text().strip()
