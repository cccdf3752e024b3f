#!/usr/bin/env python3
"""Build the chat model that tpirt bundles as its demo: data, tokenizer, training, scoring, files.

    python scripts/train_demo_model.py                 # the bundled model, within an hour on two CPU cores
    python scripts/train_demo_model.py --quick --out /tmp/demo    # under a minute, to see that everything works

Needs torch, tokenizers and safetensors only. The human-readable table comes first, one line of JSON last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from demo_model.model import DemoConfig, DemoModel
from demo_model.tokens import ChatEncoder, train_tokenizer
from demo_model.train import Recipe, print_scores, round_to_bfloat16, save, score, train, write_json
from demo_model.world import held_back_set

ROOT = Path(__file__).resolve().parent.parent
LONGEST_ANSWER = 128  # tokens


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description="Train tpirt's bundled demo chat model.")
    parser.add_argument("--out", type=Path, default=ROOT / "tpirt" / "demo", help="folder to write (default: %(default)s)")
    parser.add_argument("--budget-minutes", type=float, default=defaults.budget_minutes, help="training ends by then")
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="tokens to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to explore recipes")
    parser.add_argument("--per-category", type=int, default=200, help="held-back questions per category")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a useless model in under a minute")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a size or a training value")
    return parser.parse_args(argv)


def with_changes(instance: Any, changes: dict[str, str]) -> Any:
    """Return the dataclass with the named fields replaced; the names it knows are taken out of `changes`."""
    known = {f.name: type(getattr(instance, f.name)) for f in dataclasses.fields(instance)}
    taken = {name: known[name](changes.pop(name)) for name in list(changes) if name in known}
    return dataclasses.replace(instance, **taken)


def configure(options: argparse.Namespace) -> tuple[DemoConfig, Recipe]:
    """Return the sizes and the recipe asked for."""
    changes = dict(item.split("=", 1) for item in options.set)
    recipe = Recipe(options.seed, options.tokens, options.budget_minutes, device=options.device)
    if options.quick:
        recipe = dataclasses.replace(recipe, tokens=200_000, budget_minutes=0.3)
    recipe, config = with_changes(recipe, changes), with_changes(DemoConfig(), changes)
    if changes:
        raise SystemExit(f"--set: unknown names {', '.join(sorted(changes))}")
    return config, recipe


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Run all steps and return the report."""
    config, recipe = configure(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    per_category = 5 if options.quick else options.per_category
    questions = held_back_set(recipe.seed, per_category, long_conversations=per_category // 2)
    tokenizer = train_tokenizer(recipe.seed, config.vocab_size, conversations=2000 if options.quick else 20000)
    encoder = ChatEncoder(tokenizer)
    questions = [q for q in questions if len(encoder.prompt(q.messages)) + LONGEST_ANSWER <= config.max_position_embeddings]
    model = DemoModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {tokenizer.get_vocab_size()} tokens, {len(questions)} held-back questions", flush=True)
    training = train(model, encoder, recipe)
    round_to_bfloat16(model)
    scores = score(model, encoder, questions)
    size = save(options.out, model, tokenizer)
    report = {
        "parameters": parameters,
        "safetensors_bytes": size,
        "vocab_size": tokenizer.get_vocab_size(),
        "threads": options.threads,
        **training,
        "total_s": round(time.monotonic() - started, 1),
        "recipe": dataclasses.asdict(recipe),
        "held_back": scores,
    }
    write_json(options.out / "training_report.json", report)
    print_scores(scores)
    print(f"{training['train_s'] / 60:.1f} min of training, {size:,} bytes of weights, written to {options.out}")
    return report


def main(argv: list[str] | None = None) -> int:
    """Build the model; an interrupted run writes nothing."""
    try:
        report = build(parse_arguments(argv))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    print(json.dumps(report, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
