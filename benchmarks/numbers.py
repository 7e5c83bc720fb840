"""The demonstration of seq2seq: spelled-out numbers read by the demo's networks, and by what else a person would try.

    run(arguments)    `python launchers/bench.py numbers`

Everybody is asked the same numbers, which stand in nobody's training records, as they are spelled and with one typing
error. An answer is right if it is the number, digit by digit. It writes numbers.{md,json,png}.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trunkline.benchmarks.context_table import LETTER_WINDOWS, WORD_WINDOWS, ContextTable, Pair, words
from trunkline.engine.checkpoint.weights import find_weights
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import write_json
from trunkline.engine.record.pictures import BLUE, RED, picture
from trunkline.engine.record.tables import markdown
from trunkline.models.image_classification.metrics import interval
from trunkline.models.seq2seq.example import LANGUAGES, NEW_FIRST, NEW_TRAIN, Record, spelled
from trunkline.models.text.tokenizer import load_tokenizer

ASKED = {"clean": "clean", "one error": "prompt"}
"""How a number is asked, and the field of the records that holds it."""
NETWORK, RULES = "network", "text2num, told the language"
TUNED = {"whole": "sv", "frozen": "sv-frozen", "from scratch": "sv-scratch"}
"""How the new language was learnt, and the run's folder."""
NEW_PAIRS = NEW_FIRST + NEW_TRAIN
_MAKES = "python launchers/prepare.py seq2seq --example numbers"
_AT_ONCE = 250
_COMPARED = 24_000  # records that the nearest is sought among
_SHOWN = 10  # wrong answers

Answer = Callable[[Sequence[str]], list[str]]
Given = dict[str, list[str]]
"""By how it was asked, the answers to all records."""


def run(arguments: argparse.Namespace) -> int:
    """Ask, and write and print the tables. Returns 0. Raises ConfigError, DataError or CheckpointError."""
    runs, device = arguments.runs, torch.device(arguments.device)
    train, test, new_train, new_test = (
        read(arguments.example / f"{name}.jsonl") for name in ("train", "test", "sv-train", "sv-test")
    )
    trained = network(runs / "pretrained", device)
    tuned = {name: network(runs / folder, device) for name, folder in TUNED.items()}
    of_rules = rules([record["language"] for record in test])
    near, new_near = pairs_of(train), pairs_of(new_train)

    everybody = {NETWORK: trained, RULES: of_rules} | baselines(near, near)
    eight = {name: ask(answer, test) for name, answer in everybody.items()}
    everybody = tuned | {"not fine-tuned": trained} | baselines(near + new_near, new_near)
    new = {name: ask(answer, new_test) for name, answer in everybody.items()}
    kept = {name: ask(tuned[name], test) for name in ("whole", "frozen")}

    text = "\n\n".join(
        [
            f"{len(test):,} numbers in eight languages, none of which stands in the {len(train):,} training records:",
            by_method(eight, test),
            f"The same by language, in %: {' and '.join(ASKED)}; at the right clean, after fine-tuning on Swedish:",
            by_language(eight, kept, test),
            f"{len(new_test):,} numbers in Swedish, learnt from {NEW_PAIRS} pairs:",
            by_method(new, new_test),
            *wrong(eight[NETWORK]["one error"], test),
        ]
    )
    out: Path = arguments.out or runs / "numbers"
    out.mkdir(parents=True, exist_ok=True)
    plot({"eight languages": (eight, test), f"Swedish, {NEW_PAIRS} pairs": (new, new_test)}, out / "numbers.png")
    (out / "numbers.md").write_text(f"# Spelled-out numbers\n\n{text}\n\n![](numbers.png)\n", encoding="utf-8")
    parts = {"eight languages": counts(eight, test), "Swedish": counts(new, new_test), "afterwards": counts(kept, test)}
    write_json(out / "numbers.json", parts)
    print(f"{text}\n\nwrote {out}/numbers.md, numbers.json and numbers.png")
    return 0


def read(path: Path) -> list[Record]:
    """The example's records. Raises DataError."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not records or any(set(record) != {"prompt", "response", "clean", "language"} for record in records):
            raise ValueError("other records")
    except FileNotFoundError as error:
        raise DataError(f"{path}: is missing: make it with `{_MAKES} --out {path.parent}`") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not the example's records ({error}): make them anew with `{_MAKES}`") from error
    return records


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    """As they were typed."""
    return [(record["prompt"], record["response"]) for record in records]


def ask(answer: Answer, records: Sequence[Record]) -> Given:
    """Every record in both ways."""
    return {how: answer([record[field] for record in records]) for how, field in ASKED.items()}


@torch.no_grad()
def network(run: Path, device: torch.device) -> Answer:
    """A run's weights, opened by transformers alone: the likeliest token each time. Raises CheckpointError."""
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = find_weights(run)
    loader: Any = AutoModelForSeq2SeqLM
    tokenizer: Any = load_tokenizer(folder)
    lm = loader.from_pretrained(folder, local_files_only=True).to(device).eval()

    def answer(prompts: Sequence[str]) -> list[str]:
        given: list[str] = []
        for first in range(0, len(prompts), _AT_ONCE):
            texts = [prompt + tokenizer.eos_token for prompt in prompts[first : first + _AT_ONCE]]
            told = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
            tokens = lm.generate(
                input_ids=told["input_ids"], attention_mask=told["attention_mask"], max_new_tokens=12, do_sample=False
            )
            given += tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return given

    return answer


def rules(languages: Sequence[str]) -> Answer:
    """text2num, which is told the language of each prompt; "" where it finds no number. Raises ConfigError."""
    try:
        from text_to_num import text2num
    except ImportError as error:
        raise _not_installed("text2num") from error

    def one(prompt: str, language: str) -> str:
        try:
            return str(text2num(prompt, language))
        except ValueError:
            return ""

    return lambda prompts: [one(*asked) for asked in zip(prompts, languages, strict=True)]


