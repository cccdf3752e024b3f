"""A link to another rank: the only reader of its channel, which also decides whether it is alive.

A link always reads. A frame is a tensor of the current step, a message, a reply or a heartbeat;
tensors of past steps are dropped. So a sender never waits for a reader that has left a step, and
only the link reads from a channel.

A peer is lost if nothing has come from it for ``timeout_s``. Both sides send heartbeats, and bytes
of a large frame count while they arrive, so a slow peer is not lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from tpirt.errors import DamagedLinkError, PeerLostError, TpirtError, TransportError
from tpirt.protocol.messages import Failure, Probe, decode, encode
from tpirt.protocol.suspicion import Suspicion
from tpirt.transport.base import Channel
from tpirt.transport.frame import Frame, Header, Kind

HEARTBEAT_S = 2.0
PARTS = 2  # micro-batches of a step, at most
_REMEMBERED = 1024  # aborted steps; all tensors of older ones have been read
_MOST_UNSENT = 64  # replies and messages that are not sent yet
_MOST_AHEAD = 4  # unexpected frames per part: collectives run in lockstep


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message that came over a link; ``id`` is the request's, 0 if no answer is expected."""

    body: Any
    frame: Frame
    id: int = 0


class Handler(Protocol):
    """Receives what the link does not handle itself; on the event loop, must not block."""

    def on_message(self, link: Link, incoming: Incoming) -> None:
        """Take a message or a request. A TransportError raised here breaks the link."""

    def on_lost(self, link: Link, exc: TpirtError) -> None:
        """The other side is gone, silent, or sent an invalid frame. Called once."""


@dataclass(slots=True)
class _Waiter:
    head: bytes
    future: asyncio.Future[Frame]


