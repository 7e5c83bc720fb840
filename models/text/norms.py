"""fuse_norms(lm): RMS norms of a model of transformers by torch's own operator.

    x / sqrt(mean(x^2) + eps) * w

Theirs is a chain of operators, each of which reads and writes all of x, and keeps copies of it in fp32 for the backward
pass. On a GPU torch's is one kernel. In fp32 both give the same bits on a CPU; in 16 bits torch's rounds once, theirs
twice.
Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAME = (
    *("T5LayerNorm", "MT5LayerNorm", "LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Qwen2RMSNorm"),
    *("Qwen2MoeRMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm", "SmolLM3RMSNorm", "GraniteRMSNorm"),
)
"""transformers' classes that compute this. Those of Gemma and OLMo 2, for example, scale or round otherwise."""


def fuse_norms(lm: nn.Module) -> None:
    """Let every norm of SAME compute so. Parameters and names stay as they are."""
    for module in lm.modules():
        kind: Any = type(module)
        if kind.__name__ in SAME and kind.__module__.startswith("transformers.models."):
            module.__class__ = _fused(kind)


@cache
def _fused(kind: Any) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        casts = hidden_states.dtype != self.weight.dtype or torch.is_autocast_enabled(hidden_states.device.type)
        if casts:  # the operators of a chain and the one operator have results of different dtypes
            theirs: Tensor = kind.forward(self, hidden_states)
            return theirs
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    def reduce(self: Any) -> Any:
        return _restored, (kind, self.__dict__)

    fused: type[nn.Module] = type(f"Fused{kind.__name__}", (kind,), {"forward": forward, "__reduce__": reduce})
    return fused


def _restored(kind: Any, state: dict[str, Any]) -> nn.Module:
    """One that was pickled or copied."""
    fused = _fused(kind)
    module = fused.__new__(fused)
    module.__dict__.update(state)
    return module
