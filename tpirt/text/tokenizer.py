"""The tokenizer of a model directory, with the same ids as in training.

Differences from ``transformers`` 5.23: for ``LlamaTokenizer``, ``Qwen2Tokenizer``,
``GPT2Tokenizer`` and ``GemmaTokenizer`` it takes only the vocabulary, the merges and the
post-processor from ``tokenizer.json`` and rebuilds normalizer, pre-tokenizer and decoder from
class defaults; version 4 used the file. This changes ids: Llama 2's ``Prepend`` (``legacy: false``
in its configuration) becomes a space before the first word only, so ``<s>[INST]`` loses the
prefix space of training, and SmolLM's ``Digits`` splitter is dropped. This module uses the
published ``tokenizer.json``. transformers 5 also ignores ``add_bos_token`` and ``add_eos_token``
if there is a ``tokenizer.json``; this module follows explicit values for Llama-style classes, as
version 4 did. If file and configuration agree, all three give the same ids.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as FastTokenizer

from tpirt.errors import TokenizerError
from tpirt.text.detokenizer import Detokenizer, decode
from tpirt.text.template import ChatTemplate, find_chat_template, read_json, read_text
from tpirt.types import Message

# Without a tokenizer_config.json the defaults follow from the model type.
_CLASS_OF_MODEL = {"llama": "LlamaTokenizer", "qwen2": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}
_CLASS_OF_MODEL |= {"qwen3": "Qwen2Tokenizer"}
_LLAMA_STYLE = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_DEFAULT_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "merges.txt")


class Tokenizer:
    """The tokenizer of one model: ids, special tokens, chat template, streaming decode.

    Created by ``from_dir``. ``vocab_size`` includes added tokens and may be less than the model's.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        special_tokens: Mapping[str, str],
        template: ChatTemplate | None = None,
        origin: str = "tokenizer",
    ) -> None:
        self._fast = fast
        self._special_tokens = dict(special_tokens)
        self._template = template
        self._origin = origin
        fast.no_truncation()  # tokenizer.json may contain the limits of training
        fast.no_padding()
        self._stands_for: dict[int, int] = {}  # ids of stand-ins: beyond the vocabulary
        added = fast.get_added_tokens_decoder()
        self.added_ids: frozenset[int] = frozenset(added)
        self.special_ids: frozenset[int] = frozenset(i for i, t in added.items() if t.special)
        self._special = _any_of(t.content for t in added.values() if t.special)
        self.vocab_size: int = fast.get_vocab_size(with_added_tokens=True)
        self.bos_token = self._special_tokens.get("bos_token")
        self.eos_token = self._special_tokens.get("eos_token")
        self.bos_id: int | None = None if not self.bos_token else fast.token_to_id(self.bos_token)
        self.eos_id: int | None = None if not self.eos_token else fast.token_to_id(self.eos_token)

    @classmethod
    def from_dir(cls, path: Path) -> Tokenizer:
        """Load ``tokenizer.json`` and related files of a Hugging Face model directory.

        Reads ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json`` and the
        chat template if present. Opens no other files and runs no code of the model.

        Raises:
            TokenizerError: no ``tokenizer.json`` (the message lists other formats and how to
                convert them), or a damaged file; the message has its name.
        """
        path = Path(path)
        text = _read_fast(path)
        config = _optional_json(path / "tokenizer_config.json")
        class_name = _class_name(path, config)
        fast = _load_fast(path / "tokenizer.json", text, config, class_name)
        try:
            config = _with_legacy_files(path, config)
            named = _named_tokens(config, class_name, fast)
            _add_tokens(fast, config, named)
            _follow_flags(fast, config, class_name, named)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as exc:
            raise TokenizerError(
                f"{path / 'tokenizer_config.json'}: invalid special tokens: {exc}"
            ) from exc
        return cls(fast, named, find_chat_template(path, config), str(path))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, never truncated or padded.

        Special tokens in the text become their ids. ``add_special_tokens`` adds BOS or EOS if the
        model's tokenizer does.

        Raises:
            TokenizerError: the text is not valid Unicode (a lone surrogate from broken input).
        """
        return self._encode(text, add_special_tokens)[0]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of a sequence of ids; invalid UTF-8 becomes U+FFFD."""
        hidden = self._stands_for.keys() | (self.special_ids if skip_special_tokens else ())
        return decode(self._fast, [i for i in ids if i not in hidden])

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the model's chat template.

        Raises:
            TokenizerError: the model has no template, or the template rejects the messages.
        """
        if self._template is None:
            raise TokenizerError(
                f"{self._origin}: the model has no chat template (a base model?); give a plain "
                "prompt instead, or put a chat_template.jinja into the directory"
            )
        return self._template.render(
            messages, self._special_tokens, add_generation_prompt=add_generation_prompt
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        parse_special: bool = False,
    ) -> list[int]:
        """Render a conversation and encode it; BOS comes from the template.

        Control tokens are those that the template writes. Within messages, their text is encoded
        as text, so that a quoted document cannot end a turn; with ``parse_special``, it becomes
        their ids, as in transformers.

        Raises:
            TokenizerError: as :meth:`render_chat` and :meth:`encode`.
        """
        return self.encode_chat_spans(
            messages, add_generation_prompt=add_generation_prompt, parse_special=parse_special
        )[0]

    def encode_chat_spans(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        parse_special: bool = False,
    ) -> tuple[list[int], list[tuple[int, int]], str]:
        """As :meth:`encode_chat`; also each id's span in the rendered text, and that text."""
        if parse_special or not any(self._special.search(m.content) for m in messages):
            text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
            return *self.encode_spans(text), text
        key = _random_text(4)
        quoted: list[str] = []  # control tokens within messages

        def quote(match: re.Match[str]) -> str:
            quoted.append(match[0])
            return f"{key}{len(quoted) - 1}{key}"

        marked = [Message(m.role, self._special.sub(quote, m.content)) for m in messages]
        text = self.render_chat(marked, add_generation_prompt=add_generation_prompt)
        parts = re.compile(f"{key}([0-9]+){key}|{self._special.pattern}")
        stand_ins = self._stand_ins
        encoded = parts.sub(lambda m: quoted[int(m[1])] if m[1] else stand_ins[m[0]], text)
        self._fast.encode_special_tokens = True  # as text
        try:
            ids, spans = self.encode_spans(encoded)
        finally:
            self._fast.encode_special_tokens = False
        plain = parts.sub(lambda m: quoted[int(m[1])] if m[1] else m[0], text)
        return [self._stands_for.get(i, i) for i in ids], spans, plain

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        """A text of the same length for each special token, encoded as this token.

        Only the template's tokens are replaced by it. The whole text is then encoded at once:
        cut into pieces, it could have other ids at the seams. The texts are random, so no message
        contains them.
        """
        special = [t for t in self._fast.get_added_tokens_decoder().values() if t.special]
        stand_ins = {t.content: _random_text(len(t.content)) for t in special}
        self._fast.add_tokens([_like(t, stand_ins[t.content]) for t in special])
        ids = {t.content: i for i, t in self._fast.get_added_tokens_decoder().items()}
        self._stands_for |= {ids[text]: ids[token] for token, text in stand_ins.items()}
        return stand_ins

    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer: EOS, and what the chat template writes after an answer."""
        ends = set() if self.eos_id is None else {self.eos_id}
        if self._template is not None:
            with contextlib.suppress(TokenizerError):  # it rejects this conversation
                ends |= self._ids_after_an_answer()
        return frozenset(ends)

    def _ids_after_an_answer(self) -> frozenset[int]:
        answer = "An answer"
        talk = [Message("user", "A question"), Message("assistant", answer)]
        rendered = self.render_chat(talk, add_generation_prompt=False)
        _, _, after = rendered.rpartition(answer)
        first = self.encode(after.strip(), add_special_tokens=False)[:1]
        return self.added_ids.intersection(first)

    def added_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of those texts that are added tokens, white space around them aside."""
        return self.added_ids & {self._fast.token_to_id(text.strip()) for text in texts}

    def has_ids_of(self, other: Tokenizer) -> bool:
        """Whether every token of ``other`` has the same id here."""
        own: dict[str, int] = self._fast.get_vocab()
        return all(own.get(token) == number for token, number in other._fast.get_vocab().items())

    def unknown(self, ids: Sequence[int]) -> str:
        """Say which of the ids have no text, as padding of a model's vocabulary; "" if none."""
        unknown = [i for i in ids if i in self._stands_for or self._fast.id_to_token(i) is None]
        if not unknown:
            return ""
        return (
            f"token id {unknown[0]} is not in the tokenizer and has no text ({len(unknown)} of "
            f"{len(ids)} tokens): do tokenizer and model belong together?"
        )

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """Return a streaming decoder for ids generated after ``prompt_ids``."""
        return Detokenizer(self._fast, self.special_ids | self._stands_for.keys(), prompt_ids)

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode without BOS/EOS; also each id's (start, end) in characters of ``text``."""
        return self._encode(text, False)

    def _encode(
        self, text: str, add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            encoding = self._fast.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError) as exc:
            raise TokenizerError(
                "the text is not valid Unicode (a lone surrogate): was it read as UTF-8?"
            ) from exc
        except Exception as exc:  # tokenizers raises a bare Exception, e.g. no unknown token
            raise TokenizerError(f"{self._origin}: the text cannot be encoded: {exc}") from exc
        return encoding.ids, encoding.offsets


