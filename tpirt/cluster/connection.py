"""The master's connection to the peers of a deployment: a group, and another one after a loss."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tpirt.cancellation import finish
from tpirt.cluster.group import Group, engine_closed
from tpirt.cluster.provision import distribute
from tpirt.cluster.roster import return_to
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.errors import PeerLostError, TpirtError
from tpirt.planning import Deployment
from tpirt.refusals import refused_memory
from tpirt.transport.base import PeerClient
from tpirt.types import Progress, ProgressCallback
from tpirt.weights.store import SliceStore


class Connection:
    """Forms a deployment's group, and another one of the same peers when one was lost."""

    def __init__(
        self,
        clients: Sequence[PeerClient],
        deployment: Deployment,
        makers: Sequence[SliceMaker],
        store: SliceStore,
        master: int,
        timeout_s: float,
    ):
        """Use the clients, whose owner closes them; call :meth:`form` first.

        Args:
            clients: of the workers, by rank.
            deployment: the plan.
            makers: of every rank's slice.
            store: this machine's slices.
            master: the number by which workers recognise this master.
            timeout_s: longest silence of a peer; also how long a peer may take to come back.
        """
        self._clients = clients
        self._deployment = deployment
        self._makers = makers
        self._store = store
        self._master = master
        self._timeout_s = timeout_s
        self._group: Group | None = None
        self._failure: PeerLostError | None = None  # of the last reconnect
        self._reconnecting: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def group(self) -> Group:
        """The latest group, after :meth:`form`."""
        assert self._group is not None
        return self._group

    @property
    def broken(self) -> TpirtError | None:
        """Why the group is broken, and stayed so at the last attempt; None if it is not."""
        return self._failure or self.group.broken

    async def form(self, progress: ProgressCallback) -> None:
        """Provide every rank with its slice, and form a group.

        If it fails or is cancelled, the workers are released.

        Raises: as :func:`~tpirt.cluster.provision.distribute` and :meth:`Group.form`.
        """
        clients, timeout_s = self._clients, self._timeout_s
        with refused_memory("preparing slices"):
            manifests = await distribute(
                self._makers, self._deployment.partition, self._store, clients, timeout_s, progress
            )
        stored = self._store.find(manifests[0].slice_id)
        assert stored is not None
        group = Group(clients, self._master, timeout_s, progress)
        try:
            await group.form(self._deployment, manifests, stored, self._store)
        except BaseException:
            await finish(group.aclose())
            raise
        self._group = group

    async def reconnect(self, progress: ProgressCallback) -> None:
        """Replace a group that lost a peer by another one of the same peers, which knows no tokens.

        A restarted peer is provided with its slice if it has lost that, too. If this fails or is
        cancelled, the old group stays, closed and broken; another call tries again.

        Raises:
            PeerLostError: it failed; says how the peer was lost, and what failed.
            RequestError: the connection is closed.
        """
        if self._closed:
            raise engine_closed()
        task = self._reconnecting = asyncio.create_task(self._reconnect(progress))
        try:
            await finish(task, task.cancel)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise engine_closed() from None

    async def aclose(self) -> None:
        """Close the group, and end a running :meth:`reconnect`, which raises RequestError."""
        self._closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)
        if self._group is not None:
            await self._group.aclose()

    async def _reconnect(self, progress: ProgressCallback) -> None:
        loss = self.group.broken
        assert isinstance(loss, PeerLostError)
        progress(Progress("reconnecting", 0, len(self._clients), "peers"))
        await self.group.released()
        await finish(self.group.aclose())
        try:
            await return_to(self._clients, self._master, self._timeout_s)
            await self.form(progress)
        except TpirtError as exc:
            self._failure = PeerLostError(
                f"{loss}; reconnecting failed: {exc}", rank=loss.rank, peer_id=loss.peer_id
            )
            raise self._failure from exc
        self._failure = None
