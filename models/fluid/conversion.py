"""Cases from CSV files into a store, several processes at work, one case each at a time.

convert_all(cases, out, schema, stamps, workers)   (case, entry or what is wrong with it), as they are done
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from engine.errors import DataError
from models.fluid.csv_cases import read_case
from models.fluid.csv_source import SourceCase
from models.fluid.schema import Schema
from models.fluid.store import CaseEntry
from models.fluid.store_writer import write_case


def convert_all(
    cases: list[SourceCase], out: Path, schema: Schema, stamps: dict[str, dict[str, Any]], workers: int | None
) -> Generator[tuple[SourceCase, CaseEntry | DataError], None, None]:
    """Read these cases and write them into `out`, in the order in which they are done.

    stamps: what each case (by key) is to remember of its source. workers: processes; None for one a core.
    Close the iterator to stop early: cases in work are finished first.
    """
    workers = workers or len(os.sched_getaffinity(0))
    processes = min(workers, len(cases))
    if processes <= 1:
        for case in cases:
            yield case, _convert(case, out, schema, stamps[case.key], threads=workers)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit locks that our threads hold
    pool = ProcessPoolExecutor(processes, context, _start_worker)
    try:
        futures = {pool.submit(_convert, case, out, schema, stamps[case.key]): case for case in cases}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory: run the same command again, which goes on where "
            f"it stopped, with fewer than --workers {processes}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _convert(
    case: SourceCase, out: Path, schema: Schema, stamp: dict[str, Any], threads: int = 1
) -> CaseEntry | DataError:
    try:
        read = read_case(case.folder, schema, outputs=case.outputs, threads=threads)
    except DataError as error:
        return error
    return write_case(out, case.split, case.name, read.boundary, read.state, day=read.day.isoformat(), source=stamp)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent answers it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
