"""The engine: a model on one or many peers, and the tokens that come out of it.

This is the public Python API; the command line is a thin layer over it. Text, token ids and
sampling stay in here, on the master; what leaves is hidden states.
"""

from __future__ import annotations

import operator
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tpirt.batch import Collective
from tpirt.cluster.connection import Connection
from tpirt.cluster.group import Group
from tpirt.cluster.machine import default_threads
from tpirt.cluster.roster import other_versions
from tpirt.engine.connect import PlanCallback, connected, trace_file
from tpirt.engine.drafts.base import Drafter
from tpirt.engine.drafts.controller import DraftStats
from tpirt.engine.drafts.model import ModelDrafter, draft_kv_tokens, draft_options
from tpirt.engine.drafts.suffix import SuffixDrafter
from tpirt.engine.driver import MOST_LOSSES, Driver
from tpirt.engine.embedding import embed
from tpirt.engine.model import Model
from tpirt.engine.options import AUTO_DRAFT, NO_DRAFT, SUFFIX_DRAFT, EngineOptions
from tpirt.engine.sampler import Sampler, check_finite, check_params
from tpirt.engine.sequence import Answer, Scoring
from tpirt.engine.targets import Goodput, Targets
from tpirt.engine.token_times import token_times
from tpirt.engine.writer import Writer
from tpirt.errors import ConfigError, RequestError, TpirtError
from tpirt.planning import Deployment, PeerProfile
from tpirt.refusals import refused_memory
from tpirt.transport.base import PeerClient
from tpirt.types import (
    Completion,
    Message,
    ProgressCallback,
    RankStats,
    Recovery,
    SamplingParams,
    Token,
    ignore_progress,
)
from tpirt.weights.hub import model_name

Prompt = str | Sequence[int] | Sequence[Message]


