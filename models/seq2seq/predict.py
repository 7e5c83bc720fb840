"""Answers of a trained encoder-decoder: what `launchers/predict.py` does for this workload.

    --prompt TEXT       the answer, printed while it is made
    --prompts FILE      an answer to every prompt of a file, or of standard input (-), as JSON lines
    --chat              a talk on the terminal: the model reads all of it again each time

Without --num-beams and --sample the likeliest token is taken each time (greedy).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trunkline.engine.checkpoint.weights import described
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.seq2seq.generation import in_batches, reply, tokens_of
from trunkline.models.seq2seq.records import prompt_of
from trunkline.models.seq2seq.trained import Trained, load_trained
from trunkline.models.seq2seq.turns import between
from trunkline.models.text.answers import answers_file, prompt_lines, warn_of_unknown
from trunkline.models.text.fields import checked_text
from trunkline.models.text.sources import BadRecord, Problem, read_records

Talk = tuple[str, ...]
"""Its turns, the oldest first; the last is the prompt."""

SAMPLING = {"temperature": 0.98, "top_k": 50, "top_p": 0.8}
_TABLES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print. Returns the exit status. Raises ConfigError, DataError or CheckpointError."""
    options = _options(arguments)
    talks = _talks(arguments)
    trained = load_trained(arguments.run, arguments.device, getattr(torch, arguments.dtype))
    print(described(trained.folder), file=sys.stderr)  # what is written goes to stdout
    torch.manual_seed(arguments.seed or 0)
    if arguments.chat:
        _converse(trained, options)
        return 0
    _warn_of_long_ones(trained, talks)
    warn_of_unknown(trained.tokenizer, talks)
    if arguments.prompt is not None and arguments.out is None:
        _say(trained, talks[0], options)
        return 0
    out_file = nullcontext(sys.stdout) if arguments.out is None else answers_file(arguments.out, arguments.prompts)
    with out_file as out:
        answers = in_batches(trained, talks, arguments.batch_size or 16, **options)
        bar = tqdm(talks, desc="answer", unit="prompt", disable=arguments.out is None)
        for talk, answer in zip(bar, answers, strict=True):  # line by line: an interruption costs one batch
            row = {"history": talk[:-1]} if len(talk) > 1 else {}
            print(json.dumps(row | {"prompt": talk[-1], "answer": answer}, ensure_ascii=False), file=out, flush=True)
    if arguments.out is not None:
        print(f"wrote {len(talks):,} answers to {arguments.out}")
    return 0


def _say(trained: Trained, talk: Talk, options: dict[str, Any]) -> str:
    """The answer, printed: while it is made, or where several are searched at once, when it is there."""
    stream = options["num_beams"] == 1
    answer = reply(trained, talk, stream=stream, **options)
    if not stream:
        print(answer, flush=True)
    return answer


def _converse(trained: Trained, options: dict[str, Any]) -> None:
    """A talk on the terminal, until an empty line or the end of the input."""
    print("An empty line ends the talk.")
    turns: Talk = ()
    for line in iter(lambda: _typed("> "), ""):
        warn_of_unknown(trained.tokenizer, [(line,)])
        turns = _within(trained, (*turns, line))
        turns = *turns, _say(trained, turns, options)


def _within(trained: Trained, turns: Talk) -> Talk:
    """The turns without the oldest ones that the model has no room for, which is said."""
    tokens, most = tokens_of(trained, turns), trained.data.max_source_length
    eos = trained.tokenizer.eos_token_id
    first = next((n for n in range(len(turns)) if len(between(tokens[n:], eos)) < most), len(turns) - 1)
    if first:
        print(f"(forgotten: the oldest {first} of {len(turns)} turns: the model reads {most} tokens)")
    if len(tokens[-1]) >= most:
        print(f"(the end of this turn is not read: the model reads {most} tokens)")
    return turns[first:]


def _warn_of_long_ones(trained: Trained, talks: list[Talk]) -> None:
    eos, most = trained.tokenizer.eos_token_id, trained.data.max_source_length
    if longer := sum(len(between(tokens_of(trained, talk), eos)) >= most for talk in talks):
        print(
            f"warning: {longer:,} of {len(talks):,} prompts are longer than the {most} tokens that the model reads "
            "(data.max_source_length): of each, the oldest turns or the end are not read",
            file=sys.stderr,
        )


def _typed(mark: str) -> str:
    try:
        line = input(mark).strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise _not_utf8("standard input") from error
    return _text(line, "standard input") if line else ""


def _text(text: str, what: str) -> str:
    """Raises ConfigError for a text that says nothing, or that Python could not read as UTF-8."""
    try:
        return checked_text(text, what)
    except BadRecord as bad:
        raise _not_utf8(what) if text.strip() else ConfigError(f"{bad}: give a text to answer") from bad


def _not_utf8(what: str) -> ConfigError:
    return ConfigError(f"{what}: not UTF-8 text: set a UTF-8 locale, or use --prompts FILE")


def _talks(arguments: argparse.Namespace) -> list[Talk]:
    """What is to be answered; nothing of a chat."""
    if arguments.prompt is not None:
        return [(_text(arguments.prompt, "--prompt"),)]
    if arguments.prompts is None:
        return []
    if Path(arguments.prompts).suffix.lower() in _TABLES:
        talks = list(_of_records(Path(arguments.prompts)))
    else:
        talks = [(line,) for line in prompt_lines(arguments.prompts)]
    if not talks:
        raise DataError(f"--prompts {arguments.prompts}: holds no prompt")
    return talks


def _of_records(path: Path) -> Iterator[Talk]:
    for found in read_records([path], prompt_of):
        if isinstance(found, Problem):
            raise DataError(f"--prompts {found}: mend it, or leave the record out")
        yield found[1]


_ABOVE_0 = "use a value above 0.000001", lambda value: value > 1e-6  # below, scores leave fp32
_FROM_1 = "use 1 or more", lambda value: value >= 1
_TO_1000 = "use 1 to 1000", lambda value: 1 <= value <= 1000  # beams are searched at once
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": _FROM_1, "num_beams": _TO_1000, "no_repeat_ngram_size": _FROM_1, "batch_size": _FROM_1,
    "temperature": _ABOVE_0, "top_k": _FROM_1,
    "top_p": ("use a value above 0 and at most 1", lambda value: 0 < value <= 1),
}  # fmt: skip


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What transformers' generate takes. Raises ConfigError for a value out of range or without effect."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    for name, (remedy, holds) in _RANGES.items():
        if name in given and not holds(given[name]):
            raise ConfigError(f"{_flag(name)} {given[name]}: {remedy}")
    if arguments.chat and arguments.out is not None:
        raise ConfigError("--out: a talk on the terminal is not written: give --prompt or --prompts with it")
    if "batch_size" in given and arguments.prompts is None:
        raise ConfigError("--batch-size: has no effect without --prompts")
    options = {
        "max_new_tokens": arguments.max_new_tokens, "num_beams": arguments.num_beams or 1,
        "no_repeat_ngram_size": arguments.no_repeat_ngram_size or 0, "do_sample": arguments.sample,
    }  # fmt: skip
    drawn = [name for name in (*SAMPLING, "seed") if name in given]
    if drawn and not arguments.sample:
        raise ConfigError(f"{_flag(drawn[0])}: has no effect without --sample")
    if arguments.sample:
        options |= {name: given.get(name, default) for name, default in SAMPLING.items()}
    return options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