def baselines(pairs: Sequence[Pair], near: Sequence[Pair]) -> dict[str, Answer]:
    """Tables fitted on `pairs`; and the nearest and the most frequent of `near`. Raises ConfigError."""
    frequent = Counter(response for _, response in near).most_common(1)[0][0]
    return {
        "word-context table": ContextTable(pairs, words, WORD_WINDOWS).answers,
        "letter-context table": ContextTable(pairs, list, LETTER_WINDOWS).answers,
        "nearest neighbour": nearest(near[:: max(1, len(near) // _COMPARED)]),
        "most frequent answer": lambda prompts: [frequent] * len(prompts),
        "copy": list,
    }


def nearest(pairs: Sequence[Pair]) -> Answer:
    """The response to the prompt whose runs of 1 to 3 letters are most alike, weighed by TF-IDF. Raises ConfigError."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise _not_installed("scikit-learn") from error
    weigh = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), dtype=np.float32)
    known = weigh.fit_transform([prompt for prompt, _ in pairs]).T.tocsr()

    def answer(prompts: Sequence[str]) -> list[str]:
        places: list[int] = []
        for first in range(0, len(prompts), _AT_ONCE):
            alike = weigh.transform(prompts[first : first + _AT_ONCE]) @ known
            places += np.asarray(alike.argmax(axis=1)).ravel().tolist()
        return [pairs[place][1] for place in places]

    return answer


def _not_installed(package: str) -> ConfigError:
    return ConfigError(f"{package} is not installed, which is compared with: pip install -c constraints.txt {package}")


def right(given: Sequence[str], records: Sequence[Record], language: str | None = None) -> tuple[int, int]:
    """How many answers are right, of how many; of one language, if given."""
    marks = [
        answer == record["response"]
        for answer, record in zip(given, records, strict=True)
        if language in (None, record["language"])
    ]
    return sum(marks), len(marks)


def counts(given: Mapping[str, Given], records: Sequence[Record]) -> dict[str, Any]:
    """Who -> language -> how -> [right, of]."""
    return {
        name: {
            language: {how: right(answers, records, language) for how, answers in each.items()}
            for language in dict.fromkeys(record["language"] for record in records)
        }
        for name, each in given.items()
    }


def by_method(given: Mapping[str, Given], records: Sequence[Record]) -> str:
    """A line for each, right in % with the 95 % interval."""
    rows = [["right, 95 % interval", *ASKED]]
    for name, each in given.items():
        cells = []
        for how in ASKED:
            found = right(each[how], records)
            low, high = interval(*found)
            cells.append(f"{_percent(found)} % ({100 * low:.1f} to {100 * high:.1f})")
        rows.append([name, *cells])
    return markdown(rows, align="right")


def by_language(given: Mapping[str, Given], kept: Mapping[str, Given], records: Sequence[Record]) -> str:
    """A line for each language."""
    shown = [name for name, each in given.items() if any(right(each[how], records)[0] for how in ASKED)]
    rows = [["", *shown, *kept]]
    for language in LANGUAGES:
        cells = [", ".join(_percent(right(given[name][how], records, language)) for how in ASKED) for name in shown]
        after = [_percent(right(kept[name]["clean"], records, language)) for name in kept]
        rows.append([language, *cells, *after])
    return markdown(rows, align="right")


def wrong(given: Sequence[str], records: Sequence[Record]) -> list[str]:
    """What is to be said of the wrong answers, and some of them."""
    faults = [(answer, record) for answer, record in zip(given, records, strict=True) if answer != record["response"]]
    if not faults:
        return []
    one_digit = sum(
        len(answer) == len(record["response"]) and sum(map(str.__ne__, answer, record["response"])) == 1
        for answer, record in faults
    )
    meant = sum(_spells(answer, record) for answer, record in faults)
    rows = [["what was typed", "meant", "network"]]
    for answer, record in faults[:: -(-len(faults) // _SHOWN)]:
        rows.append([f"{record['prompt']} ({record['language']})", record["response"], answer])
    return [
        f"Of {len(faults)} wrong answers of the network, {one_digit} are wrong in one digit alone. {meant} are the "
        "number that was typed: the error made it another one. Nothing in an answer tells that it is wrong:",
        markdown(rows, align="right"),
    ]


def _spells(answer: str, record: Record) -> bool:
    return answer.isdecimal() and len(answer) <= 6 and spelled(int(answer), record["language"]) == record["prompt"]


def _percent(found: tuple[int, int]) -> str:
    return f"{100 * found[0] / found[1]:.1f}"


def plot(parts: Mapping[str, tuple[Mapping[str, Given], Sequence[Record]]], path: Path) -> None:
    """Bars of what is right in %, beside one another for both ways of asking."""
    with picture(path, 9, 3.4) as figure:
        for axes, (title, (given, records)) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
            places = np.arange(len(given))[::-1]
            for how, color, shift in zip(ASKED, (BLUE, RED), (0.2, -0.2), strict=True):
                found = [right(each[how], records) for each in given.values()]
                shares = [100 * count / of for count, of in found]
                bars = axes.barh(places + shift, shares, 0.4, color=color, label=how)
                axes.bar_label(bars, [_percent(each) for each in found], padding=2, fontsize=7)
            axes.set_yticks(places, list(given))
            axes.set_xlim(0, 112)
            axes.grid(axis="y", visible=False)
            axes.set_title(title)
            axes.set_xlabel("right (%)")
        axes.legend(loc="lower right")
