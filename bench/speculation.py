"""What guesses of the next tokens bring, and what they cost where they are wrong.

    python -m bench.speculation                      # suffix drafts on texts of three kinds
    python -m bench.speculation --model DIR --quantize int4 --hit-rates 0,0.6,0.7,0.8,0.9
    python -m bench.speculation --model DIR --hit-rates 0,0.8 --link 5ms/300mbit --quantize int4
    python -m bench.speculation --window 2           # streamed
    python -m bench.speculation --model DIR --draft DIR  # with a small model of its tokenizer, too
    python -m bench.speculation --model DIR --draft DIR --hit-rates 0.8 --memory 1G \
        --link 0ms --devices 8 --backend loopback --master-memory 1300M  # it holds the draft, too
    python -m bench.speculation --train-draft DIR  # one for the bundled model, trained once

Without ``--hit-rates`` a trained model answers chats, edits texts and summarises them, with
``--draft auto``, ``--draft none`` and a small model, if one is given. With it, any model answers a
prompt of arbitrary ids, and guesses are *emulated*: they are the tokens that it generated without
drafts, each replaced by a wrong one so often that the rest has the hit rate. What guesses would
cost to make is not in it, unless a ``--draft``, which may be any model, makes as many, which are
thrown away. Then the hit rate is known beforehand, as it is by a small model's own probabilities;
else it is learnt.

In a round, the model is connected once in every way, and all answers are generated; the order is
reversed from round to round. ``gain`` is the time of a token without drafts to that with them, both
of the same round: its median, the lowest and the highest. ``predicted`` is the gain that the
controller expected when it chose how many guesses to verify. It learns while it is measured, unless
``--warm-up`` gave it the time before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.lib.command import (
    add_engine_options,
    end_like_a_command,
    engine_options,
    new_parser,
    tell,
    values,
)
from bench.lib.draft_tasks import DRAFT_TASKS, Chat
from bench.lib.group import Answer, Group, LocalPlace
from bench.lib.record import Record, add_json_option
from bench.lib.trained_draft import trained_draft
from bench.net.network import emulate
from bench.net.options import add_backend_option, chosen_topology, show_network
from tpirt.cli.options import count, size
from tpirt.cluster.machine import default_threads
from tpirt.errors import ConfigError
from tpirt.weights.synthetic import SLICES, is_synthetic

NONE = "none"
_WARM_UP_TOKENS = 8  # by default
_WITHOUT_TOKENS = 2  # before answers without drafts: there is nothing to learn

Tasks = Mapping[str, Sequence[int | Chat]]  # prompts by kind


@dataclass(frozen=True)
class Way:
    """One way to connect.

    Attributes:
        name: of the drafts.
        options: keyword arguments of ``Engine.connect``, and ``hit_rate``.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """All answers of one kind in one round.

    Attributes:
        same: whether they are those of the first round without drafts.
        drafts: difference of :class:`tpirt.engine.drafts.controller.DraftStats`.
    """

    tokens: int
    decode_ms: float
    steps: int
    same: bool
    drafts: dict[str, Any]

    @property
    def tpot_ms(self) -> float:
        """Mean time of a token after the first."""
        return self.decode_ms / max(1, self.tokens)

    @property
    def predicted(self) -> float | None:
        """The gain that the controller expected; None without guesses."""
        if not self.drafts.get("steps"):
            return None
        # Steps without guesses take what they took, also in the prediction.
        others_s = self.decode_ms / 1e3 - self.drafts["seconds"]
        expected_s = max(0.0, others_s) + self.drafts["predicted_s"]
        return 1 + self.drafts["predicted_saved_s"] / expected_s


