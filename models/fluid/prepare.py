"""From CSV folders to a prepared store, and simulated cases as CSV folders.

    run(arguments)   `python launchers/prepare.py fluid ...`
    prepare(source, out, ...)               read, check, align and store every case of a source

Several workers read one case each at a time, so memory does not depend on how many cases there are. A case is
written whole or not at all; run again, the same command keeps the finished cases whose source files have not changed.
What is written depends on the source and the settings only, not on the number of workers or on interruptions.
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trunkline.engine.data.store_writer import PART, PARTIAL, Part
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import only_writer, replace_whole
from trunkline.models.fluid.conversion import convert_all
from trunkline.models.fluid.csv.source import SourceCase, agree_on_schema, find_cases, stamp, uneven_boundaries
from trunkline.models.fluid.schema import GROUPS, Schema
from trunkline.models.fluid.store import SPLITS, Store
from trunkline.models.fluid.store_writer import begin_store, finish_store, is_finished, read_case

_LARGEST_NETWORK = 1 << 30


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError and DataError."""
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: use 1 or more")
    if arguments.simulate:
        _simulate(arguments)
        return
    try:
        skipped = prepare(
            arguments.source,
            arguments.out,
            val_fraction=arguments.val_fraction,
            seed=arguments.seed,
            workers=arguments.workers,
            skip_bad_cases=arguments.skip_bad_cases,
            progress=True,
        )
        cases = find_cases(arguments.source, arguments.val_fraction, arguments.seed)
        usual, uneven = uneven_boundaries([case for case in cases if case.key not in skipped])
    except OSError as error:  # a full disk, a folder that must not be written
        raise DataError(
            f"{arguments.out}: {error}: mend that and run the same command again, which continues where it stopped"
        ) from error
    store = Store.open(arguments.out)
    counts = ", ".join(f"{len(store.cases(split))} {split}" for split in SPLITS)
    print(f"{arguments.out}: {counts} cases of {store.schema.num_variables} variables")
    absent = [group for group in GROUPS if group not in store.schema.present_groups]
    if absent:
        print(f"no columns of the groups {', '.join(absent)}: taken as a network without such devices")
    empty = [name for name, count in zip(store.schema.columns, store.statistics["count"]) if count == 0]
    if empty:
        print(f"columns without any value in the training cases: {', '.join(empty[:10])}{' ...' * (len(empty) > 10)}")
    if far := _far_out(store):
        named = ", ".join(f"{column} ({value:g})" for column, value in far[:10])
        print(
            f"columns in which a value lies more than {_FAR:,} times further from the median than most others do: "
            f"{named}{' ...' * (len(far) > 10)}. If it is a code for a missing value, leave the cell empty: it spoils "
            "the column's scale."
        )
    if uneven:
        named = ", ".join(f"{key} ({count})" for key, count in list(uneven.items())[:10])
        print(
            f"Boundary.csv has {usual} rows in most cases, another number in {len(uneven)}: {named}"
            f"{' ...' * (len(uneven) > 10)}: each row holds until the next, so check that none is missing"
        )
    if skipped:
        print(f"left out {len(skipped)} bad cases (also in {arguments.out / 'store.json'}):")
        for case, reason in skipped.items():
            print(f"  {case}: {reason}")


_FAR = 1000


def _far_out(store: Store) -> list[tuple[str, float]]:
    """Columns of the training cases whose scale one value decides, such as a code for a missing one, and that value.

    What is usual in a column is its median or its interquartile range. Where both are 0, as of a compressor that is
    mostly off, it is the most that is usual in any column: that names 1e30, and neither a switch nor a rare flow, but
    it misses a code such as -9999.
    """
    found = store.statistics
    median, usual = found["median"], np.maximum(np.abs(found["median"]), found["iqr"])
    usual = np.where(usual > 0, usual, usual.max())
    with np.errstate(invalid="ignore"):  # of columns without a value
        low, high = median - found["min"], found["max"] - median
    worst = np.where(low > high, found["min"], found["max"])
    far = (found["count"] > 0) & (usual > 0) & (np.maximum(low, high) > _FAR * usual)
    return [(store.schema.columns[column], float(worst[column])) for column in np.flatnonzero(far)]


