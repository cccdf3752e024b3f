#!/usr/bin/env python3
"""Build the chat model that tpirt bundles as its demo: data, tokenizer, training, scoring, files.

    python scripts/train_demo_model.py                  # the bundled model: an hour on 2 CPU cores
    python scripts/train_demo_model.py --quick --out /tmp/demo   # a smoke test of under a minute

Needs torch (2.9 or later, for Muon), tokenizers and safetensors only.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from demo_model.data import Data, DataError
from demo_model.model import DemoConfig
from demo_model.saving import save, write_json
from demo_model.scoring import score
from demo_model.tokens import ChatEncoder, train_tokenizer
from demo_model.train import Recipe, train
from demo_model.world import held_out_set
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(
        description="Train tpirt's bundled demo chat model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "tpirt" / "demo", help="folder to write")
    add("--tokens", type=int, default=recipe.tokens, help="tokens to train on")
    add(
        "--budget-minutes",
        type=float,
        default=recipe.budget_minutes,
        help="training ends when each process has had this much processor time",
    )
    add("--seed", type=int, default=recipe.seed, help="of the data and of the first weights")
    add("--processes", type=int, default=recipe.processes, help="one per CPU core to use")
    add("--quick", action="store_true", help="a smoke test: a useless model in under a minute")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.budget_minutes = 200_000, 0.3
    return options


def build(rank: int, rendezvous: str, tokenizer_json: str, options: argparse.Namespace) -> None:
    """Train as one of several ranks; rank 0 scores the model and writes the files."""
    torch.set_num_threads(1)
    recipe = Recipe(
        options.seed, options.tokens, options.budget_minutes, processes=options.processes
    )
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=options.processes)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    encoder = ChatEncoder(tokenizer)
    model, took = train(rank, DemoConfig(), encoder, recipe)
    dist.destroy_process_group()
    if rank:
        return
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16))  # score what the file will hold
    per_category = 5 if options.quick else 200
    scores = score(
        model, encoder, held_out_set(Data(), recipe.seed, per_category, per_category // 2)
    )
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "safetensors_bytes": save(options.out, model, tokenizer),
        "vocab_size": tokenizer.get_vocab_size(),
        **took,
        "recipe": dataclasses.asdict(recipe),
        "held_out": scores,
    }
    write_json(options.out / "training_report.json", report)
    print(f"written to {options.out}")


def main() -> int:
    """Build the model; an interrupted run writes nothing."""
    options = parse_arguments()
    try:
        conversations = 2000 if options.quick else 20000
        tokenizer = train_tokenizer(Data(), options.seed, DemoConfig.vocab_size, conversations)
        with tempfile.TemporaryDirectory() as folder:
            arguments = ((Path(folder) / "rendezvous").as_uri(), tokenizer.to_str(), options)
            mp.spawn(build, arguments, nprocs=options.processes)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
