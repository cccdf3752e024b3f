"""The demo model's tokenizer (byte-level BPE, trained on its conversations) and chat format."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .data import Data
from .talk import Message
from .world import training_conversation

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Words with the space before them, single digits (so that place value can be learned), marks,
# line ends, spaces.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(data: Data, seed: int, vocab_size: int, conversations: int) -> Tokenizer:
    """Train the tokenizer on training conversations; it can encode any input, byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer {seed}")
    texts = (
        f"{message['role']}\n{message['content']}"
        for _ in range(conversations)
        for message in training_conversation(data, rng)
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that is known to exist."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return int(found)


class Encoded(NamedTuple):
    """A conversation as ids, and for each id whether the model has to predict it."""

    ids: list[int]
    is_target: list[bool]


class ChatEncoder:
    """Turns conversations into ids in the chat format, the way the chat template writes them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.filler = token_id(tokenizer, END_OF_TEXT)
        self.end, self.line = token_id(tokenizer, IM_END), self._ids("\n")
        roles = ("system", "user", "assistant")
        self.headers = {role: self._ids(f"{IM_START}{role}\n") for role in roles}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Encode a conversation; targets are the assistant's words and the end of its turn.

        Header and content are encoded apart, which gives the same ids as the whole text: a special
        token stands before each header, and the split rule never joins a line end with what follows
        it.
        """
        ids: list[int] = []
        is_target: list[bool] = []
        for message in messages:
            header, content = self.headers[message["role"]], self._ids(message["content"])
            ids += [*header, *content, self.end, *self.line]
            is_target += [False] * len(header)
            is_target += [message["role"] == "assistant"] * (len(content) + 1)
            is_target += [False] * len(self.line)
        return Encoded(ids, is_target)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode the messages so far and open the assistant's turn."""
        return self.encode(messages).ids + self.headers["assistant"]
