"""The demo model's conversations: editable, repeatable, correct, honest about what is held out."""

from __future__ import annotations

import operator
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from demo_model.arithmetic import calc_keys, solve
from demo_model.data import FOLDER, Data, DataError
from demo_model.talk import Message, Talk, is_held_out
from demo_model.tokens import ChatEncoder, train_tokenizer
from demo_model.world import CATEGORIES, HeldOut, draw_trained, held_out_set, training_conversation

OPERATIONS = {"+": operator.add, "-": operator.sub, "×": operator.mul}


@pytest.fixture(scope="module")
def data() -> Data:
    return Data()


@pytest.fixture(scope="module")
def conversations(data: Data) -> list[list[Message]]:
    rng = random.Random(1)
    return [training_conversation(data, rng) for _ in range(1500)]


@pytest.fixture(scope="module")
def held_out(data: Data) -> list[HeldOut]:
    return held_out_set(data, seed=3, per_category=3, long=2)


def answers(conversations: list[list[Message]]) -> list[str]:
    return [m["content"] for c in conversations for m in c if m["role"] == "assistant"]


def sides(answer: str) -> list[list[str]]:
    """Return the sides of a worked answer, each as its words; none for other answers."""
    worked = answer.split("! ")[-1].removesuffix(".")
    return [side.split(" ") for side in worked.split(" = ")] if " = " in worked else []


def value(words: list[str]) -> int:
    """Return the value of an expression, worked out from the left."""
    result = int(words[0])
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        result = OPERATIONS[sign](result, int(term))
    return result


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("facts.toml", 'France = "Paris"', 'France = "Paris', "facts.toml: .*line"),
        ("facts.toml", 'France = "Paris"', "France = true", "capital.of.France: .*True"),
        ("facts.toml", 'cow = "moo | 4', 'cow = "4', "facts.toml: animal.known.cow: .* got 4 of 5"),
        ("facts.toml", "The opposite of {x} is {y}", "{z}", "facts.toml: opposite.answer: .*{z}"),
        ("facts.toml", "snow = ", "the snow = ", "facts.toml: .*line"),
        ("arithmetic.toml", "Solve {e}.", "Solve {e.", "arithmetic.toml: arithmetic.ask: .*{e"),
        ("stories.toml", "natures =", "nature =", "stories.toml: story.natures: is missing"),
        ("small_talk.toml", "Goodbye! 👋", "", r"small_talk.toml: greeting\[13\].answer: is empty"),
        ("wording.toml", "ask_colour =", "ask_color =", "wording.toml: openers.ask_color: unknown"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_data_file_is_reported_with_file_and_key(
    tmp_path: Path, file: str, old: str, new: str, problem: str
) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "data")
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    rng = random.Random(2)
    with pytest.raises(DataError, match=problem):  # noqa: PT012 - some keys are read when drawn
        edited = Data(folder)
        for _ in range(1000):
            training_conversation(edited, rng)


def test_an_edited_fact_changes_the_answer(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "data")
    text = (folder / "wording.toml").read_text(encoding="utf-8")
    opening = re.sub(r"(?s)\[openers\]\n.*?\n\n", "[openers]\nask_capital = 1\n\n", text)
    (folder / "wording.toml").write_text(opening, encoding="utf-8")
    facts = (folder / "facts.toml").read_text(encoding="utf-8")
    mars = re.sub(r"(?s)\[capital.of\]\n.*?\n\n", '[capital.of]\nMars = "Olympus"\n\n', facts)
    (folder / "facts.toml").write_text(mars, encoding="utf-8")
    rng, edited = random.Random(3), Data(folder)
    spoken = answers([training_conversation(edited, rng) for _ in range(50)])
    known = {answer for answer in spoken if "do not know" not in answer}
    assert known == {"The capital of Mars is Olympus."}


def test_the_same_seed_gives_the_same_conversations(data: Data) -> None:
    first, second = random.Random(4), random.Random(4)
    for _ in range(50):
        assert training_conversation(data, first) == training_conversation(data, second)