class Engine:
    """A loaded model, ready for many requests at once; made by :meth:`connect`."""

    def __init__(
        self,
        model: Model,
        connection: Connection,
        options: EngineOptions,
        drafter: Drafter | None,
        progress: ProgressCallback,
    ):
        self.config = model.config
        self.tokenizer = model.tokenizer
        self.defaults = model.defaults
        self._checkpoint = model.checkpoint
        self._embedding = model.embedding
        self._connection = connection
        self._driver = Driver(
            connection,
            self.embed,
            progress,
            sequences=options.sequences,
            waiting=options.waiting,
            spill_bytes=options.spill_bytes,
            stall_free=options.objective == "latency",
            targets=Targets(options.ttft_target_s, options.tpot_target_s),
            drafter=drafter,
        )

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        model: str | Path | None = None,
        options: EngineOptions | None = None,
        *,
        local: int = 1,
        peers: Sequence[str | PeerClient] = (),
        spares: Sequence[str | PeerClient] = (),
        progress: ProgressCallback = ignore_progress,
        on_plan: PlanCallback | None = None,
    ) -> AsyncIterator[Engine]:
        """Load a model over this process and its workers; an async context manager.

        On leaving, local workers end and remote ones wait for another master.

        Args:
            model: Hugging Face model directory, or ``ORG/NAME`` of one in the Hub's local cache;
                the bundled model when absent.
            options: how to run it; defaults when absent.
            local: number of ranks on this machine; ``local - 1`` worker processes are started.
            peers: running workers instead, as addresses ``host:port``, names of the cluster's
                devices, or clients of another transport than gRPC, which are closed on leaving,
                also with an error.
            spares: running workers that take the places of peers that are lost, or do not answer.
            progress: called with progress reports, also from other threads; later with what
                happens while there is no request.
            on_plan: called with the plan before any weights are loaded.

        Raises:
            ConfigError, CheckpointError, TokenizerError: the model or an option is invalid; fewer
                files may be open than the ranks need.
            MemoryLimitError: a memory limit is too low, and names one that works; or the system
                refused memory.
            StoreError: slices cannot be written or read.
            HandshakeError: a peer is of another version, or busy.
            PeerUnreachableError, PeerLostError: a peer does not answer, or is lost.
            PeerError, TransportError: a peer is overloaded, or sent something invalid.
            RequestError: the trace cannot be written.

        Cancelled, it leaves no process or session of its own behind; whole blocks of slices that
        were begun stay in the stores for the next start.

        Example::

            async with Engine.connect("models/llama", EngineOptions(quantize="int4")) as engine:
                print((await engine.complete("Once upon a time")).text)
        """
        options = options or EngineOptions()
        async with AsyncExitStack() as stack:
            for peer in (*peers, *spares):
                if not isinstance(peer, str):
                    stack.push_async_callback(peer.aclose)
            trace = stack.enter_context(trace_file(options))
            given = await _given_drafter(stack, options, local, peers, progress)
            reserved = 0 if given is None else given.held_bytes
            connecting = connected(
                model, options, local, peers, spares, progress, on_plan, reserved
            )
            opened, connection = await stack.enter_async_context(connecting)
            drafter = _drafter(options, given, opened)
            engine = cls(opened, connection, options, drafter, progress)
            stack.push_async_callback(engine._driver.aclose)
            if trace is not None:
                saved = trace.saved(lambda: connection.group.trace(), engine.name)
                await stack.enter_async_context(saved)
            yield engine

    @property
    def name(self) -> str:
        """The model's name: that of its directory, or on the Hub."""
        return model_name(self._checkpoint.path)

    @property
    def deployment(self) -> Deployment:
        """The plan; another one may follow the loss of a peer."""
        return self._connection.deployment

    @property
    def recoveries(self) -> Sequence[Recovery]:
        """The losses of peers that were survived, oldest first."""
        return self._connection.recoveries

    @property
    def peers(self) -> Sequence[PeerProfile]:
        """The process of every rank."""
        return self.deployment.peers

    @property
    def world_size(self) -> int:
        """Number of ranks, this process included."""
        return self._group.world_size

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.deployment.context_length

    @property
    def cached_tokens(self) -> int:
        """How many tokens' keys and values are kept for later requests."""
        return self._driver.cached_tokens

    @property
    def broken(self) -> Exception | None:
        """Why the group is broken; None while all is well.

        After a ``PeerLostError`` the next request connects again, and it is None if that succeeds.
        """
        return self._connection.broken

    @property
    def _group(self) -> Group:
        return self._connection.group

    @property
    def notices(self) -> list[str]:
        """What differs from what a user expects of peers and links, a line each."""
        policy = self._group.policy
        return [*other_versions(self.peers), *(policy.notices if policy else [])]

    def explain(self) -> list[str]:
        """Say which links were measured and how sums go over them, a line each."""
        policy = self._group.policy
        return (
            policy.explain(self.deployment.chunk_tokens) if policy else ["one rank: nothing to sum"]
        )

    def collective(self, tokens: int) -> Collective | None:
        """How partial sums of a step of ``tokens`` tokens are combined; None for one rank."""
        return self._group.policy.used(tokens) if self._group.policy else None

    def explain_drafts(self) -> str:
        """Say what guesses brought, or why there are none."""
        return self._driver.explain_drafts()

    def explain_cache(self) -> str:
        """Say what became of conversations that no request uses, in memory and on disk."""
        return self._driver.explain_cache()

    @property
    def draft_stats(self) -> DraftStats | None:
        """What guesses brought so far; None if there are none to be."""
        return self._driver.draft_stats

    @property
    def goodput(self) -> Goodput:
        """How many answers met the targets of the options so far."""
        return self._driver.goodput

    def encode(self, prompt: Prompt, *, parse_special: bool = False) -> list[int]:
        """Turn a prompt into ids: text with BOS as the tokenizer says, messages by the template.

        In a text, control tokens such as ``<|im_end|>`` become their ids; in messages only with
        ``parse_special``.

        Raises:
            TokenizerError: there is no template, or it refuses the messages.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        items = _listed(prompt)
        messages = [m for m in items if isinstance(m, Message)]
        if messages and len(messages) == len(items):
            return self.tokenizer.encode_chat(messages, parse_special=parse_special)
        return _ids(items)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        progress: ProgressCallback = ignore_progress,
        *,
        user: str = "",
        priority: int = 0,
    ) -> AsyncGenerator[Token, None]:
        """Yield tokens until an end token, a stop string, ``max_tokens`` or the context's end.

        Ids beyond the tokenizer's vocabulary (padding of the model's) have no text.

        Many requests can run at once (``EngineOptions.sequences``), and more can wait; every step
        computes a row of each, and as much of new prompts as does not hold them up. A request that
        fails, is cancelled or left, or whose reader is slow does not affect the others; use
        ``contextlib.aclosing`` to leave early. A prefix that a prompt shares with another or an
        earlier request is not computed again.

        If a peer is lost, or was since the last request, the group is formed again, by the same
        peers, spares, or another plan, and all tokens so far are computed again; ``progress``
        tells. It raises if that cannot be, or after more than four losses in a row.

        Args:
            prompt: text, messages or ids.
            params: how to sample; the model's defaults when absent.
            progress: called with progress reports of this request.
            user: on whose behalf; users take turns where requests have to wait.
            priority: of waiting requests, the higher ones begin first, and their prompts are
                computed first.

        Raises:
            RequestError: the prompt is empty or longer than the context; the engine is closed.
            QueueFullError: too many requests are waiting.
            ConfigError: a sampling parameter is out of range.
            TokenizerError: the chat template refuses the messages.
            MemoryLimitError: the prompt, or the keys and values so far, exceed the memory limit.
            LogitsError: the model computed NaN or infinity; the engine lives on.
            PeerLostError: a peer died or fell silent, and could not be connected again; names it.
                The next request tries again.
            TransportError: a peer sent something invalid, sealed; names it. The engine is broken.
            TpirtError: a rank failed (its disk); the engine lives on.
        """
        answer = self._answer(self.encode(prompt), params, progress, user, priority)
        self._driver.add(answer)
        try:
            async for token in answer:
                yield token
        finally:
            await self._driver.leave(answer)

    def _answer(
        self,
        ids: list[int],
        params: SamplingParams | None,
        progress: ProgressCallback,
        user: str = "",
        priority: int = 0,
        sampler: Sampler | None = None,
    ) -> Answer:
        params = self.defaults.sampling if params is None else params
        check_params(params)
        if not isinstance(user, str) or not isinstance(priority, int):
            raise ConfigError(
                f"user and priority: expected a text and a number, got {user!r} and {priority!r}"
            )
        self._check(ids)
        limit = self._most_tokens(params, len(ids))
        writer = Writer(self.tokenizer, ids, params, self.defaults.eos_ids, limit)
        drawing = sampler or Sampler(params)
        return Answer(ids, drawing, writer, progress, user=user, priority=priority)

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        progress: ProgressCallback = ignore_progress,
        *,
        user: str = "",
        priority: int = 0,
    ) -> Completion:
        """Generate to the end and measure; see :meth:`generate`, also for what it raises.

        ``ranks`` and ``decoded`` are empty if a worker was lost before it gave its statistics.
        """
        ids = self.encode(prompt)
        started = time.perf_counter()
        times: list[float] = []
        tokens: list[Token] = []
        answer = self._answer(ids, params, progress, user, priority)
        earlier = len(self.recoveries)
        self._driver.add(answer)
        try:
            async for token in answer:
                times.append(time.perf_counter())
                tokens.append(token)
            group = self._group  # another one may follow while statistics are asked for
            ranks = await _stats_of(answer, group)
        finally:
            await self._driver.leave(answer)
        gaps = max(1, len(times) - 1)
        targets = self.goodput.targets
        return Completion(
            text="".join(token.text for token in tokens),
            prompt_token_ids=ids,
            token_ids=[token.id for token in tokens],
            finish_reason=tokens[-1].finish_reason or "",
            ttft_ms=(times[0] - started) * 1e3,
            tpot_ms=(times[-1] - times[0]) / gaps * 1e3,
            world_size=group.world_size,
            ranks=ranks,
            decoded=token_times(ranks),
            guesses=answer.guesses,
            right_guesses=answer.right_guesses,
            in_time=targets.met(answer.ttft_s, answer.tpot_s) if targets else None,
            recoveries=list(self.recoveries[earlier:]),
        )

    async def draw(self, ids: Sequence[int], sampler: Sampler, most: int) -> None:
        """Have ``sampler`` draw up to ``most`` tokens after ``ids``; raises as :meth:`generate`."""
        params = SamplingParams(max_tokens=most)
        answer = self._answer(list(ids), params, ignore_progress, sampler=sampler)
        self._driver.add(answer)
        try:
            async for _ in answer:
                pass
        finally:
            await self._driver.leave(answer)

    async def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after each of ``ids``, (T, V) float32.

        Cancelled, all ranks stop after the current block, and the next request can follow.

        Raises:
            RequestError: ``ids`` is empty or longer than the context.
        """
        ids = _ids(ids)
        async with aclosing(self._logits(ids, self.deployment.chunk_tokens)) as parts:
            with refused_memory(f"logits of {len(ids)} tokens"):
                return torch.cat([part async for _, part in parts])

    async def loss(self, ids: Sequence[int]) -> float:
        """Return ``-sum(log p(ids[t] | ids[:t]))`` over t >= 1.

        Logits take no more memory than a prefill chunk does. Raises and can be cancelled as
        :meth:`logits`.

        Raises:
            LogitsError: the model computed NaN or infinity.
        """
        total = 0.0
        async with aclosing(self.log_probs(ids)) as parts:
            async for log_probs, targets in parts:
                total += float(F.nll_loss(log_probs, targets, reduction="sum"))
        return total

    async def log_probs(
        self, ids: Sequence[int]
    ) -> AsyncGenerator[tuple[torch.Tensor, torch.Tensor], None]:
        """Yield ``log p(. | ids[:t])``, (T, V) float32, and ``ids[t]``, (T,), over t >= 1 in order.

        T is as small as :meth:`loss` needs it. Raises and can be cancelled as :meth:`loss`.
        Use ``contextlib.aclosing`` to leave early.
        """
        ids = _ids(ids)
        async with aclosing(self._logits(ids, self.deployment.logits_tokens)) as parts:
            async for start, logits in parts:
                check_finite(logits)
                targets = torch.tensor(ids[start + 1 : start + 1 + len(logits)])
                if len(targets):
                    yield F.log_softmax(logits[: len(targets)], dim=1), targets

    async def _logits(
        self, ids: list[int], at_once: int
    ) -> AsyncGenerator[tuple[int, torch.Tensor], None]:
        """Yield the logits after each id, (T, V) with T at most ``at_once``, and T's first id."""
        self._check(ids, room=0)
        start = losses = 0
        while start < len(ids):
            before = start
            async with aclosing(self._logits_from(ids, start, at_once)) as parts:
                async for logits in parts:
                    yield start, logits
                    start += len(logits)
            losses = 0 if start > before else losses + 1
            if losses > MOST_LOSSES and (broken := self.broken) is not None:
                raise broken

    async def _logits_from(
        self, ids: list[int], start: int, at_once: int
    ) -> AsyncGenerator[torch.Tensor, None]:
        """Yield the logits after each id from ``start`` on.

        Ends early if the group, which has the LM head, breaks. Another one is formed for the
        request that computes the rest.
        """
        scoring = Scoring(ids, ignore_progress, delivered=start)
        self._driver.add(scoring)
        try:
            async for hidden in scoring:
                for part in torch.split(hidden, at_once):
                    try:
                        logits = await self._group.logits(part)
                    except TpirtError:
                        if self._group.broken is None:
                            raise
                        return
                    yield logits
        finally:
            await self._driver.leave(scoring)

    async def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Look ids up: (T, H), what a step begins with; see :func:`tpirt.engine.embedding.embed`.

        Raises:
            CheckpointError: no such row; a read failed, or the disk hangs.
        """
        return await embed(self._checkpoint, self._embedding, ids)

    async def stats(self) -> list[RankStats]:
        """Each rank's figures since the latest request began, or its reconnect, at any time.

        They cover all requests that run then; a :class:`tpirt.Completion` has its own steps.
        Cancelled, the answers of workers are ignored when they come.

        Raises:
            PeerLostError: a peer is gone.
        """
        return await self._group.stats(self._driver.first_step)

    def reset(self) -> None:
        """Forget the cached tokens and give their memory back; running requests are not affected.

        Callable at any time, within a running event loop. The memory is free before the next
        request begins.
        """
        self._driver.reset()

    def _most_tokens(self, params: SamplingParams, prompt: int) -> int:
        """The maximum of an answer's tokens; at least 1."""
        room = self.context_length - prompt
        if params.max_tokens is not None:
            return min(params.max_tokens, room)
        length = self.defaults.max_length or 0
        return min(length - prompt, room) if length > prompt else room

    def _check(self, ids: list[int], room: int = 1) -> None:
        if not ids:
            raise RequestError("the prompt is empty: give at least one token of text")
        if len(ids) + room > self.context_length:
            most, models = self.context_length, self.config.context_length
            limit = (
                f"the model's context is {most} for prompt and answer together; shorten the prompt"
                if most == models
                else f"--context is {most} for prompt and answer together; shorten the prompt, or "
                f"raise --context: the model's is {models}"
            )
            raise RequestError(f"the prompt has {len(ids)} tokens, but {limit}")
        for token_id in ids:
            if not 0 <= token_id < self.config.vocab_size:
                raise RequestError(
                    f"token id {token_id} is outside the model's vocabulary of "
                    f"{self.config.vocab_size}; do tokenizer and model belong together?"
                )


