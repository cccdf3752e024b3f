"""Seeded random faults on four peers, each in a network namespace of its own.

    python -m bench.chaos --seeds 0:300
    python -m bench.chaos --seeds 17:18 --verbose

Every seed is a round: a master connects to three peers, the fourth one is a spare, holds two
conversations at a time, idles, and asks once more. Meanwhile one to three faults happen. Checked:
every answer is token for token the one of a single process, whatever failed was resumed, nothing
took longer than what is waited for by design and ten seconds, and nothing is left over: in the
master tasks, threads, descriptors and memory, on the peers sessions, threads and descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import random
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

import psutil

from bench.lib.clock import Clock
from bench.lib.command import end_like_a_command, new_parser, tell
from bench.lib.record import Record, add_json_option
from bench.net.network import Device, Network, emulate
from bench.net.spec import parse_topology
from tpirt.testing.cluster import memory_engine
from tpirt.testing.models import make_model
from tpirt.types import SamplingParams

PEERS = 4  # the last one is the spare
TIMEOUT_S = 2.0
_RETURN_S, _SLACK_S = 5.0, 10.0  # a lost peer's time to come back; what any work may take beyond
_BASE = "0.2ms/500mbit"
_TOKENS, _PROMPT, _IDLE_S = 40, 120, 1.5
_DISK_BYTES = 64 << 20
_PHASES = ("loading", "prompt", "token", "idle")
_KINDS = (
    *("kill", "freeze", "restarts", "cut", "one-way cut", "peers cut", "throttle"),
    *("bit flip", "truncate", "disk full", "freeze all"),
)
_MORE_RSS = 96 << 20
_CLOSING_S = 60.0  # for TCP to give up what a cut link has left half open


@dataclass(frozen=True)
class Fault:
    """One fault of a round: what, on which peer, from when on, for how long."""

    kind: str
    peer: int
    phase: str
    after_s: float
    lasts_s: float


def draw(seed: int) -> list[Fault]:
    """The faults of a round."""
    chance = random.Random(seed)
    return [
        Fault(
            chance.choice(_KINDS),
            chance.randint(1, PEERS),
            chance.choice(_PHASES),
            chance.uniform(0.0, 0.3),
            chance.uniform(0.2, 6.0),
        )
        for _ in range(chance.choice((1, 1, 2, 2, 3)))
    ]


class Peer:
    """A ``tpirt peer`` on a device; its store is a small disk of its own."""

    def __init__(self, device: Device, folder: Path):
        self._device = device
        self.disk = folder
        self.store = folder / "store"
        self._log = folder.parent / f"{folder.name}.log"
        self.process: subprocess.Popen[Any] | None = None
        self.base: tuple[int, int] | None = None

    def start(self) -> None:
        """Start it if it is not running."""
        if self.process is not None and self.process.poll() is None:
            return
        command = [sys.executable, "-m", "tpirt", "peer", "--listen", self._device.listen]
        command += ["--threads", "1", "--store", str(self.store)]
        with open(self._log, "w", encoding="utf-8") as log:
            self.process = self._device.popen(command, stdout=log, stderr=log)
        self.base = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it is running."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    @property
    def log(self) -> str:
        """What it said since it was started."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def listens(self) -> bool:
        """Whether it has begun to listen."""
        return "listening" in self.log or "store" in self.log

    @property
    def free(self) -> bool:
        """Whether it waits for a master."""
        lines = [line for line in self.log.splitlines() if "serving" in line or "waiting" in line]
        return not lines or "waiting" in lines[-1]

    def figures(self) -> tuple[int, int]:
        """Its descriptors and threads."""
        assert self.process is not None
        process = psutil.Process(self.process.pid)
        return process.num_fds(), process.num_threads()

    def files(self) -> list[Path]:
        """The blocks of its slices, the same ones at every run."""
        return sorted(path for path in self.store.rglob("*.safetensors") if path.is_file())