def continue_chat(
    tokenizer: Tokenizer,
    cached_ids: list[int],
    cached_text: str,
    messages: Sequence[Message],
    *,
    parse_special: bool = False,
) -> tuple[list[int], str]:
    """Encode a conversation, and reuse the ids that are already in the KV cache.

    Generated ids can differ from the encoding of their text. If the rendered conversation R
    begins with ``cached_text`` and a special or added token is at the border, the result is
    ``cached_ids`` and the ids of the rest *as encoded within R*: added tokens split the text
    first, so text before the border does not change the ids after it, and within R they have the
    right prefix space. Otherwise (a template that rewrites history, a border within a word) all
    of R is encoded.

    Args:
        tokenizer: of the model.
        cached_ids: ids in the cache: earlier prompts and generated ids.
        cached_text: their exact text, with special tokens.
        messages: the whole conversation.
        parse_special: as in :meth:`Tokenizer.encode_chat`.

    Returns:
        The ids of the whole conversation with a generation prompt, and R.

    Raises:
        TokenizerError: as ``Tokenizer.render_chat``.
    """
    ids, spans, text = tokenizer.encode_chat_spans(messages, parse_special=parse_special)
    if cached_ids and cached_text and text.startswith(cached_text):
        at = _border(tokenizer.added_ids, cached_ids[-1], ids, spans, len(cached_text))
        if at is not None:
            return cached_ids + ids[at:], text
    return ids, text


