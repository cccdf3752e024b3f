"""The master's connection to its peers: a group, and another one after a loss.

A start and a loss are the same: ask who is there, plan, provide slices, form a group.
:mod:`tpirt.planning.lineup` decides who takes part.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

from tpirt.cancellation import finish
from tpirt.cluster.group import Group, engine_closed
from tpirt.cluster.provision import Pace, distribute
from tpirt.cluster.roster import HELLO_TIMEOUT_S, Answer, profiles, reach
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.errors import (
    ConfigError,
    DamagedSliceError,
    MemoryLimitError,
    PeerBusyError,
    PeerLostError,
    StoreError,
    TpirtError,
)
from tpirt.planning import Deployment, PeerProfile
from tpirt.planning.lineup import Places, line_up
from tpirt.protocol.messages import HelloReply
from tpirt.refusals import refused_memory
from tpirt.sharding.format import WeightFormat
from tpirt.transport.base import PeerClient
from tpirt.types import LOST, Progress, ProgressCallback, Recovery
from tpirt.weights.store import SliceStore

_RETURN_S = 5.0  # for a lost peer to come back
_SOON_S = 1.0  # where spares could take the places of all that are lost
_MOST_FAILURES = 2  # of one peer while a group is formed again; then it is left out

_PASSING = (PeerLostError, PeerBusyError, DamagedSliceError)

PlanGroup = Callable[[Places, Sequence[PeerProfile], Deployment | None], Deployment]


def _do_nothing(*_: object) -> None:
    pass


async def _wait_for_nothing(_: object) -> None:
    pass


def _always() -> bool:
    return True


class Connection:
    """Forms a group of peers, and another one when one was lost.

    Attributes:
        on_plan: called with the first plan, before weights are loaded.
        on_formed: awaited with the workers of each group; if it fails, the group is closed.
        on_broken: called when a group breaks.
        recoveries: how losses were survived, oldest first.
    """

    def __init__(
        self,
        peers: Sequence[PeerClient],
        spares: Sequence[PeerClient],
        plan: PlanGroup,
        maker: Callable[[WeightFormat], SliceMaker],
        this_peer: Callable[[], PeerProfile],
        store: SliceStore,
        master: int,
        timeout_s: float,
        pace: Pace,
    ):
        """Use the clients, whose owner closes them; call :meth:`form` first.

        Args:
            peers: the workers that the user asked for, by rank.
            spares: those that may take their places.
            plan: see :func:`tpirt.planning.lineup.next_deployment`.
            maker: makes slices of the model in a format.
            this_peer: the profile of this process.
            store: this machine's slices.
            master: the number by which workers recognise this master.
            timeout_s: longest silence of a peer.
            pace: of what is sent of slices.
        """
        self.on_plan: Callable[[Deployment], None] = _do_nothing
        self.on_formed: Callable[[Sequence[PeerClient]], Awaitable[None]] = _wait_for_nothing
        self.on_broken: Callable[[], None] = _do_nothing
        self.recoveries: list[Recovery] = []
        self._peers = peers
        self._spares = spares
        self._plan = plan
        self._maker = maker
        self._makers: dict[WeightFormat, SliceMaker] = {}
        self._this_peer = this_peer
        self._store = store
        self._master = master
        self._timeout_s = timeout_s
        self._pace = pace
        self._clients = {client.peer_id: client for client in (*peers, *spares)}
        self._places: Places = {}  # of the current group
        self._deployment: Deployment | None = None
        self._group: Group | None = None
        self._failure: PeerLostError | None = None  # of the last reconnect
        self._reconnecting: asyncio.Task[Recovery] | None = None
        self._reached = False  # whether the clients may be connected
        self._closed = False

    @property
    def group(self) -> Group:
        """The latest group, after :meth:`form`."""
        assert self._group is not None
        return self._group

    @property
    def deployment(self) -> Deployment:
        """The plan of the latest group; another one may follow a loss."""
        assert self._deployment is not None
        return self._deployment

    @property
    def broken(self) -> TpirtError | None:
        """Why the group is broken, and stayed so at the last attempt; None if it is not."""
        return self._failure or self.group.broken

    async def form(self, progress: ProgressCallback) -> None:
        """Reach the peers, or spares in their places; plan, provide slices and form a group.

        If it fails or is cancelled, the workers are released.

        Raises: as :meth:`tpirt.engine.Engine.connect`.
        """
        await self._form_with_patience(
            self._peers, HELLO_TIMEOUT_S, lambda: len(self._peers), progress
        )

    async def reconnect(
        self, progress: ProgressCallback, fewer: Callable[[], bool] = _always
    ) -> Recovery:
        """Replace a group that lost a peer by another one, which knows no tokens.

        Of the same peers where they come back; else spares, or peers that were lost before, take
        their places; else, if ``fewer()``, the others go on by another plan. If this fails or is
        cancelled, the old group stays, closed and broken; another call tries again.

        Raises:
            PeerLostError: it failed; says how the peer was lost, and what failed.
            RequestError: the connection is closed.
        """
        if self._closed:
            raise engine_closed()
        task = self._reconnecting = asyncio.create_task(self._reconnect(progress, fewer))
        try:
            return await finish(task, task.cancel)
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

    # -- a loss ------------------------------------------------------------------------------

    async def _reconnect(self, progress: ProgressCallback, fewer: Callable[[], bool]) -> Recovery:
        loss, began_s = self.group.broken, self.group.broken_s
        assert isinstance(loss, PeerLostError)
        members = [self._clients[peer] for peer in self._places.values()]
        if self._failure is None:  # else it was told at the first attempt
            progress(Progress(LOST, 0, len(members), "peers", str(loss)))
        progress(Progress("reconnecting", 0, len(members), "peers"))
        await self.group.released()
        await finish(self.group.aclose())
        before = self._places
        try:
            sent = await self._form_with_patience(
                members,
                min(_RETURN_S, self._timeout_s),
                lambda: 0 if fewer() else len(self._places),
                progress,
            )
        except TpirtError as exc:
            self._failure = PeerLostError(
                f"{loss}; reconnecting failed: {exc}", rank=loss.rank, peer_id=loss.peer_id
            )
            raise self._failure from exc
        self._failure = None
        recovery = Recovery(
            peer_id=loss.peer_id,
            change=_change(before, self._places),
            peers=len(self._places),
            noticing_ms=(loss.silent_s or 0.0) * 1e3,
            forming_ms=(time.perf_counter() - began_s) * 1e3,
            sent_bytes=sent,
        )
        self.recoveries.append(recovery)
        return recovery

    # -- forming -----------------------------------------------------------------------------

    async def _form_with_patience(
        self,
        members: Sequence[PeerClient],
        patience_s: float,
        least: Callable[[], int],
        progress: ProgressCallback,
    ) -> int:
        """Form a group of those who are there; a peer that fails meanwhile is left out.

        Args:
            members: they have ``patience_s`` to answer.
            patience_s: see ``members``.
            least: how many workers it takes.
            progress: see :meth:`form`.

        Returns:
            The bytes of weights that were sent.
        """
        failures: Counter[str] = Counter()
        left_out: dict[PeerClient, Answer] = {}
        failure: TpirtError | None = None
        while True:
            needed = [client for client in members if client not in left_out]
            answers = await self._reach(needed, patience_s, progress) | left_out
            try:
                return await self._form(answers, least(), progress)
            except TpirtError as exc:
                failures[exc.peer_id] += 1
                last = failures[exc.peer_id] >= _MOST_FAILURES or not isinstance(exc, _PASSING)
                client = self._clients.get(exc.peer_id)
                if client is not None and client not in left_out:
                    if last:
                        left_out[client] = exc
                elif last or not isinstance(exc, DamagedSliceError):  # this machine's is made again
                    if failure is not None and self._group is None:
                        raise failure from exc
                    raise
                failure = exc
                patience_s = min(patience_s, _RETURN_S)

    async def _reach(
        self, needed: Sequence[PeerClient], patience_s: float, progress: ProgressCallback
    ) -> dict[PeerClient, Answer]:
        if self._reached:  # an old connection may lead nowhere
            await finish(asyncio.gather(*(client.aclose() for client in self._clients.values())))
        self._reached = True
        others = [client for client in self._clients.values() if client not in needed]
        # A device that is busy at the start has its time: a spare would be sent gigabytes.
        soon_s, busy_s = (patience_s, 0.0) if self._group is None else (_SOON_S, self._timeout_s)
        places = len(self._peers)
        return await reach(
            needed, others, places, self._master, patience_s, soon_s, busy_s, progress
        )

    async def _form(
        self, answers: Mapping[PeerClient, Answer], least: int, progress: ProgressCallback
    ) -> int:
        """Form a group of at least ``least`` of those who answered; returns the bytes sent."""
        asked = [client.peer_id for client in self._peers]
        present, missing = {}, []
        for peer, client in self._clients.items():
            answer = answers[client]
            if isinstance(answer, HelloReply):
                present[peer] = answer
            elif peer in (self._places.values() or asked):
                missing.append(answer)
        places = line_up(asked, self._places, list(present))
        if len(places) < least:
            raise missing[0]
        clients = [self._clients[peer] for peer in places.values()]
        try:
            workers = [(client, present[client.peer_id]) for client in clients]
            peers = profiles(workers, self._this_peer())
            deployment = self._plan(places, peers, self._deployment)
        except (ConfigError, MemoryLimitError) as exc:
            if not missing:
                raise
            raise type(exc)(f"{missing[0]}; without it: {exc}") from exc
        if self._group is None:
            self.on_plan(deployment)
        return await self._provide(clients, places, deployment, progress)

    async def _provide(
        self,
        clients: Sequence[PeerClient],
        places: Places,
        deployment: Deployment,
        progress: ProgressCallback,
    ) -> int:
        makers = [self._maker_of(rank.form) for rank in deployment.ranks]
        with refused_memory("preparing slices"):
            manifests, sent = await distribute(
                makers,
                deployment.partition,
                self._store,
                clients,
                self._timeout_s,
                progress,
                self._pace,
            )
        stored = self._store.find(manifests[0].slice_id)
        if stored is None:
            raise StoreError(f"{self._store.root}: the slice was removed meanwhile; start again")
        group = Group(clients, self._master, self._timeout_s, progress, self._tell_broken)
        try:
            await group.form(deployment, manifests, stored, self._store)
            await self.on_formed(clients)
        except BaseException:
            await finish(group.aclose())
            raise
        self._group, self._deployment, self._places = group, deployment, places
        return sent

    def _tell_broken(self) -> None:
        self.on_broken()

    def _maker_of(self, form: WeightFormat) -> SliceMaker:
        if form not in self._makers:
            self._makers[form] = self._maker(form)
        return self._makers[form]


def _change(before: Places, after: Places) -> str:
    """Say who takes part that did not, and who does no more."""
    gone = [peer for peer in before.values() if peer not in after.values()]
    new = [peer for peer in after.values() if peer not in before.values()]
    if gone and new:
        return f"{', '.join(new)} in place of {', '.join(gone)}"
    if gone:
        return f"by another plan, without {', '.join(gone)}"
    return f"with {', '.join(new)} again" if new else ""
