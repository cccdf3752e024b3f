"""The master of :mod:`bench.chaos` where it is a ``tpirt chat`` that may be killed.

It reads one line per round, and tells how it goes, a JSON line each, as
:mod:`bench.lib.chaos_master` does. A chat that has ended before its questions are answered is
started again with ``--resume``. Afterwards the journal is compared with what a single process
answers: whole answers are the same, one that was cut begins like it, and none is missing.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.lib.chaos_master import tell
from tpirt.chat.saved import SavedConversation, load
from tpirt.engine import Conversation
from tpirt.testing.cluster import memory_engine
from tpirt.types import Message, SamplingParams

_MOST_STARTS = 8
_MOST_TRIES = 6
_PAUSE_S = 1.0
_LOOK_S = 0.02
_LEAVE_S = 20.0


@dataclass
class _Life:
    """What one process made: the conversation it began with, and its number of messages."""

    before: list[Message]
    after: list[Message] = field(default_factory=list)
    cut: bool = False


class _Chat:
    """A running ``tpirt chat``; its folder has its journal and what it says."""

    def __init__(self, order: dict[str, Any], folder: Path, resume: bool):
        self._folder = folder
        self._errors = folder / "errors"
        command = [*("-m", "bench.lib.jumping_clock", order["clock"], "tpirt", "chat", "--fresh")]
        command += ["--model", order["model"], "--store", order["store"], "--each-line", "--quiet"]
        command += ["--peers", ",".join(order["peers"]), "--spares", ",".join(order["spares"])]
        command += ["--timeout", str(order["timeout_s"]), "--threads", "1", "--dtype", "float32"]
        command += ["--max-tokens", str(order["tokens"]), "--temperature", "0", "--draft", "none"]
        with open(self._errors, "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command, *["--resume"] * resume],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
                env={**os.environ, "XDG_STATE_HOME": str(folder)},
            )
        tell("chat", pid=self.process.pid)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        return self._errors.read_text(encoding="utf-8", errors="replace")

    def write(self, question: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Have it leave by itself."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            tell("wrong", what="the chat does not leave")
            self.process.kill()
            self.process.wait()


class _Round:
    """Asks all questions, by as many chats as it takes."""

    def __init__(self, order: dict[str, Any], folder: Path):
        self._order = order
        self._folder = folder
        self.lives: list[_Life] = []

    def run(self) -> bool:
        """Returns whether all were answered, at least in part."""
        for _ in range(_MOST_STARTS):
            tell("loading")
            before = self._kept()
            life = _Life(list(before.messages) if before else [])
            self.lives.append(life)
            chat = _Chat(self._order, self._folder, resume=before is not None)
            answered = self._converse(chat)
            tell("chat", pid=None)
            if chat.alive:
                chat.end()
            if after := self._kept():
                life.after, life.cut = list(after.messages), after.cut
            if answered:
                return True
            tell("failed", error=chat.said[-600:], code=chat.process.returncode)
            time.sleep(_PAUSE_S)
        return False

    def _converse(self, chat: _Chat) -> bool:
        """False if the chat ended, or is to be left, before all was answered."""
        questions = self._order["questions"]
        for _ in range(_MOST_TRIES * len(questions)):
            kept = self._kept()
            done = len(kept.messages) // 2 if kept else 0
            if done >= len(questions):
                return True
            if done == len(questions) - 1:
                tell("idle")
                time.sleep(self._order["idle_s"])
            tell("prompt", number=done)
            ended = self._ends()
            chat.write(questions[done])
            if not self._answered(chat, done, ended) or "so far is kept" in chat.said:
                return False
        return False

    def _answered(self, chat: _Chat, number: int, ended: int) -> bool:
        """Wait for the end of an answer; False if the chat's comes first."""
        told = False
        while self._ends() == ended:
            if not chat.alive:
                return False
            if not told and self._lines() and '"assistant"' in self._lines()[-1]:
                told = True
                tell("token", number=number)
            time.sleep(_LOOK_S)
        return True

    def _file(self) -> Path | None:
        return next(self._folder.glob("tpirt/conversations/*.jsonl"), None)

    def _lines(self) -> list[str]:
        file = self._file()
        return file.read_text(encoding="utf-8").splitlines() if file else []

    def _ends(self) -> int:
        return sum('"end"' in line for line in self._lines())

    def _kept(self) -> SavedConversation | None:
        file = self._file()
        return load(file) if file and file.stat().st_size else None


async def _check(order: dict[str, Any], lives: list[_Life]) -> None:
    """Tell what in the journal is wrong."""
    params = SamplingParams(max_tokens=order["tokens"])
    async with memory_engine(order["model"]) as engine:
        for number, life in enumerate(lives):
            if life.after[: len(life.before)] != life.before:
                tell("wrong", what=f"chat {number} lost answers")
                continue
            talk = Conversation(engine)
            talk.turns += life.before
            new = life.after[len(life.before) :]
            for question, answer in zip(new[::2], new[1::2], strict=True):
                whole = ""
                async with aclosing(talk.send(question.content, params)) as tokens:
                    async for token in tokens:
                        whole += token.text
                if whole == answer.content:
                    continue
                last = answer is life.after[-1]
                if not (last and whole.startswith(answer.content)):
                    tell("wrong", what=f"chat {number}: wrong tokens: {answer.content!r}")


def main() -> None:
    """Serve rounds until standard input ends."""
    process = psutil.Process()
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        folder = Path(order["folder"]) / f"chat-{os.getpid()}-{number}"
        folder.mkdir()
        work = _Round(order, folder)
        if not work.run():
            tell("given up")
        asyncio.run(_check(order, work.lives))
        tell(
            "over",
            tasks=0,
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            rss=process.memory_info().rss,
            children=len(process.children(recursive=True)),
        )


if __name__ == "__main__":
    main()
