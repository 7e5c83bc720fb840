"""Evaluation of a trained surrogate on unseen days, beside the baselines of trunkline.models.fluid.baselines.

    evaluate(trained, store, split, ...)   -> Evaluation
    run(arguments)  what launchers/evaluate.py calls

Four horizons: every single minute, rollouts of 60 minutes and of 6 hours one after another, and one rollout a day from
its first minutes to its end. A horizon that no case is long enough for is left out. All forecasters start from the same
true minutes and see the same boundary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence

from tqdm import tqdm

from trunkline.engine.checkpoint.trained import warn_of_other_data
from trunkline.engine.checkpoint.weights import described
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import made_folder
from trunkline.models.fluid.baselines.catalog import baselines_of
from trunkline.models.fluid.copies import copied_states
from trunkline.models.fluid.evaluation_report import write_report
from trunkline.models.fluid.flags import HORIZONS
from trunkline.models.fluid.plots import plot_evaluation
from trunkline.models.fluid.rollout import Forecaster, Surrogate, rollout, starts, take_windows
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.tally import Evaluation, Tally, Yardstick
from trunkline.models.fluid.trained import Trained, load_trained

MODEL = "surrogate"
RIDGES, NETWORKS = ("ridge", "switches"), ("mlp", "graph")
_VALUES_AT_ONCE = 32 << 20  # of a batch's states; fp64 sums over them take some times that


def evaluate(
    trained: Trained,
    store: Store,
    split: str,
    *,
    max_cases: int | None = None,
    batch_size: int = 256,
    with_ridge: bool = True,
    baselines: Sequence[str] | None = None,
    baseline_minutes: float | None = None,
    horizons: Collection[str] = HORIZONS,
    progress: bool = False,
) -> Evaluation:
    """Errors on the cases of a split that have outputs. Raises DataError if none has, or none of enough minutes,
    or if the store does not fit.

    Raises ConfigError for baselines that contradict the other two options about them.
    """
    _check_options(with_ridge, baselines or (), baseline_minutes)
    if store.schema != trained.schema:
        raise DataError(f"{store.root}: has other columns than the data {trained.folder} was trained on")
    cases = [case for case in store.cases(split) if store.has_state(split, case)][:max_cases]
    if not cases:
        raise DataError(
            f"{store.root}: no case of split {split!r} has outputs to compare with: choose another --split, or use "
            "launchers/predict.py"
        )
    store.verify(array.name for array in store.arrays_of(split, cases))
    normalization = trained.model.normalization
    device = normalization.scale.device
    without = () if with_ridge else RIDGES
    others = baselines_of(store, normalization, baselines, baseline_minutes, without=without, progress=progress)
    for note in others.notes:
        print(note, file=sys.stderr)
    forecasters: dict[str, Forecaster] = {MODEL: Surrogate(trained.model, trained.data.history), **others.forecasters}
    history = max(forecaster.history for forecaster in forecasters.values())

    result = Evaluation(split, cases, copied_states(store), others.facts)
    yardstick = Yardstick(normalization, store.schema, result.copied)
    for horizon in horizons:
        steps = HORIZONS[horizon] or store.minutes - history
        places = [(case, row) for case in cases for row in starts(store.minutes, history, steps, every=steps)]
        if not places:
            continue
        size = max(1, min(batch_size, _VALUES_AT_ONCE // (store.schema.num_states * (history + steps))))
        tallies: dict[str, Tally] = {}
        for first in tqdm(range(0, len(places), size), desc=horizon, unit="batch", disable=not progress):
            boundary, states = take_windows(store, split, places[first : first + size], history + steps, device)
            for name, forecaster in forecasters.items():
                title = f"{horizon}, {name}" if progress and steps > 60 else None
                start = states[:, :history]
                cut = history - forecaster.history
                predicted = rollout(
                    forecaster,
                    boundary[:, cut:],
                    start[:, cut:],
                    missing=normalization.state_offset,
                    progress=title,
                )
                tally = Tally.of(predicted, states[:, history:], yardstick)
                tallies[name] = tallies[name] + tally if name in tallies else tally
        result.tallies[horizon] = tallies
    if not result.tallies:
        raise DataError(
            f"{store.root}: cases of {store.minutes} minutes are too short for {' and '.join(horizons)} after the "
            f"{history} that a forecaster starts from: choose shorter --horizons"
        )
    return result


def _check_options(with_ridge: bool, baselines: Sequence[str], minutes: float | None) -> None:
    ridges = [name for name in baselines if name in RIDGES]
    if ridges and not with_ridge:
        raise ConfigError(f"--no-ridge leaves out what --baselines {' '.join(ridges)} asks for: drop one of them")
    if minutes is not None and not any(name in NETWORKS for name in baselines):
        raise ConfigError(
            f"--baseline-minutes {minutes:g}: --baselines asks for no network that would train so long: add "
            f"{' or '.join(NETWORKS)} to --baselines, or leave --baseline-minutes out"
        )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and write evaluation.{md,json,png}; prints the tables over all devices. Returns the exit status."""
    out = made_folder(arguments.out)
    trained = load_trained(arguments.run, arguments.device)
    store = Store.open(arguments.store or trained.data.store)
    if arguments.store is None:
        warn_of_other_data(trained.folder, store.fingerprint, store.root)
    result = evaluate(
        trained,
        store,
        arguments.split,
        max_cases=arguments.max_cases,
        batch_size=arguments.batch_size,
        with_ridge=not arguments.no_ridge,
        baselines=arguments.baselines,
        baseline_minutes=arguments.baseline_minutes,
        horizons=arguments.horizons,
        progress=True,
    )
    print(write_report(result, trained, out))
    plot_evaluation(result, trained.schema, out / "evaluation.png")
    print(f"{described(trained.folder)}\nwrote {out}/evaluation.md, evaluation.json and evaluation.png")
    return 0
