"""Seeded random faults on four peers, each in a network namespace of its own.

    python -m bench.chaos --seeds 0:300
    python -m bench.chaos --seeds 17:18 --verbose

Every seed is a round: a master connects to three peers, the fourth one is a spare, holds two
conversations at a time, idles, and asks once more. Where the master is to be killed, it is a
``tpirt chat``, which is resumed. Meanwhile one to four faults happen.
All devices have certificates: flipped bits that TCP's checksum does not find are found by TLS and
sealed frames. Checked: every answer is token for token the one of a single process, whatever failed
was resumed, nothing took longer than what is waited for by design and ten seconds, and nothing is
left over: in the master tasks, threads, descriptors and memory, on the peers sessions, threads,
descriptors and memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.lib.cgroup import memory_cgroup
from bench.lib.chaos_faults import (
    BASE,
    ENDING,
    KINDS,
    MOST,
    PEERS,
    Fault,
    Faults,
    Peer,
    draw,
    secured,
    small_disk,
)
from bench.lib.clock import Clock
from bench.lib.command import end_like_a_command, new_parser, tell
from bench.lib.jumping_clock import set_offset
from bench.lib.record import Record, add_json_option
from bench.net.network import Device, Network, emulate
from bench.net.spec import parse_topology
from tpirt.testing.cluster import memory_engine
from tpirt.testing.identities import MadeCluster
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams

TIMEOUT_S = 2.0
_RETURN_S, _SLACK_S = 5.0, 10.0  # a lost peer's time to come back; what any work may take beyond
_TOKENS, _PROMPT, _IDLE_S = 40, 120, 1.5
_QUESTIONS = ("What is the first one?", "and the second", "the last")
_MORE_RSS = 96 << 20
_CLOSING_S = 60.0  # for TCP to give up what a cut link has left half open
_MEMORY_BYTES = 2 << 30  # of a peer, until that is a fault
CLOCK, DISK, IDENTITY = "master.clock", "master.disk", "master.identity"
_ENGINE, _CHAT = "bench.lib.chaos_master", "bench.lib.chaos_chat"


@dataclass
class Outcome:
    """What a round brought.

    Attributes:
        seed, faults: the round.
        wrong: what must not be; empty if all is well.
        failures: errors that a user would have seen; the conversation went on after them.
        recoveries: losses that were survived without one.
        seconds: its duration.
        longest_s: without any sign of progress.
    """

    seed: int
    faults: list[Fault]
    wrong: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    longest_s: float = 0.0


class Master:
    """The process that connects to the peers, and what it tells."""

    def __init__(self, device: Device, folder: Path, module: str):
        self.module = module
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.base: dict[str, int] | None = None
        command = [sys.executable, "-m", "bench.lib.jumping_clock", str(folder / CLOCK), module]
        with open(folder / "master.log", "a", encoding="utf-8") as log:
            self.process = device.popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=secured(folder / IDENTITY),
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.put(json.loads(line))
        self.events.put({"event": "ended"})

    def order(self, order: dict[str, Any]) -> None:
        """Have it begin a round."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """End it when its round is over."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        """End it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Chaos:
    """Runs rounds on one network."""

    def __init__(
        self, network: Network, peers: Sequence[Peer], folder: Path, model: Path, verbose: bool
    ):
        self._network = network
        self._peers = peers
        self._folder = folder
        self._model = model
        self._verbose = verbose
        self._clock = Clock()
        self._masters: dict[str, Master] = {}
        set_offset(folder / CLOCK, 0.0)
        self._faults = Faults(network, peers, folder / DISK, folder / CLOCK)
        self._hands = ThreadPoolExecutor(2 * MOST)  # a beginning and an end of each fault

    def _master(self, module: str) -> Master:
        """The one that is running, or another one."""
        if module not in self._masters:
            self._masters[module] = Master(self._network.devices[0], self._folder, module)
        return self._masters[module]

    def close(self) -> None:
        """End the masters."""
        for master in self._masters.values():
            master.close()
        self._hands.shutdown()

    def run(self, seed: int, prompts: list[list[int]], expected: list[list[int]]) -> Outcome:
        """Run one round."""
        faults = draw(seed) if seed >= 0 else []
        outcome = Outcome(seed, faults)
        for peer in self._peers:
            peer.start()
        self._wait(lambda: all(peer.listens for peer in self._peers), 30.0)
        killed = any(fault.kind == "kill master" for fault in faults)
        master = self._master(_CHAT if killed else _ENGINE)
        self._faults.master = master.process
        order = {
            "model": str(self._model),
            "store": str(self._folder / DISK / "store"),
            "peers": [device.listen for device in self._network.devices[1:PEERS]],
            "spares": [self._network.devices[PEERS].listen],
            "timeout_s": TIMEOUT_S,
            "prompts": prompts,
            "questions": _QUESTIONS,
            "tokens": _TOKENS,
            "idle_s": _IDLE_S,
            "clock": str(self._folder / CLOCK),
            "folder": str(self._folder),
        }
        begun_s = self._clock.now_s()
        with self._happening(faults) as reached:
            reached("between")
            master.order(order)
            over = self._follow(master, outcome, expected, reached)
        outcome.seconds = self._clock.now_s() - begun_s
        for fault in faults:
            self._faults.end(fault)
        if over is None:
            master.kill()
            del self._masters[master.module]
        else:
            self._check_left(master, over, outcome)
        return outcome

    @contextmanager
    def _happening(self, faults: Sequence[Fault]) -> Iterator[Callable[[str], None]]:
        """Has each fault begin after its phase is reached, and end after its time."""
        waiting = list(faults)
        timers: list[threading.Timer] = []
        under_way: list[Future[None]] = []

        def later(seconds: float, work: Callable[[Fault], None], fault: Fault) -> None:
            # Not in the timer's thread: a peer ends with the thread that started it.
            timer = threading.Timer(
                seconds, lambda: under_way.append(self._hands.submit(work, fault))
            )
            timers.append(timer)
            timer.start()

        def reached(phase: str) -> None:
            for fault in [each for each in waiting if each.phase == phase]:
                waiting.remove(fault)
                later(fault.after_s, self._faults.begin, fault)
                later(fault.after_s + fault.lasts_s, self._faults.end, fault)

        try:
            yield reached
        finally:
            for timer in timers:
                timer.join()
            for work in under_way:
                work.result()

    def _follow(
        self,
        master: Master,
        outcome: Outcome,
        expected: list[list[int]],
        reached: Callable[[str], None],
    ) -> dict[str, Any] | None:
        """Read the master's events to the round's end; None if there was none."""
        stopped_s = sum(fault.lasts_s for fault in outcome.faults)
        least_s = (TIMEOUT_S + _RETURN_S) * max(1, len(outcome.faults)) + _SLACK_S
        limit_s = least_s + stopped_s
        answers = 0
        last_s = self._clock.now_s()
        while True:
            try:
                event = master.events.get(timeout=0.5)
            except queue.Empty:
                if self._clock.now_s() - last_s > 3 * limit_s:
                    outcome.wrong.append("hangs")
                    return None
                continue
            now = self._clock.now_s()
            outcome.longest_s = max(outcome.longest_s, now - last_s)
            last_s = now
            if self._verbose:
                tell(f"  {event}")
            match event["event"]:
                case "answer":
                    answers += 1
                    number = event["number"] % len(expected)
                    if event["ids"] != expected[number]:
                        outcome.wrong.append(f"wrong tokens in answer {event['number']}")
                case "failed":
                    outcome.failures.append(event["error"])
                case "recoveries":
                    outcome.recoveries += event["recoveries"]
                case "given up":
                    outcome.wrong.append("a conversation could not be resumed")
                case "ended":
                    outcome.wrong.append("the master ended")
                    return None
                case "chat":
                    self._faults.chat = event["pid"]
                case "wrong":
                    outcome.wrong.append(event["what"])
                case "over":
                    if master.module == _ENGINE and answers < len(expected) + 1:
                        outcome.wrong.append(f"{answers} answers")
                    if outcome.longest_s > limit_s:
                        outcome.wrong.append(f"nothing for {outcome.longest_s:.0f} s")
                    return event
                case phase:
                    reached(phase)

    def _check_left(self, master: Master, over: dict[str, Any], outcome: Outcome) -> None:
        """Compare what is there with what was there after the first round."""
        figures = {key: over[key] for key in ("tasks", "descriptors", "threads", "rss", "children")}
        if master.base is None:
            master.base = figures
        for key, allowed in (("tasks", 0), ("descriptors", 4), ("threads", 12), ("children", 0)):
            if figures[key] > master.base[key] + allowed:
                outcome.wrong.append(f"master: {figures[key]} {key}, {master.base[key]} before")
        if figures["rss"] > master.base["rss"] + _MORE_RSS:
            outcome.wrong.append(f"master: {figures['rss'] >> 20} MiB")
        for number, peer in enumerate(self._peers, start=1):
            if not self._wait(lambda peer=peer: peer.free, TIMEOUT_S + _SLACK_S):
                outcome.wrong.append(f"peer {number} still serves")
            elif peer.process is None or peer.process.poll() is not None:
                killed = any(f.peer == number and f.kind in ENDING for f in outcome.faults)
                if not killed:
                    code = peer.process and peer.process.poll()
                    said = peer.log.splitlines()[-3:]
                    outcome.wrong.append(f"peer {number} ended with {code}: {said}")
            elif peer.base is None:
                if "waiting" in peer.log:  # it has served
                    peer.base = peer.figures()
            elif not self._wait(lambda peer=peer: _within(peer), _CLOSING_S):
                outcome.wrong.append(f"peer {number}: {peer.figures()}, {peer.base} before")

    def _wait(self, condition: Callable[[], bool], patience_s: float) -> bool:
        until_s = self._clock.now_s() + patience_s
        while not condition():
            if self._clock.now_s() > until_s:
                return False
            time.sleep(0.05)
        return True


