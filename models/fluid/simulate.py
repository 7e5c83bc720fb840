"""Days of a gas network, simulated minute by minute, in the CSV layout that `launchers/prepare.py fluid` reads.

    simulate("demo", 48, Path("data"), seed=0, test_cases=8)

    <out>/network.json                                      the network and what made the folder
    <out>/{train,test}/case_0001/{Boundary,B,C,H,N,P,R,T&E}.csv

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
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from engine.errors import ConfigError, DataError
from models.fluid import scenario
from models.fluid.gas import Array
from models.fluid.hydraulics import Controls, Hydraulics, NotConvergedError
from models.fluid.scenario import BEFORE, Day, random_day
from models.fluid.thermal import Thermal
from models.fluid.topology import NETWORKS, Network

FORMAT = 1
MINUTES = 1440
STEP_S = 60.0
SPIN_UP_STEP_S = 300.0
SMALLEST_STEP_S = 0.9
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
    """Writes `cases` training and `test_cases` test days of a network ("demo", "reference") into `out`.

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
    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    with tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc=f"simulating {network}", unit="day") as bar:
        if workers == 1:
            for job in todo:
                make(job)
                bar.update()
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
                futures = [pool.submit(make, job) for job in todo]
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
    shutil.rmtree(out / ".partial", ignore_errors=True)


