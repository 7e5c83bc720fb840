"""Text from a trained language model: what `launchers/predict.py` does for this workload.

    --prompt TEXT       continue a text, or with --chat answer it
    --prompts FILE      the same for every line of a file, up to "\\n" or "\\r\\n"; --out keeps prompts and answers as
                        JSON lines
    --chat              the prompt is what a user says; without one, talk: a line a turn, an empty line ends it

Without --temperature the likeliest token is taken each time (greedy). Text is printed while it is made.
Of the model's own generation_config.json only the tokens that end a text count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm

from trunkline.engine.checkpoint.weights import described
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.causal_lm.trained import Trained, load_trained
from trunkline.models.text.answers import answers_file, prompt_lines, warn_of_unknown
from trunkline.models.text.sources import BadRecord
from trunkline.models.text.tokenizer import leading_ids, pad_id

Message = dict[str, str]


def run(arguments: argparse.Namespace) -> int:
    """Generate and print. Returns the exit status. Raises ConfigError, DataError or CheckpointError."""
    options = _generation_options(arguments)
    for flag, text in (("--prompt", arguments.prompt), ("--system", arguments.system)):
        _check_utf8(flag, text or "")
    prompts = list(_prompts(arguments))
    trained = load_trained(arguments.run, arguments.device, getattr(torch, arguments.dtype))
    print(described(trained.folder), file=sys.stderr)  # what is written goes to stdout
    torch.manual_seed(arguments.seed or 0)
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.chat and not prompts:
        _talk(trained, system, options)
        return 0
    warn_of_unknown(trained.tokenizer, [(prompt,) for prompt in prompts if prompt])
    stream = arguments.out is None
    with nullcontext() if stream else answers_file(arguments.out, arguments.prompts) as out:
        for prompt in tqdm(prompts, desc="generate", unit="prompt", disable=stream or len(prompts) == 1):
            if arguments.chat:
                answer = reply(trained, [*system, {"role": "user", "content": prompt}], stream=stream, **options)
            else:
                if stream:
                    print(prompt, end="", flush=True)
                answer = continue_text(trained, prompt, stream=stream, **options)
            if out is not None:  # line by line, so that an interruption costs one answer
                print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False), file=out, flush=True)
    if not stream:
        print(f"wrote {len(prompts)} answers to {arguments.out}")
    return 0


def continue_text(trained: Trained, prompt: str, *, stream: bool = False, **options: Any) -> str:
    """What the model writes after `prompt`, without it. `options` are those of transformers' generate."""
    ids = trained.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return _generate(trained, [*leading_ids(trained.tokenizer), *ids], stream, options)


def reply(trained: Trained, messages: list[Message], *, stream: bool = False, **options: Any) -> str:
    """The assistant's next message. Raises ConfigError if the tokenizer has no chat template or refuses."""
    return _generate(trained, _rendered(trained, messages), stream, options)


def _rendered(trained: Trained, messages: list[Message]) -> list[int]:
    if not trained.tokenizer.chat_template:
        raise ConfigError(f"{trained.folder}: its tokenizer has no chat template: leave out --chat")
    left_out: list[str] = []
    try:
        ids = trained.renderer.prompt(messages, left_out.append)
    except BadRecord as error:
        raise ConfigError(f"{trained.folder}: its chat template does not take this conversation: {error}") from error
    if lost := [reason for reason in left_out if "'system'" in reason]:
        raise ConfigError(f"--system: {lost[0]} ({trained.folder}): leave it out")
    return ids


@torch.no_grad()
def _generate(trained: Trained, ids: list[int], stream: bool, options: dict[str, Any]) -> str:
    from transformers import TextStreamer

    if not ids:
        raise ConfigError("--prompt: is empty, and this tokenizer begins no text by itself: give at least a letter")
    device = next(trained.lm.parameters()).device
    options = dict(options)
    room = _positions(trained) - len(ids)
    count = options.pop("max_new_tokens", None) or min(128, room)
    if count > room or room < 1:
        raise ConfigError(
            f"--prompt: {len(ids)} tokens and {max(count, 1)} new ones (--max-new-tokens) are more than the "
            f"{room + len(ids)} positions that this model knows: shorten either"
        )
    inputs = torch.tensor([ids], device=device)
    out = trained.lm.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        eos_token_id=trained.stops,
        pad_token_id=pad_id(trained.tokenizer),
        max_new_tokens=count,
        streamer=TextStreamer(trained.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        **options,
    )
    return trained.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip("\n")


def _positions(trained: Trained) -> int:
    return getattr(trained.lm.config, "max_position_embeddings", None) or 2**31


def _talk(trained: Trained, messages: list[Message], options: dict[str, Any]) -> None:
    """A conversation on the terminal, until an empty line or the end of the input."""
    print("An empty line ends the conversation.")
    first = len(messages)  # after the system's
    while True:
        try:
            said = input("> ").strip()
            _check_utf8("standard input", said)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise _not_utf8("standard input") from error
        if not said:
            return
        messages = [*messages, {"role": "user", "content": said}]
        wanted = min(options["max_new_tokens"] or 64, _positions(trained) // 2)
        while len(messages) > first + 1 and len(_rendered(trained, messages)) + wanted > _positions(trained):
            del messages[first : first + 2]
            print("(the oldest turn is forgotten: the model has no positions left for it)")
        messages.append({"role": "assistant", "content": reply(trained, messages, stream=True, **options)})


def _check_utf8(what: str, text: str) -> None:
    """Raises ConfigError for bytes that Python could not read as text, which it keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _not_utf8(what) from error


def _not_utf8(what: str) -> ConfigError:
    return ConfigError(f"{what}: not UTF-8 text: set a UTF-8 locale, or use --prompts FILE")


def _prompts(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.prompt is not None:
        yield arguments.prompt
    elif arguments.prompts is not None:
        prompts = prompt_lines(arguments.prompts)
        if not prompts:
            raise DataError(f"--prompts {arguments.prompts}: holds no line with text")
        yield from prompts
    elif not arguments.chat:
        raise ConfigError("give --prompt TEXT, --prompts FILE, or --chat to talk")
    elif arguments.out is not None:
        raise ConfigError("--out: a conversation on the terminal is not written; give --prompt or --prompts with it")


def _generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What transformers' generate takes. Raises ConfigError for a value out of range or without effect."""
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {arguments.max_new_tokens}: use 1 or more")
    if arguments.system and not arguments.chat:
        raise ConfigError("--system: has no effect without --chat")
    if arguments.temperature is None:
        for name in ("top_k", "top_p", "seed"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: has no effect without --temperature")
        return {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    if not arguments.temperature > 1e-6:  # nor NaN; below, scores leave fp32
        raise ConfigError(
            f"--temperature {arguments.temperature}: use a value above 0.000001, or leave it out for greedy"
        )
    if arguments.top_k is not None and arguments.top_k < 1:
        raise ConfigError(f"--top-k {arguments.top_k}: use 1 or more")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top-p {arguments.top_p}: use a value above 0 and at most 1")
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": True,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k or 0,
        "top_p": 1.0 if arguments.top_p is None else arguments.top_p,
    }
