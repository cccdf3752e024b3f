"""Invitations: one device with the right code joins, whatever strangers do meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tpirt.cluster.membership import issuer, join_cluster
from tpirt.errors import IdentityError, PeerUnreachableError
from tpirt.identity.certificates import new_request
from tpirt.identity.join import DeviceExchange, JoinReply, JoinRequest, read_code
from tpirt.identity.names import PEER
from tpirt.identity.registry import Member
from tpirt.identity.trust import Trust
from tpirt.testing.identities import MadeCluster
from tpirt.transport import joining
from tpirt.transport.address import Address, Endpoint
from tpirt.transport.joining import Invitation

CODE, WRONG = "4821-0937", "4821-0938"
TIMEOUT_S = 10.0


class Open:
    """An invitation that is open.

    Attributes:
        where: its address.
        joined: what joined.
        ended: the end of it.
    """

    def __init__(self, where: Address, joined: list[Member], ended: asyncio.Future[None]):
        self.where = where
        self.joined = joined
        self.ended = ended

    async def join(self, folder: Path, code: str = CODE, name: str = "kitchen") -> Trust:
        trust = Trust(PEER, folder)
        await join_cluster(trust, f"{self.where}/{code}", name, 50_051)
        return trust


@pytest.fixture
def cluster(tmp_path: Path) -> MadeCluster:
    return MadeCluster(tmp_path / "master")


@asynccontextmanager
async def inviting(
    cluster: MadeCluster,
    patience_s: float = 60.0,
    name: str | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[Open]:
    joined: list[Member] = []
    invitation = Invitation(CODE, issuer(cluster.master, name, joined.append))
    (endpoint,) = await invitation.listen(Address(host, 0))
    ended = asyncio.ensure_future(invitation.joined(patience_s))
    try:
        yield Open(Address("127.0.0.1", endpoint.where[1]), joined, ended)
    finally:
        ended.cancel()
        await asyncio.gather(ended, return_exceptions=True)


@pytest.mark.both_loops
async def test_a_device_joins_and_keeps_its_own_key(cluster: MadeCluster, tmp_path: Path) -> None:
    async with inviting(cluster) as invitation:
        trust = await invitation.join(tmp_path / "peer")
        await asyncio.wait_for(invitation.ended, TIMEOUT_S)
    identity = trust.identity
    assert identity is not None
    assert identity.certificate.name == "kitchen"
    (member,) = cluster.master.registry.members()
    assert member == invitation.joined[0]
    assert (member.name, member.identity) == ("kitchen", identity.subject.identity)
    assert member.address == "127.0.0.1:50051"
    assert cluster.master.identity is not None
    assert identity.subject.cluster == cluster.master.identity.subject.cluster
    again = Trust(PEER, tmp_path / "peer").identity  # from the disk
    assert again is not None
    assert again.key == identity.key
    assert (identity.path.stat().st_mode & 0o777, identity.path.parent.stat().st_mode & 0o777) == (
        0o600,
        0o700,
    )


async def test_names_are_told_apart_and_printable(cluster: MadeCluster, tmp_path: Path) -> None:
    long, certified = "\x1b[31mpi\n" + "x" * 100, []
    for number, name in enumerate(("pi", "pi", long, long)):
        async with inviting(cluster) as invitation:
            identity = (await invitation.join(tmp_path / str(number), name=name)).identity
            await asyncio.wait_for(invitation.ended, TIMEOUT_S)
        assert identity is not None
        certified.append(identity.certificate.name)
    names = [each.name for each in cluster.master.registry.members()]
    assert names == certified  # also in the log of either side
    assert names[:2] == ["pi", "pi-2"]
    assert names[2].startswith("?[31mpi?xxx")
    assert names[3] == names[2][:62] + "-2"
    assert len(names[2]) == 64


async def test_a_device_that_joins_again_says_who_it_was(
    cluster: MadeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert "cluster revoke" not in caplog.text
        async with inviting(cluster) as invitation:
            await invitation.join(tmp_path / "peer", name="pi")
    assert "until now this device was pi in that cluster" in caplog.text
    assert "`tpirt cluster revoke pi`" in caplog.text


async def test_a_caller_of_the_default_listener_is_known_by_its_own_address(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    """Not as ``::ffff:127.0.0.1``, and with the zone of a link-local one."""
    async with inviting(cluster, host="0.0.0.0") as invitation:
        await invitation.join(tmp_path / "peer")
        await asyncio.wait_for(invitation.ended, TIMEOUT_S)
    assert invitation.joined[0].address == "127.0.0.1:50051"
    number, name = socket.if_nameindex()[0]
    assert Endpoint(socket.AF_INET6, ("fe80::1", 1, 0, number)).host == f"fe80::1%{name}"


async def test_a_device_that_does_not_finish_is_not_registered(
    cluster: MadeCluster, tmp_path: Path
) -> None:
    _, request = new_request()
    async with inviting(cluster) as invitation:
        reader, writer, exchange, answer = await open_exchange(invitation.where)
        writer.write(framed(exchange.request(answer, JoinRequest("kitchen", 1, request.decode()))))
        await reader.readexactly(100)  # of the certificate
        assert cluster.master.registry.find("kitchen")
        writer.close()
        with pytest.raises(IdentityError, match="did not finish"):
            await asyncio.wait_for(invitation.ended, TIMEOUT_S)
    assert not cluster.master.registry.members()
    assert not invitation.joined
    async with inviting(cluster) as invitation:
        await invitation.join(tmp_path / "peer")
        await asyncio.wait_for(invitation.ended, TIMEOUT_S)
    assert invitation.joined[0].name == "kitchen"


@pytest.mark.parametrize("left", [False, True], ids=["deadline", "interrupted"])
async def test_the_end_of_the_invitation_while_a_device_joins(
    left: bool, cluster: MadeCluster, tmp_path: Path
) -> None:
    """The device has its time after the deadline; after an interruption it is not registered."""
    asked, go = asyncio.Event(), asyncio.Event()
    issue = issuer(cluster.master, None, lambda _: None)

    @asynccontextmanager
    async def slowly(request: JoinRequest, host: str) -> AsyncIterator[JoinReply]:
        async with issue(request, host) as reply:
            asked.set()
            await go.wait()
            yield reply

    invitation = Invitation(CODE, slowly)
    (endpoint,) = await invitation.listen(Address("127.0.0.1", 0))
    accepting = asyncio.create_task(invitation._accept(invitation._listeners[0]))
    where = f"127.0.0.1:{endpoint.where[1]}/{CODE}"
    device = asyncio.create_task(join_cluster(Trust(PEER, tmp_path), where, "kitchen", 50_051))
    await asyncio.wait_for(asked.wait(), TIMEOUT_S)
    accepting.cancel()
    ended = asyncio.create_task(invitation.joined(0.0))
    for _ in range(5):  # the deadline passes
        await asyncio.sleep(0)
    if left:
        ended.cancel()
    else:
        go.set()
    results = await asyncio.gather(ended, device, return_exceptions=True)
    if left:
        assert isinstance(results[0], asyncio.CancelledError)
        assert isinstance(results[1], PeerUnreachableError)
        assert not cluster.master.registry.members()
    else:
        assert results == [None, None]
        assert cluster.master.registry.find("kitchen")


async def test_the_master_may_choose_the_name(cluster: MadeCluster, tmp_path: Path) -> None:
    async with inviting(cluster, name="attic") as invitation:
        await invitation.join(tmp_path / "peer")
        await asyncio.wait_for(invitation.ended, TIMEOUT_S)
    assert cluster.master.registry.find("attic")


async def test_three_wrong_codes_end_it(cluster: MadeCluster, tmp_path: Path) -> None:
    async with inviting(cluster) as invitation:
        for _ in range(3):
            with pytest.raises(IdentityError, match="the code is not right"):
                await invitation.join(tmp_path / "peer", WRONG)
        with pytest.raises(IdentityError, match="3 wrong codes; the code is void"):
            await asyncio.wait_for(invitation.ended, TIMEOUT_S)
        with pytest.raises(PeerUnreachableError, match="cluster invite"):
            await invitation.join(tmp_path / "peer")
    assert not cluster.master.registry.members()
    assert not (tmp_path / "peer").exists()


async def test_a_wrong_code_costs_one_try(cluster: MadeCluster, tmp_path: Path) -> None:
    async with inviting(cluster) as invitation:
        for _ in range(2):
            with pytest.raises(IdentityError, match="the code is not right"):
                await invitation.join(tmp_path / "peer", WRONG)
        await invitation.join(tmp_path / "peer")
        await asyncio.wait_for(invitation.ended, TIMEOUT_S)


async def test_a_code_is_good_for_one_device(cluster: MadeCluster, tmp_path: Path) -> None:
    async with inviting(cluster) as invitation:
        first = await open_exchange(invitation.where)
        await invitation.join(tmp_path / "peer")  # while another one is under way
        await asyncio.wait_for(invitation.ended, TIMEOUT_S)
        reader, writer, exchange, answer = first
        with contextlib.suppress(OSError):
            writer.write(framed(exchange.request(answer, JoinRequest("late", 1, ""))))
        assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
        writer.close()
        with pytest.raises(PeerUnreachableError):
            await invitation.join(tmp_path / "second")
    assert len(cluster.master.registry.members()) == 1


async def test_nobody_came_in_time(cluster: MadeCluster, tmp_path: Path) -> None:
    async with inviting(cluster, patience_s=0.05) as invitation:
        with pytest.raises(IdentityError, match="no device has joined within"):
            await asyncio.wait_for(invitation.ended, TIMEOUT_S)
        with pytest.raises(PeerUnreachableError, match="cannot join at"):
            await invitation.join(tmp_path / "peer")


async def test_strangers_do_not_keep_the_device_out(
    cluster: MadeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More silent ones than there are places, and some that speak nonsense."""
    async with inviting(cluster) as invitation:
        strangers = []
        for number in range(3 * joining._PLACES):
            reader, writer = await asyncio.open_connection(*invitation.where)
            if number % 3 == 0:
                writer.write(b"\xff\xff" + bytes(100))
            elif number % 3 == 1:
                writer.write(b"\x10\x00tpirt join 1")
            strangers.append((reader, writer))
        await invitation.join(tmp_path / "peer")
        await asyncio.wait_for(invitation.ended, TIMEOUT_S)
        for _, writer in strangers:
            writer.close()
    assert len(cluster.master.registry.members()) == 1


