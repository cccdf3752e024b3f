"""Small tokenizers and templates that the tests of tpirt.text share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "hello world, hello there: what is the time? it's 12:30!",
    "user assistant system think about the answer [INST] [/INST]",
    "naïve café déjà vu é ü 你好 世界 😀",
] * 3

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("m.content", "(m.content.split('</think>')[-1] if not loop.last "
                          "else m.content)")  # fmt: skip
RAISING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


def byte_level(*, bos: bool = False) -> Tokenizer:
    """Like GPT-2, Qwen (no BOS) or Llama 3 (``bos``: its post-processor adds one)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if bos:
        tokenizer.post_processor = frame(tokenizer, "<|endoftext|>")
    return tokenizer


def sentencepiece(*, scheme: str = "prepend", bos: bool = True) -> Tokenizer:
    """Like Llama 2: byte fallback; ``scheme`` "prepend" (normalizer) or one of Metaspace's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = sorted({c for line in CORPUS for c in line if c.isascii() and c != " "})
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "h"), ("a", "t"), ("▁", "["), ("▁", "▁")]
    pieces += ["▁", *letters, *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "prepend":
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(chain)
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if bos:
        tokenizer.post_processor = frame(tokenizer, "<s>")
    return tokenizer


def frame(tokenizer: Tokenizer, bos: str) -> TemplateProcessing:
    """A post-processor that puts BOS before the text."""
    special = [(bos, tokenizer.token_to_id(bos))]
    return TemplateProcessing(single=[bos, "$A"], special_tokens=special)


def write_dir(path: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> Path:
    """Write a model directory's tokenizer files."""
    tokenizer.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path
