"""``tpirt eval``: perplexity of a text, computed by all ranks."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from tpirt.cli.options import (
    Commands,
    add_engine_options,
    add_parser,
    connected,
    count,
    run_async,
)
from tpirt.errors import LogitsError, RequestError
from tpirt.types import Progress


def add_command(commands: Commands) -> None:
    """Add ``eval`` and its options."""
    parser = add_parser(
        commands,
        "eval",
        "measure a text's perplexity under a model, quantized or not",
        "tpirt eval --model ~/llama --text wiki.txt --quantize int4 --local 2",
    )
    add_engine_options(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--context",
        type=count,
        default=512,
        metavar="N",
        help="tokens per piece of text; each piece is evaluated without context (default 512)",
    )
    parser.add_argument("--max-pieces", type=count, metavar="N", help="stop after N pieces")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    import tpirt.chat  # noqa: F401  # before the event loop: see run_async

    run_async(_evaluate(arguments))


async def _evaluate(arguments: argparse.Namespace) -> None:
    from tpirt.chat.progress import ConsoleProgress

    text = _read(Path(arguments.text))
    with ConsoleProgress(quiet=arguments.quiet) as progress:
        async with connected(arguments, progress) as engine:
            ids = engine.tokenizer.encode(text)
            length = min(arguments.context, engine.context_length)
            pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
            pieces = [piece for piece in pieces if len(piece) > 1][: arguments.max_pieces]
            if not pieces:
                raise RequestError(f"{arguments.text}: needs at least two tokens of text")
            loss, tokens = 0.0, 0
            for number, piece in enumerate(pieces):
                loss += await engine.loss(piece)
                tokens += len(piece) - 1
                progress(Progress("evaluating", number + 1, len(pieces), "pieces"))
    perplexity = _perplexity(loss / tokens)
    if arguments.json:
        figures = {"perplexity": perplexity, "tokens": tokens, "context": length}
        print(json.dumps(figures | {"quantize": arguments.quantize}))
    else:
        print(f"perplexity {perplexity:.4f} over {tokens} tokens, pieces of {length}")


def _perplexity(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        raise LogitsError(
            f"the mean loss is {mean_loss:.4g} per token, too much for a perplexity: the "
            "checkpoint is damaged: download it again, or try --dtype float32"
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise RequestError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise RequestError(f"{path}: not UTF-8 text (byte {exc.start})") from exc
