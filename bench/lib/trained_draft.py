"""A small model that guesses for the bundled one: trained on its conversations, once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from bench.lib.command import tell
from scripts.demo_model.model import DemoConfig
from scripts.demo_model.saving import save
from scripts.demo_model.tokens import ChatEncoder
from scripts.demo_model.train import Recipe, train
from tpirt.engine.model import BUNDLED_MODEL

# An eighth of the bundled model's weights.
CONFIG = DemoConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_BATCH_TOKENS = 2048  # few, so that a short time has many steps


def trained_draft(folder: Path, minutes: float) -> Path:
    """Train the model once, and keep it in ``folder``; returns its directory.

    Args:
        folder: where it is kept.
        minutes: of processor time that training takes.
    """
    if not (folder / "model.safetensors").exists():
        tell(f"training a small model for {minutes:g} min of processor time")
        tokenizer = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
        recipe = Recipe(budget_minutes=minutes, batch_tokens=_BATCH_TOKENS, processes=1)
        with _one_process():
            model, took = train(0, CONFIG, ChatEncoder(tokenizer), recipe)
        save(folder, model, tokenizer)
        tell(f"{took['tokens']:,} tokens in {took['steps']} steps")
    return folder


@contextmanager
def _one_process() -> Iterator[None]:
    """A group of this process alone, with one thread: the recipe's time is that of a thread."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="tpirt-bench-") as scratch:
        meeting = (Path(scratch) / "meeting").as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            dist.destroy_process_group()
