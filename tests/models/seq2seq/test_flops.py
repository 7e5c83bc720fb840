from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.seq2seq.test_build import model_of, network_of
from tests.models.seq2seq.toy_data import toy_run, toy_store
from tests.models.seq2seq.toy_pairs import toy_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.models.registry import make_task
from trunkline.models.seq2seq.flops import forward_flops


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_they_agree_with_torch_s_own_count(feed_forward: str) -> None:
    network = network_of(model_of(attention="eager", feed_forward_proj=feed_forward))
    sides = np.array([[24, 16]] * 3)
    one = torch.ones(3, 24, dtype=torch.int64), torch.ones(3, 16, dtype=torch.int64)
    documents = [torch.zeros_like(each) for each in one]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = network.hidden(one[0], documents[0], one[1], documents[1])
        hidden @ network.lm.lm_head.weight.t()
    config = network.lm.config
    # eager attention computes the pairs that are not visible too
    hidden_pairs = 3 * 16 * 15 / 2 * config.num_decoder_layers * 4 * config.num_heads * config.d_kv
    assert counter.get_total_flops() == pytest.approx(forward_flops(network.lm, sides) + hidden_pairs, rel=1e-6)


def test_a_run_counts_the_tokens_of_its_samples(pairs: Path, tmp_path: Path) -> None:
    def of_all(config: RunConfig) -> float:
        task = make_task(config)
        return task.flops_per_sample() * len(task.dataset("train"))

    padded = of_all(toy_config(tmp_path / "padded", pairs))
    assert padded > 0
    assert of_all(toy_config(tmp_path / "packed", pairs, data={"packing": True})) == pytest.approx(padded)


def test_texts_have_the_sides_of_their_batches(tmp_path: Path) -> None:
    task: Any = make_task(toy_run(tmp_path, toy_store(tmp_path, "text")))
    dataset = task.dataset("train")
    batch = task.collate([dataset[index] for index in range(len(dataset))])
    held = [(batch[f"{side}_document"] >= 0).sum(1).tolist() for side in ("input", "target")]
    assert task._samples.sides("train").T.tolist() == held
