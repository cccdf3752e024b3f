#!/usr/bin/env python3
"""Build the chat model that tpirt bundles as its demo: data, tokenizer, training, scoring, files.

    python scripts/train_demo_model.py                  # the bundled model: an hour on 2 CPU cores
    python scripts/train_demo_model.py --quick --out /tmp/demo   # a smoke test of under a minute

Needs torch (2.9 or later, for Muon), tokenizers and safetensors only. The human-readable table
comes first, one line of JSON last.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from demo_model.model import DemoConfig
from demo_model.saving import round_to_bfloat16, save, write_json
from demo_model.scoring import print_scores, score
from demo_model.team import assembled
from demo_model.tokens import ChatEncoder, train_tokenizer
from demo_model.train import Recipe, train, train_member
from demo_model.world import HeldBack, held_back_set

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description="Train tpirt's bundled demo chat model.")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "tpirt" / "demo",
        help="folder to write (default: %(default)s)",
    )
    parser.add_argument(
        "--budget-minutes",
        type=float,
        default=defaults.budget_minutes,
        help="training ends when each process has had this much processor time",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=defaults.tokens,
        help="tokens to train on (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--processes",
        type=int,
        default=defaults.processes,
        help="one per CPU core to use (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to explore recipes")
    parser.add_argument(
        "--per-category", type=int, default=200, help="held-back questions per category"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: a useless model in under a minute"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a size or a training value",
    )
    return parser.parse_args(argv)


def with_changes(instance: Any, changes: dict[str, str]) -> Any:
    """Return the dataclass with its named fields replaced, and take them out of `changes`."""
    known = {f.name: type(getattr(instance, f.name)) for f in dataclasses.fields(instance)}
    taken = {name: known[name](changes.pop(name)) for name in list(changes) if name in known}
    return dataclasses.replace(instance, **taken)


def configure(options: argparse.Namespace) -> tuple[DemoConfig, Recipe]:
    """Return the sizes and the recipe asked for."""
    changes = dict(item.split("=", 1) for item in options.set)
    recipe = Recipe(
        seed=options.seed,
        tokens=options.tokens,
        budget_minutes=options.budget_minutes,
        processes=options.processes if options.device == "cpu" else 1,
        device=options.device,
    )
    if options.quick:
        recipe = dataclasses.replace(recipe, tokens=200_000, budget_minutes=0.3)
    recipe, config = with_changes(recipe, changes), with_changes(DemoConfig(), changes)
    if changes:
        raise SystemExit(f"--set: unknown names {', '.join(sorted(changes))}")
    return config, recipe


def make_questions(options: argparse.Namespace, recipe: Recipe) -> list[HeldBack]:
    """Draw the held-back questions."""
    per_category = 5 if options.quick else options.per_category
    return held_back_set(recipe.seed, per_category, long_conversations=per_category // 2)


def cpu_seconds() -> float:
    """Return the processor time of this process and of those it has waited for."""
    return sum(os.times()[:4])


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Run all steps and return the report."""
    config, recipe = configure(options)
    torch.set_num_threads(1)
    started, cpu_started = time.monotonic(), cpu_seconds()
    tokenizer = train_tokenizer(
        recipe.seed, config.vocab_size, conversations=2000 if options.quick else 20000
    )
    encoder = ChatEncoder(tokenizer)
    with assembled(recipe.processes, train_member, config, tokenizer.to_str(), recipe) as team:
        model, took = train(team, config, encoder, recipe)
    round_to_bfloat16(model)
    scores = score(model, encoder, make_questions(options, recipe))
    size = save(options.out, model, tokenizer)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "safetensors_bytes": size,
        "vocab_size": tokenizer.get_vocab_size(),
        **took,
        "total_s": round(time.monotonic() - started, 1),
        "total_cpu_s": round(cpu_seconds() - cpu_started, 1),
        "recipe": dataclasses.asdict(recipe),
        "held_back": scores,
    }
    write_json(options.out / "training_report.json", report)
    print_scores(scores)
    print(
        f"{report['total_s'] / 60:.1f} min, {report['total_cpu_s'] / 60:.1f} CPU min, "
        f"{report['parameters']:,} parameters, {size:,} bytes of weights, written to {options.out}"
    )
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
