"""Texts that say what others say: by templates and synonyms, or with their sentences in another order."""

import random
import re

FRAMES = [
    "{}",
    "Please help me with this: {}",
    "{} Show how you get there.",
    "Hello! I have homework. {} Thanks a lot.",
    "Question from class: {}",
]
SYNONYMS = {"how many": "what number of", "total": "sum", "each": "every", "does": "will", "much": "much money"}


def paraphrased(text: str, dice: random.Random) -> str:
    for word in dice.sample(sorted(SYNONYMS), 2):
        text = text.replace(word, SYNONYMS[word])
    return dice.choice(FRAMES).format(text)


def reordered(text: str, dice: random.Random) -> str:
    sentences = re.split(r"(?<=[.?!])\s+", text)
    dice.shuffle(sentences)
    return " ".join(sentences)
