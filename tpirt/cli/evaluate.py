"""``tpirt eval``: perplexity of a text, and what quantization changes, computed by all ranks."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tpirt.cli.options import (
    Commands,
    add_engine_options,
    add_parser,
    connected,
    count,
    engine_options,
    run_async,
)
from tpirt.errors import LogitsError, RequestError
from tpirt.terminal import print_whole
from tpirt.types import Progress
from tpirt.units import format_bytes

if TYPE_CHECKING:
    import torch

    from tpirt.chat.progress import ConsoleProgress
    from tpirt.cli.divergence import Divergence

# The weights as the checkpoint has them, and sums in float32.
_REFERENCE = {"quantize": "none", "dtype": "float32", "comm_dtype": "auto", "trace": None}


def add_command(commands: Commands) -> None:
    """Add ``eval`` and its options."""
    parser = add_parser(
        commands,
        "eval",
        "measure a text's perplexity under a model, quantized or not",
        "tpirt eval --model ~/llama --text wiki.txt --quantize int4 --kl --local 2",
    )
    add_engine_options(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="the text, a UTF-8 file")
    parser.add_argument(
        "--context",
        type=count,
        default=512,
        metavar="N",
        help="tokens per piece of text; each piece is evaluated without context (default 512)",
    )
    parser.add_argument("--max-pieces", type=count, metavar="N", help="stop after N pieces")
    parser.add_argument(
        "--kl",
        action="store_true",
        help="measure the KL divergence from the unquantized model in float32 too, which runs "
        "first; its log-probabilities take 4 bytes x tokens x vocabulary in a temporary file",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    import tpirt.chat  # before the event loop: see run_async
    import tpirt.cli.divergence  # noqa: F401

    engine_options(arguments)  # before the reference is computed for nothing
    run_async(_evaluate(arguments, _open_text(arguments)))


@dataclass(frozen=True)
class _Text:
    """A text as ids in pieces of ``length``, of which the last may be shorter."""

    pieces: list[list[int]]
    length: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """How many are predicted: of each piece all but the first."""
        return sum(len(piece) - 1 for piece in self.pieces)


def _open_text(arguments: argparse.Namespace) -> _Text:
    """Encode the text; no weights are read.

    Raises:
        TpirtError: text, model or tokenizer cannot be read; the text is too short.
    """
    from tpirt.engine.model import open_model

    text = _read(Path(arguments.text))
    model = open_model(arguments.model)
    model.checkpoint.close()
    if arguments.context < 2:
        raise RequestError(
            "--context 1: expected at least 2; a piece's first token is not predicted"
        )
    length = min(arguments.context, model.config.context_length)
    ids = model.tokenizer.encode(text)
    pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1][: arguments.max_pieces]
    if not pieces:
        raise RequestError(f"{arguments.text}: needs at least two tokens of text")
    return _Text(pieces, length, model.config.vocab_size)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise RequestError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise RequestError(f"{path}: not UTF-8 text (byte {exc.start})") from exc


async def _evaluate(arguments: argparse.Namespace, text: _Text) -> None:
    from tpirt.chat.progress import ConsoleProgress

    with ConsoleProgress(quiet=arguments.quiet) as progress, ExitStack() as stack:
        divergence = None
        if arguments.kl:
            divergence = await _reference(arguments, text, progress, stack)
        loss = 0.0
        async with aclosing(_predictions(arguments, text, progress)) as parts:
            async for log_probs, targets in parts:
                loss -= float(log_probs.gather(1, targets.unsqueeze(1)).sum())
                if divergence is not None:
                    divergence.add(log_probs)
    _print(arguments, text, _perplexity(loss / text.tokens), divergence)


async def _reference(
    arguments: argparse.Namespace, text: _Text, progress: ConsoleProgress, stack: ExitStack
) -> Divergence:
    """Run the unquantized model; what is measured against it is added to the result.

    Its log-probabilities are kept until ``stack`` is left.

    Raises:
        RequestError: the disk lacks room for them.
        TpirtError: see :meth:`tpirt.Engine.connect`.
    """
    from tpirt.cli.divergence import Divergence, Predictions

    kept = stack.enter_context(Predictions(text.tokens, text.vocabulary))
    progress.note(
        f"tpirt: log-probabilities of the unquantized model take {format_bytes(kept.nbytes)} in "
        f"{kept.folder} until the command ends"
    )
    unquantized = argparse.Namespace(**vars(arguments) | _REFERENCE)
    async with aclosing(_predictions(unquantized, text, progress)) as parts:
        async for log_probs, _ in parts:
            kept.append(log_probs)
    return Divergence(kept)


async def _predictions(
    arguments: argparse.Namespace, text: _Text, progress: ConsoleProgress
) -> AsyncGenerator[tuple[torch.Tensor, torch.Tensor], None]:
    """Connect, and yield what :meth:`tpirt.Engine.log_probs` does, of one piece after another."""
    async with connected(arguments, progress) as engine:
        for number, piece in enumerate(text.pieces):
            async with aclosing(engine.log_probs(piece)) as parts:
                async for part in parts:
                    yield part
            progress(Progress("evaluating", number + 1, len(text.pieces), "pieces"))


def _print(
    arguments: argparse.Namespace, text: _Text, perplexity: float, divergence: Divergence | None
) -> None:
    figures = {"perplexity": perplexity, "tokens": text.tokens, "context": text.length}
    line = f"perplexity {perplexity:.4f} over {text.tokens} tokens, pieces of {text.length}"
    if divergence is not None:
        figures |= {
            "kl_mean": divergence.mean,
            "kl_worst": divergence.worst,
            "same_top_token": divergence.same_top,
        }
        line += (
            f"; KL divergence {divergence.mean:.4g} nats per token (mean), worst token "
            f"{divergence.worst:.4g}, same top token {divergence.same_top:.2%}"
        )
    if arguments.json:
        print_whole(json.dumps(figures | {"quantize": arguments.quantize}))
    else:
        print(line)


def _perplexity(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        raise LogitsError(
            f"the mean loss is {mean_loss:.4g} per token, too much for a perplexity: the "
            "checkpoint is damaged: download it again, or try --dtype float32"
        ) from None
