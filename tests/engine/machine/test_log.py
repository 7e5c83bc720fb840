"""The logger "trunkline": what is printed, where to, and how a program silences or redirects it."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trunkline.engine.machine.log import LOG, bars_are_hidden

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = LOG.level, LOG.handlers[:], LOG.propagate
    yield
    LOG.level, LOG.handlers[:], LOG.propagate = before
    LOG.manager._clear_cache()


def _say() -> None:
    LOG.info("100 % of a note")
    LOG.warning("a warning")
    LOG.error("an error")


def test_without_logging_set_up_lines_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    _say()
    assert capsys.readouterr() == ("100 % of a note\nwarning: a warning\n", "error: an error\n")
    assert not bars_are_hidden()


def test_the_level_silences_notes_and_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("trunkline").setLevel(logging.WARNING)
    _say()
    assert capsys.readouterr() == ("warning: a warning\n", "error: an error\n")
    assert bars_are_hidden()


def test_other_handlers_take_the_lines_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.FileHandler(tmp_path / "run.log")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    LOG.handlers[:] = [handler]
    _say()
    handler.close()
    assert (tmp_path / "run.log").read_text() == "INFO 100 % of a note\nWARNING a warning\nERROR an error\n"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("before", "printed"),
    [
        ("logging.basicConfig(format='root %(message)s')", "a note\n"),  # the root logger's lines are others
        ("log.setLevel(logging.WARNING)", ""),
        ("log.addHandler(logging.StreamHandler(sys.stdout)); log.setLevel('INFO')", "a note\n"),
    ],
)
def test_what_a_program_has_set_before_stays(before: str, printed: str) -> None:
    code = f"import logging, sys; log = logging.getLogger('trunkline'); {before}\n"
    code += "from trunkline.engine.machine.log import LOG; LOG.info('a note')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (printed, "")


def test_the_engine_says_nothing_past_the_logger() -> None:
    programs = {"doctor.py", "fsdp_section.py", "report.py", "selftest.py"}  # these are run as such
    for path in (ROOT / "engine").rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        said = {ast.unparse(call) for call in calls} & {"print", "tqdm.write"}
        assert not said or path.name in programs | {"log.py"}, f"{path} calls {said}: use trunkline.engine.machine.log"
