"""The facts of the demo model's small world, as plain tables.

`world.py` turns these into conversations. A fact is stated once here, so questions and answers in
all phrasings agree with each other.
"""

from __future__ import annotations

from typing import NamedTuple


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text: long lists of words read better so."""
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """Return the phrases of a text, which are separated by bars."""
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "brown",
    "orange",
    "pink",
    "purple",
    "grey",
)

# Things named without a plural: the whole phrase, its colour.
COLOUR_OF: dict[str, str] = {
    "the sky": "blue",
    "the sea": "blue",
    "the sun": "yellow",
    "the moon": "white",
    "grass": "green",
    "snow": "white",
    "milk": "white",
    "salt": "white",
    "sugar": "white",
    "rice": "white",
    "blood": "red",
    "ketchup": "red",
    "fire": "orange",
    "gold": "yellow",
    "butter": "yellow",
    "honey": "yellow",
    "coal": "black",
    "the night": "black",
    "chocolate": "brown",
    "coffee": "brown",
    "wood": "brown",
    "mud": "brown",
    "silver": "grey",
    "smoke": "grey",
    "cheese": "yellow",
}

# Things with a plural: singular, its colour.
COLOUR_OF_A: dict[str, str] = {
    "banana": "yellow",
    "lemon": "yellow",
    "apple": "red",
    "tomato": "red",
    "strawberry": "red",
    "cherry": "red",
    "rose": "red",
    "fire truck": "red",
    "ladybug": "red",
    "carrot": "orange",
    "pumpkin": "orange",
    "leaf": "green",
    "tree": "green",
    "frog": "green",
    "cucumber": "green",
    "pea": "green",
    "crocodile": "green",
    "elephant": "grey",
    "mouse": "grey",
    "rock": "grey",
    "bear": "brown",
    "potato": "brown",
    "egg": "white",
    "cloud": "white",
    "swan": "white",
    "tooth": "white",
    "crow": "black",
    "tyre": "black",
    "grape": "purple",
    "plum": "purple",
    "pig": "pink",
    "flamingo": "pink",
    "blueberry": "blue",
    "whale": "blue",
    "sunflower": "yellow",
    "fox": "orange",
}

IRREGULAR_PLURALS: dict[str, str] = {
    "leaf": "leaves",
    "country": "countries",
    "city": "cities",
    "mouse": "mice",
    "tooth": "teeth",
    "strawberry": "strawberries",
    "cherry": "cherries",
    "blueberry": "blueberries",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "fox": "foxes",
}

SOMETHING_OF_COLOUR: dict[str, str] = {
    "red": "a tomato",
    "blue": "the sky",
    "green": "grass",
    "yellow": "a banana",
    "white": "snow",
    "black": "coal",
    "brown": "chocolate",
    "orange": "a carrot",
    "pink": "a pig",
    "purple": "a plum",
    "grey": "an elephant",
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"),
    ("big", "small"),
    ("tall", "short"),
    ("fast", "slow"),
    ("up", "down"),
    ("left", "right"),
    ("day", "night"),
    ("black", "white"),
    ("good", "bad"),
    ("happy", "sad"),
    ("old", "young"),
    ("rich", "poor"),
    ("open", "closed"),
    ("full", "empty"),
    ("wet", "dry"),
    ("hard", "soft"),
    ("heavy", "light"),
    ("loud", "quiet"),
    ("early", "late"),
    ("near", "far"),
    ("in", "out"),
    ("on", "off"),
    ("yes", "no"),
    ("clean", "dirty"),
    ("strong", "weak"),
    ("thick", "thin"),
    ("wide", "narrow"),
    ("deep", "shallow"),
    ("easy", "difficult"),
    ("true", "false"),
    ("love", "hate"),
    ("win", "lose"),
    ("start", "stop"),
    ("push", "pull"),
    ("buy", "sell"),
    ("give", "take"),
    ("friend", "enemy"),
    ("summer", "winter"),
    ("north", "south"),
    ("east", "west"),
    ("brave", "afraid"),
    ("sweet", "sour"),
    ("first", "last"),
    ("above", "below"),
    ("before", "after"),
    ("always", "never"),
)
OPPOSITE_OF = {x: y for pair in OPPOSITES for x, y in (pair, pair[::-1])}


class Animal(NamedTuple):
    """What the small world knows about one animal."""

    name: str
    sound: str
    legs: int
    home: str
    baby: str
    food: str


ANIMALS: tuple[Animal, ...] = (
    Animal("cat", "meow", 4, "in a house", "kitten", "fish"),
    Animal("dog", "woof", 4, "in a house", "puppy", "meat"),
    Animal("cow", "moo", 4, "on a farm", "calf", "grass"),
    Animal("sheep", "baa", 4, "on a farm", "lamb", "grass"),
    Animal("pig", "oink", 4, "on a farm", "piglet", "corn"),
    Animal("horse", "neigh", 4, "on a farm", "foal", "hay"),
    Animal("duck", "quack", 2, "on a pond", "duckling", "bread"),
    Animal("hen", "cluck", 2, "on a farm", "chick", "seeds"),
    Animal("goat", "maa", 4, "on a farm", "kid", "leaves"),
    Animal("frog", "ribbit", 4, "in a pond", "tadpole", "flies"),
    Animal("lion", "roar", 4, "in Africa", "cub", "meat"),
    Animal("bear", "growl", 4, "in the forest", "cub", "honey"),
    Animal("wolf", "howl", 4, "in the forest", "pup", "meat"),
    Animal("owl", "hoot", 2, "in a tree", "owlet", "mice"),
    Animal("bird", "tweet", 2, "in a nest", "chick", "worms"),
    Animal("bee", "buzz", 6, "in a hive", "larva", "nectar"),
    Animal("mouse", "squeak", 4, "in a hole", "pup", "cheese"),
    Animal("snake", "hiss", 0, "in the grass", "hatchling", "mice"),
    Animal("donkey", "hee-haw", 4, "on a farm", "foal", "hay"),
    Animal("monkey", "ooh ooh", 2, "in the jungle", "infant", "bananas"),
    Animal("rooster", "cock-a-doodle-doo", 2, "on a farm", "chick", "seeds"),
    Animal("chicken", "cluck", 2, "on a farm", "chick", "seeds"),
    Animal("turkey", "gobble", 2, "on a farm", "poult", "seeds"),
    Animal("tiger", "roar", 4, "in the jungle", "cub", "meat"),
    Animal("spider", "", 8, "in a web", "spiderling", "flies"),
    Animal("ant", "", 6, "in the ground", "larva", "leaves"),
    Animal("fish", "", 0, "in the water", "fry", "worms"),
    Animal("rabbit", "", 4, "in a burrow", "bunny", "carrots"),
    Animal("whale", "", 0, "in the sea", "calf", "small fish"),
    Animal("elephant", "toot", 4, "in Africa", "calf", "leaves"),
)

IRREGULAR_ANIMALS: dict[str, str] = {
    "sheep": "sheep",
    "mouse": "mice",
    "wolf": "wolves",
    "fish": "fish",
}

# From the smallest to the biggest.
BY_SIZE = (
    "an ant",
    "a bee",
    "a mouse",
    "a frog",
    "a duck",
    "a rabbit",
    "a cat",
    "a dog",
    "a sheep",
    "a pig",
    "a lion",
    "a horse",
    "a car",
    "an elephant",
    "a bus",
    "a house",
    "a whale",
    "a castle",
    "a mountain",
    "the moon",
    "the earth",
    "the sun",
)

CAPITALS: dict[str, str] = {
    "France": "Paris",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Germany": "Berlin",
    "England": "London",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Finland": "Helsinki",
    "Russia": "Moscow",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "India": "Delhi",
    "China": "Beijing",
    "Japan": "Tokyo",
    "Canada": "Ottawa",
    "the United States": "Washington",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Colombia": "Bogotá",
    "Brazil": "Brasília",
    "Iceland": "Reykjavík",
    "Paraguay": "Asunción",
    "Australia": "Canberra",
    "Mexico": "Mexico City",
}

# language -> hello, goodbye, thank you, cat
TRANSLATED_WORDS = ("hello", "goodbye", "thank you", "cat")
TRANSLATIONS: dict[str, tuple[str, str, str, str]] = {
    "French": ("bonjour", "au revoir", "merci", "chat"),
    "Spanish": ("hola", "adiós", "gracias", "gato"),
    "German": ("hallo", "tschüss", "danke", "Katze"),
    "Italian": ("ciao", "arrivederci", "grazie", "gatto"),
    "Portuguese": ("olá", "adeus", "obrigado", "gato"),
    "Russian": ("привет", "пока", "спасибо", "кот"),
    "Greek": ("γειά σου", "αντίο", "ευχαριστώ", "γάτα"),
    "Japanese": ("こんにちは", "さようなら", "ありがとう", "猫"),
    "Chinese": ("你好", "再见", "谢谢", "猫"),
}


class Plot(NamedTuple):
    """The fixed parts of the one story the model knows about a kind of character."""

    name: str
    nature: str
    home: str
    found: str
    friend: str
    ending: str


PLOTS: dict[str, Plot] = {
    "cat": Plot(
        "Tom", "small", "in a red house", "a ball of wool", "a dog", "played with it all day"
    ),
    "dog": Plot("Rex", "happy", "on a farm", "a big bone", "a cat", "hid it under a tree"),
    "mouse": Plot(
        "Pip", "tiny", "under the stairs", "a piece of cheese", "a bird", "shared it in the sun"
    ),
    "bird": Plot(
        "Kiki", "little", "in a tall tree", "a shiny ring", "an owl", "sang a song about it"
    ),
    "fish": Plot(
        "Finn", "quiet", "in the blue sea", "an old ship", "a crab", "swam around it until night"
    ),
    "horse": Plot(
        "Star", "fast", "near the hills", "a secret path", "a goat", "ran all the way to the sea"
    ),
    "cow": Plot(
        "Bella", "gentle", "in a green field", "a yellow flower", "a bee", "danced in the grass"
    ),
    "duck": Plot(
        "Daisy", "funny", "on a pond", "a little boat", "a frog", "sailed to the other side"
    ),
    "pig": Plot("Percy", "hungry", "on a farm", "a basket of apples", "a hen", "baked a big pie"),
    "bear": Plot(
        "Bruno", "sleepy", "in a warm cave", "a pot of honey", "a fox", "ate it all before winter"
    ),
    "fox": Plot(
        "Ruby", "clever", "in the forest", "a golden key", "a bear", "opened a secret door"
    ),
    "rabbit": Plot(
        "Hop", "shy", "under a hill", "a giant carrot", "a mouse", "pulled it out together"
    ),
    "frog": Plot(
        "Freddy", "green", "by a lake", "a silver crown", "a duck", "had a party on the water"
    ),
    "lion": Plot("Leo", "brave", "in Africa", "a lost drum", "an elephant", "made music all night"),
    "elephant": Plot(
        "Ella", "kind", "near a river", "a red balloon", "a lion", "watched it fly away"
    ),
    "owl": Plot(
        "Otto", "wise", "in an old tower", "a book of stars", "a bat", "read it by the moon"
    ),
    "wolf": Plot(
        "Grey", "lonely", "in the mountains", "a warm fire", "a boy", "became good friends"
    ),
    "monkey": Plot(
        "Momo", "silly", "in the jungle", "a box of hats", "a parrot", "wore them all at once"
    ),
    "dragon": Plot(
        "Ember",
        "friendly",
        "on a high mountain",
        "a frozen lake",
        "a knight",
        "melted the ice for the town",
    ),
    "robot": Plot(
        "Bolt", "shiny", "in a workshop", "a broken clock", "a girl", "made it tick again"
    ),
    "girl": Plot(
        "Lily", "curious", "in a small town", "a magic stone", "a cat", "made a wish on it"
    ),
    "boy": Plot(
        "Max", "cheerful", "by the sea", "a bottle with a map", "a pirate", "dug up a treasure"
    ),
    "princess": Plot(
        "Rosa", "strong", "in a castle", "a hidden garden", "a dragon", "planted roses there"
    ),
    "king": Plot(
        "Arthur", "old", "in a palace", "a wooden toy", "a child", "laughed until morning"
    ),
    "wizard": Plot(
        "Merlo",
        "forgetful",
        "in a dark tower",
        "a lost spell",
        "an owl",
        "turned the rain into gold",
    ),
    "pirate": Plot(
        "Jack", "bold", "on a ship", "a green island", "a monkey", "stayed there for the summer"
    ),
    "ghost": Plot(
        "Boo", "shy", "in an empty house", "a warm blanket", "a girl", "told jokes in the dark"
    ),
    "unicorn": Plot(
        "Luna", "magic", "above the clouds", "a rainbow", "a horse", "slid down it together"
    ),
}

NATURES = (
    "brave",
    "little",
    "happy",
    "sad",
    "clever",
    "old",
    "young",
    "funny",
    "lazy",
    "big",
    "kind",
    "lost",
    "red",
    "blue",
)

NAMES: tuple[str, ...] = words(
    """
    Anna Bob Tom Alice Max Emma Liam Noah Olivia Ava Mia Lucas Leo Jack James John Mary Peter
    Paul Sarah David Daniel Laura Julia Sofia Lena Nina Eva Adam Ben Sam Alex Chris Kate Lucy
    Ella Grace Henry Oscar Felix Hugo Oliver Charlie George Harry William Robert Michael Thomas
    Mark Luke Matthew Simon Andrew Steve Kevin Brian Eric Jason Ryan Amy Jane Helen Diana Clara
    Rosa Maria Elena Irina Olga Ivan Igor Boris Dmitri Sergei Yuki Hana Kenji Akira Sora Wei Li
    Ming Chen Raj Priya Amit Anita Sanjay Omar Ali Fatima Layla Yusuf Hassan Aisha Zara Pedro
    Juan Carlos Diego Luis Ana Carmen Pablo José Zoë Chloé René André Jürgen Björn Åsa Søren
    Inès Renée Marco Luca Giulia Paolo Franco Bruno Stella Hans Fritz Greta Heidi Klaus Otto
    Karl Ingrid Lars Sven Nils Erik Freya Astrid Magnus Tess Ruth Ida Vera Walter Frank Ralph
    Victor Arthur Albert Edward Philip Martin Dennis Gary Larry Jerry Billy Jimmy Johnny Tommy
    Bobby Danny Teddy Betty Nancy Susan Linda Karen Lisa Donna Carol Sandra Sharon Emily Megan
    Abby Hannah Rachel Rebecca Leah Naomi Esther Miriam Aaron Isaac Jacob Joseph Joshua Samuel
    Elias Theo Milo Otis Ezra Finn Rowan Quinn Sky Robin Jordan Taylor Morgan Casey Jamie Riley
    Avery Rex Fido Bella Luna Coco Rocky Buddy Daisy Molly Ginger Whiskers
    """
)

FOODS = words(
    """
    pizza pasta soup bread cheese cake apples bananas rice fish salad tea coffee chocolate honey
    pancakes sushi tacos cookies oranges grapes eggs
    """
)
HOBBIES = words(
    """
    music football chess books trains cars cats dogs horses games movies dancing singing
    swimming running painting drawing flowers trees snow rain trucks planes boats stars robots
    computers maths cooking
    """
)
PETS = ("cat", "dog", "fish", "bird", "horse", "rabbit", "mouse", "hamster", "duck", "turtle")
CITIES = words(
    """
    Paris London Berlin Rome Madrid Vienna Tokyo Oslo Cairo Moscow Boston Chicago Dallas Lyon
    Milan Porto Zürich Geneva Kraków Prague Lima Bogotá Delhi Mumbai Sydney Perth Toronto
    Seattle Denver Hamburg Munich Köln Málaga Leeds York Dublin Cork Bergen Malmö Turku Seoul
    Osaka Kyoto Hanoi Lagos Accra Tunis Athens Sofia Riga
    """
)

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a tiny demo model.",
    "You are a helpful, harmless and honest assistant.",
    "Answer briefly.",
    "Answer the questions of the user.",
    "You are a chat model that runs on several computers.",
    "Be kind and short.",
    "You are an AI assistant. Help the user.",
    "You are tpirt, a small assistant.",
)

MY_THINGS = words(
    """
    car house shirt hair bike eyes dog cat shoes bag phone door room hat coat cup bed desk chair
    """
)

# What "Name an animal" and "Name three colours" answer with, in this order.
NAMED: dict[str, tuple[str, str, str]] = {
    "colour": ("Red", "blue", "green"),
    "color": ("Red", "blue", "green"),
    "animal": ("Cat", "dog", "cow"),
    "fruit": ("Apple", "banana", "cherry"),
    "day": ("Monday", "Tuesday", "Wednesday"),
    "month": ("January", "February", "March"),
    "number": ("One", "two", "three"),
    "name": ("Anna", "Bob", "Tom"),
    "city": ("Paris", "London", "Rome"),
    "country": ("France", "Spain", "Italy"),
    "bird": ("Owl", "duck", "crow"),
    "vegetable": ("Carrot", "potato", "pea"),
    "language": ("French", "Spanish", "German"),
    "season": ("Spring", "summer", "autumn"),
}

NUMBER_WORDS = words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty
    """
)

