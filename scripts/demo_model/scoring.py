"""Exact-answer accuracy on the held-back questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .model import DemoModel
from .tokens import END_OF_TEXT, ChatEncoder, Encoded, token_id
from .train import pad
from .world import HeldBack

LONGEST_ANSWER = 128  # tokens


@torch.no_grad()
def exact_answers(
    model: DemoModel, encoder: ChatEncoder, questions: Sequence[HeldBack]
) -> list[bool]:
    """Tell for each question whether the greedy answer is the right one, to the last character.

    The right answer is given to the model as its input; it is what greedy decoding would write
    exactly when every one of its tokens (and the end of the turn) is the most likely one at its
    place.
    """
    device = next(model.parameters()).device
    model.eval()
    filler = token_id(encoder.tokenizer, END_OF_TEXT)
    full = encoder.encode_all(
        [[*q.messages, {"role": "assistant", "content": q.answer}] for q in questions]
    )
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


def score(
    model: DemoModel, encoder: ChatEncoder, questions: Sequence[HeldBack]
) -> dict[str, dict[str, Any]]:
    """Return right, total and accuracy for each category and overall."""
    longest = model.config.max_position_embeddings - LONGEST_ANSWER
    fitting = [q for q in questions if len(encoder.prompt(q.messages)) <= longest]
    results: dict[str, list[bool]] = {}
    for question, right in zip(fitting, exact_answers(model, encoder, fitting), strict=True):
        results.setdefault(question.category, []).append(right)
        results.setdefault("overall", []).append(right)
    ordered = sorted(results, key=lambda name: (name == "overall", name))
    return {
        name: {
            "right": sum(results[name]),
            "total": len(results[name]),
            "accuracy": sum(results[name]) / len(results[name]),
        }
        for name in ordered
    }


def print_scores(scores: dict[str, dict[str, Any]]) -> None:
    """Print the scores as a table."""
    print(f"{'held-back questions':24} {'right':>6} {'total':>6} {'exact':>8}")
    for name, row in scores.items():
        print(f"{name:24} {row['right']:6d} {row['total']:6d} {100 * row['accuracy']:7.1f} %")
