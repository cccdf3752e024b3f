"""Short stories on request, and questions about the story told."""

from __future__ import annotations

from .talk import Exchange, Talk, a

PLOT = ("name", "nature", "home", "found", "friend", "ending")


def story(talk: Talk, user: str, who: str, keys: tuple[str, ...], **changes: str) -> Exchange:
    """Put a request and its story together and remember whom it was about."""
    plot = {**talk.data.row(f"story.plots.{who}", PLOT), **changes}
    the_friend = f"the {plot['friend'].split(' ', 1)[1]}"
    words = {"who": who, "a_nature": a(plot["nature"]), "the_friend": the_friend}
    lines = talk.data.phrases("story.text")
    text = " ".join(talk.fill(line, **words, **plot) for line in lines)
    remember = {"topic": "story", "story": (who, plot["name"], plot["nature"])}
    return Exchange("story", user, text, keys, remember)


def plain_story(talk: Talk, number: int, key: str, requests: str, chance: float) -> Exchange:
    """Ask for any story; the answer is one of the first of the data."""
    user, tag = talk.decorate(talk.pick(requests), chance)
    who = talk.data.names("story.plots")[number]
    return story(talk, user, who, (f"{key}:{user}",) if tag else ())


def ask_story(talk: Talk) -> Exchange:
    """Ask for a story: any, about a kind of character, with a nature, with a name."""
    roll, kinds = talk.rng.random(), talk.data.names("story.plots")
    if roll < 0.15:
        return plain_story(talk, 0, "story", "story.plain", 0.3)
    if roll < 0.2:
        return plain_story(talk, 1, "story", "story.another", 0.3)
    if roll < 0.25:
        return ask_impossible_story(talk)
    if roll < 0.32:
        name = talk.any_name()
        user = talk.fill(talk.pick("story.ask"), c=name)
        return story(talk, user, kinds[0], (f"name:{name}",), name=name)
    who, opener = talk.rng.choice(kinds), talk.pick("story.ask")
    if roll < 0.36:
        second = talk.rng.choice([other for other in kinds if other != who])
        user = talk.fill(opener, c=f"{a(who)} and {a(second)}")
        return story(talk, user, who, (f"story:{who} and {second}",))
    phrase, keys, changes = a(who), (f"story:{opener}|{who}",), {}
    if talk.chance(0.25):
        changes["nature"] = talk.pick("story.natures")
        character = f"{changes['nature']} {who}"
        phrase, keys = a(character), (f"story:{character}",)
    if talk.chance(0.6):
        changes["name"] = talk.any_name()
        phrase = f"{phrase} {talk.rng.choice(('named', 'named', 'called'))} {changes['name']}"
        keys += (f"name:{changes['name']}",)
    return story(talk, talk.fill(opener, c=phrase), who, keys, **changes)


def follow_story(talk: Talk) -> Exchange:
    """Ask for one more story in short, or about the one just told."""
    if talk.rng.random() > 0.1:
        return ask_story_detail(talk)
    return plain_story(talk, 1, "more", "story.next", 0.15)


def ask_impossible_story(talk: Talk) -> Exchange:
    """Ask for a story about something the model has no story about."""
    invented, noun = a(talk.invented_word()), talk.pick("unknown.nouns")
    what = talk.rng.choice((invented, noun, a(talk.pick("story.impossible"))))
    opener = talk.pick("story.ask")
    answer = talk.say("story.unknown", x=what)
    return talk.fact("story", opener, what, answer, {"topic": "no story"}, c=what)


def ask_story_detail(talk: Talk) -> Exchange:
    """Ask about the story told last, or about one when none was told."""
    question = talk.rng.choice(talk.data.replies("story.questions"))
    told, kinds = talk.state.get("story"), talk.data.names("story.plots")
    who, name, nature = told or (talk.rng.choice(kinds), talk.any_name(), "small")
    plot = talk.data.row(f"story.plots.{who}", PLOT)
    words = {"w": who, "aw": a(who), "n": name, "anature": a(nature), **plot}
    user = talk.fill(question.phrase, **words)
    if not told:
        if "{n}" in question.phrase:
            return ask_story_detail(talk)
        return Exchange("recall_untold", user, talk.say("story.untold"), (f"nostory:{user}",))
    keys = (f"storyq:{question.phrase}|{who}",)
    if name != plot["name"]:
        keys += (f"name:{name}",)
    answer = talk.fill(question.answer, **words)
    return Exchange("story_question", user, answer, keys, {"topic": "story"})
