"""Throughput and latency of many users, and what a long prompt does to running answers.

    python -m bench.serving --model DIR --quantize int4
    python -m bench.serving --model DIR --quantize int4 --memory 600M --intruder 2000
    python -m bench.serving --model DIR --quantize int4 --threads 2 \\
        --llama-server FILE --gguf FILE

Every user sends a request when the last one was answered (a closed loop), and has no prefix in
common with others. The engine runs in this process; llama-server is asked over HTTP, with as many
slots as users. In a round, every number of users is measured once with every program; the order is
reversed from round to round.

The time of a token is that since the one before it, so p95 shows how much an answer halts while
prompts of others are computed. ``x one`` is the throughput to that of the first number of users in
the same round. Peak memory is that of the largest process, with the loop itself in rank 0's;
``--memory`` bounds every rank. In the end all memory of requests is given back, and what is
resident is compared with what was before the first one.

With ``--ttft-target`` and ``--tpot-target`` (ms), goodput is the share of requests within both.

``--intruder`` measures the time per token of 3 answers before a long prompt arrives and until its
first token, and its time to first token beside that on an idle engine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.lib.closed_loop import Intrusion, Loop, Server, answered, closed_loop, intrude, prompts
from bench.lib.command import (
    add_engine_options,
    end_like_a_command,
    engine_options,
    new_parser,
    percentile,
    tell,
    values,
)
from bench.lib.llama_server import llama_server
from bench.lib.record import Record, add_json_option
from bench.lib.resident import peak_bytes, reset_peaks, resident_bytes, settled_bytes
from tpirt import Engine, EngineOptions, SamplingParams
from tpirt.cli.options import add_target_options, count
from tpirt.cluster.machine import default_threads
from tpirt.engine.targets import NO_TARGETS, Targets
from tpirt.units import format_bytes

_WARM_UP_TOKENS = 8
_DISTURBED = 3  # answers
_AIM = 2.0  # the most that an intruder may lengthen their tokens


class EngineServer:
    """An engine in this process; see :class:`Server`."""

    name = "tpirt"

    def __init__(self, engine: Engine):
        self.engine = engine

    async def stream(self, prompt: Sequence[int], tokens: int) -> AsyncGenerator[int, None]:
        """See :class:`Server`."""
        params = SamplingParams(max_tokens=tokens)
        async with aclosing(self.engine.generate(prompt, params)) as answer:
            async for _ in answer:
                yield 1


@dataclass(frozen=True)
class Sample:
    """One loop.

    Attributes:
        peak_bytes: of memory, by then; None for another program.
    """

    loop: Loop
    peak_bytes: int | None


Samples = dict[tuple[str, int], list[Sample]]  # by program and users


@dataclass(frozen=True)
class Row:
    """One program with one number of users: percentiles over tokens or requests of all rounds.

    Attributes:
        tokens_per_s: of all users: the median of the rounds.
        scaling: to that of the first number of users, in the same round.
        ratio: tpirt's to this program's, in the same round; None for tpirt.
        goodput: the share of requests within the targets; 1 without any.
    """

    program: str
    users: int
    tokens_per_s: float
    scaling: float
    ratio: float | None
    ttft_p50_ms: float
    ttft_p95_ms: float
    ttft_p99_ms: float
    token_p50_ms: float
    token_p95_ms: float
    token_p99_ms: float
    peak_bytes: int | None
    goodput: float
    rounds: list[float]


@dataclass(frozen=True)
class Intruded:
    """What an intruder did; medians of the rounds, milliseconds.

    Attributes:
        ratio: of the running answers' p95 during it to that before, in the same round.
        ttft_ratio: of the intruder's time to first token to that alone, in the same round.
    """

    tokens: int
    before_p50_ms: float
    before_p95_ms: float
    during_p50_ms: float
    during_p95_ms: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    ttft_ms: float
    alone_ttft_ms: float
    ttft_ratio: float


async def run_rounds(arguments: argparse.Namespace, engine: Engine) -> Samples:
    """Measure every number of users with every program, by turns."""
    samples: Samples = {}
    sent = prompts(engine.config.vocab_size, arguments.prompt_tokens)
    programs = ["tpirt", "llama-server"] if arguments.llama_server else ["tpirt"]
    for number in range(arguments.rounds):
        for users in arguments.users[:: -1 if number % 2 else 1]:
            for program in programs[:: -1 if number % 2 else 1]:
                sample = await _sample(arguments, engine, program, users, sent)
                samples.setdefault((program, users), []).append(sample)
                tell(
                    f"round {number + 1} of {arguments.rounds}: {users} users: {program}: "
                    f"{sample.loop.tokens_per_s:.1f} tokens/s"
                )
    return samples


async def _sample(
    arguments: argparse.Namespace,
    engine: Engine,
    program: str,
    users: int,
    sent: Iterator[list[int]],
) -> Sample:
    async with _running(arguments, engine, program, users) as server:
        await closed_loop(server, users, 1, sent, _WARM_UP_TOKENS)
        reset_peaks()
        loop = await closed_loop(server, users, arguments.requests, sent, arguments.tokens)
        return Sample(loop, peak_bytes() if program == "tpirt" else None)


@asynccontextmanager
async def _running(
    arguments: argparse.Namespace, engine: Engine, program: str, users: int
) -> AsyncIterator[Server]:
    if program == "tpirt":
        engine.reset()
        yield EngineServer(engine)
        return
    with llama_server(
        arguments.llama_server,
        arguments.gguf,
        slots=users,
        slot_tokens=arguments.prompt_tokens + max(arguments.tokens, _WARM_UP_TOKENS) + 1,
        threads=arguments.local * threads_of(arguments),
    ) as server:
        yield server


def summarize(samples: Samples, targets: Targets = NO_TARGETS) -> list[Row]:
    """A row for every program and number of users."""
    first = next(users for _, users in samples)
    return [_row(samples, program, users, first, targets) for program, users in samples]


def _row(samples: Samples, program: str, users: int, first: int, targets: Targets) -> Row:
    own = samples[program, users]
    rates = _rates(own)
    scalings = [
        mine / one for mine, one in zip(rates, _rates(samples[program, first]), strict=True)
    ]
    ratio = None
    if program != "tpirt":
        pairs = zip(_rates(samples["tpirt", users]), rates, strict=True)
        ratio = statistics.median(ours / its for ours, its in pairs)
    requests = [each for sample in own for each in sample.loop.answered]
    first_ms = [each.ttft_s * 1e3 for each in requests]
    gaps_ms = [gap_s * 1e3 for each in requests for gap_s in each.gaps_s]
    in_time = [targets.met(each.ttft_s, each.tpot_s) for each in requests]
    peaks = [sample.peak_bytes for sample in own if sample.peak_bytes is not None]
    return Row(
        program=program,
        users=users,
        tokens_per_s=statistics.median(rates),
        scaling=statistics.median(scalings),
        ratio=ratio,
        ttft_p50_ms=percentile(first_ms, 50),
        ttft_p95_ms=percentile(first_ms, 95),
        ttft_p99_ms=percentile(first_ms, 99),
        token_p50_ms=percentile(gaps_ms, 50),
        token_p95_ms=percentile(gaps_ms, 95),
        token_p99_ms=percentile(gaps_ms, 99),
        peak_bytes=max(peaks, default=None),
        goodput=statistics.mean(in_time),
        rounds=rates,
    )


def _rates(samples: Sequence[Sample]) -> list[float]:
    return [sample.loop.tokens_per_s for sample in samples]


async def run_intruder(arguments: argparse.Namespace, engine: Engine) -> Intruded:
    """Let a long prompt arrive while answers run, once a round; and alone."""
    server = EngineServer(engine)
    short = prompts(engine.config.vocab_size, arguments.prompt_tokens, seed=1)
    long = prompts(engine.config.vocab_size, arguments.intruder, seed=2)
    most_tokens = engine.context_length - arguments.prompt_tokens
    intrusions, alone_s = [], []
    for number in range(arguments.rounds):
        tell(f"round {number + 1} of {arguments.rounds}: a prompt of {arguments.intruder} tokens")
        engine.reset()
        running = [next(short) for _ in range(_DISTURBED)]
        found = await intrude(server, running, arguments.tokens, most_tokens, next(long))
        intrusions.append(found)
        engine.reset()
        alone_s.append((await answered(server, next(long), 1)).ttft_s)
    return summarize_intrusions(arguments.intruder, intrusions, alone_s)


def summarize_intrusions(
    tokens: int, intrusions: Sequence[Intrusion], alone_s: Sequence[float]
) -> Intruded:
    """Put rounds together."""

    def median_ms(name: str, percent: int) -> float:
        rounds = (percentile(getattr(each, name), percent) for each in intrusions)
        return statistics.median(rounds) * 1e3

    waits = [each.ttft_s / alone for each, alone in zip(intrusions, alone_s, strict=True)]
    ratios = [percentile(each.during_s, 95) / percentile(each.before_s, 95) for each in intrusions]
    return Intruded(
        tokens=tokens,
        before_p50_ms=median_ms("before_s", 50),
        before_p95_ms=median_ms("before_s", 95),
        during_p50_ms=median_ms("during_s", 50),
        during_p95_ms=median_ms("during_s", 95),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        ttft_ms=statistics.median(each.ttft_s for each in intrusions) * 1e3,
        alone_ttft_ms=statistics.median(alone_s) * 1e3,
        ttft_ratio=statistics.median(waits),
    )


def show(rows: Sequence[Row], memory: int | None) -> None:
    """Print the table for people."""
    print(
        "program       users  tokens/s   x one  TTFT p50       p95       p99  token p50      p95"
        "      p99  peak memory  goodput  tpirt's"
    )
    for row in rows:
        peak = "-" if row.peak_bytes is None else format_bytes(row.peak_bytes)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x"
        print(
            f"{row.program:12} {row.users:6d} {row.tokens_per_s:9.1f} {row.scaling:7.2f} "
            f"{row.ttft_p50_ms:9.1f} {row.ttft_p95_ms:9.1f} {row.ttft_p99_ms:9.1f} "
            f"{row.token_p50_ms:10.1f} {row.token_p95_ms:8.1f} {row.token_p99_ms:8.1f} "
            f"{peak:>12} {row.goodput:>8.1%} {ratio:>8}"
        )
    if memory is not None:
        peak = max(row.peak_bytes or 0 for row in rows)
        kept = "kept" if peak <= memory else "EXCEEDED"
        print(f"memory limit of {format_bytes(memory)}: {kept}, peak {format_bytes(peak)}")


def show_intruded(found: Intruded) -> None:
    """Print what an intruder did."""
    print(
        f"a prompt of {found.tokens} tokens while {_DISTURBED} answers run: their tokens "
        f"{found.before_p95_ms:.1f} ms before, {found.during_p95_ms:.1f} ms during it (p95; p50 "
        f"{found.before_p50_ms:.1f} and {found.during_p50_ms:.1f}): {found.ratio:.2f} x "
        f"({found.lowest_ratio:.2f} to {found.highest_ratio:.2f}; aim: {_AIM:g} x); its first "
        f"token after {found.ttft_ms:.0f} ms, alone after {found.alone_ttft_ms:.0f} ms: "
        f"{found.ttft_ratio:.2f} x"
    )


def options_of(arguments: argparse.Namespace) -> EngineOptions:
    """Those of the engine in this process."""
    given = {
        **engine_options(arguments),
        "threads": threads_of(arguments),
        "sequences": max(*arguments.users, _DISTURBED + 1),
        "objective": arguments.objective,
        "ttft_target_s": arguments.ttft_target_s,
        "tpot_target_s": arguments.tpot_target_s,
        "draft": arguments.draft,
    }
    return EngineOptions(**given)


def threads_of(arguments: argparse.Namespace) -> int:
    """Threads of each rank."""
    return int(arguments.threads or default_threads(arguments.local))


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure with one engine; print tables and return the result."""
    options = options_of(arguments)
    model = arguments.model and str(arguments.model)
    async with Engine.connect(model, options, local=arguments.local) as engine:
        before = await _reset(engine)
        samples = await run_rounds(arguments, engine)
        intruded = await run_intruder(arguments, engine) if arguments.intruder else None
        after = await _reset(engine)
    rows = summarize(samples, Targets(options.ttft_target_s, options.tpot_target_s))
    show(rows, arguments.memory)
    if intruded is not None:
        show_intruded(intruded)
    print(
        f"resident without requests: {format_bytes(before)} before the first, "
        f"{format_bytes(after)} after the last and reset()"
    )
    return {
        "rows": [asdict(row) for row in rows],
        "intruder": intruded and asdict(intruded),
        "resident_before_bytes": before,
        "resident_after_bytes": after,
    }


