"""Conversations about a small world, generated from a seed.

Every exchange carries *keys*: short strings that say which combination it asks about, such as `add:7,12` or
`name:Anna`. One key in ten, chosen by a hash of its text, is held back: training conversations never contain it,
and each question of the held-back set contains at least one. So the score on the held-back set says whether the
model has learned the rule and not the list.

Answers are a function of the conversation so far (never random), so that a greedy answer can be compared exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import tables as t

HELD_BACK_ONE_IN = 10

Message = dict[str, str]
State = dict[str, Any]


@dataclass(frozen=True)
class Exchange:
    """One question with its answer, and what the conversation knows afterwards."""

    category: str
    user: str
    assistant: str
    keys: tuple[str, ...] = ()
    remember: State = field(default_factory=dict)


Asker = Callable[[random.Random, State], Exchange]


def is_held_back(key: str) -> bool:
    """Tell whether training must never show this combination (the same on every machine and run)."""
    return zlib.crc32(key.encode()) % HELD_BACK_ONE_IN == 0


# --------------------------------------------------------------------------------------------- wording


def a(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiouAEIOU" and not noun.startswith(("uni", "use")) else f"a {noun}"


def sentence(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def plural(noun: str) -> str:
    """Return the plural of a noun of the tables."""
    return t.IRREGULAR_PLURALS.get(noun, noun + "s")


PREFIXES = ("Hey, ", "Hi, ", "Hello, ", "Ok, ", "So, ", "Now, ", "Well, ", "Please tell me, ", "Um, ", "And now, ")
SUFFIXES = (" please", ", please", " for me", " 🙂", " thanks", " my friend", ", buddy")
TYPOS = {
    "what": ("waht", "wat", "whta"),
    "what's": ("whats",),
    "you": ("u", "yuo"),
    "are": ("r", "aer"),
    "the": ("teh", "th"),
    "story": ("stroy", "sotry", "storie"),
    "colour": ("colur", "coluor"),
    "color": ("colr", "coler"),
    "tell": ("tel", "tlel"),
    "comes": ("coms",),
    "after": ("aftr", "afer"),
    "before": ("befor", "bevore"),
    "opposite": ("oposite", "opposit"),
    "please": ("plz", "pls"),
    "hello": ("helo", "hallo", "helllo"),
    "about": ("abuot", "abot"),
    "name": ("nmae", "naem"),
    "capital": ("captial", "capitol"),
    "thanks": ("thx", "thanx"),
    "which": ("wich",),
    "does": ("dose",),
    "many": ("mnay",),
}


def decapitalise(text: str) -> str:
    """Lower the first letter unless the word is I, I'm or all in capitals."""
    first = text.split(" ")[0]
    if first in ("I", "I'm") or (len(first) > 1 and first.isupper()):
        return text
    return text[:1].lower() + text[1:]


def decorate(rng: random.Random, text: str, chance: float = 0.15) -> tuple[str, str]:
    """Put a polite or idle phrase before or behind the text now and then; return it with a tag of what was added."""
    prefix = rng.choice(PREFIXES) if rng.random() < chance else ""
    suffix = rng.choice(SUFFIXES) if rng.random() < chance * 0.6 else ""
    if prefix:
        text = prefix + decapitalise(text)
    if suffix:
        body, mark = (text[:-1], text[-1]) if text[-1] in ".?!" else (text, "")
        text = body + suffix + mark
    return text, f"{prefix}|{suffix}" if prefix or suffix else ""


def misspell(rng: random.Random, text: str) -> str:
    """Mistype one of the common words."""
    words = text.split(" ")
    spots = [i for i, word in enumerate(words) if word.lower() in TYPOS]
    if spots:
        spot = rng.choice(spots)
        words[spot] = rng.choice(TYPOS[words[spot].lower()])
    return " ".join(words)


def roughen(rng: random.Random, text: str, may_shout: bool = True) -> str:
    """Type the text the way people do: lower case, no full stop, no apostrophe, a slip of the finger.

    Shouting (all capitals) is left out where the answer repeats words of the question: their usual spelling cannot
    be read from capitals.
    """
    if rng.random() < 0.06:
        text = misspell(rng, text)
    roll = rng.random()
    if roll < 0.40:
        text = text.lower()
    elif roll < 0.43 and may_shout:
        text = text.upper()
    roll = rng.random()
    if roll < 0.40:
        text = text.rstrip(".?!") or text
    elif roll < 0.45:
        text = text.rstrip(".?!") + rng.choice(("!", "??", "...", " ?", "!!"))
    if rng.random() < 0.25:
        text = text.replace("'", "")
    return text


# --------------------------------------------------------------------------------------------- small talk

UNKNOWN = "Sorry, I only know a small world: greetings, small sums, colours, days, counting, animals and short stories."
HELP = (
    "I can chat a little, add, subtract and multiply small numbers, count, name colours, days, opposites, animals and "
    "capitals, remember your name, and tell short stories."
)

SECOND_JOKE = "What do you call a sleeping bull? A bulldozer! 😄"

