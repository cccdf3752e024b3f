"""Things with an order: days and months, numbers, sizes."""

from __future__ import annotations

import random

from . import tables as t
from .exchange import Exchange, State, from_template
from .wording import decorate, sentence

AFTER_FORMS = (
    "What day comes after {x}?",
    "Which day comes after {x}?",
    "What comes after {x}?",
    "What is the day after {x}?",
    "What's after {x}?",
    "Which day follows {x}?",
    "What day is after {x}?",
    "Today is {x}. What day is tomorrow?",
    "If today is {x}, what is tomorrow?",
    "The day after {x}?",
    "What is next after {x}?",
)

BEFORE_FORMS = (
    "What day comes before {x}?",
    "Which day comes before {x}?",
    "What comes before {x}?",
    "What is the day before {x}?",
    "What's before {x}?",
    "What day is before {x}?",
    "Today is {x}. What day was yesterday?",
    "If today is {x}, what was yesterday?",
    "The day before {x}?",
)

CALENDAR_FACTS = (
    ("How many days are in a week?", "A week has 7 days."),
    ("How many days are there in a week?", "A week has 7 days."),
    ("How many days does a week have?", "A week has 7 days."),
    ("How many months are in a year?", "A year has 12 months."),
    ("How many months are there in a year?", "A year has 12 months."),
    ("How many months does a year have?", "A year has 12 months."),
    ("How many days are in a year?", "A year has 365 days."),
    ("How many days does a year have?", "A year has 365 days."),
    ("How many hours are in a day?", "A day has 24 hours."),
    ("How many hours does a day have?", "A day has 24 hours."),
    ("How many minutes are in an hour?", "An hour has 60 minutes."),
    ("How many minutes does an hour have?", "An hour has 60 minutes."),
    ("How many seconds are in a minute?", "A minute has 60 seconds."),
    ("How many weeks are in a year?", "A year has 52 weeks."),
    ("How many weeks does a year have?", "A year has 52 weeks."),
    ("Name the days of the week.", "The days of the week are " + ", ".join(t.DAYS) + "."),
    ("What are the days of the week?", "The days of the week are " + ", ".join(t.DAYS) + "."),
    ("List the days of the week.", "The days of the week are " + ", ".join(t.DAYS) + "."),
    ("Name the months of the year.", "The months are " + ", ".join(t.MONTHS) + "."),
    ("What are the months of the year?", "The months are " + ", ".join(t.MONTHS) + "."),
    ("List the months.", "The months are " + ", ".join(t.MONTHS) + "."),
    ("Which days are the weekend?", "The weekend is Saturday and Sunday."),
    ("What days are the weekend?", "The weekend is Saturday and Sunday."),
    ("When is the weekend?", "The weekend is Saturday and Sunday."),
    ("What are the seasons?", "The seasons are spring, summer, autumn and winter."),
    ("Name the seasons.", "The seasons are spring, summer, autumn and winter."),
    ("How many seasons are there?", "There are 4 seasons: spring, summer, autumn and winter."),
)


def calendar_answer(name: str, direction: int) -> str:
    """Return the sentence about the neighbour of a day or month."""
    names = t.DAYS if name in t.DAYS else t.MONTHS
    other = names[(names.index(name) + direction) % len(names)]
    return f"{other} comes {'after' if direction > 0 else 'before'} {name}."


def ask_calendar(rng: random.Random, state: State) -> Exchange:
    """Ask about the order of days and months, or for a fact of the calendar."""
    roll = rng.random()
    if roll < 0.2:
        question, answer = rng.choice(CALENDAR_FACTS)
        user, tag = decorate(rng, question, chance=0.3)
        keys = (f"calendar:{question}|{tag}",) if tag else ()
        return Exchange("calendar", user, answer, keys, {"topic": "calendar facts"})
    names = rng.choice((t.DAYS, t.MONTHS))
    unit = "day" if names is t.DAYS else "month"
    if roll < 0.32:
        index = rng.randrange(len(names))
        form = rng.choice(
            (
                "What is the {o} {u}?",
                "Which {u} is the {o}?",
                "What is the {o} {u} of the {p}?",
                "Name the {o} {u}.",
            )
        )
        period = "week" if unit == "day" else "year"
        user = form.format(o=t.ORDINALS[index], u=unit, p=period)
        answer = f"The {t.ORDINALS[index]} {unit} is {names[index]}."
        return from_template("calendar", form, names[index], user, answer, topic="calendar facts")
    name, direction = rng.choice(names), rng.choice((1, 1, -1))
    form = rng.choice(AFTER_FORMS if direction > 0 else BEFORE_FORMS)
    user = form.format(x=name)
    if unit == "month":
        if "oday" in form:
            form = (
                "What month comes after {x}?" if direction > 0 else "What month comes before {x}?"
            )
            user = form.format(x=name)
        user = user.replace("day", "month")
    answer = calendar_answer(name, direction)
    remember = {"topic": "calendar", "direction": direction, "last": answer.split(" ")[0]}
    return Exchange("calendar", user, answer, (f"calendar:{form}|{name}",), remember)


def follow_calendar(rng: random.Random, state: State) -> Exchange:
    """Ask for another day or month in the direction asked for last."""
    if rng.random() < 0.3:
        name, direction = state["last"], state["direction"]
        form = rng.choice(
            (
                "And {w} that?",
                "And {w} that?",
                "And then?",
                "And {w} that one?",
                "What comes {w} that?",
            )
        )
    else:
        name, direction = rng.choice(rng.choice((t.DAYS, t.DAYS, t.MONTHS))), 0
        form = rng.choice(
            ("And {x}?", "What about {x}?", "And {w} {x}?", "And {w} {x}?", "{w} {x}?")
        )
        direction = state["direction"] if "{w}" not in form else rng.choice((1, -1))
    user = sentence(form.format(x=name, w="after" if direction > 0 else "before"))
    answer = calendar_answer(name, direction)
    remember = {"topic": "calendar", "direction": direction, "last": answer.split(" ")[0]}
    return Exchange(
        "follow_up_fact", user, answer, (f"follow:{form}|{name} {direction}",), remember
    )


