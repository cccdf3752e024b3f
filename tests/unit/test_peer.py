"""The worker process's own decisions."""

import pytest

from tpirt.peer.process import is_loopback


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("raspberry", False),
    ],
)
def test_only_loopback_goes_without_a_warning(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
