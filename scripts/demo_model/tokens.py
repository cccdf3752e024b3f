"""The demo model's tokenizer (byte-level BPE, trained on its conversations) and chat format."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .exchange import Message
from .world import training_conversation

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END)

# Words with the space before them, single digits (so that place value can be learned), marks,
# line ends, spaces.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(seed: int, vocab_size: int, conversations: int = 20000) -> Tokenizer:
    """Train the tokenizer on training conversations; it can encode any input, byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer {seed}")
    texts = (
        f"{message['role']}\n{message['content']}"
        for _ in range(conversations)
        for message in training_conversation(rng)
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that is known to exist."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return int(found)


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids, and for each id whether the model has to predict it."""

    ids: list[int]
    is_target: list[bool]


class ChatEncoder:
    """Turns conversations into ids in the chat format, the way the chat template writes them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = token_id(tokenizer, IM_END)
        self.line = self._ids("\n")
        self.headers = {
            role: self._ids(f"{IM_START}{role}\n") for role in ("system", "user", "assistant")
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Encode complete conversations; the targets are the assistant's words and the end of its
        turn.

        Header and content are encoded apart, which gives the same ids as the whole text: a special
        token stands before each header, and the split rule never joins a line end with what follows
        it.
        """
        contents = [
            message["content"] for conversation in conversations for message in conversation
        ]
        pieces = iter(self.tokenizer.encode_batch_fast(contents, add_special_tokens=False))
        return [
            self._join(conversation, (next(pieces).ids for _ in conversation))
            for conversation in conversations
        ]

    def _join(self, conversation: Sequence[Message], contents: Iterable[list[int]]) -> Encoded:
        ids: list[int] = []
        is_target: list[bool] = []
        for message, content in zip(conversation, contents, strict=True):
            header = self.headers[message["role"]]
            ids += [*header, *content, self.end, *self.line]
            answers = message["role"] == "assistant"
            is_target += (
                [False] * len(header) + [answers] * (len(content) + 1) + [False] * len(self.line)
            )
        return Encoded(ids, is_target)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode the messages so far and open the assistant's turn."""
        return list(itertools.chain(self.encode_all([messages])[0].ids, self.headers["assistant"]))