def _within(peer: Peer) -> bool:
    assert peer.base is not None
    more = (now - then for now, then in zip(peer.figures(), peer.base, strict=True))
    return all(each <= most for each, most in zip(more, (6, 12, _MORE_RSS), strict=True))


def answers(model: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What a single process answers."""

    async def ask() -> list[list[int]]:
        async with memory_engine(model) as engine:
            params = SamplingParams(max_tokens=_TOKENS)
            return [(await engine.complete(prompt, params)).token_ids for prompt in prompts]

    return asyncio.run(ask())


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """One line per kind of fault: rounds with it, errors that a user saw, what went wrong."""
    rounds: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    wrong: dict[str, set[int]] = defaultdict(set)
    for outcome in outcomes:
        for kind in {fault.kind for fault in outcome.faults}:
            rounds[kind] += 1
            seen[kind] += bool(outcome.failures)
            if outcome.wrong:
                wrong[kind].add(outcome.seed)
    lines = ["fault             rounds  with an error  wrong  seeds"]
    for kind in KINDS:
        seeds = " ".join(map(str, sorted(wrong[kind])))
        lines.append(
            f"{kind:16s} {rounds[kind]:7d} {seen[kind]:14d} {len(wrong[kind]):6d}  {seeds}"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    """Parse arguments, run the rounds, print the table."""
    parser = new_parser("bench.chaos", __doc__)
    parser.add_argument("--seeds", default="0:20", metavar="A:B", help="from A to B - 1")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no round after that")
    parser.add_argument("--verbose", action="store_true", help="tell what the master tells")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    record = Record("chaos", argv, arguments)
    first, last = map(int, arguments.seeds.split(":"))
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tpirt-chaos-")))
        sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 128}
        model = make_model(folder / "model", "llama", intermediate_size=1536, **sizes)
        prompts = [[(7 * i + start) % 250 for i in range(_PROMPT)] for start in (0, 100)]
        expected = answers(model, prompts)
        topology = parse_topology(BASE, PEERS + 1)
        network = stack.enter_context(emulate(topology, backend="tun"))
        cluster = MadeCluster(folder / IDENTITY)
        stack.enter_context(small_disk(folder / DISK))
        peers = []
        for device in network.devices[1:]:
            name = f"peer{device.index}"
            disk = stack.enter_context(small_disk(folder / name))
            memory = stack.enter_context(memory_cgroup(name, _MEMORY_BYTES, tell))
            identity = folder / f"{name}.identity"
            cluster.peer(identity, name)
            peers.append(Peer(device, disk, identity, memory))
            stack.callback(device.stop)  # before its group is removed
        chaos = Chaos(network, peers, folder, model, arguments.verbose)
        stack.callback(chaos.close)
        until_s = time.monotonic() + 60 * (arguments.minutes or 1e6)
        for seed in (-1, *range(first, last)):
            if time.monotonic() > until_s:
                break
            outcome = chaos.run(seed, prompts, expected)
            kinds = ", ".join(f"{f.kind} of {f.peer} in {f.phase}" for f in outcome.faults)
            verdict = "; ".join(outcome.wrong) or "ok"
            tell(
                f"seed {seed}: {kinds or 'no fault'}: {outcome.seconds:.1f} s, "
                f"{len(outcome.recoveries)} recoveries, {len(outcome.failures)} errors: {verdict}"
            )
            if outcome.wrong and not arguments.verbose:
                for failure in outcome.failures:
                    tell(f"  {failure}")
            outcomes += [outcome] * (seed >= 0)
    print("\n".join(table(outcomes)))
    failing = [outcome.seed for outcome in outcomes if outcome.wrong]
    faults = sum(len(outcome.faults) for outcome in outcomes)
    print(f"{len(outcomes)} rounds, {faults} faults, {len(failing)} rounds went wrong")
    record.finish({"rounds": [_as_json(outcome) for outcome in outcomes], "failing": failing})
    return int(bool(failing))


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {**vars(outcome), "faults": [vars(fault) for fault in outcome.faults]}


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
