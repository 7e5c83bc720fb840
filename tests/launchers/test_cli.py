from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trunkline.launchers.cli import COMMANDS

ROOT = Path(__file__).parents[2]

HELP = """
import sys
from trunkline.launchers.cli import main
sys.argv = ["trunkline", "--help"]
status = main()
heavy = {"torch", "pydantic", "deepspeed", "numpy"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else status)
"""


def _trunkline(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trunkline.launchers.cli", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_launcher_is_a_command() -> None:
    mains = {path.stem for path in (ROOT / "launchers").glob("*.py") if "\ndef main(" in path.read_text()}
    assert {name.replace("-", "_") for name in COMMANDS} == mains - {"cli"}


def test_help_has_a_line_for_each_command_and_imports_nothing_that_takes_seconds() -> None:
    outcome = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    described = [line.split(maxsplit=1) for line in outcome.stdout.splitlines() if line.startswith("  ")]
    assert described == [[name, what] for name, what in COMMANDS.items()]


def test_a_command_is_the_launcher_of_that_name() -> None:
    theirs = subprocess.run([sys.executable, "launchers/prepare.py", "--help"], cwd=ROOT, capture_output=True)
    ours = _trunkline("prepare", "--help")
    assert ours.returncode == theirs.returncode == 0
    assert ours.stdout.replace("trunkline prepare", "prepare.py").split() == theirs.stdout.decode().split()


def test_the_status_is_the_launchers() -> None:
    outcome = _trunkline("train", "--config", "fluid/dmo")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: fluid/dmo: neither a file nor one of the shipped configurations")
    assert "did you mean 'fluid/demo'?" in outcome.stderr


def test_an_unknown_command_and_none_are_errors_with_the_usage() -> None:
    for argv, message in (["trian"], "error: no command 'trian'"), ([], "error: name a command"):
        outcome = _trunkline(*argv)
        assert (outcome.returncode, outcome.stdout) == (2, "")
        assert outcome.stderr.startswith("usage: trunkline <command> [flags]")
        assert outcome.stderr.endswith(f"{message}\n")
