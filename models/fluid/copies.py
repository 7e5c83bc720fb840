"""Which states are only copied from set-points: predicting them earns nothing, so scores leave them out.

    copied_states(store)   -> {"N_001_p": "T_001:SP"}

A state is a copy if it equals one set-point of the same minute in all training minutes that are looked at. One that
does so only while its device is on is none. Equal means closer than a hundredth of the state's standard deviation:
that is more than files round off, and what such a state has of its own is less than a ten-thousandth of its variance.
A column that never changes is no copy, since it cannot be told from others.
"""

from __future__ import annotations

import numpy as np

from trunkline.models.fluid.statistics import sample_positions
from trunkline.models.fluid.store import Store

EQUAL = 0.01
"""How far a copy may be from its set-point, in standard deviations of the state."""
_VALUES_AT_ONCE = 16 << 20  # of pairs in some rows


def copied_states(store: Store) -> dict[str, str]:
    """The set-point that a state copies, by the state's name; in the order of the state vector.

    Looks at the rows that the store's medians come from: all of a small network, 4,999 at V = 6,712. A missing value
    contradicts nothing, but a state that is missing in most rows is no copy. Raises DataError for a damaged file.
    """
    schema, minutes = store.schema, store.minutes
    cases = [case for case in store.cases("train") if store.has_state("train", case)]
    store.verify(array.name for array in store.arrays_of("train", cases))
    places = sample_positions(len(cases) * minutes, schema.num_variables)
    deviation = store.statistics["std"]
    varies = deviation > 0
    set_points, states = np.nonzero(varies[: schema.num_boundary, None] & varies[schema.num_boundary :])
    allowed = EQUAL * deviation[schema.num_boundary :]
    present = np.zeros(schema.num_states, dtype=np.int64)
    for number, case in enumerate(cases):
        rows = places[places // minutes == number] % minutes
        boundary, state = store.boundary("train", case)[rows], np.asarray(store.state("train", case))[rows]
        present += (~np.isnan(state)).sum(axis=0)
        first = 0
        while first < len(rows):  # a few rows rule out nearly all pairs, and then many rows fit
            some = slice(first, first := first + max(1, _VALUES_AT_ONCE // max(1, len(states))))
            apart = np.abs(state[some][:, states] - boundary[some][:, set_points]) > allowed[states]
            equal = ~apart.any(axis=0)
            set_points, states = set_points[equal], states[equal]
    pairs = sorted(zip(states.tolist(), set_points.tolist()), reverse=True)  # of several set-points, the first stays
    found = {state: set_point for state, set_point in pairs if 2 * present[state] > len(places)}
    return {schema.states[state]: schema.boundary[found[state]] for state in sorted(found)}
