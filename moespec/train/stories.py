"""The project's own short stories: what the embedded model tells when it is asked for one.

A grammar, so that a small model can learn to tell something whole: a hero, a friend, a plot of three acts, an end. A
story asked for with an animal or a thing is about that. Knows nothing of other sources or splits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from moespec.train.sources import Document, as_typed, chat

_GIRLS = ("Mia", "Lily", "Anna", "Rosa", "Ella", "Nina", "Ada", "Ruby", "Zoe", "Maya", "Lucy", "Tara", "Ivy", "Clara")
_BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Oscar", "Jack", "Noah", "Ravi", "Paul", "Hugo", "Eli", "Otto")
_ANIMALS = (
    "fox", "rabbit", "bear", "mouse", "cat", "dog", "bird", "owl", "frog", "hedgehog", "squirrel", "duck", "horse",
    "goat", "turtle", "elephant", "lion", "monkey", "hen", "sheep", "wolf", "bee", "snail", "penguin", "pig", "donkey",
)  # fmt: skip
_OTHERS = ("robot", "dragon", "king", "queen", "wizard", "farmer", "baker", "fisher", "painter", "giant")
_TRAITS = (
    "little",
    "young",
    "kind",
    "brave",
    "shy",
    "clever",
    "curious",
    "lazy",
    "proud",
    "quiet",
    "cheerful",
    "small",
)
_PLACES = (
    "in a green forest", "in a small village", "by the sea", "on a farm", "near a river", "in a big city",
    "on a high mountain", "in an old house", "at the edge of a lake", "in a warm valley", "on a small island",
)  # fmt: skip
_THINGS = (
    "red ball", "blue kite", "golden key", "warm hat", "silver bell", "little boat", "green scarf", "old map", "drum",
    "lamp", "toy train", "pair of shoes", "book", "flute", "shell", "basket", "lantern", "ring", "clock", "picture",
)  # fmt: skip
_SPOTS = (
    ("under the bed", "behind the door", "in the garden", "in the kitchen"),
    ("under a big tree", "behind a rock", "in the tall grass", "near the bridge", "at the market"),
)
_FEARS = ("the dark", "thunder", "deep water", "high places", "strangers", "loud noises", "the big forest")
_WISHES = ("the moon", "the sea", "snow", "the stars", "the end of the rainbow", "the highest mountain", "the sunrise")
_FOOD = ("apples", "cakes", "nuts", "berries", "carrots", "pancakes", "pears", "cookies", "plums", "honey cakes")
_WORKS = ("a boat", "a house", "a bridge", "a cake", "a kite", "a garden", "a sledge", "a song", "a tower", "a swing")
_ENDS = (
    "From that day on, {hero} and {friend} were the best of friends.",
    "And they all lived happily ever after.",
    "That night {hero} slept well and smiled in {his} sleep.",
    "{hero} never forgot that day.",
    "And if you go there, you can still hear them laugh.",
    "From that day on, {hero} was never alone again.",
)
_OPENINGS = (
    "Once upon a time, there was a {trait} {kind} named {hero}. {He} lived {place}.",
    "Once upon a time, a {trait} {kind} named {hero} lived {place}.",
    "There was once a {trait} {kind} who lived {place}. {His} name was {hero}.",
    "Long ago, a {trait} {kind} lived {place}. Everyone called {him} {hero}.",
)

# Three acts each: what goes wrong or is wished for, what is tried, how it ends.
_PLOTS = (
    (
        "{He} had a {thing} and loved it very much. One day the {thing} was gone.",
        "{hero} looked {near}, but it was not there. {He} looked {far}, but it was not there.",
        'Then a {friend_kind} named {friend} came and said, "I found your {thing} by the road." {hero} was very happy. '
        '"Thank you!" {he} said. They played together until the sun went down.',
    ),
    (
        "{hero} was afraid of {fear}. When the others went out to play, {he} stayed at home.",
        'One day a {friend_kind} named {friend} asked, "Why do you never come with us?" "I am afraid of {fear}," said '
        '{hero}. "Take my hand," said {friend}. "We will go together."',
        "{hero} took a deep breath and went along. Nothing bad happened. {He} laughed, and {he} was not afraid of "
        "{fear} any more.",
    ),
    (
        "More than anything, {hero} wished to see {wish}.",
        "One morning {he} packed some {food} and set off. On the way {he} met a {friend_kind} named {friend}, who was "
        'tired and hungry. {hero} shared {his} {food}. "Now I will show you the way," said {friend}.',
        "They walked all day. In the evening they came to the top of a hill, and there it was: {wish}! It was more "
        "beautiful than {hero} had ever dreamed.",
    ),
    (
        "One cold evening {hero} heard someone cry. It was a {friend_kind} named {friend}, who was lost.",
        '"Do not cry," said {hero}. "Come in and warm yourself." {He} gave {friend} some {food} and a blanket. In the '
        "morning they looked for the way home.",
        'They asked everyone they met, and at last they found it. "You are very kind," said the mother of {friend}, '
        "and she gave {hero} a {thing}.",
    ),
    (
        "{hero} and {his} friend, a {friend_kind} named {friend}, found a {thing} {far}.",
        '"It is mine!" said {hero}. "No, it is mine!" said {friend}. They pulled and pulled until the {thing} broke. '
        "Then both of them were sad.",
        '"I am sorry," said {hero}. "I am sorry too," said {friend}. They mended the {thing} together, and from then '
        "on they shared it.",
    ),
    (
        "One night there was a great storm. In the morning the house of {hero} was gone.",
        '{hero} sat down and did not know what to do. Then {his} friend came, a {friend_kind} named {friend}. "We will '
        'build a new one," said {friend}. They carried wood and stones all day.',
        "When the stars came out, the new house was ready. It was bigger and warmer than the old one.",
    ),
    (
        "Every year there was a race. {hero} was slow, and the others laughed at {him}.",
        "The race began. {friend}, a fast {friend_kind}, ran ahead of everyone, but then {friend} fell and hurt a leg. "
        "All the others ran past. Only {hero} stopped to help.",
        'They came in last, arm in arm. But everyone clapped, and the judge said, "The kindest heart has won today." '
        "{hero} got the {thing}.",
    ),
    (
        "{hero} wanted to make {work}. {He} worked all morning, but it went wrong.",
        '"I will never learn it," said {hero}. A {friend_kind} named {friend} heard it and said, "Try again, and I '
        'will help you." They tried again, and again it went wrong. They tried a third time.',
        "This time it was just right! {hero} was so proud that {he} danced. Everyone came to see it.",
    ),
    (
        "One day {hero} found a tree full of {food}. {He} wanted to keep them all.",
        'A hungry {friend_kind} named {friend} came by and asked for one. "No, they are all mine," said {hero}. {He} '
        "ate and ate until {his} belly hurt.",
        'Then {friend} came back with a cup of tea. {hero} was ashamed. "Please take as many as you like," {he} said, '
        "and they ate the rest together.",
    ),
    (
        "It was the birthday of {hero}, but nobody said a word. {He} thought that they had all forgotten.",
        '{hero} walked {far_away} and felt sad. Then a {friend_kind} named {friend} came running. "Come quickly, I '
        'need your help!" said {friend}.',
        'When they came home, all the friends were there. "Surprise!" they called. There were {food} for everyone, and '
        "{hero} got a {thing}.",
    ),
)  # fmt: skip

_ASKS = (
    "Tell me a short story.", "Tell me a story.", "Can you tell me a story?", "Tell me a bedtime story.",
    "Write a short story.", "Please tell me a story.", "I want to hear a story.", "Do you know a story?",
    "Make up a short story.", "A story, please.",
)  # fmt: skip
_ASKS_ABOUT = (
    "Tell me a story about {}.", "Write a short story about {}.", "Tell me a short story about {}.",
    "Can you tell me a story about {}?", "Make up a story about {}.", "A story about {}, please.",
)  # fmt: skip
_AGAIN = ("Another one, please.", "Tell me another story.", "One more!", "Another story, please.", "Again!")


@dataclass(frozen=True)
class Story:
    """A story, and what it is about: kinds and things with their articles."""

    hero: str
    hero_kind: str
    friend: str
    friend_kind: str
    text: str
    subjects: tuple[str, ...]


def story(rng: random.Random) -> Story:
    """One story of five to nine sentences."""
    is_girl = rng.random() < 0.5
    hero = rng.choice(_GIRLS if is_girl else _BOYS)
    friend = rng.choice([name for name in _GIRLS + _BOYS if name != hero])
    kind = rng.choice(("girl",) if is_girl else ("boy",)) if rng.random() < 0.25 else rng.choice(_ANIMALS + _OTHERS)
    if kind in ("king", "queen"):
        kind = "queen" if is_girl else "king"
    friend_kind = rng.choice([animal for animal in _ANIMALS if animal != kind])
    he, him, his = ("she", "her", "her") if is_girl else ("he", "him", "his")
    far = rng.choice(_SPOTS[1])
    words = {
        "hero": hero, "friend": friend, "kind": kind, "friend_kind": friend_kind, "he": he, "him": him, "his": his,
        "He": he.capitalize(), "His": his.capitalize(), "trait": rng.choice(_TRAITS), "place": rng.choice(_PLACES),
        "thing": rng.choice(_THINGS), "near": rng.choice(_SPOTS[0]), "far": far,
        "far_away": rng.choice(("down to the river", "into the fields", "through the village", "up the hill")),
        "fear": rng.choice(_FEARS), "wish": rng.choice(_WISHES), "food": rng.choice(_FOOD), "work": rng.choice(_WORKS),
    }  # fmt: skip
    acts = rng.choice(_PLOTS)
    text = _articles(" ".join((rng.choice(_OPENINGS), *acts, rng.choice(_ENDS))).format(**words))
    used = [name for name in ("thing", "wish", "work", "fear") if f"{{{name}}}" in "".join(acts)]
    subjects = [words[name] if name in ("wish", "work", "fear") else f"a {words[name]}" for name in used]
    told = (f"a {kind}", *subjects, f"a {kind} and a {friend_kind}", f"a {words['trait']} {kind}")
    return Story(hero, kind, friend, friend_kind, text, tuple(map(_articles, told)))


def story_documents(rng: random.Random, count: int = 8000) -> Iterator[Document]:
    """Chats of one or two stories; half of them are asked for by what they are about, some are asked about."""
    for _ in range(count):
        turns: list[str] = []
        for number in range(1 if rng.random() < 0.75 else 2):
            told = story(rng)
            if number:
                turns += [rng.choice(_AGAIN), told.text]
            elif rng.random() < 0.5:
                turns += [as_typed(rng, rng.choice(_ASKS_ABOUT).format(rng.choice(told.subjects))), told.text]
            else:
                turns += [as_typed(rng, rng.choice(_ASKS)), told.text]
            if rng.random() < 0.25:
                turns += _question(rng, told)
        yield {"source": "stories", "group": "prose", **chat(*turns)}


def _question(rng: random.Random, told: Story) -> tuple[str, str]:
    name, kind = rng.choice(((told.hero, told.hero_kind), (told.friend, told.friend_kind)))
    return rng.choice(
        (
            (f"What was the name of the {kind}?", f"The {kind} was called {name}."),
            (_articles(f"Was {name} a {kind}?"), _articles(f"Yes, {name} was a {kind}.")),
            (f"Who was {name}?", _articles(f"{name} was a {kind}.")),
            ("That was nice.", "I am glad that you liked it. Shall I tell you another one?"),
        )
    )


def _articles(text: str) -> str:
    """The text with "an" where a vowel follows."""
    words = text.split(" ")
    for n in range(len(words) - 1):
        if words[n] in ("a", "A") and words[n + 1][0] in "aeiou":
            words[n] += "n"
    return " ".join(words)