@dataclass(frozen=True)
class Row:
    """One kind of text with one kind of drafts; medians of the rounds.

    Attributes:
        gain: time of a token without drafts to that with them.
        predicted: what the controller expected of it; None if no guess was verified.
        tokens_a_step: of decoding.
        verified, right: guesses a round.
        hit_rates: share of right guesses by the controller's kind, where their answer is known.
        same: whether all answers are those without drafts.
    """

    text: str
    drafts: str
    tokens: int
    tpot_ms: float
    tokens_per_s: float
    gain: float
    lowest_gain: float
    highest_gain: float
    predicted: float | None
    tokens_a_step: float
    verified: float
    right: float
    hit_rates: dict[str, float]
    same: bool
    tpot_rounds_ms: list[float]


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Counters, and counters by name, since ``before``."""
    return {
        key: difference(value, before.get(key, {}))
        if isinstance(value, Mapping)
        else value - before.get(key, 0)
        for key, value in after.items()
    }


def combine(answers: Sequence[Answer]) -> Sample:
    """Put the answers of a round together, which came one after another."""
    return Sample(
        tokens=sum(answer.tokens for answer in answers),
        decode_ms=sum(answer.decode_ms for answer in answers),
        steps=sum(answer.steps for answer in answers),
        same=all(answer.same for answer in answers),
        drafts=difference(answers[-1].drafts, answers[0].drafts_before),
    )


def run_rounds(
    ways: Sequence[Way],
    rounds: int,
    connected: Any,
    tasks: Tasks,
    tokens: int,
    warm_up: int = _WARM_UP_TOKENS,
) -> dict[tuple[str, str], list[Sample]]:
    """Connect in every way by turns; returns samples by text and drafts.

    Args:
        ways: the first is without drafts.
        rounds: how many.
        connected: connects a group in a way, and returns it.
        tasks: what to answer.
        tokens: of each answer, at most.
        warm_up: tokens before, at most.
    """
    samples: dict[tuple[str, str], list[Sample]] = {}
    for number in range(rounds):
        for way in ways[:: -1 if number % 2 else 1]:
            tell(f"round {number + 1} of {rounds}: drafts {way.name}")
            group = connected(way)
            first = warm_up if way.name != NONE else min(warm_up, _WITHOUT_TOKENS)
            group.answer(next(iter(tasks.values()))[0], first)
            for text, prompts in tasks.items():
                sample = combine([group.answer(prompt, tokens) for prompt in prompts])
                samples.setdefault((text, way.name), []).append(sample)
    return samples


def summarize(samples: Mapping[tuple[str, str], Sequence[Sample]], text: str, drafts: str) -> Row:
    """Compare one kind of drafts with none."""
    own, base = samples[text, drafts], samples[text, NONE]
    gains = [without.tpot_ms / with_.tpot_ms for without, with_ in zip(base, own, strict=True)]
    predictions = [sample.predicted for sample in own if sample.predicted is not None]
    tpot_ms = statistics.median(sample.tpot_ms for sample in own)
    tested, hit = _totals(own, "tested"), _totals(own, "hit")
    return Row(
        text=text,
        drafts=drafts,
        tokens=own[0].tokens,
        tpot_ms=tpot_ms,
        tokens_per_s=1e3 / tpot_ms,
        gain=statistics.median(gains),
        lowest_gain=min(gains),
        highest_gain=max(gains),
        predicted=statistics.median(predictions) if predictions else None,
        tokens_a_step=statistics.median(sample.tokens / max(1, sample.steps) for sample in own),
        verified=statistics.median(sample.drafts.get("guesses", 0) for sample in own),
        right=statistics.median(sample.drafts.get("right", 0) for sample in own),
        hit_rates={
            kind: hit.get(kind, 0) / tested[kind] for kind in sorted(tested) if tested[kind]
        },
        same=all(sample.same for sample in own),
        tpot_rounds_ms=[sample.tpot_ms for sample in own],
    )


def _totals(samples: Sequence[Sample], name: str) -> dict[str, int]:
    totals: dict[str, int] = {}
    for sample in samples:
        for kind, number in sample.drafts.get(name, {}).items():
            totals[kind] = totals.get(kind, 0) + number
    return totals


def show(rows: Sequence[Row]) -> None:
    """Print the table for people."""
    print(
        "text         drafts          tokens   TPOT ms  tokens/s    gain  lowest  highest"
        "  predicted  tokens/step  verified  right  same"
    )
    for row in rows:
        predicted = "-" if row.predicted is None else f"{row.predicted:.2f}"
        print(
            f"{row.text:12} {row.drafts:14} {row.tokens:7d} {row.tpot_ms:9.2f} "
            f"{row.tokens_per_s:9.1f} {row.gain:7.3f} {row.lowest_gain:7.3f} "
            f"{row.highest_gain:8.3f} {predicted:>10} {row.tokens_a_step:12.2f} "
            f"{row.verified:9.0f} {row.right:6.0f}  {'yes' if row.same else 'NO'}"
        )
    for row in rows:
        if row.hit_rates:
            rates = ", ".join(f"{kind} {rate:.0%}" for kind, rate in row.hit_rates.items())
            print(f"hits of {row.text}, {row.drafts}: {rates}")


def chosen_ways(arguments: argparse.Namespace) -> list[Way]:
    """Without drafts first, then what is compared with that."""
    none = Way(NONE, {"draft": NONE})
    if arguments.hit_rates is None:
        ways = [none, Way("auto", {"draft": "auto"})]
        if arguments.draft is not None:
            ways.append(Way("model", {"draft": str(arguments.draft)}))
        return ways
    costs = {"draft": str(arguments.draft)} if arguments.draft else {}
    return [
        none,
        *(Way(f"emulated {rate:g}", {"hit_rate": rate, **costs}) for rate in arguments.hit_rates),
    ]


@contextmanager
def group_of(arguments: argparse.Namespace, folder: Path) -> Iterator[Any]:
    """Start the processes; returns what connects them in a :class:`Way`."""
    store = arguments.store or _store(arguments.model, folder)
    engine: dict[str, Any] = {
        **engine_options(arguments),
        "model": arguments.model and str(arguments.model),
        "store": str(store),
    }
    if arguments.link is None:
        engine["local"] = arguments.local
        with Group([LocalPlace()]) as group:
            yield _connector(group, None, engine)
        return
    topology = chosen_topology(arguments)
    engine["threads"] = arguments.threads or default_threads(topology.devices)
    peer = ["--store", str(store), "--threads", str(engine["threads"])]
    if arguments.memory is not None:
        peer += ["--memory", str(arguments.memory)]
    if arguments.master_memory is not None:
        engine["memory_bytes"] = arguments.master_memory
    with emulate(topology, backend=arguments.backend) as network:
        show_network(network)
        with Group(network.devices, peer, folder / "peers.log") as group:
            peers = [network.reach(0, device.index) for device in network.devices[1:]]
            yield _connector(group, peers, engine)


def _connector(group: Group, peers: Sequence[str] | None, engine: Mapping[str, Any]) -> Any:
    given = {name: value for name, value in engine.items() if value is not None}

    def connected(way: Way) -> Group:
        group.connect(peers, **given, **way.options)
        return group

    return connected


def _store(model: Path | None, folder: Path) -> Path:
    synthetic = model is not None and is_synthetic(model)
    return model / SLICES if model is not None and synthetic else folder / SLICES


def main(argv: Sequence[str]) -> int:
    """Parse arguments, measure, print."""
    arguments = _parse(argv)
    if arguments.hit_rates is None and arguments.model and is_synthetic(arguments.model):
        raise ConfigError("a model of random weights writes no texts: give --hit-rates")
    if arguments.train_draft is not None:
        arguments.draft = trained_draft(arguments.train_draft, arguments.train_minutes)
    tasks: Tasks = DRAFT_TASKS
    if arguments.hit_rates is not None:
        tasks = {f"{arguments.prompt_tokens} ids": [arguments.prompt_tokens]}
    ways = chosen_ways(arguments)
    record = Record("speculation", argv, arguments)
    with (
        tempfile.TemporaryDirectory(prefix="tpirt-bench-") as scratch,
        group_of(arguments, Path(scratch)) as connected,
    ):
        if arguments.hit_rates is not None:
            tell("the answers without drafts")
            connected(ways[0]).answer(arguments.prompt_tokens, arguments.tokens)
        samples = run_rounds(
            ways, arguments.rounds, connected, tasks, arguments.tokens, arguments.warm_up
        )
    rows = [summarize(samples, text, way.name) for text in tasks for way in ways]
    show(rows)
    record.finish({"emulated": arguments.hit_rates is not None, "rows": list(map(asdict, rows))})
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("bench.speculation", __doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the bundled model")
    parser.add_argument(
        "--hit-rates", type=values(_share), metavar="SHARE,...", help="emulate guesses, any model"
    )
    parser.add_argument("--draft", type=Path, metavar="DIR", help="a small model that guesses")
    parser.add_argument(
        "--train-draft", type=Path, metavar="DIR", help="a small model for the bundled one, kept"
    )
    parser.add_argument(
        "--train-minutes",
        type=float,
        default=2.0,
        metavar="MIN",
        help="processor time of its training (default 2)",
    )
    parser.add_argument("--prompt-tokens", type=count, default=64, metavar="N", help="emulated")
    parser.add_argument("--tokens", type=count, default=128, metavar="N", help="of an answer")
    parser.add_argument(
        "--warm-up",
        type=count,
        default=_WARM_UP_TOKENS,
        metavar="N",
        help=f"tokens from which the controller learns before (default {_WARM_UP_TOKENS})",
    )
    parser.add_argument("--rounds", type=count, default=5, metavar="N")
    parser.add_argument("--local", type=count, default=1, metavar="N", help="ranks; no links")
    links = parser.add_argument_group("links", "one way, device to device; see bench.links")
    links.add_argument("--link", metavar="SPEC", help="such as 5ms/300mbit (default: no links)")
    links.add_argument("--devices", type=count, metavar="N", help="default 2")
    links.add_argument(
        "--master-memory", type=size, metavar="SIZE", help="the master's, if not --memory"
    )
    links.set_defaults(profile=None)
    add_backend_option(links)
    add_engine_options(parser)
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    if arguments.train_draft is not None and (arguments.model or arguments.draft):
        parser.error("--train-draft trains a model for the bundled one: no --model, no --draft")
    return arguments


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share from 0 to 1")
    return share


if __name__ == "__main__":
    sys.exit(end_like_a_command(lambda: main(sys.argv[1:])))
