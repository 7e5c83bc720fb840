"""Spelled-out numbers and their digits, for which nothing has to be downloaded.

    write_numbers(folder)   {train,val,test}.jsonl in eight languages, and sv-{train,val,test}.jsonl in one more

A record is {"prompt": "dreiunvierzig", "response": "43", "clean": "dreiundvierzig", "language": "de"}. Prompts are as a
person types them: of the training records seven of 16 have a typing error and one of 16 lacks its accents; all of val
and test have an error. "clean" is the same without. The words are those of the package num2words (LGPL), in lower case
and without commas. What language they are of, the prompt does not say.

One number in ten above 100 is held out, in all languages at once: half of these for val, half for test. Swedish is a
language to fine-tune on. Its 300 training pairs are 0 ... 99 and 200 more. Each stands 16 times, with other errors.
"""

from __future__ import annotations

import random
import string
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from trunkline.engine.errors import ConfigError
from trunkline.models.text.record_files import write_records

LANGUAGES = ("en", "es", "fr", "it", "de", "nl", "pt", "da")
NEW_LANGUAGE = "sv"
TRAIN, VAL, TEST = 24_000, 100, 250  # records of each language
NEW_TRAIN, NEW_FIRST, NEW_COPIES = 200, 100, 16
_DIGITS = (1, 2, 3, 4, 5, 6, 6)  # how many a number has, drawn evenly
_SEED = 42

Record = dict[str, str]


def write_numbers(folder: Path) -> dict[str, int]:
    """Write the files, all or none, and return how many records each has. They depend on num2words alone.

    Raises ConfigError if num2words is not installed, and DataError if `folder` is there and not empty.
    """
    spelled(0, "en")  # what lacks should be named before anything is written
    return write_records(folder, _files())


def _files() -> dict[str, Iterator[Record]]:
    return {
        "train.jsonl": (record for language in LANGUAGES for record in train_records(language, TRAIN)),
        "val.jsonl": (record for language in LANGUAGES for record in held_out_records(language, "val", VAL)),
        "test.jsonl": (record for language in LANGUAGES for record in held_out_records(language, "test", TEST)),
        "sv-train.jsonl": train_records(NEW_LANGUAGE, NEW_TRAIN, first=NEW_FIRST, copies=NEW_COPIES),
        "sv-val.jsonl": held_out_records(NEW_LANGUAGE, "val", VAL),
        "sv-test.jsonl": held_out_records(NEW_LANGUAGE, "test", TEST),
    }


def train_records(language: str, count: int, *, first: int = 0, copies: int = 1) -> Iterator[Record]:
    """The numbers below `first`, then `count` draws, which may repeat a number; all of it `copies` times, each time
    with other typing errors."""
    draw = random.Random(f"{_SEED} {language} train")
    pairs = []
    for place in range(first + count):
        number = place if place < first else _drawn(draw, "train")
        pairs.append((number, spelled(number, language)))
        yield _record(*pairs[-1], language, _as_typed(pairs[-1][1], draw))
    for number, clean in pairs * (copies - 1):
        yield _record(number, clean, language, _as_typed(clean, draw))


def held_out_records(language: str, split: str, count: int) -> Iterator[Record]:
    """`count` numbers of "val" or "test", each once and each with a typing error."""
    draw = random.Random(f"{_SEED} {language} {split}")
    seen: set[int] = set()
    while len(seen) < count:
        if (number := _drawn(draw, split)) not in seen:
            seen.add(number)
            clean = spelled(number, language)
            yield _record(number, clean, language, with_typo(clean, draw))


def split_of(number: int) -> str:
    """ "train", "val" or "test": the same in all languages."""
    mixed = (number * 2654435761 % 2**32) // 7
    return "train" if number <= 100 or mixed % 10 else ("val", "test")[mixed // 10 % 2]


def spelled(number: int, language: str) -> str:
    """The number in words. Raises ConfigError if num2words is not installed."""
    try:
        from num2words import num2words
    except ImportError as error:
        raise ConfigError(
            "num2words is not installed, which spells the example's numbers: pip install -c constraints.txt num2words"
        ) from error
    return unicodedata.normalize("NFC", num2words(number, lang=language).lower().replace(",", ""))


def with_typo(text: str, draw: random.Random) -> str:
    """The text with a letter too few, too many or changed, or with two neighbours swapped: another text."""
    typed = text
    while typed == text:
        place, letter = draw.randrange(len(text)), draw.choice(string.ascii_lowercase)
        here, after = text[place:], text[place + 1 :]
        typed = text[:place] + draw.choice((after, letter + here, letter + after, after[:1] + here[:1] + after[1:]))
    return typed


def without_accents(text: str) -> str:
    """The text without the marks above and below its letters."""
    parts = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(part for part in parts if not unicodedata.combining(part)))


def _drawn(draw: random.Random, split: str) -> int:
    while True:
        digits = draw.choice(_DIGITS)
        number = draw.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
        if split_of(number) == split:
            return number


def _as_typed(clean: str, draw: random.Random) -> str:
    kind = draw.randrange(16)
    return with_typo(clean, draw) if kind < 7 else without_accents(clean) if kind == 7 else clean


def _record(number: int, clean: str, language: str, typed: str) -> Record:
    return {"prompt": typed, "response": str(number), "clean": clean, "language": language}