def _border(
    added_ids: frozenset[int],
    last_cached: int,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    border: int,
) -> int | None:
    """Index of the first id after ``border`` if an added token begins or ends exactly there."""
    for at, (token_id, (start, end)) in enumerate(zip(ids, spans, strict=True)):
        if token_id in added_ids and start < end:
            if start == border:
                return at
            # Only if the cache ends with this token too: the model may have spelled its text.
            if end == border and token_id == last_cached:
                return at + 1
        if start > border:
            break
    return None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the texts, the longest first; without texts, it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _random_text(length: int) -> str:
    """Characters of private use, which nobody can guess."""
    return "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(length))


def _like(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
        special=False,
    )


def _read_fast(path: Path) -> str:
    file = path / "tokenizer.json"
    if not file.is_file():
        found = [name for name in _OTHER_FORMATS if (path / name).is_file()]
        if not found:
            raise TokenizerError(f"{file}: no such file; is {path} a complete model directory?")
        raise TokenizerError(
            f"{file}: no such file (found {', '.join(found)}); most models have one: `hf download "
            f"ORG/NAME tokenizer.json tokenizer_config.json --local-dir {shlex.quote(str(path))}`; "
            "docs/models.md says how to convert other formats"
        )
    return read_text(file)


def _load_fast(file: Path, text: str, config: Mapping[str, Any], class_name: str) -> FastTokenizer:
    try:
        return FastTokenizer.from_str(_with_prefix_space(text, config, class_name))
    except Exception as exc:  # tokenizers raises a bare Exception for any error
        raise TokenizerError(
            f"{file}: not a supported tokenizer ({exc}); it may be truncated, download it again"
        ) from exc


