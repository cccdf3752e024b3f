"""Many users: closed loops and intruders against a server that answers at once, and the table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from bench.lib.closed_loop import (
    Answered,
    Intrusion,
    Loop,
    answered,
    closed_loop,
    gaps_between,
    intrude,
    prompts,
)
from bench.lib.llama_server import LlamaServer, llama_server
from bench.serving import Sample, Samples, main, summarize, summarize_intrusions
from tpirt.errors import ConfigError
from tpirt.testing.models import make_model

EVENTS = """\
HTTP/1.1 200 OK
Transfer-Encoding: chunked

2a
data: {"content": "a", "tokens_predicted": 1}

2a
data: {"content": "bc", "tokens_predicted": 3}

2a
data: {"content": "", "stop": true, "tokens_predicted": 3}

0

"""


class Echo:
    """Answers at once, and remembers who asked while how many others were answered."""

    name = "echo"

    def __init__(self, most: int = 1 << 30):
        self.asked: list[tuple[int, ...]] = []
        self.busy = self.most_busy = 0
        self._most = most

    async def stream(self, prompt: Sequence[int], tokens: int) -> AsyncGenerator[int, None]:
        self.asked.append(tuple(prompt))
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            for _ in range(min(tokens, self._most)):
                await asyncio.sleep(0)
                yield 1
        finally:
            self.busy -= 1


async def test_every_user_sends_one_request_after_another() -> None:
    echo = Echo()
    loop = await closed_loop(echo, 3, 4, prompts(100, 5), 6)
    assert (loop.tokens, len(loop.answered)) == (72, 12)
    assert (echo.most_busy, len(set(echo.asked))) == (3, 12)
    assert all(len(each.gaps_s) == 5 for each in loop.answered)


async def test_an_answer_that_is_too_short_is_no_measurement() -> None:
    with pytest.raises(ConfigError, match="ended an answer after 3 of 6 tokens"):
        await answered(Echo(3), [1], 6)


def test_prompts_repeat_with_their_seed_only() -> None:
    assert [*islice(prompts(100, 9, 1), 3)] == [*islice(prompts(100, 9, 1), 3)]
    assert next(prompts(100, 9, 1)) != next(prompts(100, 9, 2))


async def test_an_intruder_arrives_while_others_are_answered() -> None:
    echo = Echo()
    found = await intrude(echo, [[1], [2], [3]], 8, 10_000, [4])
    assert echo.asked == [(1,), (2,), (3,), (4,)]
    assert len(found.before_s) >= 24
    assert echo.busy == 0


async def test_answers_outlast_the_intruder() -> None:
    with pytest.raises(ExceptionGroup) as failed:
        await intrude(Echo(9), [[1]], 100, 9, [4])
    assert failed.group_contains(ConfigError, match="ended before the intruder's first token")


def test_gaps_belong_to_the_time_in_which_they_end() -> None:
    arrivals = [[0.0, 1.0, 3.0, 4.0], [0.5, 2.5]]
    assert gaps_between(arrivals, 1.0, 3.0) == [2.0, 2.0]


def sample(seconds: float, gap_s: float) -> Sample:
    return Sample(Loop(100, seconds, [Answered(0.5, [gap_s] * 4)]), 1000)


def test_ratios_are_those_of_a_round() -> None:
    samples: Samples = {
        ("tpirt", 1): [sample(10, 0.1), sample(20, 0.1)],
        ("llama-server", 1): [sample(20, 0.2), sample(40, 0.2)],
        ("tpirt", 4): [sample(5, 0.1), sample(10, 0.3)],
    }
    one, llama, four = summarize(samples)
    assert (one.tokens_per_s, one.scaling, one.ratio) == (7.5, 1.0, None)
    assert (llama.program, llama.ratio, llama.scaling) == ("llama-server", 2.0, 1.0)
    assert four.scaling == 2.0
    assert (four.token_p50_ms, four.token_p95_ms) == (pytest.approx(300), pytest.approx(300))


def test_intrusions_are_compared_round_by_round() -> None:
    rounds = [Intrusion(3.0, [0.1], [0.2]), Intrusion(5.0, [0.2], [0.2])]
    found = summarize_intrusions(2000, rounds, [1.0, 2.0])
    assert (found.ratio, found.lowest_ratio, found.highest_ratio) == (1.5, 1.0, 2.0)
    assert (found.ttft_ms, found.alone_ttft_ms, found.ttft_ratio) == (4000, 1500, 2.75)


async def test_events_of_llama_server_count_tokens() -> None:
    """Also one that has more than one: a character that took several."""
    requests = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.decode().partition("Content-Length: ")[2].split()[0])
        requests.append(json.loads(await reader.readexactly(length)))
        writer.write(EVENTS.encode())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        llama = LlamaServer(server.sockets[0].getsockname()[1])
        assert [came async for came in llama.stream([7, 8], 3)] == [1, 2]
    assert requests[0]["prompt"] == [7, 8]
    assert (requests[0]["n_predict"], requests[0]["cache_prompt"]) == (3, False)


def test_a_llama_server_that_ends_is_told(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    with (
        pytest.raises(ConfigError, match="No such file"),
        llama_server(program, tmp_path, slots=1, slot_tokens=1, threads=1),
    ):
        pass
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o700)
    with (
        pytest.raises(ConfigError, match="llama-server ended at its start, exit code 3"),
        llama_server(program, tmp_path, slots=1, slot_tokens=1, threads=1),
    ):
        pass


def test_one_command_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    options = ["--model", str(model), "--store", str(tmp_path / "store"), "--users", "1,2"]
    options += ["--rounds", "1", "--requests", "1", "--prompt-tokens", "4", "--tokens", "3"]
    assert main([*options, "--intruder", "20", "--threads", "1", "--memory", "2G"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert [(row["users"], row["ratio"]) for row in result["rows"]] == [(1, None), (2, None)]
    assert result["intruder"]["tokens"] == 20
    assert result["resident_after_bytes"] > 0
    assert table[3].startswith("memory limit of 2 GiB: kept")
    assert str(tmp_path) not in last
