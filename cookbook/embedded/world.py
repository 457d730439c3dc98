"""A closed little world: what there is to know, and how one asks about it.

Everything is a `Relation`: one kind of question, whose subjects each have one fact. Small talk is a relation with a
single nameless subject.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Exchange:
    """A question, a reply in plain English, and the fact that makes the reply right (a part of its text)."""

    question: str
    reply: str
    fact: str


@dataclass(frozen=True)
class Relation:
    """One kind of question. Templates name `{subject}`, replies also `{fact}`.

    `follow_ups` ask the same again of another subject, and only make sense right after it was asked in full.
    """

    questions: tuple[str, ...]
    replies: tuple[str, ...]
    facts: Mapping[str, str]
    follow_ups: tuple[str, ...] = ("And {subject}?", "What about {subject}?", "And what about {subject}?")

    def ask(self, subject: str, rng: Random, *, following_up: bool = False) -> Exchange:
        """One wording of the question about `subject`, and one wording of its reply."""
        question = rng.choice(self.follow_ups if following_up else self.questions).format(subject=subject)
        reply = rng.choice(self.replies).format(subject=subject, fact=self.facts[subject])
        return Exchange(_capitalised(question), _capitalised(reply), self.facts[subject])


def small_talk(questions: tuple[str, ...], replies: tuple[str, ...]) -> Relation:
    """Remarks that ask for no fact."""
    return Relation(questions, replies, {"": ""}, follow_ups=())


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _successors(names: tuple[str, ...]) -> dict[str, str]:
    """Each name to the next one around the circle."""
    return dict(zip(names, names[1:] + names[:1], strict=True))


def _inverse(facts: Mapping[str, str]) -> dict[str, str]:
    return {fact: subject for subject, fact in facts.items()}


CAPITALS = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Bulgaria": "Sofia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogota",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "New Zealand": "Wellington",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Senegal": "Dakar",
    "South Korea": "Seoul",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Ukraine": "Kyiv",
    "Uruguay": "Montevideo",
    "Vietnam": "Hanoi",
}

COUNTRIES_BY_CONTINENT = {
    "Africa": ("Egypt", "Ethiopia", "Ghana", "Kenya", "Morocco", "Senegal"),
    "Asia": ("China", "India", "Japan", "Nepal", "South Korea", "Thailand", "Vietnam"),
    "Europe": (
        *("Austria", "Belgium", "Bulgaria", "Croatia", "Denmark", "Finland", "France", "Germany", "Greece"),
        *("Hungary", "Iceland", "Ireland", "Italy", "Norway", "Poland", "Portugal", "Romania", "Spain"),
        *("Sweden", "Ukraine"),
    ),
    "North America": ("Canada", "Cuba"),
    "Oceania": ("Australia", "New Zealand"),
    "South America": ("Argentina", "Brazil", "Chile", "Colombia", "Ecuador", "Peru", "Uruguay"),
}

SOUNDS = {
    **{"a bear": "growl", "a bee": "buzz", "a cat": "meow", "a cow": "moo", "a crow": "caw", "a dog": "bark"},
    **{"a donkey": "bray", "a duck": "quack", "a frog": "croak", "a goat": "bleat", "a goose": "honk"},
    **{"a hen": "cluck", "a horse": "neigh", "a lion": "roar", "a mouse": "squeak", "a pig": "oink"},
    **{"a sheep": "baa", "a snake": "hiss", "a turkey": "gobble", "a wolf": "howl", "an elephant": "trumpet"},
    **{"an owl": "hoot"},
}

ANIMALS_BY_LEGS = {
    "no": ("a fish", "a snake", "a worm", "a snail"),
    "two": ("a crow", "a duck", "a goose", "a hen", "a swan", "a turkey", "an owl"),
    "four": (
        *("a bear", "a cat", "a cow", "a deer", "a dog", "a donkey", "a frog", "a goat", "a horse", "a lion"),
        *("a mouse", "a pig", "a rabbit", "a sheep", "a wolf", "an elephant"),
    ),
    "six": ("a bee", "a beetle", "a butterfly", "an ant"),
    "eight": ("a scorpion", "a spider"),
}

HOMES = {
    **{"a bear": "den", "a bee": "hive", "a bird": "nest", "a cow": "barn", "a dog": "kennel", "a fish": "pond"},
    **{"a hen": "coop", "a horse": "stable", "a king": "palace", "a monk": "monastery", "a mouse": "hole"},
    **{"a pig": "sty", "a rabbit": "burrow", "a soldier": "barracks", "a spider": "web", "an ant": "nest"},
}

YOUNG = {
    **{"a bear": "cub", "a cat": "kitten", "a cow": "calf", "a deer": "fawn", "a dog": "puppy", "a duck": "duckling"},
    **{"a frog": "tadpole", "a goat": "kid", "a goose": "gosling", "a hen": "chick", "a horse": "foal"},
    **{"a kangaroo": "joey", "a lion": "cub", "a pig": "piglet", "a rabbit": "kit", "a sheep": "lamb"},
    **{"a swan": "cygnet", "a wolf": "pup", "an elephant": "calf", "an owl": "owlet"},
}

THINGS_BY_COLOUR = {
    "black": ("a crow", "coal", "liquorice"),
    "blue": ("a sapphire", "the sea", "the sky"),
    "brown": ("a chestnut", "chocolate", "coffee"),
    "green": ("a cucumber", "a frog", "an emerald", "grass", "spinach"),
    "grey": ("a mouse", "an elephant"),
    "orange": ("a carrot", "a pumpkin"),
    "pink": ("a flamingo", "a pig"),
    "purple": ("a plum", "lavender"),
    "red": ("a fire engine", "a ruby", "a strawberry", "a tomato", "blood"),
    "white": ("a cloud", "a polar bear", "a swan", "milk", "salt", "snow"),
    "yellow": ("a banana", "a lemon", "the sun"),
}

OPPOSITE_PAIRS = {
    **{"awake": "asleep", "begin": "end", "big": "small", "brave": "cowardly", "buy": "sell", "clean": "dirty"},
    **{"cheap": "expensive", "day": "night", "deep": "shallow", "early": "late", "east": "west", "fast": "slow"},
    **{"first": "last", "full": "empty", "happy": "sad", "hard": "soft", "high": "low", "hot": "cold"},
    **{"inside": "outside", "left": "right", "light": "dark", "long": "short", "loud": "quiet", "love": "hate"},
    **{"near": "far", "north": "south", "open": "closed", "push": "pull", "rich": "poor", "smooth": "rough"},
    **{"strong": "weak", "sweet": "sour", "thick": "thin", "top": "bottom", "true": "false", "up": "down"},
    **{"wet": "dry", "wide": "narrow", "win": "lose", "young": "old"},
}

USES = {
    **{"a bicycle": "riding", "a bowl": "eating soup", "a broom": "sweeping the floor", "a clock": "telling the time"},
    **{"a compass": "finding north", "a fridge": "keeping food cold", "a hammer": "driving nails"},
    **{"a kettle": "boiling water", "a key": "opening locks", "a ladder": "climbing up high"},
    **{"a lamp": "giving light", "a map": "finding the way", "a needle": "sewing cloth", "a pen": "writing"},
    **{"a pillow": "resting the head", "a saw": "cutting wood", "a spade": "digging holes"},
    **{"a telescope": "looking at the stars", "a thermometer": "measuring temperature", "a towel": "drying hands"},
    **{"an anchor": "holding a ship in place", "an oven": "baking bread", "an umbrella": "keeping dry in the rain"},
    **{"soap": "washing hands"},
}

INSTRUCTIONS = {
    "bake bread": "Mix flour, water, salt and yeast, and let the dough rise. Bake it in a hot oven for half an hour.",
    "boil an egg": "Put the egg in boiling water. After eight minutes, cool it in cold water and peel it.",
    "brush my teeth": "Put a little toothpaste on the brush. Brush every tooth for two minutes, then rinse.",
    "build a sandcastle": "Fill a bucket with wet sand and turn it over. Lift it off and dig a moat around the castle.",
    "draw a house": "Draw a square for the walls and a triangle on top for the roof. Then add a door and two windows.",
    "fall asleep": "Turn off the light and lie still. Breathe slowly and think of something calm.",
    "fly a kite": "Stand with your back to the wind and hold the kite up. When the wind takes it, let out the string.",
    "make a cup of tea": "Boil some water and pour it over a tea bag. Wait three minutes, then take the bag out.",
    "make a sandwich": "Take two slices of bread. Put cheese and tomato between them, and cut it in half.",
    "make lemonade": "Squeeze two lemons into a jug of water. Stir in some sugar and add ice.",
    "make toast": "Put a slice of bread in the toaster. When it is golden, take it out and butter it.",
    "plant a seed": "Make a small hole in the soil and drop the seed in. Cover it, water it and wait for the sun.",
    "tie a knot": "Cross the two ends and push one of them through the loop. Then pull both ends tight.",
    "wash the dishes": "Fill the sink with warm water and soap. Scrub every dish, rinse it and leave it to dry.",
}

NAMES = (
    *("Adam", "Alice", "Anna", "Ben", "Carla", "Clara", "Daniel", "David", "Elena", "Emma", "Eric", "Eva", "Felix"),
    *("Frank", "Grace", "Hannah", "Henry", "Ivan", "Jack", "James", "Jane", "Julia", "Kate", "Laura", "Leo", "Lucy"),
    *("Maria", "Mark", "Martin", "Mia", "Nina", "Noah", "Oliver", "Omar", "Oscar", "Paul", "Peter", "Rosa", "Ruth"),
    *("Sam", "Sara", "Simon", "Sophie", "Thomas", "Tom", "Victor", "Walter", "Zoe"),
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
NEXT_DAY, NEXT_MONTH = _successors(DAYS), _successors(MONTHS)
NEXT_NUMBER = {str(number): str(number + 1) for number in range(1, 20)}
CONTINENTS = {country: land for land, countries in COUNTRIES_BY_CONTINENT.items() for country in countries}
LEGS = {animal: number for number, animals in ANIMALS_BY_LEGS.items() for animal in animals}
COLOURS = {thing: colour for colour, things in THINGS_BY_COLOUR.items() for thing in things}
OPPOSITES = OPPOSITE_PAIRS | _inverse(OPPOSITE_PAIRS)
SUMS = {f"{a} plus {b}": str(a + b) for a in range(11) for b in range(11)}
SUMS_IN_SIGNS = {f"{a} + {b}": str(a + b) for a in range(11) for b in range(11)}
DIFFERENCES = {f"{a} minus {b}": str(a - b) for a in range(11) for b in range(a + 1)}

ARITHMETIC_QUESTIONS = ("What is {subject}?", "How much is {subject}?", "What does {subject} make?", "{subject}?")

TOPICS = (
    Relation(
        (
            "What is the capital of {subject}?",
            "Which city is the capital of {subject}?",
            "Can you tell me the capital of {subject}?",
            "Do you know the capital of {subject}?",
            "Name the capital of {subject}.",
        ),
        ("The capital of {subject} is {fact}.", "{fact} is the capital of {subject}."),
        CAPITALS,
    ),
    Relation(
        (
            "Which country has {subject} as its capital?",
            "{subject} is the capital of which country?",
            "Of which country is {subject} the capital?",
        ),
        ("{subject} is the capital of {fact}.",),
        _inverse(CAPITALS),
    ),
    Relation(
        ("On which continent is {subject}?", "Which continent is {subject} in?", "Where in the world is {subject}?"),
        ("{subject} is in {fact}.",),
        CONTINENTS,
    ),
    Relation(
        ("What sound does {subject} make?", "What does {subject} say?", "Which noise does {subject} make?"),
        ("{subject} makes a sound like this: {fact}!", "The sound of {subject} is a {fact}."),
        SOUNDS,
    ),
    Relation(
        ("How many legs does {subject} have?", "How many legs are there on {subject}?"),
        ("{subject} has {fact} legs.",),
        LEGS,
    ),
    Relation(
        ("Where does {subject} live?", "What is the home of {subject} called?"),
        ("{subject} lives in a {fact}.", "The home of {subject} is a {fact}."),
        HOMES,
    ),
    Relation(
        ("What is the young of {subject} called?", "What do you call the baby of {subject}?"),
        ("The young of {subject} is called a {fact}.", "The baby of {subject} is a {fact}."),
        YOUNG,
    ),
    Relation(
        ("What colour is {subject}?", "Which colour is {subject}?", "Tell me the colour of {subject}."),
        ("{subject} is {fact}.", "The colour of {subject} is {fact}."),
        COLOURS,
    ),
    Relation(
        ("What is the opposite of {subject}?", "Tell me the opposite of {subject}.", "What is not {subject}?"),
        ("The opposite of {subject} is {fact}.",),
        OPPOSITES,
    ),
    Relation(
        ("Which day comes after {subject}?", "What day follows {subject}?", "What is the day after {subject}?"),
        ("The day after {subject} is {fact}.", "{fact} comes after {subject}."),
        NEXT_DAY,
    ),
    Relation(
        ("Which day comes before {subject}?", "What is the day before {subject}?"),
        ("The day before {subject} is {fact}.", "{fact} comes before {subject}."),
        _inverse(NEXT_DAY),
    ),
    Relation(
        ("Which month comes after {subject}?", "What month follows {subject}?", "What is the month after {subject}?"),
        ("The month after {subject} is {fact}.", "{fact} comes after {subject}."),
        NEXT_MONTH,
    ),
    Relation(
        ("Which month comes before {subject}?", "What is the month before {subject}?"),
        ("The month before {subject} is {fact}.", "{fact} comes before {subject}."),
        _inverse(NEXT_MONTH),
    ),
    Relation(
        ("Which number comes after {subject}?", "What number follows {subject}?"),
        ("The number after {subject} is {fact}.", "{fact} comes after {subject}."),
        NEXT_NUMBER,
    ),
    Relation(
        ("Which number comes before {subject}?", "What is the number before {subject}?"),
        ("The number before {subject} is {fact}.", "{fact} comes before {subject}."),
        _inverse(NEXT_NUMBER),
    ),
    Relation(ARITHMETIC_QUESTIONS, ("{subject} is {fact}.", "{subject} makes {fact}."), SUMS),
    Relation(ARITHMETIC_QUESTIONS, ("{subject} = {fact}.",), SUMS_IN_SIGNS),
    Relation(ARITHMETIC_QUESTIONS, ("{subject} is {fact}.", "{subject} makes {fact}."), DIFFERENCES),
    Relation(
        ("What is {subject} for?", "What do people use {subject} for?", "Why would I need {subject}?"),
        ("{subject} is for {fact}.", "People use {subject} for {fact}."),
        USES,
    ),
    Relation(
        ("How do I {subject}?", "Can you tell me how to {subject}?", "What is the best way to {subject}?"),
        ("{fact}",),
        INSTRUCTIONS,
        follow_ups=("And how do I {subject}?", "And what if I want to {subject}?"),
    ),
    small_talk(
        ("Who are you?", "What is your name?", "What are you?", "Tell me about yourself."),
        ("I am Tiny Chat, a small language model.", "My name is Tiny Chat, and I am a small language model."),
    ),
    small_talk(
        ("What can you do?", "What do you know?", "What can I ask you?", "Can you help me?"),
        ("I can help you with capitals, animals, colours, opposites, the calendar and small sums.",),
    ),
    small_talk(
        ("Are you human?", "Are you a person?", "Am I talking to a real person?"),
        ("No, I am a computer program.", "No, I am a small language model and not a person."),
    ),
    small_talk(
        ("Tell me a riddle.", "Do you know a riddle?", "Can you make me laugh?", "Tell me a joke."),
        (
            "What has two hands and a face but no legs? A clock!",
            "What gets wetter the more it dries? A towel!",
            "What has many teeth but never bites? A comb!",
        ),
    ),
    small_talk(
        (
            *("What will the weather be tomorrow?", "Who won the match yesterday?", "What time is it?"),
            *("How old am I?", "Where did I put my keys?", "What is the price of gold today?"),
            *("Who will win the election?", "What did I eat for breakfast?", "When is my birthday?"),
            *("What is the news today?", "How many people live on Mars?", "Which numbers will win the lottery?"),
        ),
        ("I am sorry, I do not know that.", "I do not know that. I am only a small model."),
    ),
)

INTRODUCTION = Relation(
    ("My name is {subject}.", "Hello, I am {subject}.", "Hi, my name is {subject}!", "Hello! You can call me {subject}."),
    ("Hello, {subject}! Nice to meet you.", "Hello, {subject}! How can I help you?"),
    {name: name for name in NAMES},
)
NAME_RECALL = Relation(
    ("What is my name?", "Do you remember my name?", "Who am I?"),
    ("Your name is {fact}.", "You are {fact}."),
    {name: name for name in NAMES},
)

OPENINGS = (
    INTRODUCTION,
    small_talk(
        ("Hello!", "Hi!", "Hello there!", "Good morning!", "Good evening!", "Hey!"),
        ("Hello! How can I help you?", "Hello, my friend! What would you like to know?"),
    ),
    small_talk(
        ("How are you?", "Hello, how are you?", "How are you today?", "How do you do?"),
        ("I am very well, thank you. How are you?", "I am fine, thank you. How can I help you?"),
    ),
    small_talk(
        NAME_RECALL.questions,
        ("You have not told me your name yet.", "I do not know your name yet. What is it?"),
    ),
)

CLOSINGS = (
    small_talk(
        ("Thank you!", "Thanks!", "Thanks a lot!", "Thank you very much.", "Great, thank you!"),
        ("You are welcome, my friend!", "You are very welcome. I am happy to help."),
    ),
    small_talk(
        ("Goodbye!", "Bye!", "See you later!", "I have to go now.", "Good night!"),
        ("Goodbye, my friend! Have a good day.", "Goodbye! Come back soon."),
    ),
)
