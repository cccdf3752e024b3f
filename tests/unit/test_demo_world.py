"""The demo model's conversations: repeatable, correct, and honest about what is held back."""

from __future__ import annotations

import operator
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from demo_model import tables, world
from demo_model.arithmetic import calc_keys, follow_arithmetic, solve
from demo_model.exchange import Message, State, is_held_back
from demo_model.tokens import ChatEncoder, train_tokenizer

OPERATIONS = {"+": operator.add, "-": operator.sub, "×": operator.mul}


def expressions(answer: str) -> list[list[str]]:
    """Return the sides of a worked answer, each as its words; none for other answers."""
    worked = answer.split("! ")[-1].removesuffix(".")
    return [side.split(" ") for side in worked.split(" = ")] if " = " in worked else []


def value(words: list[str]) -> int:
    """Return what an expression is worth, worked out from the left."""
    result = int(words[0])
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        result = OPERATIONS[sign](result, int(term))
    return result


def conversations(seed: int, count: int) -> list[list[Message]]:
    rng = random.Random(seed)
    return [world.training_conversation(rng) for _ in range(count)]


def answers(seed: int, count: int) -> list[str]:
    return [
        message["content"]
        for conversation in conversations(seed, count)
        for message in conversation
        if message["role"] == "assistant"
    ]


@pytest.fixture(scope="module")
def held_back() -> list[world.HeldBack]:
    return world.held_back_set(seed=3, per_category=8, long_conversations=4)


def test_the_same_seed_gives_the_same_conversations() -> None:
    assert conversations(1, 200) == conversations(1, 200)
    assert conversations(1, 200) != conversations(2, 200)


def test_the_same_seed_gives_the_same_held_back_set(held_back: list[world.HeldBack]) -> None:
    assert world.held_back_set(seed=3, per_category=8, long_conversations=4) == held_back


def test_a_conversation_alternates_and_ends_with_the_assistant() -> None:
    for conversation in conversations(3, 500):
        roles = [message["role"] for message in conversation]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        assert all(message["content"].strip() for message in conversation)


def test_some_conversations_have_a_system_message_and_several_turns() -> None:
    drawn = conversations(4, 500)
    with_system = sum(conversation[0]["role"] == "system" for conversation in drawn)
    assert 50 < with_system < 250
    assert max(len(conversation) for conversation in drawn) >= 12


def test_a_long_conversation_is_as_long_as_asked_for() -> None:
    conversation = world.training_conversation(random.Random(5), min_chars=3000)
    assert sum(len(message["content"]) for message in conversation) >= 3000


def test_training_exchanges_carry_no_held_back_key() -> None:
    rng, state = random.Random(6), State()
    for _ in range(3000):
        exchange = world.draw_trained(rng, state)
        assert not any(map(is_held_back, exchange.keys))
        state.update(exchange.remember)


def test_held_back_pairs_appear_in_no_training_answer() -> None:
    """Not even within the working of a product or of a sum of three numbers."""
    seen = 0
    for answer in answers(7, 4000):
        for side in expressions(answer):
            if len(side) == 3:
                seen += 1
                keys = calc_keys(int(side[0]), side[1], int(side[2]))
                assert not any(map(is_held_back, keys)), answer
    assert seen > 1000


def test_held_back_names_are_never_told_in_training() -> None:
    withheld = {name for name in tables.NAMES if is_held_back(f"name:{name}")}
    assert len(withheld) > 10
    greeting = re.compile(r"Nice to meet you, ([^!]+)!")
    told = {name for answer in answers(8, 4000) for name in greeting.findall(answer)}
    assert len(told) > 200
    assert not told & withheld


def test_held_back_questions_are_disjoint_from_training(held_back: list[world.HeldBack]) -> None:
    """A pair of the same last question and answer must not occur where it stands alone."""
    trained = {
        (conversation[-2]["content"], conversation[-1]["content"])
        for conversation in conversations(9, 5000)
    }
    sums = {"addition", "subtraction", "multiplication", "name", "echo", "size"}
    for question in held_back:
        if question.category in sums:
            assert (question.messages[-1]["content"], question.answer) not in trained


def test_the_held_back_set_covers_every_category(held_back: list[world.HeldBack]) -> None:
    counts = Counter(question.category for question in held_back)
    assert counts == {**dict.fromkeys(world.CATEGORIES, 8), "long_conversation": 4}
    for question in held_back:
        assert question.messages[-1]["role"] == "user"
        assert question.answer.strip()


def test_all_sides_of_a_worked_answer_are_equal() -> None:
    seen: Counter[int] = Counter()
    for answer in answers(10, 4000):
        sides = expressions(answer)
        seen[len(sides)] += 1
        assert len({value(side) for side in sides}) <= 1, answer
    assert seen[2] > 1000
    assert seen[3] > 100


@pytest.mark.parametrize(
    ("left", "sign", "right", "answer"),
    [
        (12, "+", 7, "12 + 7 = 19."),
        (3, "-", 5, "3 - 5 = -2."),
        (7, "×", 8, "7 × 8 = 56."),
        (47, "×", 6, "47 × 6 = 240 + 42 = 282."),
        (6, "×", 47, "6 × 47 = 240 + 42 = 282."),
        (10, "×", 47, "10 × 47 = 470."),
    ],
)
def test_solve(left: int, sign: str, right: int, answer: str) -> None:
    assert solve(left, sign, right) == answer


@pytest.mark.parametrize(("left", "sign", "right"), [(100, "+", 1), (12, "/", 4), (47, "×", 11)])
def test_what_is_out_of_range_is_refused(left: int, sign: str, right: int) -> None:
    assert "=" not in solve(left, sign, right)


def test_going_on_calculating_starts_from_the_last_result() -> None:
    rng = random.Random(12)
    for result in range(0, 100, 7):
        exchange = follow_arithmetic(rng, {"topic": "arithmetic", "result": result})
        assert exchange.assistant.startswith(f"{result} ")


def test_a_name_told_is_the_name_recalled() -> None:
    told: Counter[bool] = Counter()
    for conversation in conversations(13, 3000):
        name = None
        for message in conversation:
            text = message["content"]
            if message["role"] != "assistant":
                continue
            if found := re.match(r"Nice to meet you, ([^!]+)!", text):
                name = found[1]
            elif found := re.fullmatch(r"Your name is (.+)\.", text):
                assert found[1] == name
                told[True] += 1
            elif text == "You have not told me your name yet.":
                assert name is None
                told[False] += 1
    assert told[True] > 50
    assert told[False] > 20


def test_answers_hold_characters_of_several_bytes() -> None:
    joined = "".join(answers(14, 3000))
    for character in "é×👋に":
        assert character in joined


def test_the_tokenizer_encodes_anything_and_agrees_with_the_chat_format() -> None:
    tokenizer = train_tokenizer(seed=0, vocab_size=600, conversations=300)
    for text in ("", "Zoë 🦜", "\x00\t\n\n x", "零 12+7=19", "<tag> \\ {}"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    encoder = ChatEncoder(tokenizer)
    for conversation in conversations(15, 100):
        whole = "".join(
            f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
            for message in conversation
        )
        encoded = encoder.encode_all([conversation])[0]
        assert encoded.ids == tokenizer.encode(whole, add_special_tokens=False).ids
        learned = [i for i, target in zip(encoded.ids, encoded.is_target, strict=True) if target]
        spoken = [m["content"] for m in conversation if m["role"] == "assistant"]
        expected = "".join(f"{text}<|im_end|>" for text in spoken)
        assert tokenizer.decode(learned, skip_special_tokens=False) == expected
