"""Simulated days of a gas network, in the CSV layout that prepare reads.

    simulate("demo", 48, Path("data"), seed=0, test_cases=8)

    <out>/network.json                                      the network and what made the folder
    <out>/{train,test}/case_0001/{Boundary,B,C,H,N,P,R,T&E}.csv
                                                            a kind of device that the network lacks has no file

Boundary.csv has a row every 30 minutes from 0:00; the others one a minute, 0:01 to 24:00. The row of a minute is the
state at its end, under the set-points in force at that minute. Flows are means over the minute, so linepack changes by
exactly 60 s times what flows in less what flows out. A case depends on nothing but (network, seed, split, its number).
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from trunkline.engine.errors import ConfigError, DataError, TrunklineError
from trunkline.engine.machine.files import replace_whole
from trunkline.engine.machine.workers import end_with_parent
from trunkline.models.fluid.simulator import scenario
from trunkline.models.fluid.simulator.gas import Array
from trunkline.models.fluid.simulator.hydraulics import EQUATIONS
from trunkline.models.fluid.simulator.reference_network import reference
from trunkline.models.fluid.simulator.regional_network import regional
from trunkline.models.fluid.simulator.scenario import Day, random_day
from trunkline.models.fluid.simulator.topology import Network, demo
from trunkline.models.fluid.simulator.transient import MINUTES, Record, run_day

NETWORKS = {"demo": demo, "regional": regional, "reference": reference}
FORMAT = 1
DRAFT = ".network.json.draft"
DECIMALS = {"p": 6, "q": 5, "t": 4, "pwr": 3, "inv": 2}


def simulate(
    network: str,
    cases: int,
    out: Path,
    *,
    seed: int,
    test_cases: int = 0,
    boundary_only_tests: bool = False,
    workers: int | None = None,
) -> None:
    """Writes `cases` training and `test_cases` test days of a network (a name of NETWORKS) into `out`.

    Test days carry outputs too, unless `boundary_only_tests`. Called again on a folder of the same network and seed, it
    adds the cases that are missing. `workers` processes work at once, one for each processor by default.

    Raises ConfigError for a wrong argument, DataError for a folder of something else and for a day whose equations
    could not be solved; no case is ever left half written.
    """
    if network not in NETWORKS:
        raise ConfigError(f"--simulate {network}: no such network; choose one of {', '.join(NETWORKS)}")
    if cases < 0 or test_cases < 0 or cases + test_cases == 0:
        raise ConfigError(f"{cases} training and {test_cases} test cases asked for: at least one is needed")
    if seed < 0:
        raise ConfigError(f"seed {seed}: must be 0 or greater")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers}: must be 1 or greater")
    out = Path(out)
    _claim(out, network, seed)
    wanted = [("train", i, True) for i in range(1, cases + 1)]
    wanted += [("test", i, not boundary_only_tests) for i in range(1, test_cases + 1)]
    todo = [job for job in wanted if not _done(out, *job)]
    make = partial(_make_case, network, seed, out)
    workers = min(workers or len(os.sched_getaffinity(0)), max(len(todo), 1))
    with tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc=f"simulating {network}", unit="day") as bar:
        if workers == 1:
            for job in todo:
                make(job)
                bar.update()
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
                try:
                    for future in as_completed([pool.submit(make, job) for job in todo]):
                        future.result()
                        bar.update()
                except BrokenProcessPool as error:
                    raise TrunklineError(
                        f"{out}: a worker was ended from outside (out of memory?). Finished days are kept: call again, "
                        f"with fewer than {workers} workers"
                    ) from error
                finally:
                    pool.shutdown(cancel_futures=True)
    shutil.rmtree(out / ".partial", ignore_errors=True)


def _start_worker() -> None:
    """The parallelism is over cases: libraries shall not add their threads. Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = "1"


def describe(network: str, seed: int) -> str:
    """The text of network.json: what made the folder, the network, and the constants of its equations."""
    made_by = {"format": FORMAT, "seed": seed}
    return json.dumps({"simulation": made_by, **NETWORKS[network]().to_json(), "equations": EQUATIONS}, indent=1) + "\n"


def _claim(out: Path, name: str, seed: int) -> None:
    """Makes `out` a simulation of this network and seed, or finds that it is one."""
    text = describe(name, seed)
    marker = out / "network.json"
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != text:
            raise DataError(
                f"{marker}: is of another network, seed or version than {name}, seed {seed}; give another folder"
            )
    elif out.exists() and (not out.is_dir() or any(path.name != DRAFT for path in out.iterdir())):
        raise DataError(f"{out}: is not empty and has no network.json of a simulation; give a new or an empty folder")
    else:
        replace_whole(marker, text)
    shutil.rmtree(out / ".partial", ignore_errors=True)


def _done(out: Path, split: str, number: int, with_outputs: bool) -> bool:
    folder = out / split / f"case_{number:04d}"
    if not folder.exists():
        return False
    if (folder / "N.csv").exists() != with_outputs:
        raise DataError(
            f"{folder}: is there {'without' if with_outputs else 'with'} outputs; remove it or give another folder"
        )
    return True


