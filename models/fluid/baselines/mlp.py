"""Ridge + MLP: Linear, GELU, Linear, GELU, Linear over all that two minutes hold, beside a ridge autoregression."""

from __future__ import annotations

from torch import nn

from trunkline.models.fluid.baselines.residual import Settings
from trunkline.models.fluid.store import Store

MLP = Settings(width=256, learning_rate=2e-3, weight_decay=0.1)


def mlp(store: Store) -> nn.Sequential:
    """[B, 2 V] -> [B, Vs], in units. Starts as zero."""
    width, schema = MLP.width, store.schema
    last = nn.Linear(width, schema.num_states)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    enter = nn.Linear(2 * schema.num_variables, width)
    return nn.Sequential(enter, nn.GELU(), nn.Linear(width, width), nn.GELU(), last)
