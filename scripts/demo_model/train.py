"""Batches, schedule and training of the demo model.

Training is data-parallel with one single-threaded process per CPU core. For products this small,
processes that meet once per step use two cores better than two threads that meet at every operator.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Data
from .model import DemoConfig, DemoModel
from .talk import Message
from .tokens import ChatEncoder, Encoded
from .world import training_conversation

LONG_CONVERSATION_CHARS = 2000  # about 900 tokens, below max_position_embeddings
LONG_SHARE = 0.015
LOG_EVERY_S = 15.0


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults fit one hour on two CPU cores."""

    seed: int = 1
    tokens: int = 30_000_000
    budget_minutes: float = 55.0  # of processor time, per process
    batch_tokens: int = 6144
    muon_lr: float = 0.005
    adam_lr: float = 4e-3
    weight_decay: float = 0.02
    warmup: float = 0.01
    decay: float = 0.5
    processes: int = 2


@dataclass(frozen=True)
class Batch:
    """Rows of one conversation each, padded at the end."""

    ids: Tensor  # (B, T)
    predicting: Tensor  # (B, T) bool: the places whose next token is a target
    targets: Tensor  # the next tokens at those places, in row order


def pad(encoded: Sequence[Encoded], width: int, filler: int) -> Batch:
    """Put conversations into one batch of the given width."""
    ids = torch.tensor([one.ids + [filler] * (width - len(one.ids)) for one in encoded])
    is_target = torch.tensor([one.is_target + [False] * (width - len(one.ids)) for one in encoded])
    predicting = is_target.roll(-1, dims=1)
    predicting[:, -1] = False
    return Batch(ids, predicting, ids.roll(-1, dims=1)[predicting])


def draw_conversation(data: Data, rng: random.Random) -> list[Message]:
    """Draw a training conversation; now and then a long one, to learn to look far back."""
    is_long = rng.random() < LONG_SHARE
    min_chars = rng.randint(600, LONG_CONVERSATION_CHARS) if is_long else 0
    return training_conversation(data, rng, min_chars)


def batches(recipe: Recipe, rank: int, encoder: ChatEncoder, max_length: int) -> Iterator[Batch]:
    """Yield this rank's share of fresh batches for ever.

    Each row is one conversation from position 0, so no mask between packed conversations is needed.
    Rows wait until a batch of their width is full. Widths are multiples of 16, so that little is
    padded and only a few shapes occur (CPU kernels are prepared once for each shape). All ranks
    draw the same conversations and take every `processes`-th row: their shares cost the same.
    """
    data, rng, size = Data(), random.Random(f"train {recipe.seed}"), recipe.processes
    waiting: dict[int, list[Encoded]] = {}
    while True:
        one = encoder.encode(draw_conversation(data, rng))
        width = -(-len(one.ids) // 16) * 16
        if width > max_length:
            continue
        rows = waiting.setdefault(width, [])
        rows.append(one)
        if len(rows) >= max(1, recipe.batch_tokens // width // size) * size:
            yield pad(waiting.pop(width)[rank::size], width, encoder.filler)


def learning_rate_factor(progress: float, recipe: Recipe) -> float:
    """Return the factor of the learning rates: a short rise, a plateau, a straight fall to zero."""
    rise = min(1.0, (progress + 1e-4) / recipe.warmup)
    fall = min(1.0, (1.0 - progress) / recipe.decay)
    return max(0.0, min(rise, fall))


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95
    )
    return [muon, torch.optim.AdamW(others, recipe.adam_lr, weight_decay=0.0, betas=(0.9, 0.98))]


def backward(model: DemoModel, batch: Batch) -> float:
    """Compute the gradients of a batch, in bfloat16 products, and return its loss."""
    logits = model(batch.ids, batch.predicting, torch.bfloat16)
    loss = F.cross_entropy(logits, batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def average(parameters: Sequence[Tensor], figures: Sequence[float]) -> list[float]:
    """Replace the gradients by their means over all ranks; return the means of the figures.

    All of it goes in one message: the ranks meet once per step.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [gradient.flatten() for gradient in gradients] + [torch.tensor(figures)]
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    means = torch.split(flat.div_(dist.get_world_size()), [part.numel() for part in parts])
    for gradient, mean in zip(gradients, means[:-1], strict=True):
        gradient.copy_(mean.view_as(gradient))
    return [float(mean) for mean in means[-1]]


def train(
    rank: int, config: DemoConfig, encoder: ChatEncoder, recipe: Recipe
) -> tuple[DemoModel, dict[str, Any]]:
    """Train a new model and return it with what the training took; all ranks end with the same.

    The run is over by tokens or by processor time, whichever comes first. Only where the machine is
    too slow for the budget does the schedule end early; the run is then not repeatable bit by bit.
    """
    torch.manual_seed(recipe.seed)
    model = DemoModel(config)
    optimizers = make_optimizers(model, recipe)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    started = last_log = time.monotonic()
    cpu_started, progress, tokens, steps = time.process_time(), 0.0, 0, 0
    for batch in batches(recipe, rank, encoder, config.max_position_embeddings):
        for group, full_rate in groups:
            group["lr"] = full_rate * learning_rate_factor(progress, recipe)
        loss = backward(model, batch)
        budget_used = (time.process_time() - cpu_started) / (recipe.budget_minutes * 60)
        figures = average(list(model.parameters()), [batch.ids.numel(), loss, budget_used])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens, steps = tokens + round(figures[0] * recipe.processes), steps + 1
        progress = max(tokens / recipe.tokens, figures[2])
        if rank == 0 and time.monotonic() - last_log > LOG_EVERY_S:
            last_log = time.monotonic()
            left = (last_log - started) * (1 - progress) / progress / 60
            print(f"step {steps:6d}  loss {figures[1]:.4f}  {left:5.1f} min left", flush=True)
        if progress >= 1.0:
            break
    return model, {
        "steps": steps,
        "tokens": tokens,
        "train_s": round(time.monotonic() - started, 1),
        "train_cpu_s_per_process": round(time.process_time() - cpu_started, 1),
        "cut_short_by_clock": tokens < recipe.tokens,
    }
