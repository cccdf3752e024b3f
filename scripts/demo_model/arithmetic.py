"""Sums, differences and products, and going on from the last result."""

from __future__ import annotations

import dataclasses

from .talk import Asker, Exchange, Talk, sentence


def solve(left: int, sign: str, right: int) -> str | None:
    """Return the answer with its working, or None where the numbers are out of range.

    Products with a two-digit factor are split into tens and ones, which lets them follow from the
    times table.
    """
    if sign == "/" or max(abs(left), abs(right)) > 99:
        return None
    if sign in "+-":
        return f"{left} {sign} {right} = {result_of(left, sign, right)}."
    big, small = max(left, right), min(left, right)
    if small > 10:
        return None
    if big <= 10 or small in (0, 1, 10) or big % 10 == 0:
        return f"{left} × {right} = {left * right}."
    tens, ones = big // 10 * 10, big % 10
    return f"{left} × {right} = {tens * small} + {ones * small} = {left * right}."


def result_of(left: int, sign: str, right: int) -> int:
    """Return the number that a calculation gives."""
    return {"+": left + right, "-": left - right, "×": left * right}[sign]


def calc_keys(left: int, sign: str, right: int) -> tuple[str, ...]:
    """Name the pair, without its order where the order does not matter.

    The times table itself (both numbers up to 10) is a fact to know and is never held out.
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


def ask_for(talk: Talk, left: int, sign: str, right: int) -> str:
    """Ask with one of the usual signs, sometimes without spaces or in words."""
    form, mark = talk.pick("arithmetic.ask"), talk.pick(f"arithmetic.signs.{sign}")
    expression = f"{left} {mark} {right}"
    if not mark.isalpha() and " " not in mark and talk.chance(0.4):
        expression = f"{left}{mark}{right}"
    elif mark.isalpha() and 0 <= left <= 20 and 0 <= right <= 20 and talk.chance(0.5):
        numbers = talk.data.phrases("arithmetic.numbers")
        expression = f"{numbers[left]} {mark} {numbers[right]}"
    return talk.fill(form, e=expression)


def number(talk: Talk) -> int:
    """Return a number up to 99; small ones, which people ask for most, more often."""
    return talk.rng.randint(0, 12 if talk.chance(0.2) else 99)


def arithmetic(category: str, sign: str) -> Asker:
    """Make the asker for one sign."""

    def ask(talk: Talk) -> Exchange:
        left, right = number(talk), number(talk)
        if sign == "×":
            left, right = number(talk), talk.rng.randint(0, 10)
            if talk.chance(0.5):
                left, right = right, left
        form = talk.pick(f"arithmetic.worded.{sign}")
        if talk.chance(0.15) and not ("apples" in form and right > left):
            user = talk.fill(form, l=left, r=right)
        else:
            user = ask_for(talk, left, sign, right)
        return calculation(talk, category, user, left, sign, right)

    return ask


def calculation(talk: Talk, category: str, user: str, left: int, sign: str, right: int) -> Exchange:
    """Put a calculation and its answer together; the result is what "and plus 2?" goes on from."""
    keys, answer = calc_keys(left, sign, right), solve(left, sign, right)
    if answer is None:
        reason = {"/": "no_division", "×": "big_product"}.get(sign, "big_sum")
        return Exchange(category, user, talk.say(f"arithmetic.{reason}"), keys, {"topic": ""})
    remember = {"topic": "arithmetic", "result": result_of(left, sign, right)}
    return Exchange(category, user, answer, keys, remember)


ask_addition = arithmetic("addition", "+")
ask_subtraction = arithmetic("subtraction", "-")
ask_multiplication = arithmetic("multiplication", "×")


def ask_three_terms(talk: Talk) -> Exchange:
    """Ask for a calculation with three small numbers, worked out from the left."""
    x, y, z = (talk.rng.randint(1, 9) for _ in range(3))
    first = talk.rng.choice("+++-") if x >= y else "+"
    subtotal = result_of(x, first, y)
    second = talk.rng.choice("+-")
    result = result_of(subtotal, second, z)
    tight, words = talk.chance(0.4), talk.chance(0.2)
    signs = [{"+": "plus", "-": "minus"}[sign] if words else sign for sign in (first, second)]
    expression = f"{x} {signs[0]} {y} {signs[1]} {z}"
    if tight and not words:
        expression = expression.replace(" ", "")
    user = talk.fill(talk.pick("arithmetic.ask"), e=expression)
    answer = f"{x} {first} {y} {second} {z} = {subtotal} {second} {z} = {result}."
    parts = (*calc_keys(x, first, y), *calc_keys(subtotal, second, z))
    keys = (f"three:{x}{first}{y}{second}{z}", *parts)
    return Exchange("addition", user, answer, keys, {"topic": "arithmetic", "result": result})


def ask_double(talk: Talk) -> Exchange:
    n = number(talk)
    user = talk.fill(talk.pick("arithmetic.double"), n=n)
    exchange = calculation(talk, "multiplication", user, 2, "×", n)
    return dataclasses.replace(exchange, keys=(*exchange.keys, f"double:{n}"))


def ask_not_whole(talk: Talk) -> Exchange:
    """Ask for a calculation with a fraction or with a negative number."""
    left, right, sign = number(talk), number(talk), talk.rng.choice("+-×")
    fraction = talk.chance(0.7)
    texts = [f"{left}.{talk.rng.randint(1, 9)}" if fraction else f"-{left + 1}", str(right)]
    if talk.chance(0.3) and fraction:
        texts.reverse()
    form, mark = talk.pick("arithmetic.ask"), talk.pick(f"arithmetic.plain_signs.{sign}")
    user = talk.fill(form, e=f"{texts[0]} {mark} {texts[1]}")
    answer, keys = talk.say("arithmetic.not_whole"), (f"fraction:{texts}{sign}",)
    return Exchange("too_big", user, answer, keys, {"topic": ""})


def ask_too_big(talk: Talk) -> Exchange:
    """Ask for a calculation that is out of range, or of a kind not learned."""
    if talk.chance(0.2):
        return ask_not_whole(talk)
    rng = talk.rng
    sign = rng.choice("++-×××//")
    left = rng.randint(100, 10 ** rng.randint(3, 6))
    right = rng.choice((number(talk), rng.randint(100, 9999)))
    if sign == "/":
        left, right = rng.randint(1, 200), rng.randint(1, 20)
    elif sign == "×" and rng.random() < 0.6:
        left, right = rng.randint(11, 99), rng.randint(11, 99)
    if rng.random() < 0.5 and sign != "/":
        left, right = right, left
    exchange = calculation(talk, "too_big", ask_for(talk, left, sign, right), left, sign, right)
    return dataclasses.replace(exchange, keys=(f"big:{left}{sign}{right}",))


def follow_arithmetic(talk: Talk) -> Exchange:
    """Go on calculating with the last result."""
    rng, result = talk.rng, talk.state["result"]
    sign = rng.choice("++--×") if result <= 10 else rng.choice("+-")
    n = rng.randint(0, 10) if sign == "×" else rng.choice((rng.randint(0, 12), rng.randint(0, 99)))
    if not -99 <= result <= 99:
        sign = rng.choice("+-")
    if result < 0:  # going on from here would leave the small world
        return ask_addition(talk)
    if talk.chance(0.3):
        user = talk.fill(talk.pick(f"arithmetic.next.worded.{sign}"), n=n)
    else:
        word = talk.pick(f"arithmetic.next.signs.{sign}")
        user = sentence(talk.fill(talk.pick("arithmetic.next.forms"), w=word, n=n))
    return calculation(talk, "follow_up_arithmetic", user, result, sign, n)
