"""Cases from CSV files into a store, several at a time.

convert_all(cases, out, schema, stamps, workers)   (case, entry or what is wrong with it), as they are done

Workers are threads: parsing, summing, hashing and writing all run without the interpreter's lock, and a thread needs
neither seconds nor memory to start.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from trunkline.engine.data.store_writer import Part
from trunkline.engine.errors import DataError
from trunkline.models.fluid.csv.cases import read_case
from trunkline.models.fluid.csv.source import SourceCase
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.store_writer import write_case


def convert_all(
    cases: list[SourceCase], out: Path, schema: Schema, stamps: dict[str, dict[str, Any]], workers: int | None
) -> Generator[tuple[SourceCase, Part | DataError], None, None]:
    """Read these cases and write them into `out`; each worker holds one case in memory.

    stamps: what each case (by key) is to remember of its source. workers: how many at a time; None for one a core.
    Close the iterator to stop early: cases in work are finished first.
    """
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        futures = {pool.submit(_convert, case, out, schema, stamps[case.key]): case for case in cases}
        for future in as_completed(list(futures)):
            yield futures.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _convert(case: SourceCase, out: Path, schema: Schema, stamp: dict[str, Any]) -> Part | DataError:
    try:
        read = read_case(case.folder, schema, outputs=case.outputs)
    except DataError as error:
        return error
    return write_case(out, case.split, case.name, read.boundary, read.state, day=read.day.isoformat(), source=stamp)
