"""``tpirt generate``."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpirt.cli.options import (
    Commands,
    add_context_option,
    add_draft_option,
    add_engine_options,
    add_parser,
    add_request_options,
    add_sampling_options,
    add_special_tokens_option,
    connected,
    run_async,
    sampling_params,
)
from tpirt.errors import PeerLostError, RequestError, TpirtError, TransportError
from tpirt.terminal import print_whole
from tpirt.types import LOST, RECONNECTED, RESUMED, Message, Progress, SamplingParams

if TYPE_CHECKING:
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.engine.engine import Engine, Prompt

_EMPTY = "the prompt is empty: give at least one character of text"


def add_command(commands: Commands) -> None:
    """Add ``generate`` and its options."""
    parser = add_parser(
        commands,
        "generate",
        "continue a prompt, or many at once, and exit; to a pipe or file, the text is written "
        "unchanged",
        "tpirt generate --local 2 --chat --prompt 'What is 3 + 4?' --json",
    )
    add_engine_options(parser)
    add_context_option(parser)
    add_draft_option(parser)
    add_sampling_options(parser)
    add_request_options(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; - reads standard input")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file")
    prompt.add_argument(
        "--prompts",
        metavar="FILE",
        help="answer each line of a UTF-8 file, or of standard input (-), many in one step; prints "
        "a JSON object for each, in their order",
    )
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system message; implies --chat")
    add_special_tokens_option(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object with figures; with --prompts, each object has those of its "
        "steps, too",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    import tpirt.chat  # noqa: F401  # before the event loop: see run_async

    texts = _prompts(arguments)
    sampling_params(arguments, SamplingParams())  # fail before loading
    if arguments.prompts is None:
        run_async(_generate(arguments, _conversation(arguments, texts[0])))
    else:
        run_async(_generate_all(arguments, texts))


def _conversation(arguments: argparse.Namespace, text: str) -> Prompt:
    if not (arguments.chat or arguments.system):
        return text
    system = [Message("system", arguments.system)] if arguments.system else []
    return [*system, Message("user", text)]


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompts is not None:
        texts = _lines(_read(arguments.prompts))
        if not texts:
            raise RequestError(f"{arguments.prompts}: no prompts: give at least one line")
        return texts
    if arguments.prompt_file is not None:
        text = _read(arguments.prompt_file)
    else:
        text = _read("-") if arguments.prompt == "-" else arguments.prompt
    if not text:
        raise RequestError(_EMPTY)
    return [text]


def _lines(text: str) -> list[str]:
    """Lines as editors count them, without empty ones at the end.

    ``str.splitlines`` also divides at form feeds and the like, which are text.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _read(source: str) -> str:
    """The text of a file, or of standard input for ``-``."""
    name = "standard input" if source == "-" else source
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as exc:
        raise RequestError(f"{name}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise RequestError(f"{name}: not UTF-8 text (byte {exc.start})") from exc


async def _generate(arguments: argparse.Namespace, prompt: Prompt) -> None:
    from tpirt.chat.progress import ConsoleProgress

    with ConsoleProgress(quiet=arguments.quiet) as progress:
        async with connected(arguments, progress, arguments.context) as engine:
            params = sampling_params(arguments, engine.defaults.sampling)
            prompt = engine.encode(prompt, parse_special=arguments.special_tokens)
            if arguments.json:
                completion = await engine.complete(prompt, params, progress)
                print_whole(_json(asdict(completion)))
                ids, cut = completion.token_ids, completion.finish_reason == "length"
            else:
                ids, cut = await _print_answer(engine, prompt, params, progress)
            if not arguments.quiet:
                for note in _notes(engine, ids, cut):
                    print(f"tpirt: {note}", file=sys.stderr)


async def _generate_all(arguments: argparse.Namespace, texts: Sequence[str]) -> None:
    """Print a line for each prompt as soon as those before have theirs."""
    from tpirt.chat.progress import ConsoleProgress
    from tpirt.engine import EngineOptions

    failed = 0
    with ConsoleProgress(quiet=arguments.quiet) as progress:
        async with connected(arguments, progress, arguments.context) as engine:
            params = sampling_params(arguments, engine.defaults.sampling)
            running = asyncio.Semaphore(arguments.sequences or EngineOptions.sequences)
            told: set[Progress] = set()

            def tell(report: Progress) -> None:
                """Each of the requests that run hears of a loss: say it once."""
                if report.stage in (LOST, RECONNECTED, RESUMED) and report not in told:
                    told.add(report)
                    progress(report)

            async def answer(text: str) -> dict[str, Any]:
                if not text:
                    return {"error": _EMPTY}
                prompt = _conversation(arguments, text)
                async with running:
                    try:
                        ids = engine.encode(prompt, parse_special=arguments.special_tokens)
                        done = asdict(await engine.complete(ids, params, tell))
                    except (PeerLostError, TransportError):
                        raise  # it is not this prompt's fault
                    except TpirtError as exc:
                        return {"error": str(exc)}
                if not arguments.json:
                    for steps in ("ranks", "decoded"):  # most of them others' as well
                        del done[steps]
                return done

            tasks = [asyncio.create_task(answer(text)) for text in texts]
            try:
                for number, task in enumerate(tasks):
                    progress(Progress("answers", number, len(tasks), "prompts"))
                    line = await task
                    failed += "error" in line
                    progress.close()
                    print_whole(_json(line))
                    sys.stdout.flush()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            if engine.goodput.targets and not arguments.quiet:
                print(f"tpirt: {engine.goodput.explain()}", file=sys.stderr)
    if failed:
        raise RequestError(
            f"{failed} of {len(texts)} prompts have no answer; their lines have an error instead"
        )


def _json(figures: dict[str, Any]) -> str:
    """One line of JSON; where standard output is UTF-8, only control characters are escaped."""
    if (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        return json.dumps(figures)
    text = json.dumps(figures, ensure_ascii=False)
    return re.sub("[\x7f-\x9f]", lambda char: f"\\u{ord(char[0]):04x}", text)


async def _print_answer(
    engine: Engine, prompt: Prompt, params: SamplingParams, progress: ConsoleProgress
) -> tuple[list[int], bool]:
    """Print the answer as it comes; its ids, and whether a length ended it."""
    from tpirt.chat.console import Console
    from tpirt.chat.status import Timing

    ids, cut, timing = [], False, Timing()
    console = Console(sys.stdout, sys.stderr)
    progress.before = console.end_line_on_terminal
    async with aclosing(engine.generate(prompt, params, progress)) as tokens:
        async for token in tokens:
            progress.close()
            timing.count()
            console.stream(token.text)
            ids.append(token.id)
            cut = token.finish_reason == "length"
    console.stream("\n")
    if timing.tokens and not progress.quiet:
        console.status(str(timing))
    return ids, cut


def _notes(engine: Engine, ids: Sequence[int], cut: bool) -> Iterator[str]:
    """What a reader of the answer should know."""
    if cut:
        if engine.cached_tokens + 1 >= engine.context_length:
            yield f"stopped at the end of the context of {engine.context_length} tokens"
        else:
            tokens = "1 token" if len(ids) == 1 else f"{len(ids)} tokens"
            yield f"stopped after {tokens}: --max-tokens N for more"
    if not engine.tokenizer.decode(ids).strip() and engine.tokenizer.has_chat_template:
        yield "the model ended its answer at once; --chat applies its chat template"
    if unknown := engine.tokenizer.unknown(ids):
        yield unknown
