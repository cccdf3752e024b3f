"""uvloop's event loop, on which a test that takes too long ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvloop


class TimelyLoop(uvloop.Loop):
    """Cancels all tasks when a signal handler fails the test, as pytest-timeout's does.

    uvloop reports what the handler raises and goes on: a test that hangs would hang for ever.
    """

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """See :class:`asyncio.AbstractEventLoop`."""
        exc = context.get("exception")
        if not isinstance(exc, pytest.fail.Exception):
            super().call_exception_handler(context)
            return
        for task in asyncio.all_tasks(self):
            task.cancel(str(exc))
