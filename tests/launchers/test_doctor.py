from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.engine.machine.test_apex import install
from trunkline.engine.machine import doctor
from trunkline.engine.machine.doctor import Finding, can_train

ROOT = Path(__file__).parents[2]
DOCTOR = ROOT / "launchers" / "doctor.py"


def _doctor(*options: str, python: str = sys.executable, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [python, str(DOCTOR), *options], env=environment | ({} if path is None else {"PYTHONPATH": path}),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def _findings(outcome: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    report = json.loads(outcome.stdout)
    assert report["can_train"] == (outcome.returncode == 0)
    return {finding["name"]: finding for finding in report["findings"]}


@pytest.mark.distributed
def test_this_machine_can_train() -> None:
    outcome = _doctor("--json", path=str(ROOT))
    findings = _findings(outcome)
    assert outcome.returncode == 0, outcome.stdout
    assert "sum, average, reduce-scatter and all-gather" in findings["collectives over gloo"]["detail"]
    assert findings["deepspeed import"]["detail"].startswith("works without a compiler")
    assert findings["tensorboard"]["status"] == "ok"
    for name in ("python", "torch", "numpy", "cpu", "disk", "memory"):
        assert findings[name]["detail"]


def test_the_web_toolkit_named_apex_is_a_warning(tmp_path: Path) -> None:
    install(tmp_path, "apex", "0.9.10.dev0", ["apex/__init__.py", "apex/views.py"])
    outcome = _doctor("--quick", "--json", path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert outcome.returncode == 0
    apex = _findings(outcome)["apex"]
    assert apex["status"] == "warning"
    assert "is not NVIDIA's but the unrelated web toolkit" in apex["detail"]
    assert "pip uninstall apex" in apex["remedy"]


def test_an_apex_that_keeps_deepspeed_from_being_imported_is_blamed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "apex", "0.9.10.dev0", ["apex/__init__.py", "apex/views.py"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    findings = {finding.name: finding for finding in doctor._imports()}
    assert findings["deepspeed import"] == Finding(
        "deepspeed import", "problem", "RuntimeError: imported", "pip uninstall apex"
    )


def test_an_empty_python_is_told_what_to_install(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    python = str(tmp_path / "empty" / "bin" / "python")
    alone = _doctor(python=python)
    assert alone.returncode == 1
    assert "Trunkline is not installed" in alone.stderr
    assert "pip install -c constraints.txt -e ." in alone.stderr
    findings = _findings(_doctor("--quick", "--json", python=python, path=str(ROOT)))
    assert findings["deepspeed"]["status"] == "warning"
    assert "--backend fsdp" in findings["deepspeed"]["detail"]
    for name in ("torch", "numpy"):
        assert findings[name]["status"] == "problem"
        assert findings[name]["remedy"] == "pip install -c constraints.txt -e ."


def test_a_check_that_breaks_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> Any:
        raise OSError("no such table")

    monkeypatch.setattr("psutil.virtual_memory", unreadable)
    findings = {finding.name: finding for finding in doctor.examine(quick=True)}
    assert findings["memory"].status == "warning"
    assert "no such table" in findings["memory"].detail
    assert findings["disk"].status in ("ok", "warning")


def test_only_a_problem_keeps_training_from_starting() -> None:
    fine, warning, problem = (Finding("x", status, "") for status in ("ok", "warning", "problem"))
    assert can_train([fine, warning])
    assert not can_train([fine, problem, fine])