async def _reset(engine: Engine) -> int:
    """Forget everything; returns what is resident then."""
    await answered(EngineServer(engine), [3], 2)
    engine.reset()
    return await asyncio.to_thread(settled_bytes, resident_bytes)


def main(argv: Sequence[str]) -> int:
    """Parse arguments, measure, print."""
    arguments = _parse(argv)
    record = Record("serving", argv, arguments)
    record.finish(asyncio.run(measure(arguments)))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("bench.serving", __doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled model")
    parser.add_argument("--users", type=values(count), default=[1, 2, 4, 8, 16], metavar="N,...")
    parser.add_argument("--requests", type=count, default=2, metavar="N", help="of each user")
    parser.add_argument("--prompt-tokens", type=count, default=64, metavar="N")
    parser.add_argument("--tokens", type=count, default=32, metavar="N", help="of every answer")
    parser.add_argument("--rounds", type=count, default=3, metavar="N")
    parser.add_argument("--intruder", type=count, metavar="TOKENS", help="of a long prompt")
    parser.add_argument("--local", type=count, default=1, metavar="N", help="ranks")
    add_engine_options(parser)
    parser.add_argument("--objective", default="latency")
    add_target_options(parser)
    parser.add_argument("--draft", default="none", help="default none: it is not measured here")
    parser.add_argument("--llama-server", type=Path, metavar="FILE", help="llama.cpp's program")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for it")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    if (arguments.llama_server is None) != (arguments.gguf is None):
        parser.error("--llama-server and --gguf belong together")
    return arguments


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
