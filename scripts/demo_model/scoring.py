"""Exact-answer accuracy on the held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .model import DemoModel
from .tokens import ChatEncoder, Encoded
from .train import pad
from .world import HeldOut

LONGEST_ANSWER = 128  # tokens


@torch.no_grad()
def exact_answers(
    model: DemoModel, encoder: ChatEncoder, questions: Sequence[HeldOut]
) -> list[bool]:
    """Tell for each question whether the greedy answer is the right one, to the last character.

    The right answer is given to the model as its input; it is what greedy decoding would write
    exactly when every one of its tokens (and the end of the turn) is the most likely one at its
    place.
    """
    rows = []
    for question in questions:
        answer = {"role": "assistant", "content": question.answer}
        start = len(encoder.prompt(question.messages))
        full = encoder.encode([*question.messages, answer])
        rows.append(Encoded(full.ids, [False] * start + full.is_target[start:]))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    right = [False] * len(rows)
    for first in range(0, len(order), 32):
        chosen = order[first : first + 32]
        width = max(len(rows[i].ids) for i in chosen)
        batch = pad([rows[i] for i in chosen], width, encoder.filler)
        hits = model(batch.ids, batch.predicting).argmax(dim=-1) == batch.targets
        lengths = batch.predicting.sum(dim=1).tolist()
        for i, hit in zip(chosen, hits.split(lengths), strict=True):
            right[i] = bool(hit.all())
    return right


def score(
    model: DemoModel, encoder: ChatEncoder, questions: Sequence[HeldOut]
) -> dict[str, dict[str, Any]]:
    """Return right, total and accuracy for each category and overall, and print them."""
    longest = model.config.max_position_embeddings - LONGEST_ANSWER
    fitting = [q for q in questions if len(encoder.prompt(q.messages)) <= longest]
    results: dict[str, list[bool]] = {}
    for question, right in zip(fitting, exact_answers(model, encoder, fitting), strict=True):
        results.setdefault(question.category, []).append(right)
        results.setdefault("overall", []).append(right)
    scores = {}
    for name in sorted(results, key=lambda name: (name == "overall", name)):
        right, total = sum(results[name]), len(results[name])
        scores[name] = {"right": right, "total": total, "accuracy": right / total}
        print(f"{name:24} {right:6d} of {total:6d} {100 * right / total:7.1f} %")
    return scores
