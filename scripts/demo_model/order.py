"""Things with an order: days and months, numbers, sizes."""

from __future__ import annotations

from .talk import Exchange, Talk, sentence


def side(direction: int) -> str:
    """Return the word for a direction, 1 or -1."""
    return "after" if direction > 0 else "before"


def neighbour(
    talk: Talk, category: str, key: str, user: str, name: str, direction: int
) -> Exchange:
    """Answer with the day or month next to another."""
    days = talk.data.phrases("calendar.day")
    names = days if name in days else talk.data.phrases("calendar.month")
    other = names[(names.index(name) + direction) % len(names)]
    answer = f"{other} comes {side(direction)} {name}."
    remember = {"topic": "calendar", "direction": direction, "last": other}
    return Exchange(category, user, answer, (key,), remember)


def ask_calendar(talk: Talk) -> Exchange:
    """Ask about the order of days and months, or for a fact of the calendar."""
    roll = talk.rng.random()
    if roll < 0.2:
        fact = talk.rng.choice(talk.data.replies("calendar.facts"))
        return talk.fixed("calendar", fact.phrase, fact.answer, chance=0.3)
    unit = talk.rng.choice(("day", "month"))
    names = talk.data.phrases(f"calendar.{unit}")
    if roll < 0.32:
        index = talk.rng.randrange(len(names))
        form, ordinal = talk.pick("calendar.ordinal"), talk.data.phrases("calendar.ordinals")[index]
        answer = f"The {ordinal} {unit} is {names[index]}."
        words = {"o": ordinal, "u": unit, "p": "week" if unit == "day" else "year"}
        return talk.fact("calendar", form, names[index], answer, {"topic": ""}, **words)
    name, direction = talk.rng.choice(names), talk.rng.choice((1, 1, -1))
    form = talk.pick(f"calendar.{side(direction)}")
    if unit == "month" and "oday" in form:  # today and tomorrow are days
        form = f"What month comes {side(direction)} {{x}}?"
    user = talk.fill(form, x=name)
    if unit == "month":
        user = user.replace("day", "month")
    return neighbour(talk, "calendar", f"calendar:{form}|{name}", user, name, direction)


def follow_calendar(talk: Talk) -> Exchange:
    """Ask for another day or month in the direction asked for last."""
    name, direction = talk.state["last"], talk.state["direction"]
    if talk.chance(0.3):
        form = talk.pick("calendar.then")
    else:
        name = talk.pick(f"calendar.{talk.rng.choice(('day', 'day', 'month'))}")
        form = talk.pick("calendar.next")
        if "{w}" in form:
            direction = talk.rng.choice((1, -1))
    user = sentence(talk.fill(form, x=name, w=side(direction)))
    key = f"follow:{form}|{name} {direction}"
    return neighbour(talk, "follow_up_fact", key, user, name, direction)


def ask_counting(talk: Talk) -> Exchange:
    """Ask to count, for the next number, for the bigger of two, whether one is even."""
    rng = talk.rng
    kind = rng.choice(("to", "range", "down", "next", "next", "bigger", "bigger", "even"))
    if kind == "next":
        n, direction = rng.randint(1, 98), rng.choice((1, 1, -1))
        word, form = side(direction), talk.pick("counting.next")
        answer = f"{n + direction} comes {word} {n}."
        return talk.fact("counting", form, f"{n},{direction}", answer, w=word, n=n)
    if kind == "even":
        n, form = rng.randint(0, 99), talk.pick("counting.even")
        return talk.fact("counting", form, str(n), f"{n} is {'odd' if n % 2 else 'even'}.", n=n)
    if kind == "bigger":
        x, y = rng.sample(range(100), 2)
        user = talk.fill(talk.pick("counting.bigger"), x=x, y=y)
        small, big = sorted((x, y))
        answer, key = f"{big} is bigger than {small}.", f"bigger:{small},{big}"
        return Exchange("counting", user, answer, (key,), {"topic": "counting"})
    if kind == "range":
        low = rng.randint(0, 85)
        numbers = range(low, low + rng.randint(2, 14) + 1)
        user = talk.fill(talk.pick("counting.range"), l=low, h=numbers[-1])
        key = f"range:{low},{numbers[-1]}"
    else:
        n = rng.randint(2, 30) if kind == "to" else rng.randint(3, 20)
        numbers = range(1, n + 1) if kind == "to" else range(n, -1, -1)
        user = talk.fill(talk.pick(f"counting.{kind}"), n=n)
        key = f"{kind}:{user}"
    answer = ", ".join(map(str, numbers)) + "."
    return Exchange("counting", user, answer, (key,), {"topic": "counting"})


def ask_size(talk: Talk) -> Exchange:
    """Ask which of two things is bigger or smaller, or for the biggest or smallest animal.

    Neighbours on the scale are never held out: their order follows from nothing else.
    """
    if talk.chance(0.06):
        extreme, animal = talk.pick_pair("size.extremes")
        user, tag = talk.decorate(talk.fill(talk.pick("size.extreme"), x=extreme), chance=0.3)
        answer, keys = f"{animal} is the {extreme} animal.", (f"size:{user}",) if tag else ()
        return Exchange("size", user, answer, keys, {"topic": "size"})
    scale = talk.data.phrases("size.scale")
    i, j = talk.rng.sample(range(len(scale)), 2)
    form, x, y = talk.pick("size.ask"), scale[i], scale[j]
    big, small = (x, y) if i > j else (y, x)
    if form.startswith("Is") and "than" in form:
        relation = "bigger" if i > j else "smaller"
        answer = f"{'Yes' if relation in form else 'No'}, {x} is {relation} than {y}."
    elif "smaller" in form:
        answer = f"{sentence(small)} is smaller than {big}."
    else:
        answer = f"{sentence(big)} is bigger than {small}."
    keys = (f"size:{min(i, j)},{max(i, j)}",) if abs(i - j) > 1 else ()
    return Exchange("size", talk.fill(form, x=x, y=y), answer, keys, {"topic": "size"})