class Link:
    """One rank's connection to another.

    Attributes:
        rank: rank of the other side.
        channel: carries the frames; only the link reads it.
        lost: why the link is lost; None if it is not.
    """

    def __init__(
        self,
        channel: Channel,
        rank: int,
        timeout_s: float,
        handler: Handler,
        *,
        suspicious: bool = False,
    ):
        """Take over a channel; :meth:`start` begins to read.

        ``suspicious``: give the other side up before the timeout if it used to be punctual.
        """
        self.rank = rank
        self.channel = channel
        self.lost: TpirtError | None = None
        self._handler = handler
        self._suspicious = suspicious
        self._loop = asyncio.get_running_loop()
        self._step = 0
        self._parts = 0  # of the step at hand; 0 when it is over
        self._reason: Exception | None = None  # why nothing of the step at hand is waited for
        self._given_up: deque[int] = deque(maxlen=_REMEMBERED)  # steps that did not complete
        self._inbox: list[deque[Frame]] = _queues()
        self._ahead: list[deque[Frame]] = _queues()  # of the next step: its sender is ahead of us
        self._newest = [-1] * PARTS
        self._waiters: list[_Waiter | None] = [None] * PARTS
        self._requests: dict[int, asyncio.Future[Incoming]] = {}
        self._last_id = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._received = self._sent = 0
        self._frame_s = 0.0  # when the last whole frame came
        self._timer: asyncio.TimerHandle | None = None
        self.silence(timeout_s)

    @property
    def peer_id(self) -> str:
        """Name of the other side, for error messages."""
        return self.channel.peer_id

    def silence(self, timeout_s: float) -> None:
        """Set the longest silence before the other side counts as lost."""
        self._timeout_s = timeout_s
        self._interval_s = min(HEARTBEAT_S, timeout_s / 4)
        self._suspicion = Suspicion(self._interval_s, timeout_s)
        self._begin_to_listen()
        if self._timer is not None:  # the next heartbeat may be due sooner than was planned
            self._schedule()

    def start(self) -> None:
        """Begin to read and to send heartbeats."""
        self._begin_to_listen()
        self._schedule()
        self.channel.start(self)

    # -- steps -----------------------------------------------------------------------------

    def begin(self, step: int, parts: int) -> None:
        """Expect tensors of ``step``; drop those of older steps."""
        follows = step == self._step + 1
        self._step, self._parts, self._reason = step, parts, None
        self._inbox, self._ahead = (self._ahead if follows else _queues()), _queues()
        self._newest = [_newest(queue) for queue in self._inbox]

    def skip(self, step: int) -> None:
        """Record a step that was aborted before it arrived."""
        self.begin(step, 0)
        self._given_up.append(step)

    def end(self, *, completed: bool) -> None:
        """End the current step; its tensors are dropped from now on if it was aborted."""
        self._parts = 0
        if not completed:
            self._given_up.append(self._step)
        for inbox in self._inbox:
            inbox.clear()

    def wake(self, reason: Exception) -> None:
        """Raise ``reason`` in all calls that wait for a tensor of the current step."""
        self._reason = reason
        self._fail_waiters(reason)

    async def expect(self, part: int, head: bytes) -> memoryview | bytes:
        """Wait for the tensor whose frame begins with ``head``; returns its payload.

        A cancelled call does not change the link; the next call gets the tensor.

        Raises:
            PeerLostError: the other side is gone or silent.
            TransportError: another frame came; the link is broken. In the clear it is a
                DamagedLinkError.
            Exception: the reason given to :meth:`wake` since the step began.
        """
        inbox = self._inbox[part]
        if not inbox:
            self.channel.poll()  # which may abort the step
        if self._reason is not None:
            raise self._reason
        if inbox:
            await asyncio.sleep(0)  # a rank that never waits must not starve the loop
            if self._reason is not None:
                raise self._reason
            frame = inbox.popleft()
        elif ahead := next(filter(None, self._ahead), None):
            raise self._invalid(_mismatch(self.peer_id, head, ahead[0]))
        elif self.lost is not None:
            raise self.lost
        else:
            waiter = self._waiters[part] = _Waiter(head, self._loop.create_future())
            try:
                frame = await waiter.future
            except asyncio.CancelledError:
                future = waiter.future
                if future.done() and not future.cancelled() and future.exception() is None:
                    inbox.appendleft(future.result())
                raise
            finally:
                self._waiters[part] = None
        if frame.head != head:
            raise self._invalid(_mismatch(self.peer_id, head, frame))
        return frame.payload

    # -- messages --------------------------------------------------------------------------

    async def send(self, frame: Frame) -> None:
        """Send a frame, in order. If cancelled, the frame is still sent whole.

        Raises:
            PeerLostError, TransportError: the link is gone.
        """
        if self.lost is not None:
            raise self.lost
        try:
            await self.channel.send(frame)
        except PeerLostError as exc:
            raise self._broken(exc) from exc

    async def notify(self, body: object, payload: memoryview | bytes = b"") -> None:
        """Send a message that needs no answer; cancelled or failed, as :meth:`send`."""
        await self.send(message_frame(Kind.MESSAGE, body, payload))

    async def request(self, body: object, payload: memoryview | bytes = b"") -> Incoming:
        """Send a request and wait for its reply; any number at a time, in any order.

        If cancelled, the whole request is still sent, and its reply is ignored.

        Raises:
            PeerLostError, TransportError: the link is gone.
            TpirtError: the other side answers with a failure of its own.
        """
        self._last_id += 1
        number = self._last_id
        future: asyncio.Future[Incoming] = self._loop.create_future()
        self._requests[number] = future
        try:
            await self.send(message_frame(Kind.REQUEST, body, payload, number))
            reply = await future
        finally:
            del self._requests[number]
            if future.done() and not future.cancelled():
                future.exception()  # seen: asyncio need not report it
        if isinstance(reply.body, Failure):
            raise reply.body.error(self.peer_id)
        return reply

    async def respond(self, to: Incoming, body: object, payload: memoryview | bytes = b"") -> None:
        """Answer a request; cancelled or failed, as :meth:`send`."""
        await self.send(message_frame(Kind.REPLY, body, payload, to.id))

    def reply(self, to: Incoming, body: object, payload: memoryview | bytes = b"") -> None:
        """Answer a request in the background.

        Raises:
            TransportError: the other side asks for more than it reads.
        """
        if len(self._tasks) >= _MOST_UNSENT:
            raise TransportError(f"peer {self.peer_id}: it reads no replies; refused")
        self._spawn(self._post(message_frame(Kind.REPLY, body, payload, to.id)))

    def tell(self, body: object) -> None:
        """Send a message in the background."""
        self._spawn(self._post(message_frame(Kind.MESSAGE, body)))

    def doubted(self, exc: TransportError) -> TransportError:
        """The error of something invalid that came over this link.

        In the clear nobody can tell what the other side sent from what was damaged, or slipped in,
        on its way.
        """
        return exc if self.channel.carrier.seal else DamagedLinkError.of(exc)

    def give_up(self, exc: TpirtError) -> None:
        """Break the link for a reason on this side."""
        self._broken(exc)

    async def aclose(self) -> None:
        """Close the channel; waiting calls raise PeerLostError. Idempotent.

        If cancelled, the link is lost all the same; another call closes the channel.
        """
        self._stop()
        if self.lost is None:
            self.lost = self._named(PeerLostError(f"peer {self.peer_id}: the link is closed"))
            self._release(self.lost)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.channel.aclose()

    # -- the channel's side ----------------------------------------------------------------

    def on_frame(self, frame: Frame) -> None:
        """See :class:`tpirt.transport.base.Receiver`."""
        before_s, self._frame_s = self._frame_s, self._loop.time()
        for part, waiter in enumerate(self._waiters):  # nearly always: just what is expected
            if waiter is not None and waiter.head == frame.head and not waiter.future.done():
                order = _order(frame.header)
                if order <= self._newest[part]:
                    break  # the same again
                self._newest[part] = order
                waiter.future.set_result(frame)
                return
        if self.lost is not None:
            return
        try:
            self._sort(frame, self._frame_s - before_s)
        except TransportError as exc:
            self._invalid(exc)

    def on_lost(self, exc: TpirtError) -> None:
        """See :class:`tpirt.transport.base.Receiver`."""
        if isinstance(exc, TransportError):
            self._invalid(exc)
        else:
            self._broken(exc)

    def _sort(self, frame: Frame, gap_s: float) -> None:
        header = frame.header
        match header.kind:
            case Kind.PARTIAL | Kind.REDUCED:
                self._take_tensor(header, frame)
            case Kind.HEARTBEAT:
                self._suspicion.heard(gap_s)
            case Kind.REPLY:
                future = self._requests.get(header.seq)
                incoming = Incoming(decode(frame.message, self.peer_id), frame, header.seq)
                if future is not None and not future.done():
                    future.set_result(incoming)
                elif header.seq > self._last_id:
                    raise TransportError(f"peer {self.peer_id}: a reply to nothing; refused")
            case Kind.MESSAGE | Kind.REQUEST:
                body = decode(frame.message, self.peer_id)
                number = header.seq if header.kind == Kind.REQUEST else 0
                incoming = Incoming(body, frame, number)
                if number and isinstance(body, Probe):  # measured: answered without detour
                    self.reply(incoming, body)
                else:
                    self._handler.on_message(self, incoming)
            case kind:
                raise TransportError(
                    f"peer {self.peer_id}: a frame of unknown kind {kind}; refused"
                )

    def _take_tensor(self, header: Header, frame: Frame) -> None:
        """Keep a tensor that is not expected yet, or drop one of an older step."""
        part, order = header.seq % PARTS, _order(header)
        if header.step in self._given_up:
            return
        if header.step == self._step + 1:
            # The sender has left this step, so everyone has: its end is acknowledged by all ranks.
            for waiter in self._waiters:
                if waiter is not None and not waiter.future.done():
                    raise _mismatch(self.peer_id, waiter.head, frame)
            queue = self._ahead[part]
            newest = _newest(queue)
        elif header.step == self._step and self._parts:
            waiter = self._waiters[part]
            if waiter is not None and waiter.future.done():  # it has its own, and runs soon
                waiter = None
            if part >= self._parts or (waiter is not None and waiter.head != frame.head):
                expected = None if waiter is None else waiter.head
                raise _mismatch(self.peer_id, expected, frame)
            queue = self._inbox[part]
            newest = self._newest[part]
            self._newest[part] = order
        else:
            raise _mismatch(self.peer_id, None, frame)
        if order <= newest:
            raise TransportError(
                f"peer {self.peer_id}: {_words(header)} came again, or too late; refused"
            )
        if len(queue) >= _MOST_AHEAD:
            raise TransportError(
                f"peer {self.peer_id}: {len(queue)} tensors ahead of step {self._step}; refused"
            )
        queue.append(frame)

    # -- life ------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Check for silence, and send a heartbeat if nothing else was sent."""
        self.channel.poll()  # after a pause of ours the timer may come before what has arrived
        if self.lost is not None:
            return
        paused_s = self._since_tick_s()
        received, self._received = self._received, self.channel.bytes_received
        now = self._ticked_s
        if received != self._received or paused_s > 2 * self._interval_s:
            self._heard_s = now  # our own pause says nothing of the other side
        limit_s = self._suspicion.limit_s if self._suspicious else self._timeout_s
        if paused_s > limit_s:
            # It heard nothing either, and may have given us up, with no way to tell us (a firewall
            # forgot the connection). If it has not, its next heartbeat is due now.
            self._heard_s = now - limit_s + 2 * self._interval_s
        if now - self._heard_s > limit_s:
            self._broken(
                PeerLostError(
                    f"peer {self.peer_id}: said nothing for {limit_s:g} s; it hangs, or its link "
                    "does"
                )
            )
            return
        if self.channel.bytes_sent == self._sent:
            self.channel.send_nowait(_HEARTBEAT)
        self._sent = self.channel.bytes_sent
        self._schedule()

    def _begin_to_listen(self) -> None:
        self._heard_s = self._ticked_s = self._loop.time()
        self._frame_s = self._heard_s
        self._ticked_wall_s = time.time()

    def _since_tick_s(self) -> float:
        """Seconds since the last tick, and a new tick.

        The loop's clock counts the time in which a process is stopped; only the wall clock counts
        that in which the machine sleeps.
        """
        before_s, before_wall_s = self._ticked_s, self._ticked_wall_s
        self._ticked_s, self._ticked_wall_s = self._loop.time(), time.time()
        return max(self._ticked_s - before_s, self._ticked_wall_s - before_wall_s)

    def _schedule(self) -> None:
        self._stop()
        self._timer = self._loop.call_later(self._interval_s, self._tick)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _invalid(self, exc: TransportError) -> TpirtError:
        """Break the link for what came over it; returns the first error."""
        return self._broken(self.doubted(exc))

    def _broken(self, exc: TpirtError) -> TpirtError:
        """Break the link; returns the first error."""
        if self.lost is not None:
            return self.lost
        self.lost = self._named(exc)
        self._stop()
        self._release(exc)
        self._spawn(self.channel.aclose())
        self._handler.on_lost(self, exc)
        return exc

    def _named(self, exc: TpirtError) -> TpirtError:
        """Add the rank to a lost peer's error: channels do not know ranks."""
        if isinstance(exc, PeerLostError):
            exc.rank, exc.peer_id = self.rank, self.peer_id
            exc.silent_s = self._loop.time() - max(self._heard_s, self._frame_s)
        return exc

    def _release(self, exc: Exception) -> None:
        self._fail_waiters(exc)
        for future in self._requests.values():
            if not future.done():
                future.set_exception(exc)

    def _fail_waiters(self, exc: Exception) -> None:
        for waiter in self._waiters:
            if waiter is not None and not waiter.future.done():
                waiter.future.set_exception(exc)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _post(self, frame: Frame) -> None:
        with contextlib.suppress(TpirtError):  # the handler hears of it
            await self.send(frame)


