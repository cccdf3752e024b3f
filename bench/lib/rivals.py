"""llama.cpp and distributed-llama under measurement: their programs, run once and read.

Both report tokens per second of their own computation. Neither includes drawing a token.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tpirt.errors import ConfigError

_START_S, _LOOK_S = 30.0, 0.05  # for a worker to listen


@dataclass(frozen=True)
class LlamaBench:
    """``llama-bench`` of llama.cpp with a GGUF file of each number of bits.

    It runs every measurement once before it counts.
    """

    program: Path
    models: dict[int, Path]
    name = "llama.cpp"

    def run(
        self, bits: int, processes: int, threads: int, prompts: Sequence[int], tokens: int
    ) -> dict[str, float]:
        """Tokens per second by the name of what was measured, in one process."""
        assert processes == 1
        lengths = ",".join(map(str, prompts))
        options = ["-m", self.models[bits], "-t", threads, "-p", lengths, "-n", tokens]
        return llama_bench_rates(_output(self.program, *options, "-r", 1, "-o", "json"))


def llama_bench_rates(text: str) -> dict[str, float]:
    """Read the output of ``llama-bench -o json``.

    Raises:
        ConfigError: it is something else.
    """
    try:
        tests = [(test["n_prompt"], test["n_gen"], test["avg_ts"]) for test in json.loads(text)]
    except (ValueError, TypeError, KeyError) as exc:
        raise ConfigError(f"llama-bench printed something else than results: {exc!r}") from exc
    return {prompt_name(prompt) if prompt else DECODE: float(rate) for prompt, _, rate in tests}


@dataclass(frozen=True)
class Dllama:
    """``dllama`` of distributed-llama with a file of 4-bit weights, the only ones it exchanges.

    Attributes:
        tokenizer: one made by :func:`write_dllama_tokenizer`.
    """

    program: Path
    model: Path
    tokenizer: Path
    name = "distributed-llama"

    def run(
        self, bits: int, processes: int, threads: int, prompts: Sequence[int], tokens: int
    ) -> dict[str, float]:
        """Tokens per second by the name of what was measured; the first prompt's are decoded."""
        assert bits == 4
        rates: dict[str, float] = {}
        for number, prompt in enumerate(prompts):
            with self._workers(processes - 1, threads) as workers:
                decoded = 1 if number else tokens
                rates = {**self._run(workers, threads, prompt, decoded), **rates}
        return rates

    def _run(
        self, workers: Sequence[str], threads: int, prompt: int, tokens: int
    ) -> dict[str, float]:
        # The token for the beginning is evaluated as well, the last of the prompt is decoded.
        options = ["--model", self.model, "--tokenizer", self.tokenizer, "--prompt", "a" * prompt]
        options += ["--steps", prompt + tokens, "--max-seq-len", prompt + tokens]
        options += ["--nthreads", threads, "--buffer-float-type", "q80", "--temperature", 0]
        if workers:
            options += ["--workers", *workers]
        return dllama_rates(_output(self.program, "inference", *options), prompt)

    @contextmanager
    def _workers(self, count: int, threads: int) -> Iterator[list[str]]:
        """Start workers on loopback; returns their addresses."""
        ports = [free_port() for _ in range(count)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for port in ports:
                command = [self.program, "worker", "--host", "127.0.0.1", "--port", str(port)]
                worker = subprocess.Popen(
                    [*command, "--nthreads", str(threads)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                started.append(worker)
                _wait_until_listening(worker)
            yield [f"127.0.0.1:{port}" for port in ports]
        finally:
            for worker in started:
                worker.kill()
                worker.wait()


def dllama_rates(text: str, prompt: int) -> dict[str, float]:
    """Read the summary that ``dllama inference`` prints last.

    Raises:
        ConfigError: there is none, or the prompt had another number of tokens.
    """
    figure = r"\s+tokens/s: ([\d.]+)"
    evaluated = re.search(rf"^Evaluation\n.*\n\s+nTokens: (\d+)\n{figure}", text, re.MULTILINE)
    decoded = re.search(rf"^Prediction\n\s+nTokens: \d+\n{figure}", text, re.MULTILINE)
    if evaluated is None or decoded is None:
        last = (text.strip().splitlines() or ["nothing"])[-1]
        raise ConfigError(f"dllama printed no summary, but at last: {last}")
    if int(evaluated[1]) != prompt:
        raise ConfigError(f"dllama evaluated {evaluated[1]} tokens instead of {prompt}")
    return {DECODE: float(decoded[1]), prompt_name(prompt): float(evaluated[2])}


def write_dllama_tokenizer(file: Path, vocab_size: int) -> None:
    """Write a tokenizer in distributed-llama's format: an ``a`` is a token, always.

    Its converters make files that it cannot encode text with where the token for the beginning is
    not behind all others.
    """
    begin, end = vocab_size - 2, vocab_size - 1
    tokens = [bytes([byte]) for byte in range(1, 256)]
    tokens += [f"[{number}]".encode() for number in range(len(tokens), begin)]
    tokens += [b"<s>", b"</s>"]
    version, of_vocabulary, longest, of_begin, ends, add_begin = 0, 1, 2, 3, 9, 10
    header = {version: 1, of_vocabulary: vocab_size, longest: max(map(len, tokens))}
    header |= {of_begin: begin, ends: 1, add_begin: 1}
    fields = b"".join(struct.pack("<ii", *field) for field in header.items())
    words = b"".join(struct.pack("<fI", 0.0, len(token)) + token for token in tokens)
    start = struct.pack("<ii", 0x567124, 8 + len(fields))
    file.write_bytes(start + fields + struct.pack("<i", end) + words)


DECODE = "decode"


def prompt_name(tokens: int) -> str:
    """The name of what a prompt of so many tokens measures."""
    return f"prompt {tokens}"


def _output(program: Path, *options: object) -> str:
    try:
        done = subprocess.run(
            [program, *map(str, options)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    except OSError as exc:
        raise ConfigError(f"{program}: {exc.strerror}") from exc
    printed = done.stdout.decode(errors="replace")
    if done.returncode:
        said = (done.stderr.decode(errors="replace") + printed).strip().splitlines()
        reason = said[-1] if said else "no message"
        raise ConfigError(f"{program.name}: exit code {done.returncode}: {reason}")
    return printed


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_listening(worker: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and worker.poll() is None:
        connections = psutil.Process(worker.pid).net_connections("tcp4")
        if any(connection.status == psutil.CONN_LISTEN for connection in connections):
            return
        time.sleep(_LOOK_S)
    raise ConfigError("a worker of dllama does not listen")