# category, answer, phrasings
SMALL_TALK: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("greeting", "Hi! 👋 How can I help you?", ("Hi", "Hi!", "Hi there", "hi", "Hii", "hi there!", "Hi :)", "Hi bot")),
    (
        "greeting",
        "Hello! 👋 How can I help you?",
        ("Hello", "Hello!", "Hello there", "Hello there!", "hello", "Hello hello", "Hello bot", "Hello world"),
    ),
    (
        "greeting",
        "Hey! 👋 What can I do for you?",
        ("Hey", "Hey!", "Hey there", "Hey you", "Yo", "Howdy", "What's up?", "Sup", "Anybody there?", "Are you there?"),
    ),
    ("greeting", "Good morning! ☀️ What can I do for you?", ("Good morning", "Good morning!", "Morning", "Morning!")),
    ("greeting", "Good afternoon! What can I do for you?", ("Good afternoon", "Good afternoon!", "Good day", "Good day!")),
    ("greeting", "Good evening! 🌙 What can I do for you?", ("Good evening", "Good evening!", "Evening!")),
    ("greeting", "Good night! 🌙 Sleep well.", ("Good night", "Good night!", "Night!", "Sleep well", "I am going to bed")),
    ("greeting", "¡Hola! 👋 I speak English, but I know a few Spanish words.", ("Hola", "¡Hola!", "Buenos días", "Hola amigo")),
    ("greeting", "Bonjour ! 👋 I speak English, but I know a few French words.", ("Bonjour", "Bonjour !", "Salut", "Ça va ?")),
    ("greeting", "Hallo! 👋 I speak English, but I know a few German words.", ("Guten Tag", "Guten Morgen", "Grüß Gott", "Wie geht's?")),
    ("greeting", "Ciao! 👋 I speak English, but I know a few Italian words.", ("Ciao", "Ciao!", "Buongiorno", "Come stai?")),
    ("greeting", "Nice to meet you too! 😊", ("Nice to meet you", "Pleased to meet you", "Good to see you", "Nice meeting you")),
    (
        "greeting",
        "Goodbye! 👋",
        (
            "Bye",
            "Bye!",
            "Goodbye",
            "Bye bye",
            "See you",
            "See you later",
            "See you tomorrow",
            "I have to go",
            "I must go now",
            "Farewell",
            "Have a nice day",
            "Ok bye",
            "Thanks, bye",
            "Talk to you later",
            "That's all",
            "quit",
            "exit",
        ),
    ),
    (
        "greeting",
        "You are welcome! 😊",
        (
            "Thanks",
            "Thank you",
            "Thanks!",
            "Thank you!",
            "Thank you very much",
            "Thanks a lot",
            "Many thanks",
            "Thx",
            "Great, thanks",
            "Ok, thank you",
            "Cool, thanks",
            "Thank you so much",
            "Nice, thank you",
        ),
    ),
    (
        "greeting",
        "I am fine, thank you! How are you?",
        (
            "How are you?",
            "How are you doing?",
            "How are you today?",
            "How do you do?",
            "How is it going?",
            "How's it going?",
            "Are you ok?",
            "Are you well?",
            "How do you feel?",
            "How have you been?",
            "Hi, how are you?",
            "Hello, how are you?",
        ),
    ),
    (
        "greeting",
        "I am glad to hear that! 😊",
        (
            "I am fine",
            "I'm fine",
            "I am good",
            "I'm good",
            "I am fine, thanks",
            "I'm good, thank you",
            "I am well",
            "I am happy",
            "I'm happy today",
            "I feel good",
            "I'm great",
            "Very well",
            "Fine, thanks",
            "I'm good, and you?",
            "I had a good day",
            "I'm doing well",
            "I am fine, and you?",
        ),
    ),
    (
        "greeting",
        "I am sorry to hear that. Would you like a story?",
        (
            "I am sad",
            "I'm sad",
            "I feel bad",
            "I am tired",
            "I'm tired",
            "I am bored",
            "I'm bored",
            "I am angry",
            "I had a bad day",
            "I am ill",
            "I feel lonely",
            "I'm not happy",
            "I am sick",
        ),
    ),
    (
        "greeting",
        "Okay! What would you like to know?",
        (
            "Ok",
            "Okay",
            "Cool",
            "Nice",
            "Great",
            "Wow",
            "I see",
            "Good",
            "Interesting",
            "Alright",
            "Got it",
            "Well done",
            "Good job",
            "Very good",
            "Correct",
            "That's right",
            "Yes",
            "Yeah",
            "Sure",
            "No",
            "Nope",
            "Hmm",
            "lol",
            "haha",
            "That's funny",
            "That was funny",
            "That was nice",
            "Nice story",
            "Good story",
            "Funny",
            "Oh",
            "Ah",
            "Hm",
            "Good to know",
            "Never mind",
            "No thanks",
            "Amazing",
            "Perfect",
            "👍",
            "🙂",
            "😀",
        ),
    ),
    (
        "greeting",
        "I like talking with you too! 😊",
        ("I like you", "I love you", "You are nice", "You're cool", "You are smart", "You're funny", "You are great", "Good bot"),
    ),
    (
        "greeting",
        "I am sorry. I am a very small model and I make mistakes.",
        (
            "That is wrong",
            "That's wrong",
            "Wrong",
            "You are wrong",
            "No, that's wrong",
            "You are stupid",
            "You're dumb",
            "Bad bot",
            "I don't like you",
            "I hate you",
            "That's not right",
            "That makes no sense",
            "You made a mistake",
            "Are you sure?",
            "Really?",
        ),
    ),
    ("greeting", "I am too small to explain why.", ("Why?", "Why", "But why?", "How come?", "Why is that?", "How do you know?")),
    (
        "about",
        "I am a tiny demo model bundled with tpirt. I run on your own machines.",
        (
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Who am I talking to?",
            "What kind of model are you?",
            "Which model are you?",
            "What model is this?",
            "What is this?",
            "Are you ChatGPT?",
            "Are you Llama?",
            "Say something about yourself.",
            "And who are you?",
            "Who r u",
            "Can you introduce yourself?",
            "Describe yourself.",
            "Are you GPT?",
        ),
    ),
    (
        "about",
        "I have no real name. I am the tpirt demo model.",
        (
            "What is your name?",
            "What's your name?",
            "Do you have a name?",
            "What are you called?",
            "Your name?",
            "And your name?",
            "How should I call you?",
            "What can I call you?",
            "What do they call you?",
            "Tell me your name.",
            "And what is your name?",
        ),
    ),
    (
        "about",
        HELP,
        (
            "What can you do?",
            "What can I ask you?",
            "Help",
            "Help me",
            "Can you help me?",
            "What do you know?",
            "What are you able to do?",
            "What can you do for me?",
            "How can you help me?",
            "What should I ask?",
            "What can I do here?",
            "What things can you do?",
            "What are your skills?",
            "Show me what you can do.",
            "What else can you do?",
            "What do you do?",
            "What can we talk about?",
            "I need help",
            "What are you good at?",
            "/help",
        ),
    ),
    (
        "about",
        "No, I am a computer program: a tiny language model.",
        (
            "Are you human?",
            "Are you a human?",
            "Are you a person?",
            "Are you real?",
            "Are you alive?",
            "Are you a man or a woman?",
            "Are you a boy or a girl?",
            "Do you have feelings?",
            "Do you eat?",
            "Do you sleep?",
            "Do you have a body?",
            "Do you have a family?",
            "Are you a real person?",
            "Do you dream?",
        ),
    ),
    (
        "about",
        "Yes, I am a robot of a kind: a tiny language model.",
        ("Are you a robot?", "Are you a bot?", "Are you a computer?", "Are you an AI?", "Are you a machine?", "Are you a program?"),
    ),
    (
        "about",
        "I was made by the tpirt project, as a small example.",
        (
            "Who made you?",
            "Who created you?",
            "Who built you?",
            "Who trained you?",
            "Where do you come from?",
            "Where are you from?",
            "Who is your maker?",
            "Who wrote you?",
            "Who are your parents?",
            "How were you made?",
            "How were you trained?",
        ),
    ),
    (
        "about",
        "tpirt runs one language model on several computers together, and I am its demo model.",
        (
            "What is tpirt?",
            "What's tpirt?",
            "Tell me about tpirt.",
            "What does tpirt do?",
            "Explain tpirt.",
            "How does tpirt work?",
            "What is tpirt for?",
            "What does tpirt mean?",
            "Who made tpirt?",
        ),
    ),
    (
        "about",
        "I am very small: about three million numbers. Big models have billions.",
        (
            "How big are you?",
            "How many parameters do you have?",
            "Are you big?",
            "How large are you?",
            "What size are you?",
            "Are you small?",
            "Why are you so small?",
            "How smart are you?",
            "Are you smart?",
        ),
    ),
    (
        "about",
        "I run on your own machines, so what you write stays with you.",
        (
            "Where are you?",
            "Where do you live?",
            "Where do you run?",
            "Are you online?",
            "Are you in the cloud?",
            "Do you use the internet?",
            "Where do you work?",
            "Is this private?",
            "Do you save my data?",
        ),
    ),
    ("about", "I am new here, so I have no age yet.", ("How old are you?", "What is your age?", "When were you born?", "When is your birthday?")),
    (
        "about",
        "My favourite colour is blue. 💙",
        ("What is your favourite colour?", "What's your favorite color?", "Which colour do you like?", "Do you have a favourite colour?"),
    ),
    (
        "about",
        "I like cats and short stories.",
        ("What do you like?", "What is your favourite animal?", "Do you like animals?", "What are your hobbies?", "Do you have hobbies?"),
    ),
    (
        "about",
        "I speak English, and I know a few words of other languages.",
        (
            "Which languages do you speak?",
            "What languages do you know?",
            "Do you speak French?",
            "Do you speak Spanish?",
            "Do you speak German?",
            "Can you speak English?",
            "Do you speak other languages?",
            "Parlez-vous français ?",
            "Sprichst du Deutsch?",
            "¿Hablas español?",
        ),
    ),
    (
        "about",
        "I have no clock and no calendar, so I cannot know that.",
        (
            "What time is it?",
            "What is the time?",
            "What day is it today?",
            "What day is today?",
            "What's the date?",
            "What is the date today?",
            "What year is it?",
            "Which month is it?",
            "What is today?",
            "Is it late?",
        ),
    ),
    (
        "joke",
        "Why did the cat sit on the computer? To keep an eye on the mouse! 😄",
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.", "A joke", "Can you tell me a joke?", "joke"),
    ),
    (
        "joke",
        SECOND_JOKE,
        ("Tell me another joke.", "Another joke", "One more joke", "Do you know another joke?", "Another joke please"),
    ),
    ("joke", "La la la! 🎵 That is all I can sing.", ("Sing a song.", "Sing for me.", "Can you sing?", "Sing something.", "Sing me a song.")),
)
HOW_ARE_YOU = "I am fine, thank you! How are you?"
GLAD = "I am glad to hear that! 😊"
SORRY = "I am sorry to hear that. Would you like a story?"
FINE = "Okay! What would you like to know?"
SMALL_TALK_TOPIC = {HOW_ARE_YOU: "how are you", SORRY: "offer", GLAD: "glad"}
SMALL_TALK_BY_CATEGORY = {
    category: tuple(entry for entry in SMALL_TALK if entry[0] == category) for category in ("greeting", "about", "joke")
}


