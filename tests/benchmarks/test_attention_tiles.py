import argparse
import os
import signal

import pytest
import torch

from trunkline.benchmarks import attention_tiles as bench_attention_tiles
from trunkline.benchmarks.attention import run
from trunkline.benchmarks.attention_tiles import _draw, _fill_in, _sweep, tiles
from trunkline.benchmarks.contenders import make_problem, references, upstream_of
from trunkline.benchmarks.flags import attention as add_flags
from trunkline.benchmarks.report import OK, OUT_OF_TIME, Deadline, Report
from trunkline.kernels.attention.tiles import TILES, Tile


def filled_in(name, tile, wrong=False):
    table = TILES[90, 32, name]
    shipped = dict(table)
    problem = make_problem(42, 16, 1, 21, True, True, torch.device("cpu"))
    checks = references(problem, upstream_of(problem))
    if wrong:
        checks = tuple([x + 1 for x in results] for results in checks)
    row = {"head_dim": 16, **tile._asdict(), "shipped": False, "tflop_per_s": None, "status": ""}
    _fill_in(row, name, table, problem, checks)
    assert table == shipped
    return row


def test_a_right_tile_has_a_rate_and_leaves_the_table_as_it_was(interpreter, tmp_path):
    rows = [filled_in(name, Tile(16, 16, 4, 1)) for name in ("forward", "backward", "backward_dq")]
    assert [row["status"] for row in rows] == [OK] * 3
    assert all(row["tflop_per_s"] > 0 for row in rows)
    _draw(rows).savefig(tmp_path / "tiles.png")


def test_a_wrong_tile_and_one_that_cannot_run_have_no_rate(interpreter):
    assert filled_in("forward", Tile(16, 16, 4, 1), wrong=True)["status"].startswith("wrong")
    failed = filled_in("forward", Tile(0, 16, 4, 1))
    assert failed["status"].startswith("not run: ")
    assert failed["tflop_per_s"] is None


def test_the_tiles_to_try_are_different_ones():
    assert len(set(tiles())) == len(tiles())
    assert {Tile(64, 128, 4, 2, 168), Tile(128, 128, 8, 2, 128)} <= set(tiles())


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Sweeps tiles of the forward pass at two head dimensions: exit status, rows, and what problems were made."""
    made = []

    def note(tokens, head_dim, *rest):
        made.append(head_dim)
        return make_problem(42, head_dim, 1, 21, True, True, torch.device("cpu"))

    def run(minutes=None):
        shipped = Tile(16, 16, 4, 1)
        monkeypatch.setattr(bench_attention_tiles, "make_problem", note)
        monkeypatch.setattr(bench_attention_tiles, "tiles", lambda: [shipped, Tile(32, 16, 4, 1)])
        table = TILES[90, 32, "forward"]
        monkeypatch.setitem(table, 16, shipped)
        monkeypatch.setitem(table, 32, shipped)
        report = Report("sweep", "", torch.device("cpu"), tmp_path)
        status = _sweep(report, "forward", table, [16, 32], 42, 1, Deadline(minutes))
        return status, report.rows, made

    return run


def test_a_sweep_makes_each_problem_once_and_puts_the_best_first(interpreter, sweep):
    status, rows, made = sweep()
    assert (status, made) == (0, [16, 32])
    assert [(row["head_dim"], row["status"]) for row in rows] == [(16, OK)] * 2 + [(32, OK)] * 2
    assert [row["tflop_per_s"] for row in rows[:2]] == sorted((row["tflop_per_s"] for row in rows[:2]), reverse=True)


def test_a_sweep_that_finds_a_wrong_result_has_status_1(interpreter, sweep, monkeypatch):
    wrong = lambda *problem: tuple([x + 1 for x in results] for results in references(*problem))  # noqa: E731
    monkeypatch.setattr(bench_attention_tiles, "references", wrong)
    status, rows, _ = sweep()
    assert status == 1
    assert all(row["status"].startswith("wrong: ") for row in rows)


def test_a_sweep_out_of_time_has_all_rows_and_makes_no_problem(sweep):
    status, rows, made = sweep(minutes=0)
    assert (status, made) == (0, [])
    assert [(row["head_dim"], row["status"]) for row in rows] == [(16, OUT_OF_TIME)] * 2 + [(32, OUT_OF_TIME)] * 2


def test_a_sweep_that_is_stopped_makes_no_further_problem(sweep, monkeypatch):
    monkeypatch.setattr(bench_attention_tiles, "results", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        status, rows, made = sweep()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (status, made) == (1, [16])
    assert [row["status"] for row in rows] == [OUT_OF_TIME] * 4


def test_a_sweep_needs_a_gpu(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert run(parser.parse_args(["--out", str(tmp_path), "--sweep", "forward"])) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
