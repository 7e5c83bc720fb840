"""What `pip install .` installs works without the clone: the wheel's files, and its commands in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "engine", "kernels", "launchers", "models")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, so that nothing is left among them, nor taken from an earlier build."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in (*FOLDERS, "benchmarks", "trunkline"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=sources, stdout=subprocess.DEVNULL, check=True)
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked as pip unpacks it."""
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def _trunkline(site: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The command, in `folder` and with the unpacked wheel. -S: the clone's hooks in site-packages would find more."""
    packages = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return subprocess.run(
        [sys.executable, "-S", "-m", "trunkline.launchers.cli", *argv], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": packages}, check=False,
    )  # fmt: skip


def test_the_wheel_holds_the_code_and_the_configurations_and_nothing_else(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = (".py", ".json", ".md", ".toml")
    wanted = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in kinds}
    assert files == {"trunkline/__init__.py"} | {f"trunkline/{path.relative_to(ROOT).as_posix()}" for path in wanted}


def test_the_command_is_declared(site: Path) -> None:
    (written,) = site.glob("*.dist-info/entry_points.txt")
    assert "trunkline = trunkline.launchers.cli:main" in written.read_text()


def test_benchmarks_are_said_to_be_in_the_clone(site: Path, tmp_path: Path) -> None:
    outcome = _trunkline(site, tmp_path, "bench", "attention")
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr == "error: an installed Trunkline has no benchmarks: run launchers/bench.py in a clone\n"


@pytest.mark.slow
def test_every_command_works_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    def run(*argv: str) -> str:
        outcome = _trunkline(site, tmp_path, *argv)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    csv, run_folder = "data/fluid-demo/csv", "runs/fluid/demo"
    run("prepare", "fluid", "--simulate", "demo", "--cases", "4", "--test-cases", "1", "--out", csv)
    run("prepare", "fluid", "--source", csv, "--out", "data/fluid-demo/store")
    run("train", "--config", "fluid/demo", "--set", "training.steps=4", "--set", "training.eval_every=4")
    assert (tmp_path / run_folder / "report" / "summary.md").is_file()
    run("evaluate", "--run", run_folder)
    run("predict", "--run", run_folder, "--case", f"{csv}/test/case_0001", "--out", "prediction")
    assert "exported step 4" in run("export", "--run", run_folder, "--out", "weights")
    assert "Training can start." in run("doctor")
