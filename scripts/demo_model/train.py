"""Training, scoring and saving of the demo model."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from .model import DemoConfig, DemoModel
from .tokens import END_OF_TEXT, IM_END, ChatEncoder, Encoded, tokenizer_config
from .world import HeldBack, held_back_set, training_conversation

LONG_CONVERSATION_CHARS = 2000  # about 900 tokens, below max_position_embeddings
LONG_SHARE = 0.015


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults fit one hour on two CPU cores."""

    seed: int = 1
    tokens: int = 30_000_000
    budget_minutes: float = 50.0
    batch_tokens: int = 6144
    muon_lr: float = 0.007
    adam_lr: float = 4e-3
    weight_decay: float = 0.02
    warmup: float = 0.01
    decay: float = 0.5
    device: str = "cpu"


# --------------------------------------------------------------------------------------------- batches


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


def draw_conversation(rng: random.Random) -> list[dict[str, str]]:
    """Draw a training conversation, a long one now and then so that far-back turns are learned to be found."""
    if rng.random() < LONG_SHARE:
        return training_conversation(rng, min_chars=rng.randint(600, LONG_CONVERSATION_CHARS))
    return training_conversation(rng)


def batches(recipe: Recipe, encoder: ChatEncoder, max_length: int) -> Iterator[Batch]:
    """Yield fresh batches for ever; no conversation is generated twice on purpose.

    Each row is one conversation from position 0, so no mask between packed conversations is needed. Rows wait until
    a batch of their width is full; widths are multiples of 16, so that little is padded and only a few shapes
    occur (a CPU kernel is built anew for every shape).
    """
    rng = random.Random(f"train {recipe.seed}")
    filler = encoder.tokenizer.token_to_id(END_OF_TEXT)
    waiting: dict[int, list[Encoded]] = {}
    while True:
        for one in encoder.encode_all([draw_conversation(rng) for _ in range(256)]):
            width = -(-len(one.ids) // 16) * 16
            if width > max_length:
                continue
            rows = waiting.setdefault(width, [])
            rows.append(one)
            if len(rows) >= recipe.batch_tokens // width:
                yield pad(waiting.pop(width), width, filler)


# --------------------------------------------------------------------------------------------- training


def learning_rate_factor(progress: float, recipe: Recipe) -> float:
    """Return the factor of the learning rates: a short rise, a plateau, then a straight fall to zero."""
    rise = min(1.0, (progress + 1e-4) / recipe.warmup)
    fall = min(1.0, (1.0 - progress) / recipe.decay)
    return max(0.0, min(rise, fall))


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.adam_lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def train(model: DemoModel, encoder: ChatEncoder, recipe: Recipe, log_every_s: float = 15.0) -> dict[str, Any]:
    """Train in place and return what it took.

    The schedule follows the share of tokens seen. Only where the machine is too slow for the time budget does the
    clock take over and the schedule end early; the run is then no longer repeatable bit by bit.
    """
    device = torch.device(recipe.device)
    model.to(device).train()
    optimizers = make_optimizers(model, recipe)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started = last_log = time.monotonic()
    tokens = step = 0
    loss_sum, loss_steps, cut_short = 0.0, 0, False
    for batch in batches(recipe, encoder, model.config.max_position_embeddings):
        elapsed = time.monotonic() - started
        by_tokens, by_clock = tokens / recipe.tokens, elapsed / (recipe.budget_minutes * 60)
        progress = max(by_tokens, by_clock)
        cut_short |= by_clock > by_tokens
        if progress >= 1.0:
            break
        factor = learning_rate_factor(progress, recipe)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = train_step(model, optimizers, batch, device)
        tokens += batch.ids.numel()
        step += 1
        loss_sum, loss_steps = loss_sum + loss, loss_steps + 1
        if time.monotonic() - last_log > log_every_s:
            last_log = time.monotonic()
            left = elapsed * (1 - progress) / max(progress, 1e-6)
            print(
                f"step {step:6d}  loss {loss_sum / loss_steps:.4f}  {tokens / elapsed:8.0f} tokens/s  "
                f"{100 * progress:5.1f} %  about {left / 60:5.1f} min left",
                flush=True,
            )
            loss_sum, loss_steps = 0.0, 0
    wall_s = time.monotonic() - started
    return {"steps": step, "tokens": tokens, "train_s": round(wall_s, 1), "cut_short_by_clock": cut_short}


def train_step(
    model: DemoModel, optimizers: Sequence[torch.optim.Optimizer], batch: Batch, device: torch.device
) -> float:
    """Make one step in bfloat16 products and return the loss."""
    ids, predicting, targets = (x.to(device) for x in (batch.ids, batch.predicting, batch.targets))
    loss = F.cross_entropy(model(ids, predicting, torch.bfloat16), targets)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def round_to_bfloat16(model: nn.Module) -> None:
    """Round every weight to bfloat16, as the saved file holds them, and keep computing in float32."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16).float())


# --------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def exact_answers(model: DemoModel, encoder: ChatEncoder, questions: Sequence[HeldBack]) -> list[bool]:
    """Tell for each question whether the greedy answer is the right one, to the last character.

    The right answer is given to the model as its input; it is what greedy decoding would write exactly when every
    one of its tokens (and the end of the turn) is the most likely one at its place.
    """
    device = next(model.parameters()).device
    model.eval()
    filler = encoder.tokenizer.token_to_id(END_OF_TEXT)
    full = encoder.encode_all([[*q.messages, {"role": "assistant", "content": q.answer}] for q in questions])
    last_answers = [
        Encoded(one.ids, [False] * len(prompt) + one.is_target[len(prompt) :])
        for one, prompt in zip(full, (encoder.prompt(q.messages) for q in questions), strict=True)
    ]
    order = sorted(range(len(full)), key=lambda i: len(full[i].ids))
    right = [False] * len(full)
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        width = max(len(full[i].ids) for i in rows)
        batch = pad([last_answers[i] for i in rows], width, filler)
        best = model(batch.ids.to(device), batch.predicting.to(device)).argmax(dim=-1).cpu()
        hits = iter((best == batch.targets).split(batch.predicting.sum(dim=1).tolist()))
        for i in rows:
            right[i] = bool(next(hits).all())
    return right


def score(model: DemoModel, encoder: ChatEncoder, questions: Sequence[HeldBack]) -> dict[str, dict[str, Any]]:
    """Return right, total and accuracy for each category and overall."""
    results: dict[str, list[bool]] = {}
    for question, right in zip(questions, exact_answers(model, encoder, questions), strict=True):
        results.setdefault(question.category, []).append(right)
        results.setdefault("overall", []).append(right)
    ordered = sorted(results, key=lambda name: (name == "overall", name))
    return {
        name: {"right": sum(results[name]), "total": len(results[name]), "accuracy": sum(results[name]) / len(results[name])}
        for name in ordered
    }


def print_scores(scores: dict[str, dict[str, Any]]) -> None:
    """Print the scores as a table."""
    print(f"{'held-back questions':24} {'right':>6} {'total':>6} {'exact':>8}")
    for name, row in scores.items():
        print(f"{name:24} {row['right']:6d} {row['total']:6d} {100 * row['accuracy']:7.1f} %")


# --------------------------------------------------------------------------------------------- saving


def hugging_face_config(config: DemoConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(out: Path, model: DemoModel, tokenizer: Tokenizer) -> int:
    """Write the model in Hugging Face layout and return the size of the weights file in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    end_ids = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    write_json(out / "config.json", hugging_face_config(model.config, tokenizer))
    write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": end_ids, "pad_token_id": end_ids[1]})
    write_json(out / "tokenizer_config.json", tokenizer_config(model.config.max_position_embeddings))
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.state_dict().items()
    }
    partial = out / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    os.replace(partial, out / "model.safetensors")
    return (out / "model.safetensors").stat().st_size
