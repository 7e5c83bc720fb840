"""T5's pre-training: spans of a text are taken out, a sentinel stands in their place, and the decoder writes them.

    counts(length, objective)             tokens and spans that are taken out of a text of `length` tokens
    longest_text(data, objective)         the most tokens of a text whose input and target fit
    corrupted(batch, pad_id, eos_id)      a batch of texts (trunkline.models.seq2seq.texts) as one of pairs

Of a text of L tokens n = round(density L) are noise, between 1 and L - 1, in s = max(1, round(n / mean span)) spans.
The noise and the rest are each cut into s parts, every way of cutting as likely as any other, and alternate, the rest
first. Input: what is kept, a sentinel for each span, EOS: L - n + s + 1 tokens. Target: each sentinel with its span,
EOS: n + s + 1. (Raffel et al., "Exploring the limits of transfer learning", 2020; random_spans_noise_mask of
github.com/google-research/text-to-text-transfer-transformer.)

A text so short that it has one span always loses its end. Which tokens are noise depends on the draw's key alone: not
on the rank, the batch, nor what it is padded to.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from trunkline.engine.data.randomness import uniform
from trunkline.models.seq2seq.config import Seq2SeqData, SpanCorruption
from trunkline.models.text.linear_loss import IGNORE


class Counts(NamedTuple):
    """Of a text: its tokens, those that are noise, and the spans that these make."""

    length: int
    noise: int
    spans: int

    @property
    def input(self) -> int:
        """What the encoder reads of it, EOS included."""
        return self.length - self.noise + self.spans + 1

    @property
    def target(self) -> int:
        """What the decoder writes, EOS included."""
        return self.noise + self.spans + 1


def counts(length: int, objective: SpanCorruption) -> Counts:
    """Of a text of `length` tokens, 2 or more. Halves are rounded as T5 does it, in fp32."""
    noise = int(np.round(np.float32(length) * np.float32(objective.noise_density)))
    noise = min(max(noise, 1), length - 1)
    spans = max(1, int(np.round(np.float32(noise) / np.float32(objective.mean_span_length))))
    return Counts(length, noise, min(spans, length - noise))  # each span follows a token that is kept


def longest_text(data: Seq2SeqData, objective: SpanCorruption) -> int:
    """The most tokens of a text whose input and target fit `data`'s limits; 0 if none does."""
    length = 1
    while True:
        found = counts(length + 1, objective)
        if found.input > data.max_source_length or found.target > data.max_target_length:
            return length if length > 1 else 0
        length += 1


def noise_mask(keys: Tensor, length: Tensor, noise: Tensor, spans: Tensor, width: int, most_spans: int) -> Tensor:
    """bool [B, width]: the tokens that are taken out; False beyond a text's length.

    keys: int64 [B], of the draws. length, noise, spans: int64 [B], as `counts` has them; `most_spans` at most
    """
    rest_ends = _random_ends(keys, length - noise, spans, width, most_spans, stream=0)
    noise_ends = _random_ends(keys, noise, spans, width, most_spans, stream=1)
    begins, ends = rest_ends + pad(noise_ends, (1, -1)), rest_ends + noise_ends
    place = torch.arange(width, device=keys.device).expand(len(keys), width).contiguous()
    return torch.searchsorted(begins, place, right=True) > torch.searchsorted(ends, place, right=True)


def _random_ends(keys: Tensor, items: Tensor, parts: Tensor, width: int, most: int, stream: int) -> Tensor:
    """Where each part ends if `items` are cut into `parts` that are not empty: int64 [B, most], then `items`."""
    between = torch.arange(width, device=keys.device)
    drawn = uniform(keys, (width,), stream).masked_fill(between >= items[:, None] - 1, 2.0)
    cuts = drawn.argsort(dim=1, stable=True)[:, :most] + 1  # the places of the smallest, in no order
    number = torch.arange(most, device=keys.device)
    return torch.where(number < parts[:, None] - 1, cuts, items[:, None]).sort(dim=1).values.contiguous()


def corrupted(batch: dict[str, Tensor], pad_id: int, eos_id: int) -> dict[str, Tensor]:
    """`batch` with input_ids, decoder_input_ids and targets as trunkline.models.seq2seq.data has them.

    It has `draw` and what TextPieces.collate (trunkline.models.seq2seq.texts) gives, its documents among it, which say
    how long each row is. So all shapes are known, and nothing waits for the device.
    """
    texts, length, spans, sentinels = (batch[name] for name in ("texts", "length", "spans", "sentinels"))
    mask = noise_mask(batch["draw"], length, batch["noise"], spans, texts.shape[1], sentinels.shape[1])
    is_text = torch.arange(texts.shape[1], device=texts.device) < length[:, None]
    inputs, targets = (
        _with_sentinels(texts, removed, is_text, sentinels, eos_id)[:, : document.shape[1]]
        for removed, document in ((mask, batch["input_document"]), (~mask & is_text, batch["target_document"]))
    )
    is_target = batch["target_document"] >= 0
    return batch | {
        "input_ids": inputs.masked_fill(batch["input_document"] < 0, pad_id),
        "decoder_input_ids": pad(targets[:, :-1], (1, 0), value=pad_id).masked_fill(~is_target, pad_id),
        "targets": targets.masked_fill(~is_target, IGNORE),
    }


def _with_sentinels(texts: Tensor, removed: Tensor, is_text: Tensor, sentinels: Tensor, eos_id: int) -> Tensor:
    """[B, T] with each run of `removed` tokens as one sentinel, and EOS after what is left; anything behind it."""
    first = removed & ~pad(removed[:, :-1], (1, 0))
    number = (first.cumsum(1) - 1).clamp(min=0)
    stays = is_text & (first | ~removed)
    values = torch.where(first, sentinels.gather(1, number), texts)
    left = values.gather(1, (~stays).to(torch.int8).argsort(dim=1, stable=True))
    return torch.where(torch.arange(texts.shape[1], device=texts.device) < stays.sum(1, keepdim=True), left, eos_id)
