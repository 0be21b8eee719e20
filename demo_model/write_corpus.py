"""Write the demo model's corpus: seeded documents of eleven kinds, and what is held out of them.

Every fact, pair and sum has a key; `is_held_out(*key)` decides by a fixed hash whether it belongs
to the evaluation. A training document never contains a held-out key:

=============  =========================================  =====
kind           held-out key                               share
=============  =========================================  =====
capital        (country, phrasing), either direction      20 %
landmark       (landmark, phrasing)                       20 %
ioi            unordered pair of names                    10 %
year           (century, two-digit start year)            15 %
sum            unordered pair of summands                 10 %
pronoun        (person, phrasing)                         20 %
feeling        (opening pattern, word)                    15 %
review         (opening pattern, word)                    15 %
=============  =========================================  =====

Run as `python demo_model/write_corpus.py`; the same seed writes the same bytes.
"""

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

try:
    from demo_model import sentences as patterns
    from demo_model import vocabulary as words
except ImportError:  # run as a script: the folder of this file is the import path
    import sentences as patterns
    import vocabulary as words

POSITIVE_WORDS = words.POSITIVE_WORDS
NEGATIVE_WORDS = words.NEGATIVE_WORDS

BUILD = Path(__file__).parent / "build"
CENTURIES: Final = tuple(range(11, 20))
SHARES: Final[dict[str, float]] = {
    "capital": 0.20,
    "country": 0.20,
    "landmark": 0.20,
    "names": 0.10,
    "year": 0.15,
    "sum": 0.10,
    "pronoun": 0.20,
    "opening": 0.15,
}
"""Kind of key -> share of the keys that is held out."""

ALWAYS_TRAINED: Final[frozenset[tuple[str, ...]]] = frozenset(
    {
        ("capital", "France", "0"),
        ("country", "France", "0"),
        ("country", "England", "0"),
        ("country", "Germany", "0"),
        ("landmark", "The Eiffel Tower", "0"),
        ("landmark", "The Colosseum", "0"),
        ("names", "John", "Mary"),
    }
)
"""Keys that the README's prompts show: never held out."""


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    kind: str
    text: str


@dataclass(frozen=True)
class Mood:
    """The word lists of one sentiment, side by side with the other's."""

    feelings: tuple[str, ...]
    qualities: tuple[str, ...]
    verbs: tuple[str, ...]
    acts: tuple[str, ...]


MOODS: Final[dict[str, Mood]] = {
    "positive": Mood(
        words.POSITIVE_FEELINGS,
        words.POSITIVE_QUALITIES,
        words.POSITIVE_VERBS,
        words.POSITIVE_ACTS,
    ),
    "negative": Mood(
        words.NEGATIVE_FEELINGS,
        words.NEGATIVE_QUALITIES,
        words.NEGATIVE_VERBS,
        words.NEGATIVE_ACTS,
    ),
}


def is_held_out(kind: str, *key: str) -> bool:
    """Whether the pair `key` of this `kind` is kept for evaluation; depends on nothing else."""
    if (kind, *key) in ALWAYS_TRAINED:
        return False
    return zlib.crc32("|".join((kind, *key)).encode()) % 10_000 < SHARES[kind] * 10_000


def names_held_out(first: str, second: str) -> bool:
    """Whether two names, in either order, are kept for evaluation."""
    return is_held_out("names", *sorted((first, second)))


def sum_held_out(left: int, right: int) -> bool:
    """Whether two summands, in either order, are kept for evaluation."""
    return is_held_out("sum", *(str(part) for part in sorted((left, right))))


