"""Ridge autoregression with switch interactions: another linear network for each position of a switch.

    state(s+1) - state(s) = W [z, switch * z for each switch] + b
    z = [boundary(s+1), state(s), state(s-1), boundary(s)]         in normalised units

The switches are the set-points :ST (a station is on) and :FR (a valve is open) that move on the training days, at
minutes s+1 and s. It is still a closed form: the products are features like others. Rollouts are stable only if noise
on the input states is added, in closed form too, which is chosen with the penalty.

On the demo's validation days RMSE at a minute, 60 minutes and a day is .0672, .1749 and .2662; with the switches of
minute s+1 alone it is .0673, .5213 and 1.626 at the same penalty and noise, with pairs of those .0717, .1854 and .2837
at their best.

K switches make 2 V (1 + 2 K) features. Where these are more than MOST_FEATURES, a switch is multiplied with the columns
of its own device alone, in which what it does is felt first; `limits` says so. Where even the normal equations of those
take more than MOST_BYTES, the baseline is refused.
"""

from __future__ import annotations

from trunkline.engine.errors import ConfigError
from trunkline.models.fluid.ridge import MOST_BYTES, Features, switches
from trunkline.models.fluid.store import Store

NOISES = (0.01, 0.03, 0.1)
MOST_FEATURES = 4096


def interactions(store: Store) -> Features:
    """The features of a data set. Raises ConfigError if no switch moves, or if they do not fit into memory."""
    schema, moving = store.schema, _moving(store)
    if not moving:
        raise ConfigError(
            f"{store.root}: ridge with switches: no set-point :ST or :FR moves on the training days, so there is "
            "nothing to multiply with: leave switches out of --baselines"
        )
    features = Features.with_products(schema, moving, own=bool(limits(store)))
    needed = features.fit_bytes(schema.num_states)
    if needed > MOST_BYTES:
        raise ConfigError(
            f"{store.root}: ridge with switches: {len(moving)} switches make {len(features)} features even if each "
            f"is multiplied with its own device alone, and that takes {needed / 2**30:.1f} GiB, more than "
            f"{MOST_BYTES >> 30}: leave switches out of --baselines"
        )
    return features


def limits(store: Store) -> str:
    """What is said where a switch is multiplied with its own device alone; nothing where it meets every column."""
    count = len(_moving(store))
    total = 2 * store.schema.num_variables * (1 + 2 * count)
    if total <= MOST_FEATURES:
        return ""
    return (
        f"ridge with switches: each of the {count} switches is multiplied with the columns of its own device alone; "
        f"with all columns there would be {total} features, and {MOST_FEATURES} are the most"
    )


def _moving(store: Store) -> list[int]:
    """Places in the boundary of the switches that move on the training days."""
    moves = store.statistics["std"][: store.schema.num_boundary] > 0
    return [k for k in switches(store.schema) if moves[k]]
