"""Sums, differences and products, and going on from the last result."""

from __future__ import annotations

import dataclasses
import random

from . import tables as t
from .exchange import Asker, Exchange, State
from .wording import sentence

CALC_FORMS = (
    "What is {e}?",
    "What is {e}?",
    "What is {e}?",
    "What's {e}?",
    "{e}",
    "{e}",
    "{e} =",
    "{e} = ?",
    "{e}?",
    "How much is {e}?",
    "Calculate {e}.",
    "Compute {e}.",
    "Can you calculate {e}?",
    "What does {e} make?",
    "What do you get for {e}?",
    "Tell me what {e} is.",
    "Do you know what {e} is?",
    "Can you do {e}?",
    "Solve {e}.",
)

SIGNS = {
    "+": ("+", "+", "+", "plus", "and"),
    "-": ("-", "-", "-", "minus", "−"),
    "×": ("×", "x", "x", "*", "*", "times"),
    "/": ("/", "/", "divided by", "÷"),
}

BIG_SUM = "Those numbers are too big for me. I can add and subtract numbers up to 99."

BIG_PRODUCT = (
    "That product is too big for me. I can multiply a number below 100 by a number up to 10."
)

NOT_WHOLE = "I can only begin with whole numbers from 0 to 99."

NO_DIVISION = "I have not learned to divide. I can add, subtract and multiply small numbers."


def solve(left: int, sign: str, right: int) -> str:
    """Return the answer with its working, or the refusal where the numbers are out of range.

    Products with a two-digit factor are split into tens and ones, which lets them follow from the
    times table.
    """
    if sign == "/":
        return NO_DIVISION
    if max(abs(left), abs(right)) > 99:
        return BIG_PRODUCT if sign == "×" else BIG_SUM
    if sign == "+":
        return f"{left} + {right} = {left + right}."
    if sign == "-":
        return f"{left} - {right} = {left - right}."
    big, small = max(left, right), min(left, right)
    if small > 10:
        return BIG_PRODUCT
    if big <= 10 or small in (0, 1, 10) or big % 10 == 0:
        return f"{left} × {right} = {left * right}."
    tens, ones = big // 10 * 10, big % 10
    return f"{left} × {right} = {tens * small} + {ones * small} = {left * right}."


