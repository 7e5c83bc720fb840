"""Benchmarks run under the fixtures of what they measure."""

from tests.kernels.conftest import device, interpreter, torch_s_own_linear
from tests.models.causal_lm.conftest import stores

__all__ = ["device", "interpreter", "stores", "torch_s_own_linear"]
