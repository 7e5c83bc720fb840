"""Simulated cases as files: layout, repeatability, resume, and folders and arguments that are refused."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from trunkline.engine.errors import ConfigError, DataError, TrunklineError
from trunkline.models.fluid.flags import prepare
from trunkline.models.fluid.simulator.scenario import random_day
from trunkline.models.fluid.simulator.simulate import NETWORKS, outputs, simulate
from trunkline.models.fluid.simulator.topology import Network
from trunkline.models.fluid.simulator.transient import Step, run

GROUPS = ("B", "C", "H", "N", "P", "R", "T&E")
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("simulated") / "demo"
    simulate("demo", 1, out, seed=3, test_cases=1, workers=1)
    return out


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _table(folder: Path, name: str) -> pl.DataFrame:
    return pl.read_csv(folder / f"{name}.csv", infer_schema_length=None)


def test_files_have_the_promised_rows_and_times(made: Path) -> None:
    for case, day in (("train/case_0001", 1), ("test/case_0001", 1)):
        folder = made / case
        assert {path.stem for path in folder.iterdir()} == {"Boundary", *GROUPS}
        times = _table(folder, "Boundary")["TIME"].to_list()
        assert times[:3] == [f"2025/1/{day} 0:00", f"2025/1/{day} 0:30", f"2025/1/{day} 1:00"]
        assert (len(times), times[-1]) == (48, f"2025/1/{day} 23:30")
        for group in GROUPS:
            table = _table(folder, group)
            times = table["TIME"].to_list()
            assert (len(times), times[0], times[9]) == (1440, f"2025/1/{day} 0:01", f"2025/1/{day} 0:10")
            assert times[-1] == f"2025/1/{day + 1} 0:00"
            assert not table.drop("TIME").select(pl.all().is_null().any()).row(0).count(True)


def test_demo_fills_every_file_and_stays_small(made: Path) -> None:
    headers = {name: _table(made / "train/case_0001", name).columns[1:] for name in ("Boundary", *GROUPS)}
    assert all(headers.values())
    assert 60 <= sum(map(len, headers.values())) <= 110
    assert headers["P"][:7] == [f"P_001_{p}" for p in ("p_in", "p_out", "q_in", "q_out", "t_in", "t_out", "inv")]
    assert headers["C"] == [f"C_001_{p}" for p in ("p_in", "p_out", "q_in", "q_out", "t_in", "t_out", "pwr")]
    assert headers["R"] == [f"R_001_{p}" for p in ("p_in", "p_out", "q", "t_in", "t_out")]


def test_reference_has_the_6174_columns_of_the_reference() -> None:
    network = NETWORKS["reference"]()
    day = random_day(network, np.random.default_rng(0))
    tables = outputs(network, run(network, day, [Step(0, 60.0, 0)] * 2, "test"))
    counts = {name: len(table) for name, table in tables.items()}
    assert counts == {"B": 2058, "C": 161, "H": 192, "N": 1716, "P": 1610, "R": 50, "T&E": 387}


def test_linepack_in_the_files_follows_the_flows_in_the_files(made: Path) -> None:
    folder = made / "test/case_0001"
    document = json.loads((made / "network.json").read_text(encoding="utf-8"))
    pipes, nodes, ends = _table(folder, "P"), _table(folder, "N"), _table(folder, "T&E")
    gas = document["gas"]
    factor = gas["normal_temperature_k"] / (gas["normal_pressure_mpa"] * gas["flow_temperature_k"])
    held = sum(pipes[column].to_numpy() for column in pipes.columns if column.endswith("_inv"))
    for node in document["nodes"]:
        p = nodes[f"{node['name']}_p"].to_numpy()
        held = held + node["volume_m3"] * factor * p * (1 + gas["compressibility_beta"] * p)
    supplied = sum(ends[c].to_numpy() for c in ends.columns if c.startswith("T_") and c.endswith("_q"))
    delivered = sum(ends[c].to_numpy() for c in ends.columns if c.startswith("E_") and c.endswith("_q"))
    gained = held[-1] - held[0]
    net = 60.0 * float((supplied - delivered)[1:].sum())
    assert abs(gained - net) < 1e-6 * 60.0 * float(delivered.sum())
    for name in (pipe["name"] for pipe in document["pipes"]):
        change = np.diff(pipes[f"{name}_inv"].to_numpy())
        flow = 60.0 * (pipes[f"{name}_q_in"] - pipes[f"{name}_q_out"]).to_numpy()[1:]
        np.testing.assert_allclose(change, flow, atol=0.05)


def test_set_points_act_from_their_own_minute_on(made: Path) -> None:
    folder = made / "test/case_0001"
    boundary, ends = _table(folder, "Boundary"), _table(folder, "T&E")
    for delivery in ("E_001", "E_002"):
        held = np.repeat(boundary[f"{delivery}:SNQ"].to_numpy(), 30)
        np.testing.assert_allclose(ends[f"{delivery}_q"].to_numpy(), np.append(held[1:], held[-1]), atol=1e-5)


def test_flows_meet_at_nodes_and_power_goes_with_compression(made: Path) -> None:
    folder = made / "test/case_0001"
    pipes, ends, c, h, r = (_table(folder, name) for name in ("P", "T&E", "C", "H", "R"))
    into = pipes["P_004_q_out"] + h["H_001_q_out"]
    np.testing.assert_allclose(into.to_numpy(), ends["E_001_q"].to_numpy(), atol=0.5)  # but for the station's piping
    np.testing.assert_allclose(r["R_001_q"].to_numpy(), pipes["P_004_q_in"].to_numpy(), atol=0.5)
    ratio = (c["C_001_p_out"] / c["C_001_p_in"]).to_numpy()
    power, flow = c["C_001_pwr"].to_numpy(), c["C_001_q_in"].to_numpy()
    works = (ratio > 1.01) & (flow > 10.0)
    assert works.any()
    assert (power[works] > 0).all()
    assert (c["C_001_t_out"].to_numpy()[works] > c["C_001_t_in"].to_numpy()[works]).all()


def test_numbers_are_short_and_switches_whole(made: Path) -> None:
    with (made / "train/case_0001/Boundary.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert {row[name] for name in ("B_001:FR", "C_001:ST", "R_001:ST")} <= {"0", "1"}
    for line in (made / "train/case_0001/P.csv").read_text(encoding="utf-8").splitlines()[1::200]:
        assert all(len(cell) <= 12 for cell in line.split(",")[1:]), line


def test_same_seed_same_bytes_whatever_the_number_of_workers(made: Path, tmp_path: Path) -> None:
    simulate("demo", 1, tmp_path / "again", seed=3, test_cases=1, workers=2)
    assert _hashes(tmp_path / "again") == _hashes(made)


def test_another_seed_gives_other_days(made: Path, tmp_path: Path) -> None:
    simulate("demo", 0, tmp_path / "other", seed=4, test_cases=1, boundary_only_tests=True, workers=1)
    assert _hashes(made)["test/case_0001/Boundary.csv"] != _hashes(tmp_path / "other")["test/case_0001/Boundary.csv"]
    days = [made / split / "case_0001/Boundary.csv" for split in ("train", "test")]
    assert days[0].read_bytes() != days[1].read_bytes()


def test_boundary_only_tests_have_no_outputs(tmp_path: Path) -> None:
    simulate("reference", 0, tmp_path / "out", seed=0, test_cases=2, boundary_only_tests=True, workers=1)
    for case in ("case_0001", "case_0002"):
        assert [path.name for path in (tmp_path / "out/test" / case).iterdir()] == ["Boundary.csv"]
        assert len(_table(tmp_path / "out/test" / case, "Boundary").columns) == 539
    with pytest.raises(DataError, match="without outputs"):
        simulate("reference", 0, tmp_path / "out", seed=0, test_cases=2, workers=1)


def test_kill_leaves_only_whole_cases_and_the_rest_follows(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "from pathlib import Path; from trunkline.models.fluid.simulator.simulate import simulate; "
        f"simulate('demo', 1, Path({str(out)!r}), seed=3, test_cases=40, workers=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("test/case_0001")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = list(out.glob("t*/case_*"))
    assert 2 <= len(whole) < 41
    assert all(len(list(case.iterdir())) == 8 for case in whole)
    for case in out.glob("test/case_*"):
        assert len(_table(case, "N")) == 1440
    simulate("demo", 1, out, seed=3, test_cases=len(whole), workers=1)
    assert not (out / ".partial").exists()
    assert len(list(out.glob("test/case_*"))) == len(whole)
    assert {k: v for k, v in _hashes(out).items() if "case_0001" in k} == {
        k: v for k, v in _hashes(made).items() if "case_0001" in k
    }


def test_a_day_without_solution_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["demo"]()
    monkeypatch.setitem(NETWORKS, "demo", lambda: _thirsty(network))
    with pytest.raises(DataError, match=r"train/case_0001, minute -?\d+: .* by \S+ (MPa|m3/s)"):
        simulate("demo", 1, tmp_path / "out", seed=0, workers=1)
    assert not list(tmp_path.glob("out/t*/*"))


def _thirsty(network: Network) -> Network:
    return replace(network, delivery_flow=network.delivery_flow * 12.0)


def test_foreign_folders_are_refused_and_left_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="not empty"):
        simulate("demo", 1, tmp_path, seed=3)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    before = _hashes(made)
    with pytest.raises(DataError, match=r"network\.json.*another"):
        simulate("demo", 1, made, seed=4)
    with pytest.raises(DataError, match=r"network\.json.*another"):
        simulate("reference", 1, made, seed=3)
    assert _hashes(made) == before


def test_an_interrupted_first_moment_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / ".network.json.draft").write_text("{", encoding="utf-8")
    simulate("demo", 0, tmp_path, seed=0, test_cases=1, boundary_only_tests=True, workers=1)
    assert (tmp_path / "test/case_0001/Boundary.csv").is_file()
    assert json.loads((tmp_path / "network.json").read_text(encoding="utf-8"))["name"] == "demo"


def test_a_broken_pool_is_told_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(ProcessPoolExecutor, "submit", broken)
    with pytest.raises(TrunklineError, match="with fewer than 2 workers"):
        simulate("demo", 2, tmp_path / "out", seed=0, workers=2)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_in_one_message(tmp_path: Path) -> None:
    program = (
        "import multiprocessing, threading, time\n"
        "from pathlib import Path\n"
        "from trunkline.engine.errors import TrunklineError\n"
        "from trunkline.models.fluid.simulator.simulate import simulate\n"
        "def strike():\n"
        "    while not list(Path('out').glob('train/*')):\n"
        "        time.sleep(0.05)\n"
        "    multiprocessing.active_children()[0].kill()\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=strike, daemon=True).start()\n"
        "    try:\n"
        "        simulate('demo', 60, Path('out'), seed=0, workers=2)\n"
        "    except TrunklineError as error:\n"
        "        print(error)\n"
    )
    script = tmp_path / "strike.py"
    script.write_text(program, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert b"with fewer than 2 workers" in done.stdout
    assert all(len(list(case.iterdir())) == 8 for case in (tmp_path / "out/train").iterdir())


def test_prepare_offers_every_network() -> None:
    parser = argparse.ArgumentParser()
    prepare(parser)
    (offered,) = [action.choices for action in parser._actions if action.dest == "simulate"]
    assert list(offered) == list(NETWORKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "demoo"}, "choose one of demo, regional, reference"),
        ({"cases": 0}, "at least one"),
        ({"cases": -1}, "at least one|0 or greater"),
        ({"seed": -5}, "seed -5"),
        ({"workers": 0}, "workers 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    settings = {"network": "demo", "cases": 1, "out": tmp_path / "out", "seed": 0, **arguments}
    with pytest.raises(ConfigError, match=message):
        simulate(**settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
