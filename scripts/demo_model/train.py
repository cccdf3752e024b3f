"""Batches, schedule and training of the demo model."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from .exchange import Message
from .model import DemoConfig, DemoModel
from .team import Team
from .tokens import END_OF_TEXT, ChatEncoder, Encoded, token_id
from .world import training_conversation

LONG_CONVERSATION_CHARS = 2000  # about 900 tokens, below max_position_embeddings
LONG_SHARE = 0.015


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
    device: str = "cpu"


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


def draw_conversation(rng: random.Random) -> list[Message]:
    """Draw a training conversation; now and then a long one, to learn to look far back."""
    if rng.random() < LONG_SHARE:
        return training_conversation(rng, min_chars=rng.randint(600, LONG_CONVERSATION_CHARS))
    return training_conversation(rng)


def batches(recipe: Recipe, team: Team, encoder: ChatEncoder, max_length: int) -> Iterator[Batch]:
    """Yield this member's share of fresh batches for ever.

    Each row is one conversation from position 0, so no mask between packed conversations is needed.
    Rows wait until a batch of their width is full; widths are multiples of 16, so that little is
    padded and only a few shapes occur (a CPU kernel is built anew for every shape). All members
    draw the same conversations and take every `size`-th row: their shares cost the same.
    """
    rng = random.Random(f"train {recipe.seed}")
    filler = token_id(encoder.tokenizer, END_OF_TEXT)
    waiting: dict[int, list[Encoded]] = {}
    while True:
        for one in encoder.encode_all([draw_conversation(rng) for _ in range(256)]):
            width = -(-len(one.ids) // 16) * 16
            if width > max_length:
                continue
            rows = waiting.setdefault(width, [])
            rows.append(one)
            if len(rows) >= max(1, recipe.batch_tokens // width // team.size) * team.size:
                yield pad(waiting.pop(width)[team.rank :: team.size], width, filler)


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
    return [
        torch.optim.Muon(
            matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95
        ),
        torch.optim.AdamW(others, lr=recipe.adam_lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


class Trained(NamedTuple):
    """A trained model and what the training took."""

    model: DemoModel
    took: dict[str, Any]


class Meter:
    """Counts what a training run has taken, and prints it now and then."""

    def __init__(self, recipe: Recipe, team: Team, log_every_s: float = 15.0) -> None:
        self.recipe, self.team, self.log_every_s = recipe, team, log_every_s
        self.started = self.last_log = time.monotonic()
        self.cpu_started = time.process_time()
        self.progress = 0.0  # the share of the run that is over
        self.tokens = self.steps = 0
        self.losses: list[float] = []

    def budget_used(self) -> float:
        """Return the share of the time budget that this process has used.

        Processor time, not time on the wall: the model shall not be worse for what else a shared
        machine has to do.
        """
        return (time.process_time() - self.cpu_started) / (self.recipe.budget_minutes * 60)

    def add(self, tokens: int, loss: float, budget_used: float) -> None:
        """Count one step; the figures are means over the team.

        The run is over by tokens or by the clock, whichever is ahead. Only where the machine is too
        slow for the budget does the clock take over and the schedule end early; the run is then no
        longer repeatable bit by bit.
        """
        self.tokens += tokens
        self.steps += 1
        self.losses.append(loss)
        self.progress = max(self.tokens / self.recipe.tokens, budget_used)
        if self.team.rank == 0 and time.monotonic() - self.last_log > self.log_every_s:
            self._print()

    def _print(self) -> None:
        self.last_log = time.monotonic()
        elapsed = self.last_log - self.started
        left_s = elapsed * (1 - self.progress) / self.progress
        print(
            f"step {self.steps:6d}  loss {sum(self.losses) / len(self.losses):.4f}  "
            f"{self.tokens / elapsed:8.0f} tokens/s  {100 * self.progress:5.1f} %  "
            f"about {left_s / 60:5.1f} min left",
            flush=True,
        )
        self.losses.clear()

    def summary(self) -> dict[str, Any]:
        """Return the totals of the run."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "train_s": round(time.monotonic() - self.started, 1),
            "train_cpu_s_per_process": round(time.process_time() - self.cpu_started, 1),
            "cut_short_by_clock": self.tokens < self.recipe.tokens,
        }


def train(team: Team, config: DemoConfig, encoder: ChatEncoder, recipe: Recipe) -> Trained:
    """Train a new model; every member of the team ends with the same weights."""
    torch.manual_seed(recipe.seed)
    device = torch.device(recipe.device)
    model = DemoModel(config).to(device)
    optimizers = make_optimizers(model, recipe)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates = [group["lr"] for group in groups]
    meter = Meter(recipe, team)
    for batch in batches(recipe, team, encoder, config.max_position_embeddings):
        for group, rate in zip(groups, full_rates, strict=True):
            group["lr"] = rate * learning_rate_factor(meter.progress, recipe)
        loss = backward(model, batch, device)
        figures = [batch.ids.numel(), loss, meter.budget_used()]
        tokens, loss, budget_used = team.average(list(model.parameters()), figures)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        meter.add(round(tokens * team.size), loss, budget_used)
        if meter.progress >= 1.0:
            break
    return Trained(model, meter.summary())


def train_member(team: Team, config: DemoConfig, tokenizer: str, recipe: Recipe) -> None:
    """Do the work of a member other than rank 0; the tokenizer comes as its JSON text."""
    train(team, config, ChatEncoder(Tokenizer.from_str(tokenizer)), recipe)


def backward(model: DemoModel, batch: Batch, device: torch.device) -> float:
    """Compute the gradients of a batch, in bfloat16 products, and return its loss."""
    ids, predicting, targets = (x.to(device) for x in (batch.ids, batch.predicting, batch.targets))
    loss = F.cross_entropy(model(ids, predicting, torch.bfloat16), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())
