"""``llama-server`` of llama.cpp under measurement: started, asked over HTTP, ended."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lib.rivals import free_port
from tpirt.errors import ConfigError

_HOST = "127.0.0.1"
_START_S, _LOOK_S = 120.0, 0.1
_END_S = 10.0


@dataclass(frozen=True)
class LlamaServer:
    """A running ``llama-server``."""

    port: int
    name = "llama-server"

    async def stream(self, prompt: Sequence[int], tokens: int) -> AsyncGenerator[int, None]:
        """See :class:`bench.lib.closed_loop.Server`."""
        order = {"prompt": list(prompt), "n_predict": tokens, "stream": True, "ignore_eos": True}
        body = json.dumps({**order, "cache_prompt": False, "temperature": 0}).encode()
        head = f"POST /completion HTTP/1.1\r\nHost: {_HOST}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(_HOST, self.port, limit=1 << 24)
        try:
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise ConfigError(f"llama-server: {status.decode(errors='replace').strip()}")
            predicted = 0
            async for event in _events(reader):
                came = event["tokens_predicted"] - predicted
                predicted += came
                if came:
                    yield came
        finally:
            writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncGenerator[dict[str, Any], None]:
    """Events of a stream; sizes of chunks and empty lines lie between them."""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                raise ConfigError(f"llama-server: {event['error']}")
            yield event


@contextmanager
def llama_server(
    program: Path, gguf: Path, *, slots: int, slot_tokens: int, threads: int
) -> Iterator[LlamaServer]:
    """Run a server with so many slots, each with a context of ``slot_tokens``.

    Raises:
        ConfigError: it ended, or is not ready in time.
    """
    port = free_port()
    command = [str(program), "-m", str(gguf), "--host", _HOST, "--port", str(port)]
    command += ["-np", str(slots), "-cb", "-c", str(slots * slot_tokens)]
    command += ["-t", str(threads), "-tb", str(threads)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError as exc:
        raise ConfigError(f"{program}: {exc.strerror}") from exc
    try:
        _wait_until_ready(process, port)
        yield LlamaServer(port)
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{port}/health", timeout=1):
                return
        except (OSError, urllib.error.URLError):  # not listening, or still loading
            time.sleep(_LOOK_S)
    code = process.poll()
    ended = f"ended at its start, exit code {code}" if code is not None else "is not ready"
    raise ConfigError(f"llama-server {ended}")
