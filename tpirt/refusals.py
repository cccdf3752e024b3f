"""What the operating system refuses a process: memory, threads, open files."""

from __future__ import annotations

import contextlib
import errno
import re
import traceback
from collections.abc import Iterator

from tpirt.errors import ConfigError, MemoryLimitError

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

# Of torch and of the loader of its libraries, whose errors have no class of their own.
_NO_MEMORY = (
    *("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "bad_alloc"),
    *("failed to map segment", "cannot allocate memory"),
)
_NO_THREAD = ("can't start new thread",)


def refusal(exc: BaseException) -> str | None:
    """Describe what the system refused, and what helps; None for any other exception."""
    number, text = getattr(exc, "errno", None), str(exc)
    if isinstance(exc, RuntimeError) and any(each in text for each in _NO_THREAD):
        return "the system allows no more threads; raise `ulimit -u` or the container's limit"
    if isinstance(exc, MemoryError) or (isinstance(exc, OSError) and number == errno.ENOMEM):
        return _no_memory()
    if isinstance(exc, (RuntimeError, ImportError)) and any(each in text for each in _NO_MEMORY):
        return _no_memory(text)
    if isinstance(exc, OSError) and number in (errno.EMFILE, errno.ENFILE):
        return f"too many open files: {text}; raise the limit with `ulimit -n`"
    return None


def _no_memory(text: str = "") -> str:
    found = re.search(r"tried to allocate (\d+) bytes", text)
    amount = f"{int(found[1]):,} bytes of memory" if found else "memory"
    return (
        f"the system refused {amount}; end other programs, raise the limit of this process "
        "(ulimit -v, container), lower --memory, or shorten the prompt"
    )


@contextlib.contextmanager
def refused_memory(subject: str) -> Iterator[None]:
    """Raise MemoryLimitError where the system refuses memory or a thread within the block.

    Args:
        subject: what needed it, at the start of the message.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as exc:
        words = refusal(exc)
        if words is None:
            raise
        # What the failed calls had in memory is free from here on, however long the error is kept.
        traceback.clear_frames(exc.__traceback__)
        raise MemoryLimitError(f"{subject}: {words}") from None


def allow_open_files(needed: int) -> None:
    """Raise this process's soft limit on open files to at least ``needed``.

    Raises:
        ConfigError: its hard limit is lower.
    """
    allowed = raise_open_files(needed)
    if allowed < needed:
        raise ConfigError(
            f"this process may open {allowed} files at once, about {needed} are needed; raise the "
            f"limit with `ulimit -n {needed}`"
        )


def raise_open_files(wanted: int) -> int:
    """Raise this process's soft limit on open files to ``wanted``, as far as its hard limit allows.

    Returns:
        How many files it may open; ``wanted`` without a limit.
    """
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 0:  # a negative one is no limit
        return wanted
    if soft >= wanted:
        return soft
    allowed = wanted if hard < 0 else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
