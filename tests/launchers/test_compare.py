from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.record.test_comparison import run
from trunkline.launchers.compare import main


def test_the_page_is_printed_and_written_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(run(tmp_path / name)) for name in "ab"]
    assert main(runs) == 0
    printed = capsys.readouterr().out
    assert "| steps | 4 of 4 | 4 of 4 |" in printed
    assert main([*runs, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{printed}\n{tmp_path / 'out/compare.md'}\n"
    assert (tmp_path / "out/compare.md").read_text().endswith(printed)


def test_one_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(run(tmp_path / "a"))
    assert main([one, one]) == 2
    assert capsys.readouterr().err == f"error: {one}: is one run: name the folders of two or more\n"