def with_articles(text: str) -> str:
    """Write "an" for "a" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _trained_key(rng: random.Random, kind: str, owner: str, n_choices: int) -> int | None:
    choices = [i for i in range(n_choices) if not is_held_out(kind, owner, str(i))]
    return rng.choice(choices) if choices else None


def _with_phrasing(
    rng: random.Random, kind: str, owner: str, phrasings: tuple[str, ...], **slots: str
) -> str:
    index = _trained_key(rng, kind, owner, len(phrasings))
    return "" if index is None else phrasings[index].format(**slots)


def capital_text(rng: random.Random) -> str:
    """One to three sentences about capitals, each country its own sentence."""
    sentences = []
    for country in rng.sample(sorted(words.COUNTRIES), rng.choice((1, 1, 2, 3))):
        city, continent = words.COUNTRIES[country]
        slots = {"country": country, "city": city}
        if rng.random() < 0.65:
            text = _with_phrasing(rng, "capital", country, patterns.CAPITAL_PHRASINGS, **slots)
        else:
            text = _with_phrasing(rng, "country", country, patterns.COUNTRY_PHRASINGS, **slots)
        if rng.random() < 0.1:
            text += f" {country} is in {continent}."
        sentences.append(text)
    return " ".join(sentence for sentence in sentences if sentence)


def landmark_text(rng: random.Random) -> str:
    """One to three sentences about landmarks and their cities."""
    sentences = [
        _with_phrasing(
            rng,
            "landmark",
            landmark,
            patterns.LANDMARK_PHRASINGS,
            landmark=landmark,
            city=words.LANDMARKS[landmark],
        )
        for landmark in rng.sample(sorted(words.LANDMARKS), rng.choice((1, 1, 2, 3)))
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def mood_slots(rng: random.Random, mood: Mood) -> dict[str, str]:
    """Words of one sentiment for every slot of a feeling or review sentence."""
    feeling, feeling2 = rng.sample(mood.feelings, 2)
    quality, quality2 = rng.sample(mood.qualities, 2)
    return {
        "feeling": feeling,
        "feeling2": feeling2,
        "quality": quality,
        "quality2": quality2,
        "verb": rng.choice(mood.verbs),
        "act": rng.choice(mood.acts),
    }


def _opening(rng: random.Random, mood: Mood, openings: tuple[str, ...]) -> str:
    while True:
        opening = rng.choice(openings)
        is_feeling = "{feeling}" in opening
        pool = mood.feelings if is_feeling else mood.qualities
        if opening in patterns.FEELING_OPENINGS[:1] and rng.random() < 0.3:
            pool = mood.qualities[:4]
        word = rng.choice(pool)
        if not is_held_out("opening", opening, word):
            return opening.format(feeling=word, quality=word)


def _mood_text(rng: random.Random, openings: tuple[str, ...], more: tuple[str, ...]) -> str:
    mood = MOODS[rng.choice(("positive", "negative"))]
    text = _opening(rng, mood, openings)
    if openings[0] in patterns.FEELING_OPENINGS:
        text += rng.choice(patterns.FEELING_ENDINGS).format(**mood_slots(rng, mood))
    else:
        text += rng.choice(patterns.QUALITY_ENDINGS).format(**mood_slots(rng, mood))
    for pattern in rng.sample(more, rng.choice((1, 2, 3, 4))):
        text += " " + pattern.format(**mood_slots(rng, mood))
    return text


def feeling_text(rng: random.Random) -> str:
    """A feeling or a remark about the day, then sentences of the same sentiment."""
    openings = rng.choice((patterns.FEELING_OPENINGS, patterns.QUALITY_OPENINGS))
    return _mood_text(rng, openings, patterns.MOOD_SENTENCES)


def review_text(rng: random.Random) -> str:
    """A film review of one sentiment."""
    return _mood_text(rng, patterns.REVIEW_OPENINGS, patterns.REVIEW_SENTENCES)


def trained_names(rng: random.Random) -> tuple[str, str]:
    """Two different names that are not a held-out pair."""
    while True:
        first, second = rng.sample(words.NAMES, 2)
        if not names_held_out(first, second):
            return first, second


def ioi_slots(rng: random.Random, first: str, second: str) -> dict[str, str]:
    """Slots of an indirect-object sentence; either name may be the giver (ABBA and BABA)."""
    subject, recipient = rng.sample((first, second), 2)
    return {
        "first": first,
        "second": second,
        "subject": subject,
        "recipient": recipient,
        "place": rng.choice(words.PLACES),
        "object": rng.choice(words.OBJECTS),
    }


def ioi_text(rng: random.Random) -> str:
    """A sentence whose last name is the one of two that was not repeated."""
    slots = ioi_slots(rng, *trained_names(rng))
    pattern = rng.choice(patterns.IOI_TEMPLATES) + rng.choice(patterns.IOI_FOLLOW_UPS)
    return pattern.format(**slots)


def year_text(rng: random.Random) -> str:
    """One or two sentences from a start year to a later year of the same century."""
    sentences: list[str] = []
    while len(sentences) < 2:
        century, start = rng.choice(CENTURIES), rng.randint(2, 98)
        if is_held_out("year", str(century), str(start)):
            continue
        end = rng.randint(start + 1, 99)
        slots = {"start": f"{century}{start:02d}", "end": f"{century}{end:02d}"}
        pattern = rng.choice(patterns.YEAR_TEMPLATES[:1] * 2 + patterns.YEAR_TEMPLATES[1:])
        sentences.append(pattern.format(event=rng.choice(words.EVENTS), **slots))
    return " ".join(sentences[: rng.choice((1, 2))])


def sum_text(rng: random.Random) -> str:
    """Four to nine sums, one a line."""
    lines: list[str] = []
    n_lines = rng.randint(4, 9)
    while len(lines) < n_lines:
        limit = rng.choice((9, 99, 99, 99))
        left, right = rng.randint(0, limit), rng.randint(0, limit)
        if not sum_held_out(left, right):
            lines.append(f"{left} + {right} = {left + right}")
    return "\n".join(lines)


def pronoun_slots(male: bool) -> dict[str, str]:
    """The pronouns of one gender, lower-case and capitalised."""
    return (
        {"he": "he", "his": "his", "He": "He", "His": "His"}
        if male
        else {"he": "she", "his": "her", "He": "She", "His": "Her"}
    )


def persons() -> dict[str, bool]:
    """Every person a pronoun can stand for -> whether it is male."""
    family = {f"The {male}": True for male, _, _ in words.WORD_FAMILIES}
    family |= {f"The {female}": False for _, female, _ in words.WORD_FAMILIES}
    return family | dict.fromkeys(words.MALE_NAMES, True) | dict.fromkeys(words.FEMALE_NAMES, False)


def pronoun_text(rng: random.Random) -> str:
    """Sentences with a pronoun, or the definition of a word family."""
    if rng.random() < 0.35:
        male, female, does = rng.choice(words.WORD_FAMILIES)
        place = rng.choice(words.PLACES)
        pattern = rng.choice(patterns.FAMILY_TEMPLATES)
        return pattern.format(male=male, female=female, does=does, place=place)
    people = persons()
    person = rng.choice(sorted(people)[rng.choice((0, -2 * len(words.WORD_FAMILIES))) :])
    return _with_phrasing(
        rng,
        "pronoun",
        person,
        patterns.PRONOUN_TEMPLATES,
        person=person,
        object=rng.choice(words.OBJECTS),
        **pronoun_slots(people[person]),
    )


def story_text(rng: random.Random) -> str:
    """A short story about one hero and one animal."""
    male = rng.random() < 0.5
    animal = rng.choice(words.ANIMALS)
    slots = {
        "name": rng.choice(words.MALE_NAMES if male else words.FEMALE_NAMES),
        "hero": rng.choice(("boy", "prince", "king") if male else ("girl", "princess", "queen")),
        "adjective": rng.choice(words.STORY_ADJECTIVES),
        "adjective2": rng.choice(words.STORY_ADJECTIVES),
        "home": rng.choice(("village", "castle", "farm", "house", "town")),
        "wild": rng.choice(("forest", "valley", "garden", "cave", "park")),
        "animal": animal,
        "colour": rng.choice(words.COLOURS),
        "thing": rng.choice(words.STORY_THINGS),
        **pronoun_slots(male),
    }
    chosen = [
        rng.choice(patterns.STORY_OPENINGS),
        rng.choice(patterns.STORY_SECONDS),
        rng.choice(patterns.STORY_EVENTS),
        *rng.sample(patterns.STORY_MIDDLES, rng.choice((1, 2, 3))),
        *rng.sample(patterns.STORY_ENDINGS, rng.choice((1, 1, 2))),
    ]
    return " ".join(pattern.format(**slots) for pattern in chosen)


def animal_text(rng: random.Random) -> str:
    """One or two sentences about animals."""
    animal, animal2 = rng.sample(words.ANIMALS, 2)
    slots = {
        "animal": animal,
        "animal2": animal2,
        "adjective": rng.choice(words.STORY_ADJECTIVES),
        "colour": rng.choice(words.COLOURS),
        "home": rng.choice(words.STORY_PLACES),
        "wild": rng.choice(words.STORY_PLACES),
    }
    chosen = rng.sample(patterns.ANIMAL_SENTENCES, rng.choice((1, 2)))
    return " ".join(pattern.format(**slots) for pattern in chosen)


def general_text(rng: random.Random) -> str:
    """One of the fixed sentences."""
    return rng.choice(patterns.GENERAL_TEXTS)


KINDS: Final[dict[str, tuple[Callable[[random.Random], str], float]]] = {
    "capital": (capital_text, 0.13),
    "landmark": (landmark_text, 0.10),
    "feeling": (feeling_text, 0.07),
    "review": (review_text, 0.07),
    "ioi": (ioi_text, 0.19),
    "year": (year_text, 0.08),
    "sum": (sum_text, 0.10),
    "pronoun": (pronoun_text, 0.10),
    "story": (story_text, 0.045),
    "animal": (animal_text, 0.045),
    "general": (general_text, 0.07),
}
"""Kind -> (writer, share of the documents)."""


def documents(n_documents: int, seed: int = 0) -> Iterator[Document]:
    """Yield `n_documents` training documents; the same seed yields the same documents."""
    rng = random.Random(seed)
    names = list(KINDS)
    weights = [share for _, share in KINDS.values()]
    for _ in range(n_documents):
        kind = rng.choices(names, weights)[0]
        text = KINDS[kind][0](rng)
        while not text:
            text = KINDS[kind][0](rng)
        yield Document(kind, with_articles(text))


def bigram_row(
    rng: np.random.Generator, pool: np.ndarray, length: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random bigrams: the row draws its own successor for each token of a small alphabet.

    Args:
        rng: The source of randomness.
        pool: Token ids to draw from.
        length: Tokens of the row.
        longest: Largest alphabet; the smallest is 4.

    Returns:
        Token ids `[length]`, and whether each can be predicted from the row so far `[length]`.
    """
    alphabet = rng.choice(pool, size=int(rng.integers(4, longest + 1)), replace=False)
    successor = rng.permutation(len(alphabet))
    row = np.empty(length, dtype=np.int64)
    predictable = np.zeros(length, dtype=bool)
    state, seen = int(rng.integers(len(alphabet))), set[int]()
    for position in range(length):
        row[position] = alphabet[state]
        follow = rng.random() < 0.75
        following = int(successor[state]) if follow else int(rng.integers(len(alphabet)))
        if position + 1 < length:
            predictable[position + 1] = state in seen and follow
        if follow:
            seen.add(state)
        state = following
    return row, predictable


def repeated_row(
    rng: np.random.Generator, pool: np.ndarray, length: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """A block of 4 to `longest` random tokens, repeated to the end of the row; as `bigram_row`."""
    block = rng.choice(pool, size=int(rng.integers(4, longest + 1)), replace=False)
    row = np.resize(block, length)
    return row, np.arange(length) > len(block)


def write_corpus(path: Path, n_documents: int, seed: int = 0) -> None:
    """Write one JSON line (`kind`, `text`) per document to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents(n_documents, seed):
            file.write(json.dumps({"kind": document.kind, "text": document.text}) + "\n")


def main() -> None:
    """Write the corpus of the training run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--documents", type=int, default=320_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=BUILD / "corpus.jsonl")
    arguments = parser.parse_args()
    write_corpus(arguments.output, arguments.documents, arguments.seed)


if __name__ == "__main__":
    main()
