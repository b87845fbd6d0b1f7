"""Text for rendered pages: words and random strings, each of which belongs to one split."""

import hashlib
import random
import string
from functools import cache
from pathlib import Path

SPLITS = ("train", "validation", "test")
# no character that Markdown or HTML would read as markup, so the ground truth needs no escapes
PUNCTUATION = ".,;:!?'\"()-+/=%@"
ALPHABET = string.ascii_letters + string.digits + PUNCTUATION
SHORTEST, LONGEST = 2, 9  # characters of a word
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"


def split_of(word: str) -> str:
    """The one split that may show a word: a tenth each for validation and test, by its hash."""
    bucket = hashlib.blake2b(word.encode(), digest_size=8).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


@cache
def _listed_words(split: str, length: int) -> tuple[str, ...]:
    """Common English words (scikit-learn's stop words, BSD) of a split and a length."""
    words = Path(__file__).with_name("words.txt").read_text().split()
    return tuple(w for w in words if len(w) == length and split_of(w) == split)


def _pronounceable(rng: random.Random, length: int) -> str:
    """Consonants and vowels in turn."""
    kinds = (VOWELS, CONSONANTS) if rng.random() < 0.5 else (CONSONANTS, VOWELS)
    return "".join(rng.choice(kinds[i % 2]) for i in range(length))


def _random_string(rng: random.Random, length: int) -> str:
    """60% lower case, 15% upper case, 15% digits, 10% punctuation."""
    kinds = (string.ascii_lowercase, string.ascii_uppercase, string.digits, PUNCTUATION)
    chosen = rng.choices(kinds, (0.60, 0.15, 0.15, 0.10), k=length)
    return "".join(rng.choice(kind) for kind in chosen)


def make_word(rng: random.Random, length: int, split: str, prose: float) -> str:
    """Draw one word of a split.

    Parameters
    ----------
    rng : where chance comes from.
    length : characters, at least 2.
    split : "train", "validation" or "test"; no word is drawn for two of them.
    prose : the probability of a word (listed, or made of syllables; a fifth of them capitalised)
        rather than a string of random characters, which no language prior can guess.
    """
    while True:
        if rng.random() < prose:
            listed = _listed_words(split, length)
            from_list = bool(listed) and rng.random() < 0.5
            word = rng.choice(listed) if from_list else _pronounceable(rng, length)
            if rng.random() < 0.2:
                word = word.capitalize()
        else:
            word = _random_string(rng, length)
        if split_of(word) == split:
            return word


def make_line(rng: random.Random, length: int, split: str, prose: float) -> str:
    """Draw words of 2 to 9 characters, separated by single spaces, ``length`` characters in all."""
    words: list[str] = []
    left = length
    while left:
        # what remains after this word and a space must hold another word, or be nothing
        fitting = [n for n in range(SHORTEST, LONGEST + 1) if n == left or left - n - 1 >= SHORTEST]
        size = rng.choice(fitting)
        words.append(make_word(rng, size, split, prose))
        left -= min(left, size + 1)
    return " ".join(words)