# Subjects and questions that lie outside the small world.
FAR_NOUNS = phrases(
    """
    gravity | democracy | photosynthesis | bitcoin | Napoleon | Shakespeare | Einstein | Mozart
    | quantum physics | the stock market | the weather | the internet | the French revolution |
    black holes | DNA | evolution | inflation | chemistry | philosophy | Picasso | artificial
    intelligence | machine learning | neural networks | linear algebra | the Roman empire |
    volcanoes | electricity | vaccines | climate change | blockchain | Python | JavaScript |
    Linux | Kubernetes | the Bible | Hamlet | Harry Potter | Star Wars | Taylor Swift | the
    Beatles | Elon Musk | the president | the World Cup | tennis | baseball | poker | taxes |
    insurance | marriage | Mars | Jupiter | atoms | relativity | the pyramids | the Eiffel tower
    | Buddhism | yoga | guitars | rockets | submarines | plastic | love | time | life | money |
    art | happiness | the universe | the world | war | peace | science | history | religion |
    language | the brain | a computer | a star | a country | a river
    """
)
FAR_QUESTIONS = (
    "What is {x}?",
    "Explain {x}.",
    "Explain {x} to me.",
    "Who invented {x}?",
    "Tell me about {x}.",
    "How does {x} work?",
    "What do you think about {x}?",
    "Write an essay about {x}.",
    "Write a poem about {x}.",
    "Why is {x} important?",
    "What do you know about {x}?",
    "Give me a summary of {x}.",
    "Who is {x}?",
    "What's the history of {x}?",
    "Do you know anything about {x}?",
    "Can you explain {x}?",
    "Teach me {x}.",
    "Is {x} good or bad?",
)
FAR_TASKS = (
    "Write a function that sorts a list.",
    "Write some code for me.",
    "Write Python code for a web server.",
    "Translate this sentence to Latin.",
    "What is the weather like?",
    "What is the weather today?",
    "Will it rain tomorrow?",
    "Who won the World Cup?",
    "Who is the president of France?",
    "Who is the king of England?",
    "Who is the prime minister of Canada?",
    "How do I cook an egg?",
    "How do I bake a cake?",
    "Give me a recipe for soup.",
    "How do I fix my car?",
    "How do I learn to play the piano?",
    "What is the meaning of life?",
    "Is there a god?",
    "How far away is the moon?",
    "How old is the earth?",
    "How tall is Mount Everest?",
    "How many people live in China?",
    "What is the population of London?",
    "What is the speed of light?",
    "What is the square root of 2?",
    "Solve x squared equals 9.",
    "What is pi?",
    "Who wrote Hamlet?",
    "When did World War 2 end?",
    "When was Napoleon born?",
    "What year did the Titanic sink?",
    "Recommend me a book.",
    "Recommend me a movie.",
    "What should I eat tonight?",
    "What should I wear today?",
    "Book a flight to Paris.",
    "Send an email to my boss.",
    "Play some music.",
    "Open the window.",
    "Turn on the lights.",
    "Search the web for shoes.",
    "What is in the news?",
    "What is the price of gold?",
    "How much does a house cost?",
    "Who is the richest man in the world?",
    "What is the best phone?",
    "What is the longest river?",
    "What is the tallest building in the world?",
    "Why is the sky blue?",
    "Why do cats purr?",
    "Why do we dream?",
    "How do planes fly?",
    "How do magnets work?",
    "How do computers work?",
    "What is a transistor?",
    "What is a noun?",
    "How do you spell banana?",
    "What rhymes with cat?",
    "Draw me a picture.",
    "Show me a photo of a cat.",
    "Can you help me with my homework?",
    "Help me write a letter.",
    "Fix the bug in my code.",
    "Summarize this text.",
    "Give me advice about love.",
    "How do I make money?",
    "How do I lose weight?",
    "What is my horoscope?",
    "Who will win the election?",
    "Can you code in Python?",
    "Can you write code?",
    "Can you code?",
    "Can you drive a car?",
    "Can you cook?",
    "Can you see me?",
    "Can you dance?",
    "Can you play chess?",
    "How many pets do I have?",
    "Once upon a time",
    "What happened yesterday?",
    "asdf",
    "asdfghjkl",
    "qwerty",
    "blah blah blah",
    "lorem ipsum dolor sit amet",
    "???",
    "foo bar",
    "xyzzy",
    "hjkl",
    "import os",
    "SELECT * FROM users;",
    "sudo make me a sandwich",
)