def _with_prefix_space(text: str, config: Mapping[str, Any], class_name: str) -> str:
    """Apply an explicit ``add_prefix_space`` to the file, if transformers 4 and 5 both do.

    That is either value for GPT-2's byte-level splitter, and ``false`` for Llama's Metaspace.
    """
    flag = config.get("add_prefix_space")
    if not isinstance(flag, bool) or class_name not in ("GPT2Tokenizer", "LlamaTokenizer"):
        return text
    data = json.loads(text)
    if class_name == "GPT2Tokenizer" and (data["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        data["pre_tokenizer"]["add_prefix_space"] = flag
    elif class_name == "LlamaTokenizer" and not flag:
        for key in ("normalizer", "pre_tokenizer", "decoder"):
            data[key] = _without_prefix(data[key])
    return json.dumps(data)


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Remove the parts of a normalizer, pre-tokenizer or decoder that handle the prefix space."""
    if part is None or part["type"] in ("Prepend", "Strip"):
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in part:
            kept = [_without_prefix(inner) for inner in part[key]]
            part = part | {key: [inner for inner in kept if inner is not None]}
    return part


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _class_name(path: Path, config: Mapping[str, Any]) -> str:
    """Tokenizer class without "Fast": as configured, else by model type."""
    name = config.get("tokenizer_class")
    if name is None:
        model = _optional_json(path / "config.json")
        name = model.get("tokenizer_class") or _CLASS_OF_MODEL.get(str(model.get("model_type")))
    return str(name or "").removesuffix("Fast")


def _with_legacy_files(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Merge the older files; like transformers, only without an ``added_tokens_decoder``."""
    if "added_tokens_decoder" in config:
        return config
    config = config | _optional_json(path / "special_tokens_map.json")
    special = {_content(v) for v in _token_entries(config).values() if v is not None}
    special |= {_content(v) for v in _extra_tokens(config)}
    added = _optional_json(path / "added_tokens.json")
    config["added_tokens_decoder"] = {
        str(index): {"content": token, "special": token in special, "normalized": None}
        for token, index in added.items()
    }
    return config


def _named_tokens(
    config: Mapping[str, Any], class_name: str, fast: FastTokenizer
) -> dict[str, str]:
    """``bos_token`` and the like by name; class defaults only if the vocabulary has them.

    transformers 5 adds a missing default to the vocabulary, with an id beyond the embedding.
    """
    defaults = _DEFAULT_TOKENS.get(class_name, {})
    named = {k: v for k, v in defaults.items() if fast.token_to_id(v) is not None}
    for key, value in _token_entries(config).items():
        if value is None:  # an explicit null: the model has none
            named.pop(key, None)
        else:
            named[key] = _content(value)
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= {key: _content(value) for key, value in extra.items()}
    return named


def _token_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """``..._token`` entries, without flags such as ``add_bos_token: true``."""
    return {k: v for k, v in config.items() if k.endswith("_token") and not isinstance(v, bool)}


def _extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values() if isinstance(extra, dict) else extra)


def _content(value: Any) -> str:
    """The string of a token given as a string or as an AddedToken's fields."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise TypeError(f"expected a string or {{'content': ...}}, got {value!r}")
    return content


def _added_token(value: Mapping[str, Any], special: bool) -> AddedToken:
    special = special or bool(value.get("special", False))
    normalized = value.get("normalized")
    return AddedToken(
        _content(value),
        lstrip=bool(value.get("lstrip", False)),
        rstrip=bool(value.get("rstrip", False)),
        single_word=bool(value.get("single_word", False)),
        normalized=not special if normalized is None else bool(normalized),
        special=special,
    )


def _add_tokens(fast: FastTokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add the configuration's tokens in transformers' order: declared ones, then named ones.

    A declared token replaces one of ``tokenizer.json`` whose flags differ.
    """
    present = {t.content: repr(t) for t in fast.get_added_tokens_decoder().values()}
    names = set(named.values())
    declared = config["added_tokens_decoder"] or {}
    tokens: list[AddedToken] = []
    for _, value in sorted(declared.items(), key=lambda item: int(item[0])):
        if repr(_added_token(value, False)) not in present.values():
            tokens.append(_added_token(value, _content(value) in names))
    known = present.keys() | {t.content for t in tokens}
    for value in (*named.values(), *_extra_tokens(config)):
        content = _content(value)
        if content not in known:
            known = known | {content}
            fields = value if isinstance(value, dict) else {"content": content}
            tokens.append(_added_token(fields, True))
    if tokens:
        fast.add_tokens(tokens)


def _follow_flags(
    fast: FastTokenizer, config: Mapping[str, Any], class_name: str, named: Mapping[str, str]
) -> None:
    """Apply an explicit ``add_bos_token``/``add_eos_token`` of a Llama-style class.

    In all other cases, and if ``tokenizer.json`` agrees, the file's post-processor stays.
    """
    if class_name not in _LLAMA_STYLE:
        return
    bos, eos = named.get("bos_token"), named.get("eos_token")
    frame = fast.encode("", add_special_tokens=True).ids
    has_bos = bool(frame) and bos is not None and frame[0] == fast.token_to_id(bos)
    rest = frame[1:] if has_bos else frame
    has_eos = bool(rest) and eos is not None and rest[-1] == fast.token_to_id(eos)
    want_bos = bool(_flag(config, "add_bos_token", has_bos) and bos)
    want_eos = bool(_flag(config, "add_eos_token", has_eos) and eos)
    if (want_bos, want_eos) == (has_bos, has_eos):
        return
    used = [token for token, on in ((bos, want_bos), (eos, want_eos)) if on and token]
    single = [token for token, on in ((bos, want_bos), ("$A", True), (eos, want_eos)) if on]
    fast.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, fast.token_to_id(token)) for token in used]
    )


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    return value if isinstance(value, bool) else default
