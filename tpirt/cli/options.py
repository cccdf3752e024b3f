"""Options shared by several commands."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpirt.cli.sigint import interruptible
from tpirt.errors import ConfigError, PeerUnreachableError
from tpirt.transport.address import DEFAULT_PORT, Address, check_distinct
from tpirt.types import DEFAULT_TIMEOUT_S, SamplingParams
from tpirt.units import parse_bytes

if TYPE_CHECKING:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.engine import Engine, EngineOptions
    from tpirt.planning import Deployment

_DISCOVER_S = 2.0
_LEAST_OPEN_FILES = 32
Commands = Any  # argparse's subparsers object, which has no public type
Group = argparse._ActionsContainer  # a parser, or a group of its options


def add_parser(
    commands: Commands, name: str, help_text: str, example: str
) -> argparse.ArgumentParser:
    """Add a command whose help ends with an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=sentence(help_text),
        epilog=f"example:\n  {example}",
    )
    return parser


def sentence(text: str) -> str:
    """Make a sentence of a command's line of help."""
    return f"{text[0].upper()}{text[1:]}."


def add_model_option(group: Group) -> None:
    """Add ``--model``; by default the bundled model."""
    group.add_argument(
        "--model",
        metavar="DIR",
        help="Hugging Face model directory, or ORG/NAME of a model in the local Hugging Face cache "
        "(default: the bundled model)",
    )


