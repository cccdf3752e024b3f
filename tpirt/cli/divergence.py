"""KL divergence of a model's predictions from those of another, the reference, over one text."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from tpirt.errors import RequestError
from tpirt.files import free_bytes
from tpirt.units import format_bytes


class Predictions:
    """Log-probabilities of the reference, float32, in a temporary file on this machine.

    The file has no name in its folder (on Linux it never had one), so that the system removes it
    however the process ends. A context manager.

    Args:
        tokens: number of predictions.
        vocabulary: log-probabilities of each.

    Attributes:
        folder: where the file is.
        nbytes: how large it will be.

    Raises:
        RequestError: the disk lacks room.
    """

    def __init__(self, tokens: int, vocabulary: int):
        self.folder = Path(tempfile.gettempdir())
        self._row_bytes = 4 * vocabulary
        self.nbytes = tokens * self._row_bytes
        free = free_bytes(self.folder)
        if free is not None and free < self.nbytes:
            raise RequestError(
                f"{self.folder}: the log-probabilities of {tokens} tokens take "
                f"{format_bytes(self.nbytes)}, the disk has {format_bytes(free)} free; make room, "
                "choose another folder with TMPDIR, or lower --max-pieces"
            )
        with self._named_errors():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__

    def append(self, log_probs: torch.Tensor) -> None:
        """Add the next rows, (T, V) float32.

        Raises:
            RequestError: they cannot be written.
        """
        with self._named_errors():
            for row in log_probs:
                self._file.write(row.numpy().tobytes())

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the rows from the first on, (V,) float32 each.

        Raises:
            RequestError: one cannot be read.
        """
        with self._named_errors():
            self._file.seek(0)
            while row := self._file.read(self._row_bytes):
                yield torch.frombuffer(bytearray(row), dtype=torch.float32)

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed is not wanted any more
            self._file.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise RequestError(
                f"{self.folder}: the temporary file of log-probabilities: {exc.strerror}"
            ) from exc


class Divergence:
    """KL divergence from a reference's predictions, summed up over a text.

    Attributes:
        tokens: number of predictions.
        worst: the largest divergence of one, in nats.
    """

    def __init__(self, reference: Predictions):
        self.tokens = 0
        self.worst = 0.0
        self._reference = iter(reference)
        self._total = 0.0
        self._same_top = 0

    def add(self, log_probs: torch.Tensor) -> None:
        """Compare the next rows, (T, V), with the reference's."""
        for row in log_probs:  # one at a time: in float64 a prefill chunk's would take much memory
            expected = next(self._reference)
            found = kl_divergence(expected, row)
            self.tokens += 1
            self.worst = max(self.worst, found)
            self._total += found
            self._same_top += int(expected.argmax() == row.argmax())

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self._total / self.tokens

    @property
    def same_top(self) -> float:
        """The share of predictions whose most likely token is the reference's."""
        return self._same_top / self.tokens


def kl_divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """``sum(p log(p / q))`` in nats, of log-probabilities (V,).

    They are normalised in float64, because the rounding of float32 sums would show: it is as large
    as the divergence of weights in bfloat16.
    """
    log_p, log_q = (F.log_softmax(row.double(), dim=0) for row in (expected, found))
    return float(log_p.exp().mul_(log_p - log_q).sum())
