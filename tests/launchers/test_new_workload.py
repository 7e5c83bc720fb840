"""A new package with a workload: written, built, installed beside Trunkline, and used by the launchers as it is."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_wheel import BUILD
from trunkline.launchers import evaluate, new_workload, predict, train
from trunkline.models.registry import workloads

ROOT = Path(__file__).parents[2]


def test_a_new_package_trains_evaluates_and_predicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_workload.main(["high_tide", "--out", "package"]) == 0
    assert "pip install -e package\n  trunkline train high_tide" in capsys.readouterr().out
    assert "keleton" not in "".join(path.read_text() for path in Path("package").rglob("*.*"))
    built, site = tmp_path / "built", tmp_path / "site"
    subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd="package", stdout=subprocess.DEVNULL, check=True)
    (wheel,) = built.iterdir()
    zipfile.ZipFile(wheel).extractall(site)  # as pip does
    monkeypatch.syspath_prepend(site)
    assert "high_tide" in workloads()

    steps = ["--set", "training.steps=100", "--set", "training.trackers=[]"]
    assert train.main(["high_tide", "--width", "16", *steps]) == 0
    config = json.loads(Path("runs/high_tide/default/config.json").read_text())
    assert (config["workload"], config["model"]) == ("high_tide", {"width": 16})
    run = ["--run", "runs/high_tide/default"]
    assert evaluate.main(run) == 0
    measured = json.loads(Path("runs/high_tide/default/evaluation/evaluation.json").read_text())
    assert 0.01 < measured["loss"] < 0.1, "the noise alone is .01, and a model that always says 0 is at about .5"
    capsys.readouterr()
    assert predict.main([*run, "--x", "0", "1.5"]) == 0
    (x, low), (_, high) = (map(float, line.split()) for line in capsys.readouterr().out.splitlines())
    assert x == 0
    assert abs(low) < 0.4 < 0.6 < high  # sin(0), sin(1.5)


def test_what_is_written_passes_the_linter_and_its_own_test_collects(tmp_path: Path) -> None:
    assert new_workload.main(["tides", "--out", str(tmp_path / "tides")]) == 0
    names = {str(path.relative_to(tmp_path / "tides")) for path in (tmp_path / "tides").rglob("*") if path.is_file()}
    assert {"pyproject.toml", "README.md", "tests/test_tides.py", "tides/task.py", "tides/demo.json"} <= names
    assert len((tmp_path / "tides" / "README.md").read_text().splitlines()) <= 16
    lint = ["check", "--isolated", "--line-length", "120", "--select", "E,F,W,B,UP,N", str(tmp_path / "tides")]
    subprocess.run([sys.executable, "-m", "ruff", *lint], check=True, stdout=subprocess.DEVNULL)


BAD = {
    "Tides": "give small letters, digits and _, and no word of Python's, such as tides",
    "my-tides": "such as my_tides",
    "3d": "such as d",
    "tides_": "such as tides",
    "class": "no word of Python's",
    "../x": "such as x",
    "fluid": "there is a workload of that name",
    "torch": "there is a module of that name",
    "trunkline": "there is a module of that name",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_workload.main([name, "--out", "package"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: NAME {name!r}: ")
    assert BAD[name] in said
    assert not Path("package").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        assert new_workload.main(["tides", "--out", str(out)]) == 2
        assert f"error: --out {out}: is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_pip_installs_it_and_its_own_test_passes(tmp_path: Path) -> None:
    def run(*command: str, folder: Path = tmp_path) -> str:
        done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False,
                              env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"})  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(str(ROOT / "launchers" / "new_workload.py"), "tides")
    run("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", "site", "./tides")
    assert "1 passed" in run("-m", "pytest", "-q", folder=tmp_path / "tides")
    run("-m", "trunkline.launchers.cli", "train", "tides", "--output-dir", "run", "--set", "training.steps=20")
    assert "loss " in run("-m", "trunkline.launchers.cli", "evaluate", "--run", "run")