def calc_keys(left: int, sign: str, right: int) -> tuple[str, ...]:
    """Name the pair, without its order where the order does not matter.

    The times table itself (both numbers up to 10) is a fact to know and is never held back.
    """
    if sign == "-":
        return (f"sub:{left},{right}",)
    low, high = min(left, right), max(left, right)
    if sign == "+":
        return (f"add:{low},{high}",)
    if sign != "×" or high <= 10 or low > 10:
        return ()
    parts = sorted((high // 10 * 10 * low, high % 10 * low))  # the working shows this sum
    return f"mul:{low},{high}", f"add:{parts[0]},{parts[1]}"


def write_expression(rng: random.Random, left: int, sign: str, right: int) -> str:
    """Write the expression with one of the usual signs, sometimes without spaces or in words."""
    mark = rng.choice(SIGNS[sign])
    if not mark.isalpha() and " " not in mark and rng.random() < 0.4:
        return f"{left}{mark}{right}"
    if mark.isalpha() and 0 <= left <= 20 and 0 <= right <= 20 and rng.random() < 0.5:
        return f"{t.NUMBER_WORDS[left]} {mark} {t.NUMBER_WORDS[right]}"
    return f"{left} {mark} {right}"


def number(rng: random.Random, low: int = 0, high: int = 99) -> int:
    """Return a number of the range; small ones, which people ask for most, more often."""
    return rng.randint(low, min(high, 12)) if rng.random() < 0.2 else rng.randint(low, high)


WORDED_SUMS = (
    ("+", "Add {l} and {r}."),
    ("+", "What is the sum of {l} and {r}?"),
    ("+", "Add {r} to {l}."),
    ("+", "I have {l} apples and get {r} more. How many apples do I have?"),
    ("-", "Subtract {r} from {l}."),
    ("-", "Take {r} from {l}."),
    ("-", "What is the difference between {l} and {r}?"),
    ("-", "I have {l} apples and eat {r}. How many are left?"),
    ("×", "Multiply {l} by {r}."),
    ("×", "Multiply {l} and {r}."),
    ("×", "What is the product of {l} and {r}?"),
)


def arithmetic(sign: str) -> Asker:
    """Make the asker for one sign."""
    category = {"+": "addition", "-": "subtraction", "×": "multiplication"}[sign]
    worded = [form for worded_sign, form in WORDED_SUMS if worded_sign == sign]

    def ask(rng: random.Random, state: State) -> Exchange:
        left, right = number(rng), number(rng)
        if sign == "×":
            left, right = number(rng), rng.randint(0, 10)
            if rng.random() < 0.5:
                left, right = right, left
        form = rng.choice(worded)
        if rng.random() < 0.15 and not ("apples" in form and right > left):
            user = form.format(l=left, r=right)
        else:
            user = rng.choice(CALC_FORMS).format(e=write_expression(rng, left, sign, right))
        return calculation(category, user, left, sign, right)

    return ask


def calculation(category: str, user: str, left: int, sign: str, right: int) -> Exchange:
    """Put a calculation and its answer together; the result is what "and plus 2?" goes on from."""
    answer = solve(left, sign, right)
    remember: State = {"topic": "arithmetic"}
    if "=" in answer:
        remember["result"] = {"+": left + right, "-": left - right, "×": left * right}[sign]
    else:
        remember["topic"] = "refused"
    return Exchange(category, user, answer, calc_keys(left, sign, right), remember)


def ask_three_terms(rng: random.Random, state: State) -> Exchange:
    """Ask for a calculation with three small numbers, worked out from the left."""
    x, y, z = (rng.randint(1, 9) for _ in range(3))
    first = rng.choice("+++-") if x >= y else "+"
    subtotal = x + y if first == "+" else x - y
    second = rng.choice("+-")
    result = subtotal + z if second == "+" else subtotal - z
    tight, words = rng.random() < 0.4, rng.random() < 0.2
    signs = [{"+": "plus", "-": "minus"}[sign] if words else sign for sign in (first, second)]
    expression = f"{x} {signs[0]} {y} {signs[1]} {z}"
    user = rng.choice(CALC_FORMS).format(
        e=expression.replace(" ", "") if tight and not words else expression
    )
    answer = f"{x} {first} {y} {second} {z} = {subtotal} {second} {z} = {result}."
    keys = (
        f"three:{x}{first}{y}{second}{z}",
        *calc_keys(x, first, y),
        *calc_keys(subtotal, second, z),
    )
    return Exchange("addition", user, answer, keys, {"topic": "arithmetic", "result": result})


def ask_twice(rng: random.Random, state: State) -> Exchange:
    """Ask for the double of a number."""
    n = number(rng)
    user = rng.choice(
        (
            "Double {n}.",
            "What is double {n}?",
            "What is twice {n}?",
            "Twice {n}?",
            "What is the double of {n}?",
        )
    )
    exchange = calculation("multiplication", user.format(n=n), 2, "×", n)
    return dataclasses.replace(exchange, keys=(*exchange.keys, f"double:{n}"))


def ask_not_whole(rng: random.Random, state: State) -> Exchange:
    """Ask for a calculation with a fraction or with a negative number."""
    left, right, sign = number(rng), number(rng), rng.choice("+-×")
    texts = (
        [f"{left}.{rng.randint(1, 9)}", str(right)]
        if rng.random() < 0.7
        else [f"-{left + 1}", str(right)]
    )
    if rng.random() < 0.3 and "." in texts[0]:
        texts.reverse()
    user = rng.choice(CALC_FORMS).format(e=f"{texts[0]} {rng.choice(SIGNS[sign][:4])} {texts[1]}")
    return Exchange("too_big", user, NOT_WHOLE, (f"fraction:{texts}{sign}",), {"topic": "refused"})


def ask_too_big(rng: random.Random, state: State) -> Exchange:
    """Ask for a calculation that is out of range."""
    if rng.random() < 0.2:
        return ask_not_whole(rng, state)
    sign = rng.choice("++-×××//")
    left, right = (
        rng.randint(100, 10 ** rng.randint(3, 6)),
        rng.choice((number(rng), rng.randint(100, 9999))),
    )
    if sign == "/":
        left, right = rng.randint(1, 200), rng.randint(1, 20)
    elif sign == "×" and rng.random() < 0.6:
        left, right = rng.randint(11, 99), rng.randint(11, 99)
    if rng.random() < 0.5 and sign != "/":
        left, right = right, left
    user = rng.choice(CALC_FORMS).format(e=write_expression(rng, left, sign, right))
    remember = {"topic": "refused"}
    return Exchange(
        "too_big", user, solve(left, sign, right), (f"big:{left}{sign}{right}",), remember
    )


NEXT_STEPS = (
    "And {w} {n}?",
    "And {w} {n}?",
    "{w} {n}",
    "And {w} {n}",
    "Now {w} {n}.",
    "And that {w} {n}?",
    "What about {w} {n}?",
    "{w} {n}?",
    "And then {w} {n}?",
    "What is that {w} {n}?",
)

NEXT_WORDED = {
    "+": ("Add {n}.", "Now add {n}.", "And add {n}?", "Add {n} to that.", "Add {n} more."),
    "-": (
        "Subtract {n}.",
        "Now subtract {n}.",
        "Take away {n}.",
        "Subtract {n} from that.",
        "And take away {n}?",
    ),
    "×": (
        "Multiply that by {n}.",
        "Now multiply it by {n}.",
        "Multiply by {n}.",
        "And multiplied by {n}?",
    ),
}


def follow_arithmetic(rng: random.Random, state: State) -> Exchange:
    """Go on calculating with the last result."""
    result: int = state["result"]
    sign = rng.choice("++--×") if result <= 10 else rng.choice("+-")
    n = rng.randint(0, 10) if sign == "×" else rng.choice((rng.randint(0, 12), rng.randint(0, 99)))
    if not -99 <= result <= 99:
        sign = rng.choice("+-")
    if result < 0:  # going on from here would leave the small world
        return arithmetic("+")(rng, state)
    if rng.random() < 0.3:
        user = rng.choice(NEXT_WORDED[sign]).format(n=n)
    else:
        word = rng.choice(
            {
                "+": ("plus", "plus", "+"),
                "-": ("minus", "minus", "-"),
                "×": ("times", "times", "x"),
            }[sign]
        )
        user = sentence(rng.choice(NEXT_STEPS).format(w=word, n=n))
    return calculation("follow_up_arithmetic", user, result, sign, n)
