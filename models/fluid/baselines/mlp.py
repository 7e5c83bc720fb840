"""Ridge + MLP: Linear, GELU, Linear, GELU, Linear beside a ridge autoregression.

Chosen on the demo's validation days; RMSE at a minute, 60 minutes and a day after these seconds of one thread. Each
line changes what it says of the first, or of the one that it names.

                                                                         minute   hour    day
    rate .001, batch 64, decay of weights .0001, average .998    30 s     .0570  .1427  .1860
    a  batch 128                                                 30 s     .0560  .1400  .1838
    a, width 512                                                 30 s     .0602  .1376  .1761
    a, noise .05                                                 30 s     .0585  .1395  .1941
    a, noise .2                                                  30 s     .0657  .1634  .2039
    a, average .999                                              30 s     .0541  .1296  .1669
    a, decay .01                                                 30 s     .0533  .1296  .1643
    rate .002, batch 128                                         30 s     .0555  .1339  .1801
    rate .002, batch 256                                         30 s     .0488  .1301  .1725
    rate .004, batch 256                                         30 s     .0563  .1606  .2157
    b  rate .002, batch 256, decay .1, average .999              45 s     .0449  .1234  .1614
    b, another seed                                              40 s     .0441  .1227  .1664
    b, rate .003                                                 40 s     .0449  .1304  .1795
    b, rate .003, ridge fitted with noise .03 and not .1         40 s     .0407  .1267  .1760
    b, network sees boundary(s)                                  45 s     .0525  .1305  .1633
    b, network and ridge see it, ridge fitted with noise .03     45 s     .0448  .1366  .1877
    as it is: b, ridge fitted with noise .03                     60 s     .0379  .1161  .1579
"""

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