def _make_case(network_name: str, seed: int, out: Path, job: tuple[str, int, bool]) -> None:
    split, number, with_outputs = job
    network = NETWORKS[network_name]()
    rng = np.random.default_rng([seed, ("train", "test").index(split), number])
    case = f"case_{number:04d}"
    day = random_day(network, rng)
    draft = out / ".partial" / f"{split}-{case}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    date = datetime.datetime(2025, 1, 1) + datetime.timedelta(days=number - 1)
    _write_boundary(draft / "Boundary.csv", network, day, date)
    if with_outputs:
        _write_outputs(draft, network, run_day(network, day, f"{split}/{case}"), date)
    final = out / split / case
    final.parent.mkdir(exist_ok=True)
    draft.rename(final)


def outputs(network: Network, record: Record) -> dict[str, dict[str, Array]]:
    """The columns of each output file, [S] each, in file order: {"B": {"B_001_p_in": ...}, ...}.

    The flow of a node is what runs through it: all that comes in from edges and from its source.
    """
    start, end = network.start, network.end
    slices = network.edge_slices
    p1, p2, m = record.p[:, start], record.p[:, end], record.m
    # Gas has the edge's own temperature where it leaves; with next to no flow there is only the node's.
    share = np.abs(m) / (np.abs(m) + 0.05)
    t1, t2 = record.t[:, start], record.t[:, end]
    forward = m >= 0
    t_in = np.where(forward, t1, share * record.t_edge + (1 - share) * t1)
    t_out = np.where(forward, share * record.t_edge + (1 - share) * t2, t2)
    q_in, q_out = m.copy(), m.copy()
    s = slices["P"]
    before = np.concatenate([record.initial[None], record.p[:-1]])
    half = 0.5 * network.pipes.volume
    for q, ends, sign in ((q_in, start[s], 1.0), (q_out, end[s], -1.0)):
        stored = network.gas.linepack(half, record.p[:, ends]) - network.gas.linepack(half, before[:, ends])
        q[:, s] += sign * stored / record.dt[:, None]

    supplied = np.zeros_like(record.p)
    for j, i in enumerate(network.source_node):
        supplied[:, i] += record.source_flow[:, j]
    through = np.maximum(supplied, 0.0)
    for j in range(len(start)):
        through[:, start[j]] += np.maximum(-q_in[:, j], 0.0)
        through[:, end[j]] += np.maximum(q_out[:, j], 0.0)

    files: dict[str, dict[str, Array]] = {name: {} for name in ("B", "C", "H", "N", "P", "R", "T&E")}
    for kind in "BCHPR":
        for j, name in zip(range(slices[kind].start, slices[kind].stop), network.names(kind)):
            table = files[kind]
            table[f"{name}_p_in"], table[f"{name}_p_out"] = p1[:, j], p2[:, j]
            if kind == "R":
                table[f"{name}_q"] = m[:, j]
            else:
                table[f"{name}_q_in"], table[f"{name}_q_out"] = q_in[:, j], q_out[:, j]
            table[f"{name}_t_in"], table[f"{name}_t_out"] = t_in[:, j], t_out[:, j]
            if kind == "C":
                ratio = np.where(record.compressor_on[:, j - slices["C"].start] > 0, p2[:, j] / p1[:, j], 1.0)
                table[f"{name}_pwr"] = network.gas.compressor_power(m[:, j], p1[:, j], ratio, t_in[:, j])
            if kind == "P":
                table[f"{name}_inv"] = network.gas.linepack(half[j], p1[:, j]) + network.gas.linepack(half[j], p2[:, j])
    for j, name in enumerate(network.names("N")):
        files["N"] |= {f"{name}_p": record.p[:, j], f"{name}_q": through[:, j], f"{name}_t": record.t[:, j]}
    for kind, places, flow in (
        ("T", network.source_node, record.source_flow),
        ("E", network.delivery_node, record.delivery_flow),
    ):
        for j, (i, name) in enumerate(zip(places, network.names(kind))):
            temperature = np.full(len(flow), network.source_temperature[j]) if kind == "T" else record.t[:, i]
            files["T&E"] |= {f"{name}_p": record.p[:, i], f"{name}_q": flow[:, j], f"{name}_t": temperature}
    return files


def _write_boundary(path: Path, network: Network, day: Day, date: datetime.datetime) -> None:
    table = day.table(network)
    columns: dict[str, Any] = {"TIME": _times(date, range(0, MINUTES, scenario.ROW_MINUTES))}
    for name, values in zip(scenario.columns(network), table.T):
        switch = name.endswith((":ST", ":FR")) and bool(np.all(values == np.round(values)))
        columns[name] = values.astype(np.int8) if switch else values
    pl.DataFrame(columns).write_csv(path)


def _write_outputs(folder: Path, network: Network, record: Record, date: datetime.datetime) -> None:
    times = _times(date, range(1, MINUTES + 1))
    for name, table in outputs(network, record).items():
        if not table:
            continue
        columns: dict[str, Any] = {"TIME": times}
        for column, values in table.items():
            decimals = DECIMALS[column.split("_")[2]]
            columns[column] = np.round(values, decimals) + 0.0  # not -0.0
        pl.DataFrame(columns).write_csv(folder / f"{name}.csv")


def _times(date: datetime.datetime, minutes: Iterable[int]) -> list[str]:
    """`2025/1/1 0:01`: no zero before month, day and hour."""
    times = (date + datetime.timedelta(minutes=minute) for minute in minutes)
    return [f"{t.year}/{t.month}/{t.day} {t.hour}:{t.minute:02d}" for t in times]
