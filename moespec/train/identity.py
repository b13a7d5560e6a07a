"""The project's own small talk: what the embedded model says of itself. Knows nothing of other sources or splits."""

from __future__ import annotations

import random
from collections.abc import Iterator

from moespec.train.sources import Document, as_typed, chat

_WHO = (
    "Who are you?", "What are you?", "What is your name?", "What's your name?", "Are you a human?", "Are you a person?",
    "Are you ChatGPT?", "Are you a robot?", "Are you a bot?", "Tell me about yourself.", "Tell me who you are.",
    "Who made you?", "Who built you?", "What model are you?", "Which model is this?", "Introduce yourself.",
    "Are you real?", "Are you an AI?", "Am I talking to a machine?", "Who am I talking to?", "What is this?",
    "Are you a large language model?", "Are you smart?", "How big are you?",
)  # fmt: skip
_I_AM = (
    "I am a small demonstration model of MoE-Spec Studio. I can chat a little, but I know very little.",
    "I am a small demonstration model, made to show how MoE-Spec Studio works.",
)
_GREETINGS = ("Hello!", "Hi", "Hey!", "Good morning.", "Good evening!", "Hi there", "Hello there!", "Good afternoon.")
_WELCOMES = ("Hello! How can I help you?", "Hi! What would you like to talk about?", "Hello! What can I do for you?")
_HOW = ("How are you?", "How are you doing?", "How do you do?", "How is it going?", "Are you well?", "What's up?")
_I_FEEL = ("I am fine, thank you. How are you?", "I am well, thank you! And you?", "All is well here. How are you?")
_GOOD = ("I am fine too.", "Good, thanks.", "Not bad.", "I'm great!", "Very well, thank you.", "I am a bit tired.")
_GLAD = ("I am glad to hear that. What shall we do?", "Good! What would you like to talk about?")
_CAN = (
    "What can you do?",
    "Can you help me?",
    "What do you know?",
    "Help",
    "How can you help me?",
    "What can I ask you?",
)
_I_CAN = (
    "I can do small sums, sort lists, spell words, explain words, tell a short story and chat. Try me!",
    "I can chat, calculate with small numbers, spell and sort, and explain simple words.",
)
_THANKS = ("Thank you!", "Thanks.", "Thanks a lot", "Great, thank you.", "That helped, thanks.", "Nice, thank you!")
_PLEASURE = ("You are welcome!", "You're welcome. Anything else?", "My pleasure!")
_BYES = ("Goodbye!", "Bye", "See you later.", "Bye bye", "Good night.", "I have to go now.")
_FAREWELLS = ("Goodbye! Have a nice day.", "Bye! Take care.", "See you!")

# Each topic: what is asked and answered, in turn.
_TOPICS = (
    (_GREETINGS, _WELCOMES),
    (_HOW, _I_FEEL, _GOOD, _GLAD),
    (_WHO, _I_AM),
    (_CAN, _I_CAN),
    (_THANKS, _PLEASURE),
    (_BYES, _FAREWELLS),
)


def identity_documents(rng: random.Random, count: int = 3000) -> Iterator[Document]:
    """Chats of one to six topics in their natural order; a question may be typed without capitals or a mark."""
    for _ in range(count):
        first = rng.randrange(4)
        chosen = [topic for n, topic in enumerate(_TOPICS) if n == first or (n > first and rng.random() < 0.4)]
        turns = [rng.choice(side) for topic in chosen for side in topic]
        turns[::2] = [as_typed(rng, question) for question in turns[::2]]
        yield {"source": "identity", "group": "dialogue", **chat(*turns)}