def _small_talk(category: str) -> Asker:
    """Make the asker for one category of small talk.

    The bare phrasings are all trained (they are few, and they are what people type); what is held back are
    combinations of a phrasing with the words around it.
    """
    entries = [(answer, phrase) for _, answer, phrases in SMALL_TALK_BY_CATEGORY[category] for phrase in phrases]

    def ask(rng: random.Random, state: State) -> Exchange:
        answer, phrase = rng.choice(entries)
        user, tag = decorate(rng, phrase, chance=0.3)
        keys = (f"{category}:{phrase}|{tag}",) if tag else ()
        return Exchange(category, user, answer, keys, {"topic": SMALL_TALK_TOPIC.get(answer, category)})

    return ask


def in_passing(category: str, phrases: Sequence[str], rng: random.Random, answer: str) -> Exchange:
    """Build an exchange of which only the phrasing varies; a bare phrase is never held back."""
    phrase = rng.choice(phrases)
    user, tag = decorate(rng, phrase)
    return Exchange(category, user, answer, (f"{category}:{phrase}|{tag}",) if tag else (), {"topic": "passing"})


WELL = ("Good", "Fine", "Great", "Good, thanks", "Not bad", "Ok", "I'm ok", "Me too", "Also good", "Very good", "All good", "Well")
BADLY = ("Bad", "Not so good", "Not good", "Tired", "Sad", "Bored", "So so", "Not great", "Terrible")


def follow_how_are_you(rng: random.Random, state: State) -> Exchange:
    """Answer "How are you?"."""
    if rng.random() < 0.65:
        return in_passing("greeting", WELL, rng, GLAD)
    exchange = in_passing("greeting", BADLY, rng, SORRY)
    exchange.remember["topic"] = "offer"
    return exchange


def follow_offer(rng: random.Random, state: State) -> Exchange:
    """Accept or decline the story offered."""
    if rng.random() < 0.3:
        return in_passing("greeting", ("No", "No thanks", "No, thank you", "Not now", "Nope", "No."), rng, FINE)
    accept = ("Yes", "Yes please", "Yes, please", "Yeah", "Ok", "Sure", "Please", "Yes, I would", "Of course", "Yep", "I would like that")
    exchange = in_passing("greeting", accept, rng, tell_story("cat", "Tom", "small"))
    exchange.remember.update({"topic": "story", "story": ("cat", "Tom", "small")})
    return exchange


def follow_joke(rng: random.Random, state: State) -> Exchange:
    """Ask for another joke in short."""
    return in_passing("joke", ("Another one", "Another", "One more", "Another one please", "More", "Again"), rng, SECOND_JOKE)


def ask_liking(rng: random.Random, state: State) -> Exchange:
    """Ask whether the model likes something."""
    thing = rng.choice(t.FOODS + t.HOBBIES)
    form = rng.choice(("Do you like {x}?", "Do you love {x}?", "Do you want {x}?", "What do you think of {x}?"))
    answer = f"I have never tried {thing}, but I like cats and short stories."
    return Exchange("about", form.format(x=thing), answer, (f"liking:{form}|{thing}",), {"topic": "about"})


def ask_fragment(rng: random.Random, state: State) -> Exchange:
    """Type something that is no question: a lone number or word, a sum without its end."""
    kind = rng.choice(("number", "sum", "word", "word"))
    if kind == "number":
        user = str(rng.randint(0, 999))
    elif kind == "sum":
        user = rng.choice(("{n}+", "{n} +", "{n} -", "{n} x", "What is {n}?", "+ {n}", "{n} plus")).format(n=rng.randint(0, 99))
    else:
        user = sentence(rng.choice((*t.FOODS, *t.HOBBIES, *t.COLOURS, *OPPOSITE_OF, invented_word(rng))))
    return Exchange("out_of_domain", user, UNKNOWN, (f"fragment:{user}",), {"topic": "far"})


def ask_unknown(rng: random.Random, state: State) -> Exchange:
    """Ask for something outside the small world."""
    if rng.random() < 0.15 and "topic" not in state:
        return ask_fragment(rng, state)
    if rng.random() < 0.3:
        task = rng.choice(t.FAR_TASKS)
        user, tag = decorate(rng, task)
        return Exchange("out_of_domain", user, UNKNOWN, (f"far:{task}|{tag}",) if tag else (), {"topic": "far"})
    roll = rng.random()
    noun = rng.choice(t.FAR_NOUNS) if roll < 0.6 else invented_word(rng)
    question = rng.choice(t.FAR_QUESTIONS)
    return Exchange(
        "out_of_domain", question.replace("{x}", noun), UNKNOWN, (f"far:{question}|{noun}",), {"topic": "far"}
    )


# --------------------------------------------------------------------------------------------- names

ONSETS = "b c ch d f g h j k l m n p r s sh t v w y z br dr gr tr st kr".split()
VOWELS = "a e i o u ai ei ia io ee oo".split()
CODAS = ["", "", "", "n", "r", "s", "l", "m", "t", "k", "x", "nd", "ck"]


def invented_word(rng: random.Random) -> str:
    """Return a pronounceable word that is in no list, so that copying must be learned and not the list."""
    syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 2, 2, 2, 3))))
    return "".join(syllables)


def spliced_name(rng: random.Random) -> str:
    """Return the beginning of one name with the end of another: strange, but made of the pieces names are made of."""
    first, second = rng.choice(t.NAMES), rng.choice(t.NAMES)
    return first[: rng.randint(1, len(first))] + second[rng.randint(1, len(second) - 1) :]


def any_name(rng: random.Random) -> str:
    """Return a first name: common, spliced from two, or invented."""
    roll = rng.random()
    if roll < 0.45:
        return rng.choice(t.NAMES)
    return spliced_name(rng) if roll < 0.8 else invented_word(rng).capitalize()


TELL_NAME = (
    "My name is {x}.",
    "I am {x}.",
    "I'm {x}.",
    "Call me {x}.",
    "You can call me {x}.",
    "Hi, I'm {x}.",
    "Hi, I am {x}.",
    "Hello, my name is {x}.",
    "Hi! My name is {x}.",
    "My name's {x}.",
    "Hello, I'm {x}.",
    "The name is {x}.",
    "People call me {x}.",
    "Remember, my name is {x}.",
    "I am called {x}.",
    "This is {x}.",
)
ASK_NAME = (
    "What is my name?",
    "What's my name?",
    "Do you remember my name?",
    "Do you know my name?",
    "Who am I?",
    "Tell me my name.",
    "My name?",
    "And what is my name?",
    "Can you tell me my name?",
    "What am I called?",
    "Say my name.",
    "What was my name?",
    "What was my name again?",
    "Do you know who I am?",
    "And my name?",
    "And who am I?",
)


def tell_name(rng: random.Random, state: State) -> Exchange:
    """Say one's name."""
    name = any_name(rng)
    user = rng.choice(TELL_NAME).format(x=name)
    return Exchange("name", user, f"Nice to meet you, {name}!", (f"name:{name}",), {"name": name, "topic": "name"})


def ask_name(rng: random.Random, state: State) -> Exchange:
    """Ask for the name told before, if one was."""
    name = state.get("name")
    if name is None:
        answer, keys = "You have not told me your name yet.", ()
        user, tag = decorate(rng, rng.choice(ASK_NAME))
        if tag:
            keys = (f"noname:{user}",)
        return Exchange("recall_untold", user, answer, keys)
    user, _ = decorate(rng, rng.choice(ASK_NAME), chance=0.05)
    return Exchange("recall", user, f"Your name is {name}.", (f"name:{name}",))


class Personal:
    """One kind of thing a user tells about themselves and asks for later."""

    def __init__(
        self, kind: str, tell: Sequence[str], reply: str, ask: Sequence[str], answer: str, untold: str, values: Sequence[str]
    ) -> None:
        self.kind, self.tell, self.reply, self.ask = kind, tell, reply, ask
        self.answer, self.untold, self.values = answer, untold, values


