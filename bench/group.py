"""A master and its peers on the devices of a network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.net.network import Network
from bench.net.relay import RelayBackend
from bench.net.spec import LinkError

_STAR = "star"
_CHOSEN = re.compile(r"(?:used: |one token [^:]*: )([a-z-]+)")


@dataclass(frozen=True)
class Request:
    """One request as it went.

    Attributes:
        emulator_cpu_ms: what the links' forwarder computed until the first token.
        traffic: bytes sent and received per device for decoding.
    """

    ttft_ms: float
    emulator_cpu_ms: float
    decoded: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    traffic: list[tuple[int, int]]
    explained: list[str]

    @property
    def collective(self) -> str:
        """The algorithm that decoding used; ``none`` for one rank."""
        found = [match[1] for line in self.explained if (match := _CHOSEN.match(line))]
        return found[-1] if found else "none"

    @property
    def comm_dtype(self) -> str:
        """The form of sums on the wire."""
        return self.explained[-1].rpartition(": ")[2]

    @property
    def prefill_ms(self) -> float:
        """Compute of the rank that had most of it, for the prompt."""
        return max(
            float(sum(step["compute_ms"] for step in rank["steps"] if step["prefill"]))
            for rank in self.ranks
        )


class Group:
    """Peers on devices 1 and up, a master on device 0; all end with the network."""

    def __init__(self, network: Network, peer_options: list[str], log: Path):
        """Start them.

        Args:
            network: where.
            peer_options: of ``tpirt peer``, beside its address.
            log: file for what they say on standard error.

        Raises:
            LinkError: a peer ended at its start; says why.
        """
        self._network = network
        self._log = log
        self._stderr = log.open("w")
        others = network.devices[1:]
        command = [sys.executable, "-m", "tpirt", "peer", "--until-stdin-closes", "--quiet"]
        peers = [
            self._start(device.index, [*command, "--listen", device.listen, *peer_options])
            for device in others
        ]
        self._master = self._start(0, [sys.executable, "-m", "bench.master"])
        for process in peers:
            if not _stream(process.stdout).readline():
                raise self._ended("a peer")

    def connect(self, **options: Any) -> Mapping[str, Any]:
        """Have the master connect anew.

        Args:
            options: keyword arguments of ``Engine.connect``, without ``peers``.

        Raises:
            LinkError: it could not; says why.
        """
        network = self._network
        workers = len(network.devices) - 1
        relays = isinstance(network.backend, RelayBackend)
        if relays and workers > 1 and options.get("collective") != _STAR:
            raise LinkError(
                f"{network.backend.name}: peers cannot tell each other where their relays are; "
                "take --collective star, or run as root"
            )
        reach = [network.reach(0, device.index) for device in network.devices[1:]]
        return self._ask({"peers": reach, **options})

    def generate(self, prompt_tokens: int, tokens: int) -> Request:
        """Generate ``tokens`` after the first.

        Raises:
            LinkError: the master or a peer failed; says why.
        """
        emulator_cpu_s = self._network.emulator_cpu_s()
        first = self._ask({"prompt_tokens": prompt_tokens, "tokens": tokens})
        first["emulator_cpu_ms"] = (self._network.emulator_cpu_s() - emulator_cpu_s) * 1e3
        before = self._traffic()
        rest = self._ask({})
        traffic = [
            (after[0] - was[0], after[1] - was[1])
            for was, after in zip(before, self._traffic(), strict=True)
        ]
        if not rest["decoded"]:
            raise LinkError("the model ends its answer at once: take another, or --shape")
        return Request(traffic=traffic, **first, **rest)

    def close(self) -> None:
        """Close the log; the processes end with the network."""
        self._stderr.close()

    def _traffic(self) -> list[tuple[int, int]]:
        return [self._network.traffic(device.index) for device in self._network.devices]

    def _start(self, device: int, command: list[str]) -> subprocess.Popen[str]:
        return self._network.devices[device].popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            _stream(self._master.stdin).write(json.dumps(order) + "\n")
            _stream(self._master.stdin).flush()
        line = _stream(self._master.stdout).readline()
        if not line:
            raise self._ended("the master")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LinkError(answer["error"])
        return answer

    def _ended(self, who: str) -> LinkError:
        last = (self._log.read_text().strip().splitlines() or ["it has not said why"])[-1]
        return LinkError(f"{who} has ended: {last}")


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
