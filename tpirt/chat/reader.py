"""Reading user input: plain lines, from any file, while an event loop runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
from codecs import BOM_UTF8
from collections.abc import Callable
from typing import Protocol, TextIO

PROMPT = "> "
_SILENCE_S = 2.0  # after a line, before its writer is taken to wait for an answer
LEAVE_HINT = "/exit or Ctrl-D leaves"


class Reader(Protocol):
    """A source of messages."""

    async def read(self) -> str | None:
        """Wait for the next message; None at the end.

        Raises:
            KeyboardInterrupt: the line was discarded with Ctrl-C.
        """
        ...

    def interrupt(self) -> None:
        """Handle a SIGINT during :meth:`read`."""
        ...

    def aside(self, work: Callable[[], None]) -> None:
        """Call ``work``, and show the prompt again if it is waited for: SIGTSTP, or a note."""
        ...

    def release(self) -> None:
        """Undo what the prompt has changed on the terminal, before a signal ends the process."""
        ...


class PlainReader:
    """Lines from a pipe, a file or a plain terminal.

    A byte order mark is skipped. Bytes that are not UTF-8 become U+FFFD. A thread waits for input,
    because an event loop cannot poll every kind of file.

    Args:
        handle: file descriptor; None for empty input.
        prompt_to: stream for prompts; None for no prompts.
    """

    def __init__(self, handle: int | None, prompt_to: TextIO | None = None):
        self._handle = handle
        self._prompt_to = prompt_to
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer that hold no newline
        self._ended = handle is None
        self._beginning = True  # a byte order mark may come
        self._reading = False
        self._coming: asyncio.Future[bytes] | None = None

    async def read(self) -> str | None:
        """See :class:`Reader`."""
        self._prompt(PROMPT)
        while (line := self._take_line()) is None and not self._ended:
            await self._more()
        if line is None and self._buffer:  # the last line, without a newline
            line, self._buffer = bytes(self._buffer), bytearray()
        if line is None:
            self._prompt("\n")
            return None
        return line.decode("utf-8", "replace").removesuffix("\r")

    async def read_all(self) -> str | None:
        """Wait for the end of the input; all of it that is left, without the last newline.

        None if the writer waits for an answer: it has ended a line, and then was silent for a
        while. :meth:`read` returns that line.
        """
        while not self._ended:
            waits = self._buffer.endswith(b"\n")
            if not await self._more(_SILENCE_S if waits else None):
                return None
        text = self._buffer.decode("utf-8", "replace")
        self._buffer.clear()
        return text.removesuffix("\n").removesuffix("\r")

    def interrupt(self) -> None:
        """See :class:`Reader`; the terminal has dropped the typed text itself."""
        self._prompt(f"\n({LEAVE_HINT})\n{PROMPT}")

    def aside(self, work: Callable[[], None]) -> None:
        """See :class:`Reader`."""
        work()
        if self._reading:
            self._prompt(PROMPT)

    def release(self) -> None:
        """See :class:`Reader`; a plain terminal is unchanged."""

    def _prompt(self, text: str) -> None:
        if self._prompt_to is not None:
            self._prompt_to.write(text)
            self._prompt_to.flush()

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    async def _more(self, patience_s: float | None = None) -> bool:
        """Wait for more input; False if there is none within ``patience_s``."""
        if self._coming is None:  # else a call before was cancelled, or had no patience
            self._coming = asyncio.ensure_future(self._chunk())
        self._reading = True
        await asyncio.wait({self._coming}, timeout=patience_s)
        self._reading = False
        if not self._coming.done():
            return False
        chunk, self._coming = self._coming.result(), None
        self._ended = not chunk
        self._buffer += chunk
        if self._beginning and len(self._buffer) >= len(BOM_UTF8):
            self._beginning = False
            if self._buffer.startswith(BOM_UTF8):
                del self._buffer[: len(BOM_UTF8)]
        return True

    async def _chunk(self) -> bytes:
        """Read in a daemon thread: a read from a terminal cannot be cancelled."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bytes] = loop.create_future()

        def deliver(chunk: bytes) -> None:
            if not future.done():
                future.set_result(chunk)

        def work() -> None:
            chunk = _read_some(self._handle or 0)
            with contextlib.suppress(RuntimeError):  # the loop is closed by now
                loop.call_soon_threadsafe(deliver, chunk)

        threading.Thread(target=work, name="tpirt-input", daemon=True).start()
        return await future


def _read_some(handle: int) -> bytes:
    while True:
        try:
            return os.read(handle, 1 << 16)
        except BlockingIOError:
            select.select([handle], [], [])
        except OSError:
            return b""  # the terminal is gone
