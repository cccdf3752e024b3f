"""What a worker says of its device to a user who asks: disk, load, stored models, last error."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from tpirt.files import free_bytes
from tpirt.protocol.messages import StatusReply, StoredModel
from tpirt.weights.store import SliceStore, StoredSlice

_MOST_MODELS = 64
_MOST_TEXT = 500  # characters


class Condition:
    """The condition of a device; remembers its last error."""

    def __init__(self, store: SliceStore):
        self._store = store
        self._error, self._error_s = "", 0.0

    def failed(self, error: Exception) -> None:
        """Remember why a session ended."""
        self._error, self._error_s = str(error)[:_MOST_TEXT], time.monotonic()

    def report(self) -> StatusReply:
        """Describe the device now; reads the store's manifests."""
        return StatusReply(
            disk_free_bytes=free_bytes(self._store.root) or 0,
            load=_load(),
            models=_models(self._store.slices())[:_MOST_MODELS],
            last_error=self._error,
            last_error_s=int(time.monotonic() - self._error_s) if self._error else 0,
        )


def _models(slices: Sequence[StoredSlice]) -> tuple[StoredModel, ...]:
    found: dict[str, list[int]] = {}
    for stored in slices:
        found.setdefault(stored.manifest.model, []).append(stored.manifest.nbytes)
    return tuple(StoredModel(name, len(sizes), sum(sizes)) for name, sizes in sorted(found.items()))


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0
