"""Norms by torch's own operator, beside transformers' chain of operators and an fp64 one."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trunkline.models.text.norms import SAME, fuse_norms


def kind_of(name: str) -> Any:
    family = re.sub(r"(RMS|Layer)Norm$", "", name)
    folder = {"Qwen2Moe": "qwen2_moe"}.get(family, family.lower())
    return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


def pair(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Theirs, and the same in a model whose norms are fused."""
    torch.manual_seed(0)
    theirs = kind_of(name)(24, eps=1e-5).to(dtype)
    nn.init.normal_(theirs.weight)
    model = nn.Sequential(kind_of(name)(24, eps=1e-5).to(dtype))
    model[0].load_state_dict(theirs.state_dict())
    fuse_norms(model)
    return theirs, model[0]


def value_and_gradients(norm: Any, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    out = norm(x)
    return [out, *torch.autograd.grad(out, (x, norm.weight), upstream.to(out.dtype))]


@pytest.mark.parametrize("name", SAME)
def test_in_fp32_the_bits_are_those_of_transformers(name: str) -> None:
    theirs, fused = pair(name, torch.float32)
    x, upstream = torch.randn(2, 5, 7, 24)
    for a, b in zip(value_and_gradients(theirs, x, upstream), value_and_gradients(fused, x, upstream), strict=True):
        assert torch.equal(a, b)
    assert isinstance(fused, kind_of(name))
    assert type(fused) is not type(theirs)
    assert list(fused.state_dict()) == ["weight"]
    for other in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert type(other) is type(fused)
        assert other.weight is not fused.weight
        assert torch.equal(other(x), fused(x))


class Exact(nn.Module):
    """The formula in fp64: transformers' own goes through fp32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(norm.weight.detach().double()), norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["T5LayerNorm", "LlamaRMSNorm"])
def test_in_16_bits_errors_are_smaller_than_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    theirs, fused = pair(name, dtype)
    x, upstream = torch.randn(2, 50, 24).to(dtype)
    three = [
        value_and_gradients(fused, x, upstream), value_and_gradients(theirs, x, upstream),
        value_and_gradients(Exact(theirs), x.double(), upstream),
    ]  # fmt: skip
    for mine, other, true in zip(*three, strict=True):
        assert mine.dtype == dtype
        assert (mine - true).norm() < (other - true).norm()


def test_other_dtypes_and_other_norms_stay_as_they_are() -> None:
    theirs, fused = pair("LlamaRMSNorm", torch.float32)
    x = torch.randn(3, 24).bfloat16()
    assert fused(x).dtype == theirs(x).dtype == torch.float32
    assert torch.equal(fused(x), theirs(x))
    theirs, fused = pair("LlamaRMSNorm", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == theirs(x).dtype
        assert torch.equal(fused(x), theirs(x))

    class LlamaRMSNorm(nn.LayerNorm):
        """Of another package, with the same name."""

    others = nn.Sequential(kind_of("LlamaRMSNorm")(4), LlamaRMSNorm(4), nn.LayerNorm(4))
    kinds = [type(each) for each in others]
    fuse_norms(others)
    assert [type(each) is kind for each, kind in zip(others, kinds, strict=True)] == [False, True, True]
