"""Models, peers and answers that the fault tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tpirt.testing.models import make_model
from tpirt.testing.processes import PeerProcess


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context of 512 tokens."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Callable[[int], list[PeerProcess]]]:
    """Starts worker peers side by side, each with a store of its own; kills them at the end."""
    with ExitStack() as stack:

        def start(count: int) -> list[PeerProcess]:
            return [stack.enter_context(PeerProcess(tmp_path / f"peer{i}")) for i in range(count)]

        yield start
