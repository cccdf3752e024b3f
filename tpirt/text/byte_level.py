"""A byte-level tokenizer for models without one: it encodes any text and decodes any id."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = 256 + len(_TURN_TOKENS)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def write_byte_level_tokenizer(path: Path, vocab_size: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a model directory.

    Ids below 256 are single bytes, the next two begin and end a turn of the chat template. Further
    ids up to ``vocab_size`` are meaningless words that no text is encoded to. There is no end
    token: an answer does not end by itself.

    Args:
        path: the model directory.
        vocab_size: of the model, at least ``MIN_VOCAB_SIZE``.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġ{_word(number)}" for number in range(vocab_size - MIN_VOCAB_SIZE)]
    vocabulary = {token: i for i, token in enumerate((*letters, *_TURN_TOKENS, *words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in _TURN_TOKENS])
    (path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _word(number: int) -> str:
    """Spell a number in syllables: ``ba``, ``be`` ... ``deba`` ..."""
    base = len(_SYLLABLES)
    return (_word(number // base) if number >= base else "") + _SYLLABLES[number % base]