def message_frame(
    kind: Kind,
    body: object,
    payload: memoryview | bytes = b"",
    number: int = 0,
    step: int = 0,
    dtype: int = 0,
    shape: tuple[int, int] = (0, 0),
) -> Frame:
    """Make the frame of a message; ``dtype`` and ``shape`` describe a tensor in the payload."""
    message = encode(body)
    header = Header(kind, dtype, step, number, *shape, len(message), len(payload))
    return Frame(header.pack(), message, payload)


_HEARTBEAT = Frame(Header(Kind.HEARTBEAT, 0, 0, 0, 0, 0, 0, 0).pack(), b"", b"")


def _queues() -> list[deque[Frame]]:
    return [deque() for _ in range(PARTS)]


def _order(header: Header) -> int:
    """Where a tensor comes in its part of a step; increases from one to the next."""
    return 2 * header.seq + (header.kind == Kind.REDUCED)


def _newest(queue: deque[Frame]) -> int:
    return _order(queue[-1].header) if queue else -1


def _mismatch(peer_id: str, expected: bytes | None, frame: Frame) -> TransportError:
    wanted = "nothing" if expected is None else _words(Header.unpack(expected))
    return TransportError(f"peer {peer_id}: expected {wanted}, got {_words(frame.header)}; refused")


def _words(header: Header) -> str:
    return (
        f"a {Kind(header.kind).name.lower()} of step {header.step} collective {header.seq} "
        f"[{header.rows}, {header.columns}] dtype {header.dtype}, {header.payload_bytes} bytes"
    )
