"""A small English data set that nothing has to be downloaded for.

    write_examples(folder)   {text,conversations,preferences}.jsonl, and the same with -val for validation

text            Python's own documentation of its language (pydoc_data.topics), one document a topic
conversations   questions and answers of the package chatterbot-corpus (BSD licence), the first two turns of each talk
preferences     made from these: the answer is chosen, the answer of another question rejected. Nobody judged them, so
                they show that an answer belongs to its question and nothing finer

No question and no answer of the validation files stands in the training files, nor differs from one there only in case
and punctuation.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trunkline.engine.errors import ConfigError
from trunkline.models.causal_lm.records import KINDS

VAL_FRACTION = 0.1
MADE_UP = "the rejected answers are answers to other questions, picked by a rule; nobody judged these pairs"


def write_examples(folder: Path) -> dict[str, int]:
    """Write the six files and return the number of records of each. Files with the same content are left as they are.

    The files depend on nothing but the versions of Python and of chatterbot-corpus.
    Raises ConfigError if chatterbot-corpus is not installed.
    """
    import pydoc_data.topics

    pairs = _pairs()
    held_out = _held_out(pairs)
    topics = {name: text.strip() for name, text in sorted(pydoc_data.topics.topics.items())}
    files: dict[str, list[dict[str, Any]]] = {}
    for suffix, is_val in (("", False), ("-val", True)):
        part = [pair for pair, val in zip(pairs, held_out) if val == is_val]
        files[f"text{suffix}.jsonl"] = [{"text": text} for name, text in topics.items() if _chosen(name) == is_val]
        files[f"conversations{suffix}.jsonl"] = [{"prompt": q, "response": a} for q, a in part]
        files[f"preferences{suffix}.jsonl"] = [
            {"prompt": q, "chosen": a, "rejected": other} for (q, a), other in zip(part, _other_answers(part))
        ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            (folder / name).write_text(text, encoding="utf-8")
    assert {name.partition("-")[0].partition(".")[0] for name in files} == set(KINDS)
    return {name: len(records) for name, records in files.items()}


def _pairs() -> list[tuple[str, str]]:
    """(question, answer), each pair once."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(
            "the example's questions and answers are not installed: pip install -c constraints.txt chatterbot-corpus"
        )
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast
    talks: list[Any] = []
    for path in sorted(Path(spec.submodule_search_locations[0], "data", "english").glob("*.yml")):
        talks += yaml.load(path.read_text(encoding="utf-8"), loader)["conversations"]
    pairs = [
        (talk[0].strip(), talk[1].strip())
        for talk in talks
        if isinstance(talk, list) and len(talk) > 1 and all(isinstance(turn, str) and turn.strip() for turn in talk[:2])
    ]
    return list({(_plain(question), _plain(answer)): (question, answer) for question, answer in pairs}.values())


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _held_out(pairs: Iterable[tuple[str, str]]) -> list[bool]:
    """Whether each pair is for validation. Those that share a question or an answer stay together."""
    pairs = list(pairs)
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    # what is a question here is an answer there ("Hello"), so both are one kind of text
    for question, answer in pairs:
        first, second = sorted([find(_plain(question)), find(_plain(answer))])
        leader[second] = first
    return [_chosen(find(_plain(question))) for question, _ in pairs]


def _chosen(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < VAL_FRACTION * 2**64


def _other_answers(pairs: list[tuple[str, str]]) -> list[str]:
    """For each pair the next answer, from half-way round the list on, that its question does not have too."""
    right: defaultdict[str, set[str]] = defaultdict(set)
    for question, answer in pairs:
        right[_plain(question)].add(_plain(answer))
    found = []
    for index, (question, _) in enumerate(pairs):
        from_half_way = (pairs[(index + len(pairs) // 2 + step) % len(pairs)][1] for step in range(len(pairs)))
        found.append(next(answer for answer in from_half_way if _plain(answer) not in right[_plain(question)]))
    return found
