"""Hugging Face's package `kernels` and our folder of that name do not meet, wherever Python starts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

IMPORT = """
import json
import kernels
import torch
from transformers import LlamaConfig, LlamaForCausalLM, pipeline
from trunkline.kernels.attention import flash_attention

small = LlamaConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)
ids = torch.tensor([[1, 2]])
loss = LlamaForCausalLM(small)(input_ids=ids, labels=ids).loss
loss.backward()
print(json.dumps({
    "kernels": kernels.__file__,
    "get_kernel": callable(kernels.get_kernel),
    "pipeline": callable(pipeline),
    "loss": loss.item() > 0,
    "ours": flash_attention.__module__,
}))
"""


@pytest.mark.parametrize("folder", ["the project's root", pytest.param("an empty folder", marks=pytest.mark.slow)])
def test_transformers_finds_kernels_and_we_find_ours(folder: str, tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT if folder == "the project's root" else tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    theirs = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    assert json.loads(outcome.stdout.splitlines()[-1]) == {
        "kernels": str(theirs), "get_kernel": True, "pipeline": True, "loss": True,
        "ours": "trunkline.kernels.attention.flash",
    }  # fmt: skip