class Faults:
    """Makes faults happen, and mends them."""

    def __init__(self, network: Network, peers: Sequence[Peer], master: subprocess.Popen[Any]):
        self._network = network
        self._peers = peers
        self._master = master
        self._clauses: dict[Fault, str] = {}
        self._lock = threading.Lock()

    def begin(self, fault: Fault) -> None:
        """Have it happen."""
        peer = self._peers[fault.peer - 1]
        match fault.kind:
            case "kill":
                peer.kill()
            case "freeze":
                peer.signal(signal.SIGSTOP)
            case "freeze all":
                for process in self._everyone():
                    process.send_signal(signal.SIGSTOP)
            case "restarts":
                for _ in range(3):
                    peer.kill()
                    peer.start()
                    time.sleep(fault.lasts_s / 6)
            case "bit flip" | "truncate":
                self._damage(fault, peer)
            case "disk full":
                with contextlib.suppress(OSError), open(peer.disk / "ballast", "wb") as file:
                    while True:
                        file.write(bytes(1 << 20))
                        file.flush()
            case _:
                other = fault.peer % PEERS + 1
                self._link(
                    fault,
                    {
                        "cut": f"0-{fault.peer}:none",
                        "one-way cut": f"0>{fault.peer}:none",
                        "peers cut": f"{fault.peer}-{other}:none",
                        "throttle": f"{fault.peer}:5ms/1mbit",
                    }[fault.kind],
                )

    def end(self, fault: Fault) -> None:
        """Mend it."""
        peer = self._peers[fault.peer - 1]
        match fault.kind:
            case "kill" | "restarts":
                peer.start()
            case "freeze":
                peer.signal(signal.SIGCONT)
            case "freeze all":
                for process in self._everyone():
                    process.send_signal(signal.SIGCONT)
            case "disk full":
                (peer.disk / "ballast").unlink(missing_ok=True)
            case "bit flip" | "truncate":
                pass
            case _:
                self._link(fault, "")

    def _everyone(self) -> Iterator[subprocess.Popen[Any]]:
        for process in (self._master, *(peer.process for peer in self._peers)):
            if process is not None and process.poll() is None:
                yield process

    def _damage(self, fault: Fault, peer: Peer) -> None:
        files = peer.files()
        if not files:
            return
        path = files[int(fault.after_s * 1e6) % len(files)]
        with contextlib.suppress(OSError):
            path.chmod(0o600)
            with open(path, "r+b") as file:
                size = os.fstat(file.fileno()).st_size
                if fault.kind == "truncate":
                    file.truncate(size // 2)
                else:
                    file.seek(size - 1 - size // 3)
                    byte = file.read(1)[0]
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 4]))

    def _link(self, fault: Fault, clause: str) -> None:
        with self._lock:
            if clause:
                self._clauses[fault] = clause
            else:
                self._clauses.pop(fault, None)
            text = ";".join([_BASE, *self._clauses.values()])
            self._network.backend.change(parse_topology(text, PEERS + 1))


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
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._base: dict[str, int] | None = None
        self._master = self._start_master()
        self._faults = Faults(network, peers, self._master)
        self._hands = ThreadPoolExecutor(2 * 3)  # a beginning and an end of each fault

    def _start_master(self) -> subprocess.Popen[Any]:
        master = self._network.devices[0].popen(
            [sys.executable, "-m", "bench.lib.chaos_master"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self._folder / "master.log", "a"),  # noqa: SIM115
            text=True,
        )

        def read() -> None:
            assert master.stdout is not None
            for line in master.stdout:
                self._events.put(json.loads(line))
            self._events.put({"event": "ended"})

        threading.Thread(target=read, daemon=True).start()
        return master

    def close(self) -> None:
        """End the master."""
        assert self._master.stdin is not None
        self._master.stdin.close()
        self._hands.shutdown()

    def run(self, seed: int, prompts: list[list[int]], expected: list[list[int]]) -> Outcome:
        """Run one round."""
        faults = draw(seed) if seed >= 0 else []
        outcome = Outcome(seed, faults)
        for peer in self._peers:
            peer.start()
        self._wait(lambda: all(peer.listens for peer in self._peers), 30.0)
        order = {
            "model": str(self._model),
            "store": str(self._folder / "master"),
            "peers": [device.listen for device in self._network.devices[1:PEERS]],
            "spares": [self._network.devices[PEERS].listen],
            "timeout_s": TIMEOUT_S,
            "prompts": prompts,
            "tokens": _TOKENS,
            "idle_s": _IDLE_S,
        }
        assert self._master.stdin is not None
        self._master.stdin.write(json.dumps(order) + "\n")
        self._master.stdin.flush()
        begun_s = self._clock.now_s()
        with self._happening(faults) as reached:
            over = self._follow(outcome, expected, reached)
        outcome.seconds = self._clock.now_s() - begun_s
        for fault in faults:
            self._faults.end(fault)
        if over is not None:
            self._check_left(over, outcome)
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
        self, outcome: Outcome, expected: list[list[int]], reached: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Read the master's events to the round's end; None if there was none."""
        stopped_s = sum(fault.lasts_s for fault in outcome.faults)
        least_s = (TIMEOUT_S + _RETURN_S) * max(1, len(outcome.faults)) + _SLACK_S
        limit_s = least_s + stopped_s
        answers = 0
        last_s = self._clock.now_s()
        while True:
            try:
                event = self._events.get(timeout=0.5)
            except queue.Empty:
                if self._clock.now_s() - last_s > 3 * limit_s:
                    outcome.wrong.append("hangs")
                    self._restart_master()
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
                    self._restart_master()
                    return None
                case "over":
                    if answers < len(expected) + 1:
                        outcome.wrong.append(f"{answers} answers")
                    if outcome.longest_s > limit_s:
                        outcome.wrong.append(f"nothing for {outcome.longest_s:.0f} s")
                    return event
                case phase:
                    reached(phase)

    def _restart_master(self) -> None:
        self._master.kill()
        self._master.wait()
        self._events = queue.Queue()
        self._base = None
        self._master = self._start_master()
        self._faults = Faults(self._network, self._peers, self._master)

    def _check_left(self, over: dict[str, Any], outcome: Outcome) -> None:
        """Compare what is there with what was there after the first round."""
        figures = {key: over[key] for key in ("tasks", "descriptors", "threads", "rss", "children")}
        if self._base is None:
            self._base = figures
        for key, allowed in (("tasks", 0), ("descriptors", 4), ("threads", 12), ("children", 0)):
            if figures[key] > self._base[key] + allowed:
                outcome.wrong.append(f"master: {figures[key]} {key}, {self._base[key]} before")
        if figures["rss"] > self._base["rss"] + _MORE_RSS:
            outcome.wrong.append(f"master: {figures['rss'] >> 20} MiB")
        for number, peer in enumerate(self._peers, start=1):
            if not self._wait(lambda peer=peer: peer.free, TIMEOUT_S + _SLACK_S):
                outcome.wrong.append(f"peer {number} still serves")
            elif peer.process is None or peer.process.poll() is not None:
                killed = any(
                    f.peer == number and f.kind in ("kill", "restarts") for f in outcome.faults
                )
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
    descriptors, threads = peer.figures()
    return descriptors <= peer.base[0] + 6 and threads <= peer.base[1] + 12


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few MiB; an ordinary folder where none may be mounted."""
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "chaos", str(folder)],
        capture_output=True,
    ).returncode
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


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
    lines = ["fault         rounds  with an error  wrong  seeds"]
    for kind in _KINDS:
        seeds = " ".join(map(str, sorted(wrong[kind])))
        lines.append(
            f"{kind:12s} {rounds[kind]:7d} {seen[kind]:14d} {len(wrong[kind]):6d}  {seeds}"
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
        network = stack.enter_context(emulate(parse_topology(_BASE, PEERS + 1)))
        disks = [stack.enter_context(small_disk(folder / f"peer{i}")) for i in range(1, PEERS + 1)]
        peers = [Peer(*each) for each in zip(network.devices[1:], disks, strict=True)]
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
