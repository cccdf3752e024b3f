"""Conversations that end with a request: of three kinds, and within the bundled model's world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Chat = Sequence[Mapping[str, str]]


def _chat(*turns: str) -> Chat:
    """Turns of the user and of the assistant, alternately."""
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(turns)]


_ASK = "Tell me a story about a dragon named Kevin"
_STORY = (
    "Once upon a time there was a friendly dragon named Kevin. Kevin lived on a high mountain. "
    "One day Kevin found a frozen lake and showed it to a knight. Kevin and the knight melted the "
    "ice for the town. The end."
)
_CAT = "Tell me a story about a cat named Tom"
_CAT_STORY = (
    "Once upon a time there was a small cat named Tom. Tom lived in a red house. One day Tom found "
    "a ball of wool and showed it to a dog. Tom and the dog played with it all day. The end."
)

# Answers of chats share little with their prompts; edited texts repeat a long one but for a name;
# summaries take a sentence out of one.
DRAFT_TASKS: Mapping[str, Sequence[Chat]] = {
    "chat": [
        _chat("Hello!"),
        _chat("Tell me a story about a dragon named Kevin"),
        _chat("What is 12 + 7?", "12 + 7 = 19.", "And plus 2?"),
        _chat("count from 3 to 20"),
        _chat("Who are you?"),
        _chat("What can you do?"),
    ],
    "editing": [
        _chat(_ASK, _STORY, _ASK.replace("Kevin", "Anna")),
        _chat(_ASK, _STORY, _ASK.replace("Kevin", "Paul")),
        _chat(_ASK, _STORY, _ASK),
        _chat(_CAT, _CAT_STORY, _CAT.replace("Tom", "Emma")),
        _chat(_CAT, _CAT_STORY, _CAT.replace("Tom", "Max")),
    ],
    "summarising": [
        _chat(_ASK, _STORY, "What did Kevin find?"),
        _chat(_ASK, _STORY, "Where did Kevin live?"),
        _chat(_CAT, _CAT_STORY, "What did Tom find?"),
        _chat(_CAT, _CAT_STORY, "Where did Tom live?"),
    ],
}
