"""Streaming: token ids to text that never has to be taken back, and stop strings over it."""

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


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Detokenizer:
    """Turn generated ids into text as they come.

    The pushes and the final flush together are ``decode(prompt + generated)`` without the text of
    the prompt, special tokens skipped; no push ever holds part of a character, and nothing that
    was returned is changed by a later token. Each push costs O(1) tokens of decoding.

    In a byte-fallback vocabulary (Llama 2) a run of byte tokens becomes text when the run ends:
    the decoder of ``tokenizers`` replaces *every* byte of a run that turns out to be invalid, so
    an earlier character of the run is final only then.

    Args:
        tokenizer: the ``tokenizers`` object whose decoder is followed.
        special_ids: ids that give no text.
        prompt_ids: what stands before the generated ids; only its end is looked at. A prompt that
            ends within a character of a byte-level vocabulary gives that character with the token
            that completes it.
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
        """Return what was held back; incomplete characters become U+FFFD, as a decode gives."""
        return self._stream.flush()


class _ByteStream:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): every token is bytes, whatever stands before it.

    Python's incremental UTF-8 decoder and Rust's ``from_utf8_lossy`` put the same U+FFFDs.
    """

    def __init__(self, tokenizer: FastTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
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
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:  # an id beyond the vocabulary (padded embeddings) is no text
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token with characters outside the alphabet stands for itself
            return token.encode()


class _PieceStream:
    """Every other decoder: a token's text depends on the token before it, no further back.

    ``context`` is the last settled token (what makes the next one "not the first", so that its
    leading space stays); ``pending`` are the ids after it whose text is not final yet.
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
    """Find stop strings in streamed text, however it is cut.

    The text before the stop string that is complete first is released, the stop string itself and
    everything after it never. Text that may be the beginning of one is held back, which is less
    than the longest stop string.

    Args:
        stops: the stop strings; none means everything is released at once.

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
        """Return the text that can be shown now, and whether a stop string was reached."""
        if self._stopped:
            return "", True
        text = self._held + text
        # (end, start): the one complete first, and of those the longest, as if fed by characters.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]], True
        cut = len(text) - self._beginning(text)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _decoder_kinds(tokenizer: FastTokenizer) -> list[str]:
    """Types of the decoder's parts, nested sequences flattened; empty where there is none."""
    if tokenizer.decoder is None:
        return []
    return _flatten(json.loads(tokenizer.decoder.__getstate__()))


def _flatten(state: dict[str, Any]) -> list[str]:
    if state["type"] == "Sequence":
        return [kind for part in state["decoders"] for kind in _flatten(part)]
    return [str(state["type"])]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: itself where printable, else 256 and up, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