def _one_thread() -> None:
    """The parallelism is over cases; libraries that have not started their threads yet shall not add theirs."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = "1"


def _claim(out: Path, name: str, seed: int) -> None:
    """Makes `out` a simulation of this network and seed, or finds that it is one."""
    text = json.dumps({"simulation": {"format": FORMAT, "seed": seed}, **NETWORKS[name]().to_json()}, indent=1) + "\n"
    marker = out / "network.json"
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != text:
            raise DataError(
                f"{marker}: is of another network, seed or version than {name}, seed {seed}; give another folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty and has no network.json of a simulation; give a new or an empty folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        draft = out / "network.json.partial"
        draft.write_text(text, encoding="utf-8")
        draft.rename(marker)
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
        record = Simulator(network, f"{split}/{case}").run(day)
        _write_outputs(draft, network, record, date)
    final = out / split / case
    final.parent.mkdir(exist_ok=True)
    draft.rename(final)


@dataclass
class Record:
    """What a simulated day leaves: arrays of [1440, ...], row i at the end of minute i + 1. MPa, m3/s, degC."""

    p: Array  # [., N]
    t: Array  # [., N]
    m: Array  # [., K] mean flow through the middle of each edge
    stored: Array  # [., P, 2] mean flow into the linepack at the start and at the end of each pipe
    t_edge: Array  # [., K] temperature at which gas leaves each edge
    source_flow: Array  # [., T]
    delivery_flow: Array  # [., E]
    compressor_on: Array  # [., C]
    start: Array  # [N] pressures at 0:00


class Simulator:
    """Runs days of one network; `case` names the day in errors."""

    def __init__(self, network: Network, case: str) -> None:
        self.network = network
        self.case = case
        self.hydraulics = Hydraulics(network)
        self.thermal = Thermal(network)
        self.x = np.concatenate(
            [np.full(network.num_nodes, network.source_pressure.mean()), np.zeros(len(network.start))]
        )
        self.t_nodes, self.t_pipes = self.thermal.initial()
        self.trend = np.zeros_like(self.x)
        self.trend_dt = 0.0

    def run(self, day: Day) -> Record:
        """The record of a day that starts from the steady state of `day`'s first row and its rows before midnight."""
        self.settle(day.controls(self.network, 0))
        for row in range(BEFORE):
            controls = day.controls(self.network, row)
            for step in range(int(1800 / SPIN_UP_STEP_S)):
                minute = (row - BEFORE) * 30 + (step + 1) * int(SPIN_UP_STEP_S) // 60
                self.advance(controls, SPIN_UP_STEP_S, minute)
        return self.minutes(day, MINUTES)

    def settle(self, controls: Controls) -> None:
        """The steady state under constant set-points: steps that grow until nothing moves."""
        for dt in (60.0, 600.0, 6e3, 6e4, 6e5, 6e6, 6e7):
            self.advance(controls, dt, -BEFORE * 30)

    def minutes(self, day: Day, count: int) -> Record:
        """Steps of one minute from 0:00 on."""
        network = self.network
        n_p = len(network.pipes)
        record = Record(
            p=np.empty((count, network.num_nodes)),
            t=np.empty((count, network.num_nodes)),
            m=np.empty((count, len(network.start))),
            stored=np.empty((count, n_p, 2)),
            t_edge=np.empty((count, len(network.start))),
            source_flow=np.empty((count, len(network.source_node))),
            delivery_flow=np.empty((count, len(network.delivery_node))),
            compressor_on=np.empty((count, len(network.compressors))),
            start=self.x[: network.num_nodes].copy(),
        )
        controls, row = day.controls(network, BEFORE), BEFORE
        for i in range(count):
            due = BEFORE + min((i + 1) // 30, scenario.ROWS - 1)
            if due != row:
                controls, row = day.controls(network, due), due
            m, supplied, t_edge, stored = self.advance(controls, STEP_S, i + 1)
            record.p[i], record.t[i], record.m[i] = self.x[: network.num_nodes], self.t_nodes, m
            record.t_edge[i], record.stored[i] = t_edge, stored
            record.source_flow[i] = day.source_flow[row]
            record.source_flow[i, network.pressure_source] = supplied
            record.delivery_flow[i] = day.delivery_flow[row]
            record.compressor_on[i] = day.compressor_on[row]
        return record

    def advance(self, controls: Controls, dt: float, minute: int) -> tuple[Array, float, Array, Array]:
        """One step, by halves where it does not converge.

        Returns the mean flows [K], the pressure source's supply, t_edge [K] and stored [P, 2] as in Record.
        """
        network, n = self.network, self.network.num_nodes
        old = self.x
        m, source = self._solve(controls, dt, minute, dt)
        pipes = network.pipes
        ends = np.stack([pipes.start, pipes.end], axis=1)
        half = 0.5 * pipes.volume[:, None]
        held = network.gas.linepack(half, self.x[ends])
        stored = (held - network.gas.linepack(half, old[ends])) / dt
        supplied = np.maximum(controls.supply, 0.0)
        supplied[self.hydraulics.slack] += max(source, 0.0)
        self.t_nodes, self.t_pipes, t_edge = self.thermal.step(
            self.t_nodes, self.t_pipes, self.x[:n], m, held.sum(axis=1), supplied, dt
        )
        return m, source, t_edge, stored

    def _solve(self, controls: Controls, dt: float, minute: int, whole: float) -> tuple[Array, float]:
        n = self.network.num_nodes
        old = self.x
        guess = old + self.trend if dt == self.trend_dt else None
        try:
            self.x = self.hydraulics.step(old, dt, controls, guess)
        except NotConvergedError as error:
            if dt / 2 < SMALLEST_STEP_S * whole / STEP_S:
                raise DataError(
                    f"{self.case}, minute {minute}: the network's equations could not be solved, down to steps of "
                    f"{dt:.3g} s; worst: {error}. The set-points of this day are beyond what the network can carry: "
                    "try another seed"
                ) from error
            (m1, s1), (m2, s2) = (self._solve(controls, dt / 2, minute, whole) for _ in range(2))
            return 0.5 * (m1 + m2), 0.5 * (s1 + s2)
        self.trend, self.trend_dt = self.x - old, dt
        return self.x[n:], self.hydraulics.slack_supply(old, self.x, dt, controls.supply)


def outputs(network: Network, record: Record) -> dict[str, dict[str, Array]]:
    """The columns of each output file, [1440] each, in file order: {"B": {"B_001_p_in": ...}, ...}."""
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
    q_in[:, s] += record.stored[:, :, 0]
    q_out[:, s] -= record.stored[:, :, 1]

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
                ratio = np.where(record.compressor_on[:, j - slices["C"].start] > 0.5, p2[:, j] / p1[:, j], 1.0)
                table[f"{name}_pwr"] = network.gas.compressor_power(m[:, j], p1[:, j], ratio, t_in[:, j])
            if kind == "P":
                half = 0.5 * network.pipes.volume[j]
                table[f"{name}_inv"] = network.gas.linepack(half, p1[:, j]) + network.gas.linepack(half, p2[:, j])
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
    columns: dict[str, Any] = {"TIME": _times(date, np.arange(scenario.ROWS) * 30)}
    for name, values in zip(scenario.columns(network), table.T):
        switch = name.endswith((":ST", ":FR")) and bool(np.all(values == np.round(values)))
        columns[name] = values.astype(np.int8) if switch else values
    pl.DataFrame(columns).write_csv(path)


def _write_outputs(folder: Path, network: Network, record: Record, date: datetime.datetime) -> None:
    times = _times(date, np.arange(1, MINUTES + 1))
    for name, table in outputs(network, record).items():
        columns: dict[str, Any] = {"TIME": times}
        for column, values in table.items():
            decimals = DECIMALS[column.split("_")[2]]
            columns[column] = np.round(values, decimals) + 0.0  # not -0.0
        pl.DataFrame(columns).write_csv(folder / f"{name}.csv")


def _times(date: datetime.datetime, minutes: Array) -> list[str]:
    """`2025/1/1 0:01`: no zero before month, day and hour."""
    times = (date + datetime.timedelta(minutes=int(minute)) for minute in minutes)
    return [f"{t.year}/{t.month}/{t.day} {t.hour}:{t.minute:02d}" for t in times]