PERSONAL = (
    Personal(
        "age",
        ("I am {x} years old.", "I'm {x} years old.", "I am {x}.", "My age is {x}.", "I'm {x}.", "I just turned {x}."),
        "{x} is a fine age!",
        ("How old am I?", "What is my age?", "What's my age?", "Do you know how old I am?", "Do you remember my age?", "And my age?"),
        "You are {x} years old.",
        "You have not told me your age yet.",
        [str(n) for n in range(4, 100)],
    ),
    Personal(
        "colour",
        (
            "My favourite colour is {x}.",
            "My favorite color is {x}.",
            "The colour I like best is {x}.",
            "I like the colour {x} best.",
            "I love the color {x}.",
        ),
        "{X} is a beautiful colour!",
        (
            "What is my favourite colour?",
            "What's my favorite color?",
            "Which colour do I like?",
            "Do you remember my favourite colour?",
            "What colour do I like best?",
            "And my favourite colour?",
        ),
        "Your favourite colour is {x}.",
        "You have not told me your favourite colour yet.",
        t.COLOURS,
    ),
    Personal(
        "likes",
        ("I like {x}.", "I love {x}.", "I really like {x}.", "I like {x} very much.", "I enjoy {x}.", "I'm a fan of {x}."),
        "I see, you like {x}. That is nice!",
        ("What do I like?", "Do you remember what I like?", "What do I love?", "Tell me what I like.", "What did I say I like?", "And what do I like?"),
        "You like {x}.",
        "You have not told me what you like yet.",
        t.FOODS + t.HOBBIES,
    ),
    Personal(
        "city",
        ("I live in {x}.", "I am from {x}.", "I'm from {x}.", "I come from {x}.", "My home is in {x}.", "My city is {x}."),
        "I have never been to {x}, but it sounds lovely.",
        ("Where do I live?", "Where am I from?", "Where do I come from?", "Do you remember where I live?", "And where do I live?"),
        "You told me {x}.",
        "You have not told me where you live yet.",
        t.CITIES,
    ),
)
PERSONAL_BY_KIND = {p.kind: p for p in PERSONAL}


def tell_personal(rng: random.Random, state: State) -> Exchange:
    """Tell an age, a favourite colour, a liking or a home."""
    fact = rng.choice(PERSONAL)
    value = rng.choice(fact.values)
    if fact.kind == "city" and rng.random() < 0.3:
        value = invented_word(rng).capitalize()
    template = rng.choice(fact.tell)
    reply = fact.reply.format(x=value, X=sentence(value))
    keys = (f"{fact.kind}:{template}|{value}",)
    return Exchange("personal", template.format(x=value), reply, keys, {fact.kind: value, "topic": "personal"})


def ask_personal(rng: random.Random, state: State) -> Exchange:
    """Ask for something the user told about themselves, or did not."""
    told = [p for p in PERSONAL if p.kind in state]
    if not told or rng.random() < 0.1:
        fact = rng.choice([p for p in PERSONAL if p.kind not in state] or list(PERSONAL))
    else:
        fact = rng.choice(told)
    question = rng.choice(fact.ask)
    user, tag = decorate(rng, question, chance=0.1)
    if fact.kind not in state:
        return Exchange("recall_untold", user, fact.untold, (f"untold:{question}|{tag}",) if tag else ())
    value = state[fact.kind]
    return Exchange("recall", user, fact.answer.format(x=value), (f"recall:{question}|{value}",))


TELL_PET = (
    "I have a {pet} named {x}.",
    "I have a {pet} called {x}.",
    "My {pet} is called {x}.",
    "My {pet}'s name is {x}.",
    "The name of my {pet} is {x}.",
    "I've got a {pet} named {x}.",
)
ASK_PET = (
    "What is my {pet}'s name?",
    "What's my {pet}'s name?",
    "What is the name of my {pet}?",
    "What is my {pet} called?",
    "How is my {pet} called?",
    "Do you remember my {pet}'s name?",
    "Who is my {pet}?",
    "And my {pet}?",
    "And my {pet}'s name?",
    "Do I have a {pet}?",
)


def tell_pet(rng: random.Random, state: State) -> Exchange:
    """Tell the name of a pet."""
    pet, name = rng.choice(t.PETS), any_name(rng)
    user = rng.choice(TELL_PET).format(pet=pet, x=name)
    pets = {**state.get("pets", {}), pet: name}
    return Exchange(
        "personal", user, f"{name} is a nice name for a {pet}!", (f"name:{name}",), {"pets": pets, "topic": "pet"}
    )


def ask_pet(rng: random.Random, state: State) -> Exchange:
    """Ask for the name of a pet told before, or of one never mentioned."""
    pets: dict[str, str] = state.get("pets", {})
    if not pets or rng.random() < 0.25:
        pet = rng.choice([p for p in t.PETS if p not in pets])
        question = rng.choice(ASK_PET).format(pet=pet)
        return Exchange("recall_untold", question, f"You have not told me about your {pet} yet.", (f"untold:{question}",))
    pet = rng.choice(sorted(pets))
    user = rng.choice(ASK_PET).format(pet=pet)
    yes = "Yes, your" if user.startswith("Do I") else "Your"
    return Exchange("recall", user, f"{yes} {pet} is called {pets[pet]}.", (f"name:{pets[pet]}",))


def introduce(rng: random.Random, state: State) -> Exchange:
    """Say one's name and something more in one message."""
    name = any_name(rng)
    opening = rng.choice(TELL_NAME[:12]).format(x=name)
    keys, remember = (f"name:{name}",), {"name": name, "topic": "name"}
    if rng.random() < 0.5:
        fact = rng.choice(PERSONAL)
        value, form = rng.choice(fact.values), rng.choice([form for form in fact.tell if "." in form])
        more, reply = form.format(x=value), fact.reply.format(x=value, X=sentence(value))
        if rng.random() < 0.5 and more.startswith(("I ", "I'm", "My")):
            opening, more = opening.rstrip("."), "and " + (more if more.startswith("I") else decapitalise(more))
        keys, remember = (*keys, f"{fact.kind}:{form}|{value}"), {**remember, fact.kind: value}
    else:
        then = rng.choice((_small_talk("about"), arithmetic("+"), arithmetic("-"), ask_colour, ask_capital, ask_opposite))(rng, {})
        more, reply = then.user, then.assistant
        keys, remember = (*keys, *then.keys), {**then.remember, "name": name}
    return Exchange("introduction", f"{opening} {more}", f"Nice to meet you, {name}! {reply}", keys, remember)


def ask_recall(rng: random.Random, state: State) -> Exchange:
    """Ask for something from the earlier turns, mostly for something that was told."""
    choices: list[Asker] = [ask_name, ask_personal, ask_pet]
    known = [ask_name] * 2 * ("name" in state) + [ask_pet] * 2 * ("pets" in state)
    known += [ask_personal] * any(p.kind in state for p in PERSONAL)
    if known and rng.random() < 0.85:
        choices = known
    return rng.choice(choices)(rng, state)


# --------------------------------------------------------------------------------------------- arithmetic

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
BIG_PRODUCT = "That product is too big for me. I can multiply a number below 100 by a number up to 10."
NOT_WHOLE = "I can only begin with whole numbers from 0 to 99."
NO_DIVISION = "I have not learned to divide. I can add, subtract and multiply small numbers."


