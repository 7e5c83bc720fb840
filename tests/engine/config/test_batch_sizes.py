"""Batch sizes that do not go together: the remedies are whole numbers, and each of them works."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trunkline.engine.config.deepspeed_section import BatchSizes, DeepSpeedSection, batch_sizes
from trunkline.engine.config.strict import validated
from trunkline.engine.config.typed_params import known_optimizer, known_scheduler
from trunkline.engine.errors import ConfigError


def sizes(total: int, micro: Any, accumulation: Any, ranks: int) -> BatchSizes:
    section = {
        "train_batch_size": total, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1}},
    }  # fmt: skip
    return batch_sizes(validated(DeepSpeedSection, section, "deepspeed", "run.json"), ranks)


@pytest.mark.parametrize(
    ("total", "micro", "accumulation", "ranks", "message"),
    [
        (32, "auto", "auto", 64, "32 samples cannot be shared by 64 ranks: use 64 for train_batch_size, or 32 ranks"),
        (32, 1, "auto", 64, "32 is not a multiple of 64 (micro-batches of 1 x 64 ranks): use 64 for train_batch_size, "
                            "or 32 ranks"),
        (32, 2, "auto", 12, "32 is not a multiple of 24 (micro-batches of 2 x 12 ranks): use 24 or 48 for "
                            "train_batch_size, or 8 ranks"),
        (30, 8, "auto", 2, "30 is not a multiple of 16 (micro-batches of 8 x 2 ranks): use 5 for "
                           "train_micro_batch_size_per_gpu, or 16 or 32 for train_batch_size"),
        (3, "auto", "auto", 2, "3 samples cannot be shared by 2 ranks: use 2 or 4 for train_batch_size, or 1 rank"),
        (32, "auto", 3, 4, "32 samples cannot be shared by 4 ranks x 3 accumulation steps: use 24 or 36 for "
                           "train_batch_size"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_go_together_are_named_with_sizes_that_do(
    total: int, micro: Any, accumulation: Any, ranks: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"deepspeed.train_batch_size: {message}") + "$"):
        sizes(total, micro, accumulation, ranks)
    ways = message.partition(": use ")[2]
    for found in re.findall(r"(\d+)(?: or (\d+))? for (\w+)", ways):
        for size in filter(None, found[:2]):
            if found[2] == "train_batch_size":
                assert sizes(int(size), micro, accumulation, ranks).global_batch_size == int(size)
            else:
                assert sizes(total, int(size), accumulation, ranks).micro_batch_size == int(size)
    for fewer in re.findall(r"(\d+) ranks?", ways):
        assert sizes(total, micro, accumulation, int(fewer)).world_size == int(fewer)


@pytest.mark.parametrize("known", [known_optimizer, known_scheduler])
def test_an_unknown_name_lists_each_choice_once(known: Any) -> None:
    with pytest.raises(ValueError, match="known: ") as caught:
        known("Xyzzy0123")
    names = str(caught.value).partition("known: ")[2].split(", ")
    assert len(names) == len(set(names)) > 10
