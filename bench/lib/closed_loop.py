"""Users who each send a request when the last one was answered, and one who disturbs the others."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from tpirt.errors import ConfigError


class Server(Protocol):
    """What answers requests."""

    @property
    def name(self) -> str: ...

    def stream(self, prompt: Sequence[int], tokens: int) -> AsyncGenerator[int, None]:
        """Answer with ``tokens`` tokens; yield how many came, each time that some came."""
        ...


@dataclass(frozen=True)
class Answered:
    """One request, seconds.

    Attributes:
        gaps_s: of each token after those that came first, since the one before.
    """

    ttft_s: float
    gaps_s: list[float]

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first, on average."""
        return sum(self.gaps_s) / max(1, len(self.gaps_s))


@dataclass(frozen=True)
class Loop:
    """All requests of all users."""

    tokens: int
    seconds: float
    answered: list[Answered]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Intrusion:
    """A long prompt that arrived while answers ran, seconds.

    Attributes:
        before_s, during_s: gaps between tokens of the running answers, before it arrived and until
            its first token.
    """

    ttft_s: float
    before_s: list[float]
    during_s: list[float]


def prompts(vocabulary: int, tokens: int, seed: int = 0) -> Iterator[list[int]]:
    """Prompts without end, of random ids; none has a prefix that is another's, but by chance."""
    choice = random.Random(seed)
    while True:
        yield [choice.randrange(3, vocabulary) for _ in range(tokens)]


async def answered(server: Server, prompt: Sequence[int], tokens: int) -> Answered:
    """Send one request, and read its answer.

    Raises:
        ConfigError: it has fewer tokens.
    """
    last_s = began_s = time.perf_counter()
    ttft_s, gaps_s, count = 0.0, [], 0
    async with aclosing(server.stream(prompt, tokens)) as stream:
        async for came in stream:
            now_s = time.perf_counter()
            if count:
                gaps_s += [(now_s - last_s) / came] * came
            else:
                ttft_s = now_s - began_s
            count += came
            last_s = now_s
    if count != tokens:
        raise ConfigError(
            f"{server.name} ended an answer after {count} of {tokens} tokens: use another model"
        )
    return Answered(ttft_s, gaps_s)


async def closed_loop(
    server: Server, users: int, requests: int, prompts: Iterator[list[int]], tokens: int
) -> Loop:
    """Let every user send so many requests, one after another."""

    async def user() -> list[Answered]:
        return [await answered(server, next(prompts), tokens) for _ in range(requests)]

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(user()) for _ in range(users)]
    seconds = time.perf_counter() - began_s
    found = [each for task in tasks for each in task.result()]
    return Loop(users * requests * tokens, seconds, found)


async def intrude(
    server: Server,
    running: Sequence[Sequence[int]],
    tokens: int,
    most_tokens: int,
    intruder: Sequence[int],
) -> Intrusion:
    """Send a long prompt when each of ``running`` has had ``tokens`` tokens after its first.

    Args:
        server: answers all of them.
        running: prompts of the answers that are disturbed; these are left in the end.
        tokens: how long they are observed before.
        most_tokens: of their answers, so that they last.
        intruder: the long prompt.

    Raises:
        ConfigError: an answer ended before the intruder's first token.
    """
    arrivals: list[list[float]] = [[] for _ in running]
    observed = asyncio.Event()

    async def read(prompt: Sequence[int], times: list[float]) -> None:
        async with aclosing(server.stream(prompt, most_tokens)) as stream:
            async for _ in stream:
                times.append(time.perf_counter())
                if _gaps_since_all_began(arrivals) >= tokens:
                    observed.set()
        raise ConfigError(f"an answer of {server.name} ended before the intruder's first token")

    async with asyncio.TaskGroup() as group:
        readers = [
            group.create_task(read(prompt, times))
            for prompt, times in zip(running, arrivals, strict=True)
        ]
        await observed.wait()
        came_s = time.perf_counter()
        ttft_s = (await answered(server, intruder, 1)).ttft_s
        for reader in readers:
            reader.cancel()
    began_s = max(times[0] for times in arrivals)
    return Intrusion(
        ttft_s,
        gaps_between(arrivals, began_s, came_s),
        gaps_between(arrivals, came_s, came_s + ttft_s),
    )


def gaps_between(arrivals: Sequence[Sequence[float]], start_s: float, end_s: float) -> list[float]:
    """Gaps that end in a span of time."""
    return [
        later - earlier
        for times in arrivals
        for earlier, later in pairwise(times)
        if start_s < later <= end_s
    ]


def _gaps_since_all_began(arrivals: Sequence[Sequence[float]]) -> int:
    """The fewest gaps of any answer since all have their first token."""
    if not all(arrivals):
        return 0
    began_s = max(times[0] for times in arrivals)
    return min(sum(time_s > began_s for time_s in times) for times in arrivals)
