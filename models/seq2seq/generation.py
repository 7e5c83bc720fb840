"""Texts from an encoder-decoder.

    write(lm, inputs, seen, stops, pad, ...)        tokens of a batch
    generate(trained, prompts, batch_size, ...)     the answer to each prompt
    in_batches(trained, talks, batch_size, ...)     the same, as they are made, to talks of several turns
    reply(trained, turns, ...)                      the answer to one talk, printed while it is made if asked

`options` are those of transformers' generate. Nothing is taken from a model's generation_config.json but the tokens
that end a text: without options the likeliest token is taken each time (greedy). Answers of a batch do not depend on
what else is in it, unless they are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trunkline.engine.errors import ConfigError
from trunkline.models.seq2seq.turns import joined

if TYPE_CHECKING:
    from trunkline.models.seq2seq.trained import Trained

MAX_NEW_TOKENS = 320


@torch.no_grad()
def write(lm: Any, inputs: Tensor, seen: Tensor, stops: Sequence[int], pad: int, **options: Any) -> list[list[int]]:
    """What `lm` writes to each row, without the tokens that end it and all behind.

    inputs: int64 [B, N]; seen: bool [B, N], False at padding. `lm` is transformers' model with whole weights.
    """
    # synced_gpus: transformers would let ranks wait for each other, and some have no text to make
    out = lm.generate(
        inputs, attention_mask=seen.long(), eos_token_id=list(stops), pad_token_id=pad, decoder_start_token_id=pad,
        synced_gpus=False, **{"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS} | options,
    )  # fmt: skip
    return [_until_stop(row, {*stops}) for row in out[:, 1:].tolist()]


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


def generate(trained: Trained, prompts: Sequence[str], batch_size: int = 16, **options: Any) -> list[str]:
    """The answer to each prompt, in order."""
    return list(in_batches(trained, [[prompt] for prompt in prompts], batch_size, **options))


def in_batches(
    trained: Trained, talks: Sequence[Sequence[str]], batch_size: int = 16, **options: Any
) -> Iterator[str]:  # fmt: skip
    """The answer to each talk, in order: its turns, the oldest first, the last of which is the prompt."""
    for first in range(0, len(talks), batch_size):
        yield from _answers(trained, [tokens_of(trained, talk) for talk in talks[first : first + batch_size]], options)


def reply(trained: Trained, turns: Sequence[str], *, stream: bool = False, **options: Any) -> str:
    """The answer to a talk; `stream` prints it while it is made."""
    from transformers import TextStreamer

    streamer = TextStreamer(trained.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    return _answers(trained, [tokens_of(trained, turns)], options | {"streamer": streamer})[0]


def tokens_of(trained: Trained, turns: Sequence[str]) -> list[list[int]]:
    """The tokens of each turn, without EOS, as `prepare` makes them. Raises ConfigError for a text that holds EOS."""
    tokenizer = trained.tokenizer
    found = [each.ids for each in tokenizer.backend_tokenizer.encode_batch_fast(list(turns), add_special_tokens=False)]
    for turn, ids in zip(turns, found, strict=True):
        if held := {tokenizer.eos_token_id, tokenizer.pad_token_id}.intersection(ids):
            mark = tokenizer.convert_ids_to_tokens(min(held))
            raise ConfigError(f"{turn[:60]!r}: holds {mark}, which the model would take for the real one: remove it")
    return found


def _answers(trained: Trained, talks: Sequence[Sequence[Sequence[int]]], options: dict[str, Any]) -> list[str]:
    most, pad = trained.data.max_source_length, trained.tokenizer.pad_token_id
    rows = [torch.tensor(joined(turns, trained.tokenizer.eos_token_id, most)) for turns in talks]
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    seen = torch.arange(inputs.shape[1]) < lengths[:, None]
    device = trained.lm.device
    made = write(trained.lm, inputs.to(device), seen.to(device), trained.stops, pad, **options)
    return [trained.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]
