"""Ridge + MLP: Linear, GELU, Linear, GELU, Linear beside a ridge autoregression."""

from __future__ import annotations

from torch import nn

from trunkline.models.fluid.baselines.residual import Settings, features_of
from trunkline.models.fluid.store import Store

MLP = Settings(width=256, learning_rate=2e-3, weight_decay=0.1)


def mlp(store: Store) -> nn.Sequential:
    """[B, F] -> [B, Vs], in units. Starts as zero."""
    width, schema = MLP.width, store.schema
    last = nn.Linear(width, schema.num_states)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    enter = nn.Linear(len(features_of(schema)), width)
    return nn.Sequential(enter, nn.GELU(), nn.Linear(width, width), nn.GELU(), last)