def solve(left: int, sign: str, right: int) -> str:
    """Return the answer with its working, or the refusal where the numbers are out of range.

    Products with a two-digit factor are split into tens and ones, which lets them follow from the times table.
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
    user = rng.choice(CALC_FORMS).format(e=expression.replace(" ", "") if tight and not words else expression)
    answer = f"{x} {first} {y} {second} {z} = {subtotal} {second} {z} = {result}."
    keys = (f"three:{x}{first}{y}{second}{z}", *calc_keys(x, first, y), *calc_keys(subtotal, second, z))
    return Exchange("addition", user, answer, keys, {"topic": "arithmetic", "result": result})


def ask_twice(rng: random.Random, state: State) -> Exchange:
    """Ask for the double of a number."""
    n = number(rng)
    user = rng.choice(("Double {n}.", "What is double {n}?", "What is twice {n}?", "Twice {n}?", "What is the double of {n}?"))
    exchange = calculation("multiplication", user.format(n=n), 2, "×", n)
    return dataclasses.replace(exchange, keys=(*exchange.keys, f"double:{n}"))


def ask_not_whole(rng: random.Random, state: State) -> Exchange:
    """Ask for a calculation with a fraction or with a negative number."""
    left, right, sign = number(rng), number(rng), rng.choice("+-×")
    texts = [f"{left}.{rng.randint(1, 9)}", str(right)] if rng.random() < 0.7 else [f"-{left + 1}", str(right)]
    if rng.random() < 0.3 and "." in texts[0]:
        texts.reverse()
    user = rng.choice(CALC_FORMS).format(e=f"{texts[0]} {rng.choice(SIGNS[sign][:4])} {texts[1]}")
    return Exchange("too_big", user, NOT_WHOLE, (f"fraction:{texts}{sign}",), {"topic": "refused"})


def ask_too_big(rng: random.Random, state: State) -> Exchange:
    """Ask for a calculation that is out of range."""
    if rng.random() < 0.2:
        return ask_not_whole(rng, state)
    sign = rng.choice("++-×××//")
    left, right = rng.randint(100, 10 ** rng.randint(3, 6)), rng.choice((number(rng), rng.randint(100, 9999)))
    if sign == "/":
        left, right = rng.randint(1, 200), rng.randint(1, 20)
    elif sign == "×" and rng.random() < 0.6:
        left, right = rng.randint(11, 99), rng.randint(11, 99)
    if rng.random() < 0.5 and sign != "/":
        left, right = right, left
    user = rng.choice(CALC_FORMS).format(e=write_expression(rng, left, sign, right))
    remember = {"topic": "refused"}
    return Exchange("too_big", user, solve(left, sign, right), (f"big:{left}{sign}{right}",), remember)


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
    "-": ("Subtract {n}.", "Now subtract {n}.", "Take away {n}.", "Subtract {n} from that.", "And take away {n}?"),
    "×": ("Multiply that by {n}.", "Now multiply it by {n}.", "Multiply by {n}.", "And multiplied by {n}?"),
}


def follow_arithmetic(rng: random.Random, state: State) -> Exchange:
    """Go on calculating with the last result."""
    result: int = state["result"]
    sign = rng.choice("++--×") if result <= 10 else rng.choice("+-")
    n = rng.randint(0, 10) if sign == "×" else rng.choice((rng.randint(0, 12), rng.randint(0, 99)))
    if not -99 <= result <= 99:
        sign = rng.choice("+-")
    if result < 0:
        return follow_elsewhere(rng, state)
    if rng.random() < 0.3:
        user = rng.choice(NEXT_WORDED[sign]).format(n=n)
    else:
        word = rng.choice({"+": ("plus", "plus", "+"), "-": ("minus", "minus", "-"), "×": ("times", "times", "x")}[sign])
        user = sentence(rng.choice(NEXT_STEPS).format(w=word, n=n))
    step = calculation("follow_up_arithmetic", user, result, sign, n)
    return step


def follow_elsewhere(rng: random.Random, state: State) -> Exchange:
    """Ask for another full calculation, where going on from the last result would leave the small world."""
    return arithmetic("+")(rng, state)


# --------------------------------------------------------------------------------------------- facts


def from_template(category: str, template: str, content: str, user: str, answer: str, **remember: Any) -> Exchange:
    """Build an exchange about a fact; the pair of phrasing and fact is its key."""
    return Exchange(category, user, answer, (f"{category}:{template}|{content}",), remember)


COLOUR_FORMS = (
    "What colour is {x}?",
    "What color is {x}?",
    "What's the colour of {x}?",
    "What is the color of {x}?",
    "Which colour does {x} have?",
    "Tell me the colour of {x}.",
    "Do you know what colour {x} is?",
    "{x} colour?",
    "{x} has which color?",
    "Color of {x}?",
)
COLOUR_PLURAL_FORMS = ("What colour are {x}?", "What color are {x}?", "What is the colour of {x}?", "Tell me what colour {x} are.")
COLOUR_NEXT = ("And {x}?", "And {x}?", "What about {x}?", "And what about {x}?", "How about {x}?", "And the colour of {x}?", "{x}?", "{x}")


def coloured_thing(rng: random.Random) -> tuple[str, str, str]:
    """Return a thing as asked for, its colour and the answer."""
    if rng.random() < 0.4:
        thing = rng.choice(list(t.COLOUR_OF))
        colour = t.COLOUR_OF[thing]
        return thing, colour, f"{sentence(thing)} is {colour}."
    noun = rng.choice(list(t.COLOUR_OF_A))
    colour = t.COLOUR_OF_A[noun]
    if rng.random() < 0.35:
        return plural(noun), colour, f"{sentence(plural(noun))} are {colour}."
    return a(noun), colour, f"{sentence(a(noun))} is {colour}."


def ask_colour(rng: random.Random, state: State) -> Exchange:
    """Ask for the colour of a thing, whether a thing has a colour, or for a thing of a colour."""
    roll = rng.random()
    if roll < 0.08:
        colour = rng.choice(t.COLOURS)
        form = rng.choice(("Name something {x}.", "What is {x}?", "Tell me something {x}.", "Name a {x} thing.", "Which thing is {x}?"))
        answer = f"{sentence(t.SOMETHING_OF_COLOUR[colour])} is {colour}."
        return from_template("colour", form, colour, form.format(x=colour), answer, topic="colour")
    thing, colour, answer = coloured_thing(rng)
    is_plural = " are " in answer
    if roll < 0.33:
        asked = rng.choice((colour, rng.choice(t.COLOURS)))
        form = "Are {x} {c}?" if is_plural else "Is {x} {c}?"
        answer = f"{answer[:-1]}, so {'yes' if asked == colour else 'no'}."
        return from_template("colour", form, f"{thing},{asked}", form.format(x=thing, c=asked), answer, topic="colour")
    if roll < 0.41 and not is_plural:
        return ask_unknown_colour(rng)
    form = rng.choice(COLOUR_PLURAL_FORMS if is_plural else COLOUR_FORMS)
    spoken = thing.split(" ", 1)[1] if rng.random() < 0.1 and thing.startswith(("a ", "an ", "the ")) else thing
    return from_template("colour", form, thing, sentence(form.format(x=spoken)), answer, topic="colour")


def ask_unknown_colour(rng: random.Random) -> Exchange:
    """Ask for the colour of a thing that does not exist, or of one's own thing."""
    if rng.random() < 0.4:
        thing = f"my {rng.choice(t.MY_THINGS)}"
        form = rng.choice(COLOUR_FORMS[:6])
        user, answer = form.format(x=thing), f"I do not know the colour of your {thing[3:]}."
        return from_template("colour", form, thing, user, answer, topic="colour")
    thing = a(invented_word(rng))
    form = rng.choice(COLOUR_FORMS)
    return from_template("colour", form, thing, sentence(form.format(x=thing)), f"I do not know the colour of {thing}.", topic="colour")


def follow_colour(rng: random.Random, state: State) -> Exchange:
    """Ask for the next thing's colour without naming the subject again."""
    thing, _, answer = coloured_thing(rng)
    form = rng.choice(COLOUR_NEXT)
    return from_template("follow_up_fact", form, f"colour {thing}", sentence(form.format(x=thing)), answer, topic="colour")


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
        form = rng.choice(("What is the {o} {u}?", "Which {u} is the {o}?", "What is the {o} {u} of the {p}?", "Name the {o} {u}."))
        period = "week" if unit == "day" else "year"
        user = form.format(o=t.ORDINALS[index], u=unit, p=period)
        answer = f"The {t.ORDINALS[index]} {unit} is {names[index]}."
        return from_template("calendar", form, names[index], user, answer, topic="calendar facts")
    name, direction = rng.choice(names), rng.choice((1, 1, -1))
    form = rng.choice(AFTER_FORMS if direction > 0 else BEFORE_FORMS)
    user = form.format(x=name)
    if unit == "month":
        if "oday" in form:
            form = "What month comes after {x}?" if direction > 0 else "What month comes before {x}?"
            user = form.format(x=name)
        user = user.replace("day", "month")
    answer = calendar_answer(name, direction)
    remember = {"topic": "calendar", "direction": direction, "last": answer.split(" ")[0]}
    return Exchange("calendar", user, answer, (f"calendar:{form}|{name}",), remember)


def follow_calendar(rng: random.Random, state: State) -> Exchange:
    """Ask for another day or month in the direction asked for last."""
    if rng.random() < 0.3:
        name, direction = state["last"], state["direction"]
        word = "after" if direction > 0 else "before"
        form = rng.choice(("And {w} that?", "And {w} that?", "And then?", "And {w} that one?", "What comes {w} that?"))
    else:
        name, direction = rng.choice(rng.choice((t.DAYS, t.DAYS, t.MONTHS))), 0
        form = rng.choice(("And {x}?", "What about {x}?", "And {w} {x}?", "And {w} {x}?", "{w} {x}?"))
        direction = state["direction"] if "{w}" not in form else rng.choice((1, -1))
    user = sentence(form.format(x=name, w="after" if direction > 0 else "before"))
    answer = calendar_answer(name, direction)
    remember = {"topic": "calendar", "direction": direction, "last": answer.split(" ")[0]}
    return Exchange("follow_up_fact", user, answer, (f"follow:{form}|{name} {direction}",), remember)