def test_a_conversation_alternates_and_ends_with_the_assistant(
    conversations: list[list[Message]],
) -> None:
    for conversation in conversations:
        roles = [message["role"] for message in conversation]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns
        assert all(message["content"].strip() for message in conversation)


def test_a_long_conversation_is_as_long_as_asked_for(data: Data) -> None:
    conversation = training_conversation(data, random.Random(5), min_chars=3000)
    assert sum(len(message["content"]) for message in conversation) >= 3000


def test_nothing_held_out_leaks_into_training(data: Data) -> None:
    talk, names = Talk(data, random.Random(6)), set(data.phrases("names"))
    categories = set()
    for _ in range(3000):
        exchange = draw_trained(talk)
        talk.state.update(exchange.remember)
        categories.add(exchange.category)
        assert not any(map(is_held_out, exchange.keys))
        told = re.match(r"Nice to meet you, ([^!]+)!", exchange.assistant)
        assert not (told and told[1] in names and is_held_out(f"name:{told[1]}"))
    assert categories == CATEGORIES


def test_every_calculation_is_right_and_contains_no_held_out_pair(
    conversations: list[list[Message]],
) -> None:
    """The working of a product or of a sum of three numbers counts as well."""
    seen: Counter[int] = Counter()
    for answer in answers(conversations):
        worked = sides(answer)
        seen[len(worked)] += 1
        assert len({value(side) for side in worked}) <= 1, answer
        for side in worked:
            if len(side) == 3:
                keys = calc_keys(int(side[0]), side[1], int(side[2]))
                assert not any(map(is_held_out, keys)), answer
    assert seen[2] > 300
    assert seen[3] > 30


def test_the_held_out_set_covers_every_category_and_is_not_trained(
    held_out: list[HeldOut], conversations: list[list[Message]]
) -> None:
    counts = Counter(question.category for question in held_out)
    assert counts == {**dict.fromkeys(CATEGORIES, 3), "long_conversation": 2}
    trained = {(c[-2]["content"], c[-1]["content"]) for c in conversations}
    for question in held_out:
        assert question.messages[-1]["role"] == "user"
        assert question.answer.strip()
        if question.category in {"addition", "subtraction", "multiplication", "name", "echo"}:
            assert (question.messages[-1]["content"], question.answer) not in trained


@pytest.mark.parametrize(
    ("left", "sign", "right", "answer"),
    [
        (12, "+", 7, "12 + 7 = 19."),
        (3, "-", 5, "3 - 5 = -2."),
        (6, "×", 47, "6 × 47 = 240 + 42 = 282."),
        (10, "×", 47, "10 × 47 = 470."),
        (100, "+", 1, None),
        (12, "/", 4, None),
        (47, "×", 11, None),
    ],
)
def test_solve(left: int, sign: str, right: int, answer: str | None) -> None:
    assert solve(left, sign, right) == answer


def test_a_name_told_is_the_name_recalled(conversations: list[list[Message]]) -> None:
    recalled = 0
    for conversation in conversations:
        name = None
        for text in answers([conversation]):
            if told := re.match(r"Nice to meet you, ([^!]+)!", text):
                name = told[1]
            elif asked := re.fullmatch(r"Your name is (.+)\.", text):
                assert asked[1] == name
                recalled += 1
            elif text == "You have not told me your name yet.":
                assert name is None
    assert recalled > 20


def test_the_tokenizer_encodes_anything_and_agrees_with_the_chat_format(
    data: Data, conversations: list[list[Message]]
) -> None:
    tokenizer = train_tokenizer(data, seed=0, vocab_size=600, conversations=100)
    for text in ("", "Zoë 🦜", "\x00\t\n\n x", "零 12+7=19", "<tag> \\ {}"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    encoder = ChatEncoder(tokenizer)
    for conversation in conversations[:50]:
        whole = "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in conversation
        )
        encoded = encoder.encode(conversation)
        assert encoded.ids == tokenizer.encode(whole, add_special_tokens=False).ids
        learned = [i for i, target in zip(encoded.ids, encoded.is_target, strict=True) if target]
        expected = "".join(f"{text}<|im_end|>" for text in answers([conversation]))
        assert tokenizer.decode(learned, skip_special_tokens=False) == expected
