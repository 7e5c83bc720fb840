"""Facts of a start, as values that differ where the things do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.engine.tiny import TinyData, TinyModel, TinyTask
from trunkline.engine.ranks.start_facts import class_version, code_version, digest, leaves, tensor_digests


def test_a_digest_of_a_tensor_depends_on_every_bit_the_shape_and_the_dtype() -> None:
    def digest(tensor: torch.Tensor) -> str:
        module = nn.Module()
        module.register_buffer("x", tensor)
        return tensor_digests(module)["initial value of x"]

    zeros = torch.zeros(6)
    others = [-zeros, zeros.double(), zeros.view(2, 3), zeros.bfloat16(), zeros.index_fill(0, torch.tensor([5]), 1e-45)]
    assert len({digest(tensor) for tensor in [zeros, *others]}) == 6
    turned = torch.arange(6.0).view(2, 3).t()
    assert digest(turned) == digest(turned.contiguous())
    assert digest(torch.tensor(1.0)) != digest(torch.tensor(2.0))
    assert digest(torch.empty(0)) == digest(torch.from_numpy(np.empty(0, np.float32)))  # of stride 1, and of stride 0


def test_nested_values_are_named_by_dotted_keys() -> None:
    assert leaves({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_code_is_told_by_file_also_that_of_somebody_else_s_task() -> None:
    code = code_version()
    assert code["version of torch"] in (torch.__version__, torch.__version__.partition("+")[0])  # as its wheel says
    assert code["code of engine/trainer.py"] == digest(Path("engine/trainer.py").read_bytes())
    assert any(key.startswith("code of models/fluid/") for key in code)
    task = class_version(type(TinyTask(TinyData(), TinyModel())))
    assert task == {"code of TinyTask": digest(Path("tests/engine/tiny.py").read_bytes())}