def prepare(
    source: Path,
    out: Path,
    *,
    val_fraction: float = 0.1,
    seed: int = 42,
    workers: int | None = None,
    skip_bad_cases: bool = False,
    progress: bool = False,
) -> dict[str, str]:
    """Prepare the cases of `source` as a store in `out`; returns {"train/case_0007": why it was left out, ...}.

    source: ROOT/{train,test}/<case>/*.csv. Training cases need outputs; test cases have them or not.
    val_fraction: share of the training cases that becomes the split "val", chosen by `seed` and the cases' names
    workers: cases read at a time; the default is one for each core

    Raises DataError for the first bad case found, unless `skip_bad_cases`, and if no training case is left.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"--val-fraction {val_fraction}: use a number from 0 to below 1, such as 0.1")
    cases = find_cases(source, val_fraction, seed)
    _check_out(source, out)
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out, out):
        schema, bad = agree_on_schema(cases)
        _check_bad(bad, skip_bad_cases)
        cases = [case for case in cases if case.key not in bad]
        stamps = {case.key: stamp(case, schema) for case in cases}
        entries = _kept_cases(out, cases, stamps, schema)
        unread = [case for case in cases if case.name not in entries[case.split]]
        network, notes = _network(source), _notes(val_fraction, seed, bad)
        if not unread and network == _network(out) and is_finished(out, entries, notes=notes):
            return _reasons(bad)
        begin_store(out, schema)
        if network is None:
            (out / "network.json").unlink(missing_ok=True)
        else:
            replace_whole(out / "network.json", network)
        _remove_other_cases(out, entries)
        with (
            tqdm(total=len(cases), initial=len(cases) - len(unread), unit="case", disable=not progress) as bar,
            closing(convert_all(unread, out, schema, stamps, workers)) as results,
        ):
            for case, result in results:
                bar.update()
                if isinstance(result, DataError):
                    bad[case.key] = result
                    _check_bad(bad, skip_bad_cases)
                else:
                    entries[case.split][case.name] = result
        if not entries["train"]:
            raise DataError(f"{source}: no training case is left: {next(iter(_reasons(bad).values()))}")
        finish_store(out, schema, entries, notes=_notes(val_fraction, seed, bad))
        return _reasons(bad)


def _check_bad(bad: dict[str, DataError], skip_bad_cases: bool) -> None:
    if bad and not skip_bad_cases:
        error = bad[min(bad)]
        raise DataError(f"{error} (--skip-bad-cases leaves such cases out)") from error


def _reasons(bad: dict[str, DataError]) -> dict[str, str]:
    return {key: str(error) for key, error in sorted(bad.items())}


def _notes(val_fraction: float, seed: int, bad: dict[str, DataError]) -> dict[str, object]:
    return {"val_fraction": val_fraction, "seed": seed, "skipped": _reasons(bad)}


def _check_out(source: Path, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: not a folder: choose another --out")
    inside = out.resolve()
    if source.resolve() in (inside, *inside.parents) or inside in source.resolve().parents:
        raise DataError(f"--out {out} and --source {source} contain one another: choose an --out of its own")
    held = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.is_dir() else []
    if held and "schema.json" not in held:
        raise DataError(f"{out}: not empty and not a prepared data set: choose another --out, or empty it")


def _kept_cases(
    out: Path, cases: list[SourceCase], stamps: dict[str, dict[str, Any]], schema: Schema
) -> dict[str, dict[str, Part]]:
    """The cases that stand finished in `out`, read from the same files with the same columns."""
    kept: dict[str, dict[str, Part]] = {split: {} for split in SPLITS}
    for case in cases:
        part = read_case(out / case.split / case.name, schema)
        if part is not None and part.note["source"] == stamps[case.key]:
            kept[case.split][case.name] = part
    return kept


def _remove_other_cases(out: Path, kept: dict[str, dict[str, Part]]) -> None:
    for split in SPLITS:
        for folder in sorted((out / split).iterdir()) if (out / split).is_dir() else []:
            ours = folder.name.endswith(PARTIAL) or any((folder / name).is_file() for name in (PART, "case.json"))
            if ours and folder.name not in kept[split]:
                shutil.rmtree(folder)


def _network(folder: Path) -> str | None:
    """network.json, where there is one."""
    path = folder / "network.json"
    if not path.is_file():
        return None
    if path.stat().st_size > _LARGEST_NETWORK:
        raise DataError(f"{path}: larger than {_LARGEST_NETWORK >> 30} GiB: not a network")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8, or remove it") from error


def _simulate(arguments: argparse.Namespace) -> None:
    from trunkline.models.fluid.simulator.simulate import simulate

    if arguments.cases < 1:
        raise ConfigError(f"--cases {arguments.cases}: --simulate needs --cases N, 1 or more")
    if arguments.test_cases < 0:
        raise ConfigError(f"--test-cases {arguments.test_cases}: use 0 or more")
    simulate(
        arguments.simulate,
        arguments.cases,
        arguments.out,
        seed=arguments.seed,
        test_cases=arguments.test_cases,
        boundary_only_tests=arguments.boundary_only_tests,
        workers=arguments.workers,
    )
    print(
        f"{arguments.out}: {arguments.cases} training and {arguments.test_cases} test cases; "
        f"next: python launchers/prepare.py fluid --source {arguments.out} --out DIR"
    )