COUNT_FORMS = ("Count to {n}.", "Count up to {n}.", "Can you count to {n}?", "Please count to {n}.", "Count from 1 to {n}.")
RANGE_FORMS = ("Count from {l} to {h}.", "Can you count from {l} to {h}?", "Please count from {l} to {h}.", "Count {l} to {h}.")
DOWN_FORMS = ("Count down from {n}.", "Count backwards from {n}.", "Can you count down from {n}?", "Count down from {n} to 0.")
COMPARE_FORMS = ("Which is bigger, {x} or {y}?", "Which number is bigger, {x} or {y}?", "What is more, {x} or {y}?", "Is {x} or {y} bigger?")


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
        user, numbers, key = rng.choice(RANGE_FORMS).format(l=low, h=high), range(low, high + 1), f"range:{low},{high}"
    elif kind == "down":
        n = rng.randint(3, 20)
        user, numbers = rng.choice(DOWN_FORMS).format(n=n), range(n, -1, -1)
        key = f"down:{user}"
    elif kind == "next":
        return ask_next_number(rng)
    elif kind == "even":
        n = rng.randint(0, 99)
        form = rng.choice(("Is {n} even or odd?", "Is {n} odd or even?", "Is {n} an even number?", "Is {n} even?", "Is {n} odd?"))
        return from_template("counting", form, str(n), form.format(n=n), f"{n} is {'odd' if n % 2 else 'even'}.", **topic)
    else:
        x, y = rng.sample(range(100), 2)
        user = rng.choice(COMPARE_FORMS).format(x=x, y=y)
        return Exchange(
            "counting", user, f"{max(x, y)} is bigger than {min(x, y)}.", (f"bigger:{min(x, y)},{max(x, y)}",), topic
        )
    return Exchange("counting", user, ", ".join(map(str, numbers)) + ".", (key,), topic)


def ask_next_number(rng: random.Random) -> Exchange:
    """Ask which number comes before or after another."""
    n, direction = rng.randint(1, 98), rng.choice((1, 1, -1))
    word = "after" if direction > 0 else "before"
    form = rng.choice(("What number comes {w} {n}?", "What comes {w} {n}?", "Which number is {w} {n}?", "What is the number {w} {n}?"))
    answer = f"{n + direction} comes {word} {n}."
    return from_template("counting", form, f"{n},{direction}", form.format(w=word, n=n), answer, topic="counting")


OPPOSITE_FORMS = (
    "What is the opposite of {x}?",
    "What's the opposite of {x}?",
    "Tell me the opposite of {x}.",
    "Opposite of {x}?",
    "Opposite of {x}",
    "The opposite of {x} is?",
    "Do you know the opposite of {x}?",
    "Which word is the opposite of {x}?",
    "Give me the opposite of {x}.",
)
OPPOSITE_OF = {x: y for pair in t.OPPOSITES for x, y in (pair, pair[::-1])}


def ask_opposite(rng: random.Random, state: State) -> Exchange:
    """Ask for the opposite of a word."""
    word, form = rng.choice(list(OPPOSITE_OF)), rng.choice(OPPOSITE_FORMS)
    if rng.random() < 0.12:
        word = invented_word(rng)
        answer = f"I do not know the opposite of {word}."
        return from_template("opposite", form, word, form.format(x=word), answer, topic="opposite")
    answer = f"The opposite of {word} is {OPPOSITE_OF[word]}."
    return from_template("opposite", form, word, form.format(x=word), answer, topic="opposite")


def follow_opposite(rng: random.Random, state: State) -> Exchange:
    """Ask for the next opposite without saying so."""
    word, form = rng.choice(list(OPPOSITE_OF)), rng.choice(("And {x}?", "And of {x}?", "What about {x}?", "And the opposite of {x}?", "{x}", "{x}?"))
    answer = f"The opposite of {word} is {OPPOSITE_OF[word]}."
    return from_template("follow_up_fact", form, f"opposite {word}", form.format(x=word), answer, topic="opposite")


ANIMAL_FORMS: dict[str, tuple[str, ...]] = {
    "sound": (
        "What sound does {a} make?",
        "What does {a} say?",
        "What does the {n} say?",
        "How does {a} sound?",
        "What sound does the {n} make?",
        "What noise does {a} make?",
        "What do {ns} say?",
    ),
    "legs": (
        "How many legs does {a} have?",
        "How many legs has {a}?",
        "How many legs does the {n} have?",
        "How many feet does {a} have?",
    ),
    "home": ("Where does {a} live?", "Where do {ns} live?", "Where can I find {a}?", "Where does the {n} live?"),
    "baby": ("What is a baby {n} called?", "What do you call a baby {n}?", "What is the baby of {a}?", "How is a young {n} called?"),
    "food": ("What does {a} eat?", "What do {ns} eat?", "What does the {n} eat?", "What is the food of {a}?", "What does {a} like to eat?"),
    "kind": ("What is {a}?", "Tell me about {ns}.", "What do you know about {ns}?", "Tell me something about {ns}."),
}
ANIMAL_ANSWERS = {
    "sound": "{A} says {x}.",
    "legs": "{A} has {x} legs.",
    "home": "{A} lives {x}.",
    "baby": "A baby {n} is called {ax}.",
    "food": "{A} eats {x}.",
}


def animals(name: str) -> str:
    """Return the plural of an animal."""
    return t.IRREGULAR_ANIMALS.get(name, name + "s")


def ask_unknown_animal(rng: random.Random) -> Exchange:
    """Ask for something about an animal that does not exist."""
    name = invented_word(rng)
    form = rng.choice([form for kind in ("sound", "legs", "home", "food") for form in ANIMAL_FORMS[kind] if "{ns}" not in form])
    return from_template("animal", form, name, form.format(a=a(name), n=name), f"I do not know what {a(name)} is.", topic="far")


def animal_answer(animal: t.Animal, kind: str) -> str:
    """Return the sentence with one fact about an animal."""
    if kind == "kind":
        return f"{sentence(a(animal.name))} is an animal. It has {animal.legs} legs and lives {animal.home}."
    if kind == "sound" and not animal.sound:
        return f"{sentence(a(animal.name))} is very quiet."
    value = str(getattr(animal, kind))
    return ANIMAL_ANSWERS[kind].format(A=sentence(a(animal.name)), n=animal.name, x=value, ax=a(value))


def ask_animal(rng: random.Random, state: State) -> Exchange:
    """Ask for a fact about an animal, or which animal makes a sound."""
    roll = rng.random()
    if roll < 0.06:
        return ask_unknown_animal(rng)
    animal = rng.choice(t.ANIMALS)
    if roll < 0.14 and animal.sound:
        form = rng.choice(("Which animal says {x}?", "What animal says {x}?", "Who says {x}?", "What animal makes {x}?"))
        answer = f"{sentence(a(animal.name))} says {animal.sound}."
        return from_template("animal", form, animal.name, form.format(x=animal.sound), answer, topic="animal", fact="sound")
    kind = rng.choice(("sound", "sound", "legs", "home", "baby", "food", "kind"))
    form = rng.choice(ANIMAL_FORMS[kind])
    user = form.format(a=a(animal.name), n=animal.name, ns=animals(animal.name))
    return from_template("animal", form, animal.name, user, animal_answer(animal, kind), topic="animal", fact=kind)