def _listed(prompt: object) -> list[Any]:
    try:
        return list(prompt)  # type: ignore[call-overload,no-any-return]
    except TypeError as exc:
        raise _no_prompt(exc) from exc


def _ids(items: Iterable[Any]) -> list[int]:
    try:
        return [operator.index(item) for item in items]
    except TypeError as exc:
        raise _no_prompt(exc) from exc


def _no_prompt(exc: TypeError) -> RequestError:
    return RequestError(
        f"prompt: expected a text, a list of messages or a list of token ids ({exc})"
    )


async def _stats_of(answer: Answer, group: Group) -> list[RankStats]:
    """Each rank's figures since the answer's first step, with the steps that it was in.

    Those are a prompt's that computed its own, whatever else they did.
    Empty if a rank does not give them: the answer is worth more than its statistics.
    """
    own = answer.steps
    try:
        ranks = await group.stats(min(own))
    except TpirtError:  # a broken group is reported by its next user
        return []
    return [
        replace(r, steps=[replace(t, prefill=own[t.step]) for t in r.steps if t.step in own])
        for r in ranks
    ]


async def _given_drafter(
    stack: AsyncExitStack,
    options: EngineOptions,
    local: int,
    peers: Sequence[str | PeerClient],
    progress: ProgressCallback,
) -> Drafter | None:
    """The caller's own, or that of a small model, whole, in this process; None if neither."""
    draft = options.draft
    if not isinstance(draft, (str, Path)):
        return draft
    if draft in (AUTO_DRAFT, SUFFIX_DRAFT, NO_DRAFT):
        return None
    threads = options.threads or default_threads(1 if peers else local)
    chosen = draft_options(replace(options, threads=threads))
    small = Engine.connect(draft, chosen, progress=progress)
    return ModelDrafter(await stack.enter_async_context(small), draft_kv_tokens(options))


def _drafter(options: EngineOptions, given: Drafter | None, model: Model) -> Drafter | None:
    if isinstance(given, ModelDrafter):
        given.check(model.tokenizer, model_name(model.checkpoint.path))
    if given is not None or options.draft == NO_DRAFT:
        return given
    return SuffixDrafter(model.config.vocab_size)
