"""What all tests share: one compute thread, the event loop, repeatable hypothesis runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import settings

from tests.support.loops import TimelyLoop
from tests.support.nightly import NIGHTLY_PROFILE
from tpirt.cluster import collective_policy
from tpirt.collectives.cost_model import Topology
from tpirt.ops.native.compiling import SOURCES, keep_library, source_key
from tpirt.ops.native.library import load
from tpirt.testing.processes import fork_server, fork_worker

# Two pools of threads that spin on the same cores only slow each other down.
torch.set_num_threads(1)

# The user who runs the tests may be in a cluster.
os.environ["TPIRT_IDENTITY"] = os.path.join(os.devnull, "identity")

# Under nohup SIGHUP is ignored, in the background of a script SIGINT, and whatever the tests start
# would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run: a test that fails sometimes helps nobody. At night others, to find
# more; a failure says how to repeat it.
settings.register_profile("tpirt", deadline=None, derandomize=True)
settings.register_profile(
    NIGHTLY_PROFILE, settings.get_profile("tpirt"), derandomize=False, print_blob=True
)

# uvloop first: the commands run on it. asyncio's loop is that of a program that embeds the engine.
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": TimelyLoop,
    "asyncio": asyncio.new_event_loop,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--loop",
        choices=(*LOOPS, "both"),
        help="event loop of async tests (default: uvloop; both for contract and both_loops)",
    )
    parser.addoption(
        "--nightly", action="store_true", help="run the tests marked nightly, too; more examples"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before test modules are imported, which ask by it how many examples to try.
    settings.load_profile(NIGHTLY_PROFILE if config.getoption("--nightly") else "tpirt")
    _keep_kernels()


def _keep_kernels() -> None:
    """Keep the native kernels beside their sources: tests with caches of their own find them."""
    path = load().path
    if path is None or path.parent == SOURCES:
        return
    with contextlib.suppress(OSError):
        keep_library(SOURCES, path.read_bytes())
        for old in SOURCES.glob("kernels-*.native"):
            if source_key() not in old.name:
                old.unlink(missing_ok=True)


# Long ones, in which a marker says what the loop matters for; the nightly run tries both for all.
_BY_MARK = {"test_grpc.py", "test_joining.py", "test_tcp.py", "test_tls.py"}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    name = config.getoption("--loop")
    if name is None:
        contract = item.path.parent.name == "contract" and item.path.name not in _BY_MARK
        name = "both" if contract or item.get_closest_marker("both_loops") else "uvloop"
    return LOOPS if name == "both" else {name: LOOPS[name]}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked nightly, unless they are asked for by option or by name."""
    if config.getoption("--nightly") or any("::" in argument for argument in config.args):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture
def warm_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the local workers of masters in this process, which saves importing torch again."""
    if fork_server() is not None:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", fork_worker)


@pytest.fixture
def micro_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every step of several tokens as two micro-batches."""
    monkeypatch.setattr(collective_policy, "_WORTH_HIDING_S", 0.0)
    monkeypatch.setattr(collective_policy, "_LEAST_SPLIT", 2)
    monkeypatch.setattr(Topology, "on_loopback", False)
