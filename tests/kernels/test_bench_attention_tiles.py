import argparse

import torch

from kernels.bench_attention import add_arguments, run
from kernels.bench_attention_tiles import _draw, _fill_in, tiles
from kernels.bench_contenders import make_problem, references, upstream_of
from kernels.bench_report import OK
from kernels.flash_attention_tiles import TILES, Tile


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


def test_a_sweep_needs_a_gpu(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["--out", str(tmp_path), "--sweep", "forward"])) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