def add_ratio_option(group: Group) -> None:
    """Add ``--ratio``: a comma-separated share per rank."""
    group.add_argument(
        "--ratio",
        type=_ratio,
        metavar="A,B,...",
        help="share of the work per rank, the master first, such as 2,1,1 (default: even)",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :class:`tpirt.EngineOptions`, and the location of ranks."""
    where = parser.add_argument_group("model and ranks")
    add_model_option(where)
    ranks = where.add_mutually_exclusive_group()
    ranks.add_argument(
        "--local",
        type=count,
        default=1,
        metavar="N",
        help="run N ranks on this machine (default 1)",
    )
    ranks.add_argument(
        "--peers",
        type=_addresses,
        default=(),
        metavar="HOST[:PORT],...",
        help="worker peers to use, by address or by their names in the cluster; this process is "
        f"rank 0 and computes too (default port {DEFAULT_PORT})",
    )
    ranks.add_argument(
        "--discover",
        action="store_true",
        help="use the devices of the cluster that are found and free, and say which",
    )
    where.add_argument(
        "--spares",
        type=_addresses,
        default=(),
        metavar="HOST[:PORT],...",
        help="peers that take the places of those of --peers that do not answer or are lost",
    )
    add_ratio_option(where)
    memory = parser.add_argument_group("memory and cores")
    memory.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="most memory of each rank's process, such as 900M",
    )
    memory.add_argument(
        "--window", type=int, metavar="N", help="most weight blocks in memory per rank, at least 2"
    )
    memory.add_argument(
        "--spill",
        type=spill_size,
        default=4 << 30,
        metavar="SIZE",
        help="most that each rank writes to its disk of conversations that memory is too short for "
        "while others run (default 4G); none: compute them again",
    )
    add_process_options(memory)
    formats = parser.add_argument_group("format of weights and of the KV cache")
    add_format_options(formats)
    add_kv_option(formats)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--collective",
        default="auto",
        metavar="HOW",
        help="all-reduce algorithm: star, one-shot, two-shot or auto (default), which depends on "
        "measured links",
    )
    network.add_argument(
        "--comm-dtype",
        default="auto",
        metavar="DTYPE",
        help="dtype of partial sums between ranks: float32, bfloat16, int8 or auto (default): "
        "bfloat16 unless weights are float32",
    )
    network.add_argument(
        "--timeout",
        type=_seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="longest silence of a peer before it counts as lost, in seconds "
        f"(default {DEFAULT_TIMEOUT_S:g})",
    )
    network.add_argument(
        "--upload-limit",
        type=size,
        metavar="SIZE",
        help="most bytes a second of slices that are sent to peers, such as 5M (default: as fast "
        "as the network takes them)",
    )
    add_trust_options(network)
    reports = parser.add_argument_group("reports")
    reports.add_argument("--quiet", action="store_true", help="no plan and no progress on stderr")
    reports.add_argument(
        "--explain", action="store_true", help="explain the plan, links and collectives on stderr"
    )
    reports.add_argument(
        "--trace",
        metavar="FILE",
        help="write a trace of disk, compute and network of all ranks, for ui.perfetto.dev",
    )


def add_identity_option(group: Group) -> None:
    """Add ``--identity``."""
    group.add_argument(
        "--identity",
        type=_folder,
        metavar="DIR",
        help="folder of this user's keys and certificates (default $TPIRT_IDENTITY, or "
        "~/.config/tpirt)",
    )


def _folder(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return text


def add_search_options(group: Group) -> None:
    """Add ``--seconds`` and ``--json`` of commands that look for devices."""
    group.add_argument(
        "--seconds",
        type=lambda text: number(text, "seconds", 60),
        default=3.0,
        metavar="S",
        help="how long to listen for devices that announce themselves (default 3)",
    )
    group.add_argument("--json", action="store_true", help="print JSON")


def add_trust_options(group: Group) -> None:
    """Add ``--identity`` and ``--insecure``."""
    add_identity_option(group)
    group.add_argument(
        "--insecure",
        action="store_true",
        help="beyond this device, use neither encryption nor authentication: anyone on the network "
        "can read along and take part; also TPIRT_INSECURE=1",
    )


def add_draft_option(group: Group) -> None:
    """Add ``--draft``."""
    group.add_argument(
        "--draft",
        default="auto",
        metavar="HOW",
        help="guess tokens, which one pass over the weights verifies together; no token changes. "
        "suffix: from the conversation itself; DIR: by a small model with the same tokenizer, in "
        "memory here; none; auto (default): suffix, where it pays",
    )


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """Add options of commands that run many requests at once."""
    group = parser.add_argument_group("many requests")
    group.add_argument(
        "--sequences", type=count, metavar="N", help="most requests that run at once (default 16)"
    )
    group.add_argument(
        "--objective",
        choices=("latency", "throughput"),
        help="latency (default): a prompt at most doubles the time of running answers' tokens; "
        "throughput: prompts are computed as fast as can be",
    )
    add_target_options(group)


def add_target_options(group: Group) -> None:
    """Add ``--ttft-target`` and ``--tpot-target``."""
    group.add_argument(
        "--ttft-target",
        type=_milliseconds,
        dest="ttft_target_s",
        metavar="MS",
        help="the longest that a first token should take, in ms: requests that can still be in "
        "time are computed first",
    )
    group.add_argument(
        "--tpot-target",
        type=_milliseconds,
        dest="tpot_target_s",
        metavar="MS",
        help="the longest that a further token should take on average, in ms: steps that "
        "compute prompts are kept shorter, and requests wait where they would exceed it",
    )


def add_context_option(group: Group) -> None:
    """Add ``--context``."""
    group.add_argument(
        "--context",
        type=count,
        metavar="N",
        help="most tokens of a conversation; all ranks must have the memory for them (default: the "
        "model's maximum, as far as the memory lasts)",
    )


def add_format_options(group: Group) -> None:
    """Add ``--dtype`` and ``--quantize``."""
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of weights that are not quantized, and of the computation; auto (default): the "
        "checkpoint's",
    )
    group.add_argument(
        "--quantize",
        default="none",
        metavar="HOW",
        help="quantize weights: int8, int4 or nl4 (int4 with unequal steps: see the page on "
        "quantization); auto (where the peers are known) takes the first of none, int8 and int4 "
        "that fits their memory (default none)",
    )


def add_kv_option(group: Group) -> None:
    """Add ``--kv``."""
    group.add_argument(
        "--kv",
        choices=("auto", "int8"),
        default="auto",
        help="cache keys and values in int8, which takes about half of bfloat16's memory, or auto "
        "(default): in the dtype",
    )


def add_process_options(group: Group) -> None:
    """Add ``--threads``, ``--store`` and ``--store-limit``."""
    group.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="compute threads per process (default: cores, divided among local ranks)",
    )
    group.add_argument(
        "--store", metavar="DIR", help="folder of slices (default ~/.cache/tpirt/slices)"
    )
    group.add_argument(
        "--store-limit", type=size, metavar="SIZE", help="maximum size of slices on disk"
    )


def add_special_tokens_option(group: Group) -> None:
    """Add ``--special-tokens``."""
    group.add_argument(
        "--special-tokens",
        action="store_true",
        help="in messages of a chat, read control tokens such as <|im_end|> as control tokens "
        "(default: as text)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add sampling options; by default those of the model."""
    group = parser.add_argument_group(
        "sampling", "by default what the model's generation_config.json says"
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="most tokens of an answer (default: to the end of the context in a chat, else 256)",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: all")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="only the likeliest tokens whose probabilities add up to P; 1: all",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="only tokens that are at least P times as likely as the likeliest one; 0: all",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1, tokens that are there already become less likely; 1: off",
    )
    group.add_argument("--seed", type=int, metavar="N", help="equal seeds draw equal tokens")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="stop at this text or control token; may be repeated",
    )


