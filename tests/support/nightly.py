"""Which cases of a test CI runs, and which are left to ``scripts/nightly.sh``."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest
from hypothesis import Phase, settings

NIGHTLY_PROFILE = "nightly"  # of hypothesis


def nightly(*values: Any) -> Any:
    """A case that repeats what others of the test prove."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def nightly_but(
    quick: Container[Any], cases: Iterable[Any], name: Callable[[Any], str] | None = None
) -> list[Any]:
    """Mark all cases nightly but those in ``quick``.

    Args:
        quick: the cases that CI runs, too.
        cases: values, or tuples of one value per argument.
        name: gives a case its id.
    """
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.nightly,
            id=name(case) if name else None,
        )
        for case in cases
    ]


def named_examples(at_night: int) -> settings:
    """In CI hypothesis tries the examples that a test names, and at night many more.

    The first ones that it makes up itself are the simplest, which show little.
    """
    if settings.get_current_profile_name() == NIGHTLY_PROFILE:
        return settings(max_examples=at_night)
    return settings(phases=[Phase.explicit])


def examples(in_ci: int, at_night: int) -> int:
    """How many examples hypothesis tries."""
    return at_night if settings.get_current_profile_name() == NIGHTLY_PROFILE else in_ci
