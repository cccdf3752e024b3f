"""The master of a benchmark: one request, and what each rank did for its decoded tokens alone.

Run by other benchmarks as a process of its own; takes the options of ``tpirt generate`` and prints
one JSON line. What the first token cost is told apart: it reads what reruns do not, and over few
tokens it would pass for a part of each.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import aclosing
from dataclasses import asdict

from tpirt import SamplingParams
from tpirt.chat.progress import ConsoleProgress
from tpirt.cli.options import add_engine_options, connected, count, run_async
from tpirt.errors import TpirtError


async def decode(arguments: argparse.Namespace) -> dict[str, object]:
    """Generate; returns TTFT, the time per token after it, and the ranks' figures at both ends."""
    params = SamplingParams(max_tokens=arguments.tokens + 1)
    with ConsoleProgress(quiet=arguments.quiet) as progress:
        async with connected(arguments, progress) as engine:
            prompt = [(17 * i + 3) % 256 for i in range(arguments.prompt_tokens)]
            asked = time.perf_counter()
            async with aclosing(engine.generate(prompt, params, progress)) as tokens:
                await anext(tokens)
                ttft_s = time.perf_counter() - asked
                first = await engine.stats()
                started = time.perf_counter()
                decoded = [token.id async for token in tokens]
                seconds = time.perf_counter() - started
            last = await engine.stats()
    return {
        "ttft_s": ttft_s,
        "tokens": len(decoded),
        "token_s": seconds / len(decoded),
        "first": [asdict(rank) for rank in first],
        "last": [asdict(rank) for rank in last],
    }


def main() -> None:
    """Parse arguments, generate, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_engine_options(parser)
    parser.add_argument("--tokens", type=count, required=True, help="decoded after the first")
    parser.add_argument("--prompt-tokens", type=count, required=True)
    arguments = parser.parse_args()

    async def run() -> None:
        print(json.dumps(await decode(arguments)))

    try:
        run_async(run())
    except TpirtError as exc:
        raise SystemExit(f"error: {exc}") from None


if __name__ == "__main__":
    main()