async def test_a_device_that_knows_the_code_but_asks_for_nonsense(cluster: MadeCluster) -> None:
    async with inviting(cluster) as invitation:
        _, writer, exchange, answer = await open_exchange(invitation.where)
        writer.write(framed(exchange.request(answer, JoinRequest("pi", 1, "no request"))))
        with pytest.raises(IdentityError, match=r"had the right code, .*damaged certificate req"):
            await asyncio.wait_for(invitation.ended, TIMEOUT_S)
        writer.close()
    assert not cluster.master.registry.members()


@pytest.mark.parametrize("code", ["", "1234", "4821-09371", "abcd-efgh", "４８２１-０９３７"])
async def test_what_is_no_code(code: str, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="expected a code of 8 digits"):
        await join_cluster(Trust(PEER, tmp_path), f"127.0.0.1:1/{code}", "pi", 1)
    with pytest.raises(IdentityError, match="HOST:PORT/CODE"):
        await join_cluster(Trust(PEER, tmp_path), "127.0.0.1:1", "pi", 1)


async def test_a_device_says_where_it_joins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A name may take seconds to be looked up."""
    caplog.set_level(logging.INFO, "tpirt.peer")
    with pytest.raises(PeerUnreachableError, match=r"cannot join at 127\.0\.0\.1:1: "):
        await join_cluster(Trust(PEER, tmp_path), "127.0.0.1:1/4821-0937", "pi", 1)
    assert caplog.messages == ["joining at 127.0.0.1:1"]


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(2, "little") + message


async def open_exchange(
    where: Address,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, DeviceExchange, bytes]:
    """Go as far as the master's element."""
    reader, writer = await asyncio.open_connection(*where)
    exchange = DeviceExchange(read_code(CODE))
    writer.write(framed(exchange.hello()))
    size = int.from_bytes(await reader.readexactly(2), "little")
    return reader, writer, exchange, await reader.readexactly(size)