COUNT_FORMS = (
    "Count to {n}.",
    "Count up to {n}.",
    "Can you count to {n}?",
    "Please count to {n}.",
    "Count from 1 to {n}.",
)

RANGE_FORMS = (
    "Count from {l} to {h}.",
    "Can you count from {l} to {h}?",
    "Please count from {l} to {h}.",
    "Count {l} to {h}.",
)

DOWN_FORMS = (
    "Count down from {n}.",
    "Count backwards from {n}.",
    "Can you count down from {n}?",
    "Count down from {n} to 0.",
)

COMPARE_FORMS = (
    "Which is bigger, {x} or {y}?",
    "Which number is bigger, {x} or {y}?",
    "What is more, {x} or {y}?",
    "Is {x} or {y} bigger?",
)


def ask_counting(rng: random.Random, state: State) -> Exchange:
    """Ask to count, for the next number, or for the bigger of two."""
    kind = rng.choice(("to", "range", "down", "next", "next", "bigger", "bigger", "even"))
    topic: State = {"topic": "counting"}
    if kind == "to":
        n = rng.randint(2, 30)
        user, numbers = rng.choice(COUNT_FORMS).format(n=n), range(1, n + 1)
        key = f"to:{user}"
    elif kind == "range":
        low = rng.randint(0, 85)
        high = low + rng.randint(2, 14)
        user, numbers, key = (
            rng.choice(RANGE_FORMS).format(l=low, h=high),
            range(low, high + 1),
            f"range:{low},{high}",
        )
    elif kind == "down":
        n = rng.randint(3, 20)
        user, numbers = rng.choice(DOWN_FORMS).format(n=n), range(n, -1, -1)
        key = f"down:{user}"
    elif kind == "next":
        return ask_next_number(rng)
    elif kind == "even":
        n = rng.randint(0, 99)
        form = rng.choice(
            (
                "Is {n} even or odd?",
                "Is {n} odd or even?",
                "Is {n} an even number?",
                "Is {n} even?",
                "Is {n} odd?",
            )
        )
        return from_template(
            "counting",
            form,
            str(n),
            form.format(n=n),
            f"{n} is {'odd' if n % 2 else 'even'}.",
            **topic,
        )
    else:
        x, y = rng.sample(range(100), 2)
        user = rng.choice(COMPARE_FORMS).format(x=x, y=y)
        return Exchange(
            "counting",
            user,
            f"{max(x, y)} is bigger than {min(x, y)}.",
            (f"bigger:{min(x, y)},{max(x, y)}",),
            topic,
        )
    return Exchange("counting", user, ", ".join(map(str, numbers)) + ".", (key,), topic)


def ask_next_number(rng: random.Random) -> Exchange:
    """Ask which number comes before or after another."""
    n, direction = rng.randint(1, 98), rng.choice((1, 1, -1))
    word = "after" if direction > 0 else "before"
    form = rng.choice(
        (
            "What number comes {w} {n}?",
            "What comes {w} {n}?",
            "Which number is {w} {n}?",
            "What is the number {w} {n}?",
        )
    )
    answer = f"{n + direction} comes {word} {n}."
    return from_template(
        "counting", form, f"{n},{direction}", form.format(w=word, n=n), answer, topic="counting"
    )


SIZE_FORMS = (
    "Which is bigger, {x} or {y}?",
    "What is bigger, {x} or {y}?",
    "Which is smaller, {x} or {y}?",
    "What is smaller, {x} or {y}?",
    "Is {x} bigger than {y}?",
    "Is {x} smaller than {y}?",
    "Is {x} or {y} bigger?",
)


def ask_size(rng: random.Random, state: State) -> Exchange:
    """Ask which of two things is bigger or smaller.

    Neighbours on the scale are never held back: their order follows from nothing else.
    """
    if rng.random() < 0.06:
        return ask_extreme_size(rng)
    i, j = rng.sample(range(len(t.BY_SIZE)), 2)
    form = rng.choice(SIZE_FORMS)
    x, y = t.BY_SIZE[i], t.BY_SIZE[j]
    user = form.format(x=x, y=y)
    big, small = (x, y) if i > j else (y, x)
    if form.startswith("Is") and "than" in form:
        relation = "bigger" if i > j else "smaller"
        answer = f"{'Yes' if relation in form else 'No'}, {x} is {relation} than {y}."
    elif "smaller" in form:
        answer = f"{sentence(small)} is smaller than {big}."
    else:
        answer = f"{sentence(big)} is bigger than {small}."
    keys = (f"size:{min(i, j)},{max(i, j)}",) if abs(i - j) > 1 else ()
    return Exchange("size", user, answer, keys, {"topic": "size"})


def ask_extreme_size(rng: random.Random) -> Exchange:
    """Ask for the biggest or the smallest animal."""
    extreme, animal = rng.choice((("biggest", "A whale"), ("smallest", "An ant")))
    question = rng.choice(
        ("What is the {x} animal?", "Which animal is the {x}?", "Name the {x} animal.")
    )
    user, tag = decorate(rng, question.format(x=extreme), chance=0.3)
    keys = (f"size:{user}",) if tag else ()
    return Exchange("size", user, f"{animal} is the {extreme} animal.", keys, {"topic": "size"})
