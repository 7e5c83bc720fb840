from __future__ import annotations

import importlib

import pytest

from trunkline.launchers.bench import BENCHMARKS, main


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_lists_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert BENCHMARKS[name][1] in capsys.readouterr().out
    assert callable(importlib.import_module(BENCHMARKS[name][0]).run)


def test_an_unknown_benchmark_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["attenton"])
    message = capsys.readouterr().err
    assert all(name in message for name in BENCHMARKS)


def test_a_users_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["engine", "--pairs", "1"]) == 2
    assert capsys.readouterr().err == "error: use at least --pairs 10 and --tensors 2\n"