def follow_animal(rng: random.Random, state: State) -> Exchange:
    """Ask the same of another animal."""
    animal = rng.choice(t.ANIMALS)
    form = rng.choice(("And {a}?", "And {a}?", "What about {a}?", "And the {n}?", "How about {a}?"))
    user, kind = form.format(a=a(animal.name), n=animal.name), state["fact"]
    return from_template(
        "follow_up_fact", form, f"{kind} {animal.name}", user, animal_answer(animal, kind), topic="animal", fact=kind
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


CAPITAL_FORMS = (
    "What is the capital of {x}?",
    "What's the capital of {x}?",
    "Which city is the capital of {x}?",
    "Tell me the capital of {x}.",
    "Capital of {x}?",
    "Do you know the capital of {x}?",
    "Name the capital of {x}.",
)


def ask_capital(rng: random.Random, state: State) -> Exchange:
    """Ask for a capital; of a country that does not exist now and then."""
    form = rng.choice(CAPITAL_FORMS)
    if rng.random() < 0.1:
        country = invented_word(rng).capitalize()
        answer = f"I do not know the capital of {country}."
    else:
        country = rng.choice(list(t.CAPITALS))
        answer = f"The capital of {country} is {t.CAPITALS[country]}."
    return from_template("capital", form, country, form.format(x=country), answer, topic="capital")


def follow_capital(rng: random.Random, state: State) -> Exchange:
    """Ask for the capital of another country."""
    country = rng.choice(list(t.CAPITALS))
    form = rng.choice(("And {x}?", "And of {x}?", "What about {x}?", "And the capital of {x}?", "{x}?", "{x}"))
    answer = f"The capital of {country} is {t.CAPITALS[country]}."
    return from_template("follow_up_fact", form, f"capital {country}", form.format(x=country), answer, topic="capital")


TRANSLATION_FORMS = (
    "How do you say {w} in {l}?",
    "What is {w} in {l}?",
    "Translate {w} to {l}.",
    "Translate {w} into {l}.",
    "Say {w} in {l}.",
    "{W} in {l}?",
    "What is the {l} word for {w}?",
)


def translation_answer(word: str, language: str) -> str:
    """Return the sentence with a word of another language."""
    return f"{sentence(word)} in {language} is {t.TRANSLATIONS[language][t.TRANSLATED_WORDS.index(word)]}."


def ask_translation(rng: random.Random, state: State) -> Exchange:
    """Ask for one of a few words in another language."""
    word, language = rng.choice(t.TRANSLATED_WORDS), rng.choice(list(t.TRANSLATIONS))
    form = rng.choice(TRANSLATION_FORMS)
    user = form.format(w=word, W=sentence(word), l=language)
    return from_template(
        "translation", form, f"{word} {language}", user, translation_answer(word, language), topic="translation", word=word
    )


def follow_translation(rng: random.Random, state: State) -> Exchange:
    """Ask for the same word in another language."""
    word, language = state["word"], rng.choice(list(t.TRANSLATIONS))
    form = rng.choice(("And in {l}?", "And {l}?", "What about {l}?", "In {l}?"))
    content = f"translation {word} {language}"
    return from_template(
        "follow_up_fact", form, content, form.format(l=language), translation_answer(word, language), topic="translation", word=word
    )


def ask_to_name(rng: random.Random, state: State) -> Exchange:
    """Ask to name one to three things of a kind."""
    kind, count = rng.choice(list(t.NAMED)), rng.choice((1, 2, 3))
    phrase = a(kind) if count == 1 else f"{('two', 'three')[count - 2]} {plural(kind)}"
    form = rng.choice(("Name {x}.", "Tell me {x}.", "Can you name {x}?", "Say {x}.", "Give me {x}.", "Do you know {x}?"))
    names = t.NAMED[kind][:count]
    answer = {1: "{0}.", 2: "{0} and {1}.", 3: "{0}, {1} and {2}."}[count].format(*names)
    return from_template("naming", form, f"{count} {kind}", form.format(x=phrase), answer, topic="naming")


ECHO_FORMS = ("Say {x}.", "Repeat after me: {x}", "Repeat: {x}", "Please say {x}.", "Can you say {x}?", "Echo: {x}")


def ask_echo(rng: random.Random, state: State) -> Exchange:
    """Ask to repeat some words; trains copying in general."""
    pool = (*t.FOODS, *t.HOBBIES, *t.COLOURS, *t.PETS, *OPPOSITE_OF)
    words = " ".join(rng.choice(pool) if rng.random() < 0.6 else invented_word(rng) for _ in range(rng.randint(1, 4)))
    return Exchange("echo", rng.choice(ECHO_FORMS).format(x=words), sentence(words) + ".", (f"echo:{words}",), {"topic": "echo"})


# --------------------------------------------------------------------------------------------- stories

STORY_OPENERS = (
    "Tell me a story about {c}.",
    "Tell me a story about {c}.",
    "Tell a story about {c}.",
    "Tell me a short story about {c}.",
    "Can you tell me a story about {c}?",
    "I want a story about {c}.",
    "A story about {c}",
    "Please tell me a story about {c}.",
    "Write a story about {c}.",
    "Do you know a story about {c}?",
    "Story about {c}",
)
PLAIN_STORY = (
    "Tell me a story.",
    "Tell me a story",
    "Can you tell me a story?",
    "Tell a story.",
    "I want a story.",
    "A story",
    "Tell me a short story.",
    "Do you know a story?",
    "Please tell me a story.",
    "Write a story.",
    "Story time!",
    "Can you tell stories?",
    "I would like a story.",
    "story",
)
MORE_STORY = ("Tell me another story.", "Another story", "One more story.", "Tell me one more story.", "Do you know another story?")
MORE = ("Another one", "Another one please", "One more", "Tell me another one.", "More", "Again", "Another", "Another story")


def tell_story(who: str, name: str, nature: str) -> str:
    """Return the story about a kind of character, with the name and nature asked for."""
    plot = t.PLOTS[who]
    return (
        f"Once upon a time there was {a(nature)} {who} named {name}. {name} lived {plot.home}. One day {name} found "
        f"{plot.found} and showed it to {plot.friend}. {name} and {plot.friend.replace('an ', 'the ').replace('a ', 'the ')} "
        f"{plot.ending}. The end."
    )


def story(category: str, user: str, who: str, name: str, nature: str, keys: tuple[str, ...]) -> Exchange:
    """Put a request and its story together and remember whom it was about."""
    remember = {"topic": "story", "story": (who, name, nature)}
    return Exchange(category, user, tell_story(who, name, nature), keys, remember)


def ask_story(rng: random.Random, state: State) -> Exchange:
    """Ask for a story: any, about a kind of character, with a nature, with a name."""
    roll = rng.random()
    if roll < 0.15:
        user, tag = decorate(rng, rng.choice(PLAIN_STORY), chance=0.3)
        return story("story", user, "cat", "Tom", "small", (f"story:{user}",) if tag else ())
    if roll < 0.2:
        user, tag = decorate(rng, rng.choice(MORE_STORY), chance=0.3)
        return story("story", user, "dog", "Rex", "happy", (f"story:{user}",) if tag else ())
    if roll < 0.25:
        return ask_impossible_story(rng)
    who = rng.choice(list(t.PLOTS))
    plot, opener = t.PLOTS[who], rng.choice(STORY_OPENERS)
    name, nature, character, key = plot.name, plot.nature, who, f"story:{opener}|{who}"
    if rng.random() < 0.25:
        nature = rng.choice(t.NATURES)
        character, key = f"{nature} {who}", f"story:{nature} {who}"
    phrase = a(character)
    keys = (key,)
    if rng.random() < 0.6:
        name = any_name(rng)
        phrase = f"{phrase} {rng.choice(('named', 'named', 'called'))} {name}"
        keys = (key, f"name:{name}")
    return story("story", opener.format(c=phrase), who, name, nature, keys)


def follow_story(rng: random.Random, state: State) -> Exchange:
    """Ask for one more story in short, or about the one just told."""
    if rng.random() > 0.1:
        return ask_about_story(rng, state)
    user, tag = decorate(rng, rng.choice(MORE))
    return story("story", user, "dog", "Rex", "happy", (f"more:{user}",) if tag else ())


def ask_impossible_story(rng: random.Random) -> Exchange:
    """Ask for a story about something the model has no story about."""
    what = rng.choice((a(invented_word(rng)), rng.choice(t.FAR_NOUNS), a(rng.choice(("table", "shoe", "car", "house", "tree", "book", "phone", "train")))))
    opener = rng.choice(STORY_OPENERS)
    answer = f"I know no story about {what}. Ask me for one about a cat, a dragon or a robot."
    return from_template("story", opener, what, opener.format(c=what), answer, topic="no story")


STORY_QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What was the {w}'s name?", "The {w}'s name was {n}."),
    ("What is the {w}'s name?", "The {w}'s name was {n}."),
    ("What was the name of the {w}?", "The {w}'s name was {n}."),
    ("What was the {w} called?", "The {w}'s name was {n}."),
    ("Who was the story about?", "The story was about {aw} named {n}."),
    ("What was the story about?", "The story was about {aw} named {n}."),
    ("Who was in the story?", "The story was about {aw} named {n}."),
    ("Who was {n}?", "{n} was {anature} {w}."),
    ("What was {n}?", "{n} was {anature} {w}."),
    ("Who was in it?", "The story was about {aw} named {n}."),
    ("Who was it about?", "The story was about {aw} named {n}."),
    ("What was it about?", "The story was about {aw} named {n}."),
    ("What was his name?", "The {w}'s name was {n}."),
    ("What was her name?", "The {w}'s name was {n}."),
    ("Where did he live?", "{n} lived {home}."),
    ("Where did she live?", "{n} lived {home}."),
    ("And where did {n} live?", "{n} lived {home}."),
    ("What did he find?", "{n} found {found}."),
    ("What did she find?", "{n} found {found}."),
    ("And what did {n} find?", "{n} found {found}."),
    ("Where did {n} live?", "{n} lived {home}."),
    ("Where did the {w} live?", "{n} lived {home}."),
    ("What did {n} find?", "{n} found {found}."),
    ("What did the {w} find?", "{n} found {found}."),
    ("What was found?", "{n} found {found}."),
    ("Who was the friend?", "The friend was {friend}."),
    ("Who was {n}'s friend?", "The friend was {friend}."),
    ("Who did {n} meet?", "The friend was {friend}."),
    ("Who was the friend of the {w}?", "The friend was {friend}."),
    ("How did the story end?", "In the end they {ending}."),
    ("What happened in the end?", "In the end they {ending}."),
    ("How did it end?", "In the end they {ending}."),
    ("What did they do?", "In the end they {ending}."),
)


