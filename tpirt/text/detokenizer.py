"""Streaming decode of token ids to final text, and stop strings."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer as FastTokenizer

from tpirt.errors import RequestError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_HELD_TOKENS = 64
_CHARACTER_BYTES = 4  # the longest UTF-8 character


def decode(tokenizer: FastTokenizer, ids: Sequence[int]) -> str:
    """The text of ids; that of an added token is exactly its content.

    ``tokenizers`` takes the letters of an added token for bytes if all of them can be, as in
    ``naïve``.
    """
    if _decoder_kinds(tokenizer) == ["ByteLevel"]:
        stream = _ByteStream(tokenizer, ())
        return "".join([*map(stream.push, ids), stream.flush()])
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    return text


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Detokenizer:
    """Decode generated ids to text as they come.

    The results of all pushes and the final flush, joined, equal ``decode(prompt + generated)``
    without the prompt's text and special tokens. A push returns whole characters only, and later
    tokens never change returned text. Each push decodes O(1) tokens.

    In a byte-fallback vocabulary (Llama 2) a run of byte tokens becomes text when the run ends:
    ``tokenizers`` replaces *every* byte of an invalid run, so no character of the run is final
    before.

    Args:
        tokenizer: the ``tokenizers`` object.
        special_ids: ids without text.
        prompt_ids: ids before the generated ones; only the last few are used. If a byte-level
            prompt ends within a character, the token that completes it returns that character.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        special_ids: frozenset[int],
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._special_ids = special_ids
        kinds = _decoder_kinds(tokenizer)
        visible = [i for i in prompt_ids if i not in special_ids]
        self._stream: _Stream
        if kinds == ["ByteLevel"]:
            self._stream = _ByteStream(tokenizer, visible)
        else:
            self._stream = _PieceStream(tokenizer, visible, kinds)

    def push(self, token_id: int) -> str:
        """Return the text that became final with this token; "" if none did."""
        if token_id in self._special_ids:
            return ""
        return self._stream.push(token_id)

    def flush(self) -> str:
        """Return the held text; incomplete characters become U+FFFD, as in ``decode``."""
        return self._stream.flush()


class _ByteStream:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): the bytes of a token do not depend on its context.

    Python's incremental UTF-8 decoder and Rust's ``from_utf8_lossy`` produce the same U+FFFDs.
    """

    def __init__(self, tokenizer: FastTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._bytes(token_id) + tail
            if len(tail) >= _CHARACTER_BYTES:
                break
        self._decoder.decode(tail)

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:  # its own text, even if that looks like letters of bytes
            return self._added[token_id].content.encode()
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:  # an id beyond the vocabulary (padded embeddings) has no text
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # a token outside the byte alphabet is plain text
            return token.encode()


class _PieceStream:
    """Every other decoder: a token's text depends on the previous token only.

    ``context`` is the last final token; decoded after it, a token keeps its leading space.
    ``pending`` are the following ids, whose text is not final yet.
    """

    def __init__(
        self, tokenizer: FastTokenizer, prompt_ids: Sequence[int], kinds: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._byte_tokens = "ByteFallback" in kinds
        self._may_split = "ByteLevel" in kinds  # byte-level inside a longer decoder sequence
        self._context: list[int] = []
        self._pending: list[int] = []
        for token_id in reversed(prompt_ids):
            if tokenizer.id_to_token(token_id) is None:
                continue
            self._context.insert(0, token_id)
            if not self._is_byte(token_id):
                break

    def push(self, token_id: int) -> str:
        if self._tokenizer.id_to_token(token_id) is None:
            return ""
        self._pending.append(token_id)
        if self._is_byte(token_id):
            return ""
        text = self._text()
        if self._may_split and text.endswith("\ufffd") and len(self._pending) < _MAX_HELD_TOKENS:
            return ""
        self._context, self._pending = [token_id], []
        return text

    def flush(self) -> str:
        text = self._text()
        self._context, self._pending = self._context + self._pending, []
        return text

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id)
        return self._byte_tokens and _BYTE_TOKEN.fullmatch(token or "") is not None


class StopMatcher:
    """Find stop strings in streamed text, also across pushes.

    Text up to the first completed stop string is released; the stop string and everything after
    it are dropped. Text that may be the beginning of a stop string is held back.

    Args:
        stops: the stop strings; if empty, all text is released at once.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise RequestError("stop: expected non-empty strings, got an empty one")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Return the released text, and whether a stop string was found."""
        if self._stopped:
            return "", True
        text = self._held + text
        # (end, start): the first to be complete, then the longest, independent of chunking.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        cut = len(text) - self._beginning(text)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """Return the held text: it was not a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that is a prefix of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _decoder_kinds(tokenizer: FastTokenizer) -> list[str]:
    """Types of the decoder's parts, nested sequences flattened; empty without a decoder."""
    if tokenizer.decoder is None:
        return []
    return _flatten(json.loads(tokenizer.decoder.__getstate__()))


def _flatten(state: dict[str, Any]) -> list[str]:
    if state["type"] == "Sequence":
        return [kind for part in state["decoders"] for kind in _flatten(part)]
    return [str(state["type"])]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself if printable, else 256 and up, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