def sampling_params(arguments: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """Override the model's defaults with the given options.

    Raises:
        ConfigError: a value is out of range.
    """
    from tpirt.engine.sampler import check_params

    names = (
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
    )
    given = {name: getattr(arguments, name) for name in names}
    changes = {name: value for name, value in given.items() if value is not None}
    if arguments.stop:
        changes["stop"] = tuple(arguments.stop)
    params = replace(defaults, **changes)
    check_params(params)
    return params


def engine_options(arguments: argparse.Namespace, context: int | None = None) -> EngineOptions:
    """Create the engine's options from arguments.

    Raises:
        ConfigError, MemoryLimitError: a value is invalid.
    """
    from tpirt.engine import EngineOptions
    from tpirt.engine.options import NO_DRAFT

    optional = ("draft", "sequences", "objective", "ttft_target_s", "tpot_target_s")
    given = {name: getattr(arguments, name, None) for name in optional}
    given["draft"] = given["draft"] or NO_DRAFT
    return EngineOptions(
        ratio=arguments.ratio,
        window=arguments.window,
        memory_bytes=arguments.memory,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        kv=arguments.kv,
        collective=arguments.collective,
        comm_dtype=arguments.comm_dtype,
        threads=arguments.threads,
        store=arguments.store,
        store_limit_bytes=arguments.store_limit,
        upload_bytes_per_s=arguments.upload_limit,
        spill_bytes=arguments.spill,
        timeout_s=arguments.timeout,
        identity=arguments.identity,
        insecure=arguments.insecure,
        trace=arguments.trace,
        context=context,
        **{name: value for name, value in given.items() if value is not None},
    )


@asynccontextmanager
async def connected(
    arguments: argparse.Namespace, progress: ConsoleProgress, context: int | None = None
) -> AsyncIterator[Engine]:
    """Connect the engine; print the plan before loading, and notes about the group after.

    ``context`` is the longest conversation, by default the model's.

    Raises:
        TpirtError: see :meth:`tpirt.Engine.connect`.
    """
    from tpirt.engine import Engine

    def on_plan(plan: Deployment) -> None:
        progress.close()  # end its line before the table
        _show_plan(arguments, plan)

    peers = await discovered(arguments, progress) if arguments.discover else arguments.peers
    with noted(progress):
        async with Engine.connect(
            arguments.model,
            engine_options(arguments, context),
            local=arguments.local,
            peers=peers,
            spares=arguments.spares,
            progress=progress,
            on_plan=on_plan,
        ) as engine:
            _tell(arguments, engine)
            yield engine


async def discovered(arguments: argparse.Namespace, progress: ConsoleProgress) -> tuple[str, ...]:
    """Find the peers that can be used now; say which, and why not the others.

    Raises:
        PeerUnreachableError: there is none.
    """
    from tpirt.cli.devices import describe_choice, search
    from tpirt.identity.names import MASTER
    from tpirt.identity.trust import Trust

    trust = Trust(MASTER, arguments.identity, insecure=arguments.insecure)
    found, notes = await search(trust, _DISCOVER_S, progress, strangers=True)
    for line in [*describe_choice(found), *notes]:
        progress.note(f"tpirt: {line}")
    if not any(not each.reason for each in found):
        raise PeerUnreachableError(
            "no peer that can be used was found; `tpirt peers` shows what there is, --peers names "
            "them, and without --discover this device computes alone"
        )
    return tuple(each.peer for each in found if not each.reason)


@contextmanager
def noted(progress: ConsoleProgress) -> Iterator[None]:
    """Show what is logged within the block, such as new slices; with ``--quiet`` only warnings."""
    from tpirt.peer.logs import handled

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            progress.note(f"tpirt: {record.getMessage()}")

    with nullcontext() if progress.quiet else handled(Notes(), logging.INFO):
        yield


def run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine, on uvloop if installed; SIGINT cancels it.

    Raises:
        ConfigError: too few files may be open for an event loop.

    Import what it needs before: a SIGINT within an import is only noticed after the import.
    """
    from tpirt.refusals import allow_open_files

    try:
        allow_open_files(_LEAST_OPEN_FILES)
    except BaseException:
        main.close()
        raise
    try:
        import uvloop as runner
    except ImportError:
        import asyncio as runner  # type: ignore[no-redef]
    with interruptible():
        runner.run(main)


def _show_plan(arguments: argparse.Namespace, plan: Deployment) -> None:
    from tpirt.chat.plan_view import show_advice, show_plan
    from tpirt.ops.native.library import load

    if not arguments.quiet:
        show_plan(plan, sys.stderr)
        show_advice(plan, _store(arguments), sys.stderr)
    if arguments.explain:
        kernels = load().summary_of(plan.dtype.name)
        print("\n".join([*plan.explain(), kernels]), file=sys.stderr)


def _store(arguments: argparse.Namespace) -> Path | None:
    """Where this machine writes slices; None for a synthetic model, which has them already."""
    from tpirt.weights.store import store_folder
    from tpirt.weights.synthetic import is_synthetic

    if arguments.model is not None and is_synthetic(Path(arguments.model)):
        return None
    return Path(arguments.store) if arguments.store else store_folder()


def _tell(arguments: argparse.Namespace, engine: Engine) -> None:
    """Print the group's plan and its notices on stderr."""
    if not arguments.quiet:
        for notice in engine.notices:
            print(f"tpirt: {notice}", file=sys.stderr)
    if arguments.explain:
        print("\n".join(engine.explain()), file=sys.stderr)


def _ratio(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers separated by commas, such as 2,1,1"
        ) from None


def _addresses(text: str) -> tuple[str, ...]:
    addresses = tuple(str(address(part.strip())) for part in text.split(","))
    try:
        check_distinct(addresses)
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return addresses


def address(text: str, lowest_port: int = 1, default_port: int = DEFAULT_PORT) -> Address:
    """Argument type of ``HOST[:PORT]``."""
    try:
        return Address.parse(text, lowest_port, default_port)
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _seconds(text: str) -> float:
    return number(text, "seconds", 86_400)


def _milliseconds(text: str) -> float:
    return number(text, "milliseconds", 86_400_000) / 1e3


def number(text: str, of: str, most: int) -> float:
    """Argument type of a number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= most:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a number of {of} above 0, at most {most}"
        )
    return found


def size(text: str) -> int:
    """Argument type of a number of bytes."""
    try:
        return parse_bytes(text)
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def spill_size(text: str) -> int:
    """Argument type of a number of bytes, or ``none``."""
    return 0 if text == "none" else size(text)


def count(text: str) -> int:
    """Argument type of a whole number, at least 1."""
    return whole_number(text, lowest=1)


def whole_number(text: str, lowest: int = 0) -> int:
    """Argument type of a whole number, at least ``lowest``."""
    if not (text.isdecimal() and len(text) < 10 and int(text) >= lowest):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least {lowest}")
    return int(text)
