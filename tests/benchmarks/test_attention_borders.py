import argparse

import pytest
import torch

from trunkline.benchmarks import attention_borders
from trunkline.benchmarks.attention import run
from trunkline.benchmarks.attention_borders import BORDERS, SHARES, fill_in, rows
from trunkline.benchmarks.contenders import ours, references
from trunkline.benchmarks.flags import attention as add_flags
from trunkline.benchmarks.report import OK
from trunkline.kernels.attention import flash, hopper
from trunkline.kernels.attention.tiles import HOPPER_FORWARD


@pytest.fixture
def small_borders(monkeypatch):
    """At which a CPU is done in a moment."""
    monkeypatch.setattr(flash, "ROWS_PER_CHANNEL", 2)
    monkeypatch.setattr(flash, "PRODUCTS", 2**18)
    monkeypatch.setattr(hopper, "FEWEST_ROWS", 20)
    monkeypatch.setattr(hopper, "FEWEST_TILES", 40)
    monkeypatch.setattr(attention_borders, "_TILE", 2)


@pytest.mark.parametrize("D", [32, 64, 128])
def test_problems_lie_on_either_side_of_their_border_and_above_those_that_are_not_theirs(D):
    made = rows(list(BORDERS), [D])
    assert len(made) == (4 if D in HOPPER_FORWARD else 0) * len(SHARES)
    for row in made:
        tokens, tiles = row["tokens"], row["heads"] * -(-row["tokens"] // 192)
        products = row["heads"] * tokens**2 * D
        module, below, above = BORDERS[row["border"]]
        value = {
            "ROWS_PER_CHANNEL": tokens / D, "PRODUCTS": products, "FEWEST_ROWS": tokens, "FEWEST_TILES": tiles,
        }[row["border"]]  # fmt: skip
        assert row["chosen"] == (below if value < getattr(module, row["border"]) else above)
        assert row["border"] != "ROWS_PER_CHANNEL" or products > flash.PRODUCTS
        assert row["border"] != "PRODUCTS" or tokens / D > flash.ROWS_PER_CHANNEL
        assert row["border"] != "FEWEST_ROWS" or tiles > hopper.FEWEST_TILES
        assert row["border"] != "FEWEST_TILES" or tokens > hopper.FEWEST_ROWS


@pytest.mark.parametrize("name", BORDERS)
def test_right_results_are_timed_below_and_above_the_border(name, small_borders, monkeypatch):
    module, *kernels = BORDERS[name]
    shipped, seen = getattr(module, name), []

    def noting(problem):
        attend = ours(problem)
        return lambda *qkv: (seen.append(getattr(module, name)), attend(*qkv))[1]

    monkeypatch.setattr(attention_borders, "ours", noting)
    for row in rows([name], [16, 32]):
        seen.clear()
        fill_in(row, torch.device("cpu"))
        assert row["status"] == OK
        assert row["faster"] == kernels[row["above_ms"] < row["below_ms"]]
        assert seen == sorted(seen, reverse=True)
        assert len(set(seen)) == 2
        assert min(seen) < shipped < max(seen)
    assert getattr(module, name) == shipped


def test_a_wrong_result_has_no_time(small_borders, monkeypatch):
    wrong = lambda *problem: tuple([x + 1 for x in results] for results in references(*problem))  # noqa: E731
    monkeypatch.setattr(attention_borders, "references", wrong)
    row = rows(["ROWS_PER_CHANNEL"], [16])[0]
    fill_in(row, torch.device("cpu"))
    assert row["status"].startswith("wrong: ")
    assert row["below_ms"] is row["faster"] is None
    assert flash.ROWS_PER_CHANNEL == 2


def test_borders_need_a_gpu(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert run(parser.parse_args(["--out", str(tmp_path), "--borders"])) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