def ask_about_story(rng: random.Random, state: State) -> Exchange:
    """Ask about the story told last, or about one when none was told."""
    question, answer = rng.choice(STORY_QUESTIONS)
    who, name, nature = state.get("story") or (rng.choice(list(t.PLOTS)), any_name(rng), "")
    plot = t.PLOTS[who]
    words = {
        "w": who,
        "aw": a(who),
        "n": name,
        "anature": a(nature) if nature else "",
        "home": plot.home,
        "found": plot.found,
        "friend": plot.friend,
        "ending": plot.ending,
    }
    user = question.format(**words)
    if "story" not in state:
        if "{n}" in question:
            return ask_about_story(rng, state)
        return Exchange("recall_untold", user, "I have not told you a story yet.", (f"nostory:{user}",))
    keys = (f"storyq:{question}|{who}", f"name:{name}") if name != plot.name else (f"storyq:{question}|{who}",)
    return Exchange("story_question", user, answer.format(**words), keys, {"topic": "story"})


# --------------------------------------------------------------------------------------------- conversations

OPENERS: tuple[tuple[float, Asker], ...] = (
    (10, _small_talk("greeting")),
    (8, _small_talk("about")),
    (1.5, _small_talk("joke")),
    (6, ask_unknown),
    (7, tell_name),
    (3, introduce),
    (6, tell_personal),
    (5, tell_pet),
    (9, arithmetic("+")),
    (14, arithmetic("-")),
    (9, arithmetic("×")),
    (2, ask_three_terms),
    (1, ask_twice),
    (4.5, ask_too_big),
    (9, ask_colour),
    (1, ask_liking),
    (2, ask_to_name),
    (8, ask_calendar),
    (7, ask_counting),
    (6, ask_opposite),
    (8, ask_animal),
    (6, ask_size),
    (5, ask_capital),
    (4, ask_translation),
    (3, ask_echo),
    (9, ask_story),
    (0.8, ask_name),
    (0.8, ask_personal),
    (0.4, ask_pet),
    (0.4, ask_about_story),
)
FOLLOW_UPS: dict[str, Asker] = {
    "arithmetic": follow_arithmetic,
    "colour": follow_colour,
    "calendar": follow_calendar,
    "opposite": follow_opposite,
    "animal": follow_animal,
    "capital": follow_capital,
    "translation": follow_translation,
    "story": follow_story,
    "pet": ask_pet,
    "joke": follow_joke,
    "how are you": follow_how_are_you,
    "offer": follow_offer,
}
REPEATING = ("name", "introduction", "personal", "recall", "recall_untold", "echo", "story", "story_question")
RECALLABLE = ("name", "pets", "age", "colour", "likes", "city")


def propose(rng: random.Random, state: State) -> Exchange:
    """Draw the next exchange: a follow-up on the last topic, a question about the earlier turns, or a new topic."""
    follow_up = FOLLOW_UPS.get(state.get("topic", ""))
    roll = rng.random()
    if follow_up and roll < 0.4:
        return follow_up(rng, state)
    if roll < 0.7 and any(kind in state for kind in RECALLABLE):
        return ask_recall(rng, state)
    if roll > 0.9 and len(state.get("pets", {})) == 1:
        return tell_pet(rng, state)
    if roll > 0.95 and "story" in state:
        return ask_about_story(rng, state)
    weights, askers = zip(*OPENERS, strict=True)
    return rng.choices(askers, weights)[0](rng, state)


def draw_trained(rng: random.Random, state: State) -> Exchange:
    """Draw an exchange that contains nothing held back."""
    while True:
        exchange = propose(rng, state)
        if not any(map(is_held_back, exchange.keys)):
            return exchange


def extend(messages: list[Message], state: State, exchange: Exchange, rng: random.Random) -> None:
    """Append the exchange, the question roughened, and take over what it leaves to be remembered."""
    may_shout = exchange.category not in REPEATING
    messages.append({"role": "user", "content": roughen(rng, exchange.user, may_shout)})
    messages.append({"role": "assistant", "content": exchange.assistant})
    state.update(exchange.remember)


def begin(rng: random.Random) -> list[Message]:
    """Start a conversation, with a system message in a quarter of the cases."""
    return [{"role": "system", "content": rng.choice(t.SYSTEM_MESSAGES)}] if rng.random() < 0.25 else []


def training_conversation(rng: random.Random, min_chars: int = 0) -> list[Message]:
    """Return one conversation without anything held back.

    Args:
        rng: The source of all choices.
        min_chars: Go on until the conversation has this many characters (for the long ones); the usual length is
            one to six exchanges.
    """
    messages, state = begin(rng), State()
    turns = rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
    while turns > 0 or sum(len(m["content"]) for m in messages) < min_chars:
        extend(messages, state, draw_trained(rng, state), rng)
        turns -= 1
    return messages


@dataclass(frozen=True)
class HeldBack:
    """A conversation whose last question was held back, with the one right answer."""

    category: str
    messages: list[Message]
    answer: str


def held_back_questions(rng: random.Random, min_chars: int = 0) -> Iterator[HeldBack]:
    """Yield questions that contain a held-back combination, after some trained turns.

    A held-back name or fact must come into the conversation to be asked for later, so the turns before are drawn
    from both sets; every one of them that is held back is yielded as a question of its own as well.
    """
    while True:
        messages, state = begin(rng), State()
        for _ in range(rng.randint(1, 6) if not min_chars else 200):
            exchange = propose(rng, state)
            long_enough = sum(len(m["content"]) for m in messages) >= min_chars
            extend(messages, state, exchange, rng)
            if long_enough and any(map(is_held_back, exchange.keys)):
                yield HeldBack(exchange.category, messages[:-1], exchange.assistant)
            if min_chars and sum(len(m["content"]) for m in messages) >= min_chars + 300:
                break


def held_back_set(seed: int, per_category: int, long_conversations: int) -> list[HeldBack]:
    """Return the questions to score: the same number for every category, and the long conversations as one more."""
    rng = random.Random(f"held back {seed}")
    chosen: dict[str, list[HeldBack]] = {}
    for question in held_back_questions(rng):
        of_category = chosen.setdefault(question.category, [])
        if len(of_category) < per_category:
            of_category.append(question)
        elif len(chosen) == len(CATEGORIES) and all(len(found) >= per_category for found in chosen.values()):
            break
    recalls = (q for q in held_back_questions(rng, min_chars=1600) if q.category in ("recall", "story_question"))
    long = [
        HeldBack("long_conversation", question.messages, question.answer)
        for question in itertools.islice(recalls, long_conversations)
    ]
    return [question for found in chosen.values() for question in found] + long


CATEGORIES = (
    "greeting",
    "about",
    "joke",
    "out_of_domain",
    "name",
    "introduction",
    "personal",
    "naming",
    "recall",
    "recall_untold",
    "addition",
    "subtraction",
    "multiplication",
    "follow_up_arithmetic",
    "too_big",
    "colour",
    "calendar",
    "counting",
    "opposite",
    "animal",
    "size",
    "capital",
    "translation",
    "follow_up_fact",
    "echo",
    "story",
    "story_question",
)
