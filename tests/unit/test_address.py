"""Addresses as people write them."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import psutil
import pytest

from tpirt.errors import ConfigError
from tpirt.transport import address
from tpirt.transport.address import DEFAULT_PORT, Address, Endpoint, own_hosts, resolve


@pytest.mark.parametrize(
    ("text", "host", "port", "written"),
    [
        ("kitchen", "kitchen", DEFAULT_PORT, "kitchen:50051"),
        ("pi.local:1", "pi.local", 1, "pi.local:1"),
        ("192.168.1.7:65535", "192.168.1.7", 65535, "192.168.1.7:65535"),
        ("[::1]", "::1", DEFAULT_PORT, "[::1]:50051"),
        ("[fe80::1%eth0]:7", "fe80::1%eth0", 7, "[fe80::1%eth0]:7"),
    ],
)
def test_addresses_are_read_and_written(text: str, host: str, port: int, written: str) -> None:
    assert Address.parse(text) == (host, port)
    assert str(Address.parse(text)) == written


@pytest.mark.parametrize(
    "text",
    [
        *("", ":1", "a:", "a:b", "a:0", "a:65536", "a:999999", "a:-1", "a:\u0661", "50051"),
        *("::1", "::1:50051", "[]:1", "[::1", "a b", "a/b", "http://a:1"),
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST or HOST:PORT"):
        Address.parse(text)


def test_grpc_looks_up_any_host_as_a_name_and_keeps_its_zone() -> None:
    assert Address("unix", 1).uri == "dns:///unix:1"
    assert Address("fe80::1%eth0", 1).uri == "dns:///[fe80::1%25eth0]:1"


async def test_all_addresses_of_a_host_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: object, **__: object) -> list[object]:
        v6, v4 = (socket.AF_INET6, ("::1", 9, 0, 0)), (socket.AF_INET, ("127.0.1.1", 9))
        return [(family, socket.SOCK_STREAM, 6, "", where) for family, where in (v6, v4, v6)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = await resolve(Address("kitchen", 9))
    assert [endpoint.host for endpoint in found] == ["::1", "127.0.1.1"]
    assert found[0].at(7).where == ("::1", 7, 0, 0)


async def test_a_lookup_ends_in_time_although_the_system_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(30))
    monkeypatch.setattr(address, "_LOOKUP_S", 0.01)
    try:
        with pytest.raises(socket.gaierror, match="lookup of its name took longer"):
            await resolve(Address("kitchen", 9))
    finally:
        answered.set()


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
async def test_what_can_be_no_name_is_unknown(host: str) -> None:
    with pytest.raises(socket.gaierror, match="not known"):
        await resolve(Address(host, 9))


async def test_the_zone_is_kept() -> None:
    (_, name), *_ = socket.if_nameindex()
    (found,) = await resolve(Address(f"fe80::1%{name}", 9))
    assert found.where[3] == socket.if_nametoindex(name)
    assert found.host == f"fe80::1%{name}"


async def test_all_addresses_of_this_machine_are_those_of_both_protocols() -> None:
    (endpoint,) = await resolve(Address("0.0.0.0", 0), listening=True)
    with endpoint.listen() as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        if endpoint.family is socket.AF_INET6:
            socket.create_connection(("::1", port)).close()
    assert Endpoint(socket.AF_INET, ("127.0.0.1", 1)).host == "127.0.0.1"


def test_this_machines_addresses_come_with_that_of_the_default_route_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(**interfaces: str) -> list[str]:
        monkeypatch.setattr(
            psutil,
            "net_if_addrs",
            lambda: {
                name: [SimpleNamespace(family=socket.AF_INET, address=host)]
                for name, host in interfaces.items()
            },
        )
        return own_hosts()

    class Routed(socket.socket):
        def connect(self, where: object) -> None:
            if not route:
                raise OSError("no route")

        def getsockname(self) -> tuple[str, int]:
            return route, 1

    monkeypatch.setattr(socket, "socket", Routed)
    route = "192.168.1.5"
    assert found(lo="127.0.0.1", bridge="172.17.0.1", wlan="192.168.1.5") == [
        "192.168.1.5",
        "172.17.0.1",
    ]
    route = ""
    assert found(lo="127.0.0.1", bridge="172.17.0.1") == ["172.17.0.1"]
    assert found(lo="127.0.0.1") == ["127.0.0.1"]
