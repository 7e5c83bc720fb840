from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed_test
from tests.models.causal_lm.toy_language import toy_config
from trunkline.benchmarks.causal_lm import check_same, make_config, measure, report, total_steps
from trunkline.benchmarks.pairs import ratio_of
from trunkline.benchmarks.sides import Side
from trunkline.benchmarks.summary import other_workloads
from trunkline.engine.errors import TrunklineError
from trunkline.launchers.bench import main


def sides_of(
    rank: int, world_size: int, raw: dict[str, Any], folder: Path, store: Path, backend: str, accumulate: int,
    packing: bool, padding_mask: bool,
) -> list[Side]:  # fmt: skip
    config = make_config(
        raw, folder, store, steps=total_steps(4, 1), batch_size=3, accumulate=accumulate, max_length=64, packing=packing
    )
    return measure(config, turns=4, steps=1, backend=backend, padding_mask=padding_mask)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "accumulate", "packing", "padding_mask"),
    [
        pytest.param("deepspeed", 1, False, False, marks=pytest.mark.slow),
        pytest.param("deepspeed", 1, True, False, marks=pytest.mark.slow),
        ("fsdp", 2, False, True),
    ],
)
def test_all_sides_learn_the_same_and_have_a_speed(
    stores: Path, tmp_path: Path, backend: str, accumulate: int, packing: bool, padding_mask: bool
) -> None:
    toy_config(tmp_path, stores)
    raw = json.loads((tmp_path / "pretrain.json").read_text())
    (sides,) = run_distributed_test(
        sides_of, 1, raw, tmp_path, stores / "text", backend, accumulate, packing, padding_mask, backend=None
    )
    ours, trainer, loop = sides
    assert [len(side.speeds) for side in sides] == [4] * 3
    assert all(0 < speed < 1e7 for side in sides for speed in side.speeds)
    assert trainer.units == loop.units
    assert (ours.units == loop.units) is not packing
    assert [side.loss_before for side in sides] == pytest.approx([ours.loss_before] * 3, rel=1e-5)
    assert ours.loss_after < 0.99 * ours.loss_before
    if not packing:  # packed rows are other batches
        assert ours.loss_after == pytest.approx(trainer.loss_after, rel=1e-4)
    # a mean of means over micro-batches is that loop's loss, and not quite the mean over all tokens
    assert loop.loss_after == pytest.approx(trainer.loss_after, rel=1e-4 if accumulate == 1 else 2e-2)


def bench(rank: int, world_size: int, flags: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return main(["causal_lm", *flags]), printed.getvalue()


@pytest.mark.distributed
def test_the_command_prints_a_table_and_its_status_is_the_verdict(stores: Path, tmp_path: Path) -> None:
    toy_config(tmp_path, stores)
    flags = [
        "--config", str(tmp_path / "pretrain.json"), "--store", str(stores / "text"), "--batch-size", "2",
        "--max-length", "32", "--pairs", "2", "--steps", "1", "--batches", "padded", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    ((status, printed),) = run_distributed_test(bench, 1, flags, backend=None)
    lines = printed.splitlines()
    assert lines[-1] == ("slower than another" if status else "not slower than any other")
    assert [line[:22].strip() for line in lines[-5:-2]] == ["Trunkline", "transformers Trainer", "Accelerate loop"]
    rows = [line for line in other_workloads(tmp_path / "out").splitlines() if line.startswith("| causal_lm | deepsp")]
    assert [row.split(" | ")[3].split(":")[0] for row in rows] == ["transformers Trainer", "Accelerate loop"]


def test_slower_is_what_noise_does_not_explain(capsys: pytest.CaptureFixture[str]) -> None:
    def side(name: str, seconds: list[float]) -> Side:
        return Side(name, [100] * len(seconds), seconds, 8.0, 7.0)

    steady = side("theirs", [1.0] * 40)
    # both of a pair, seven times as slow: a slow moment of the machine
    disturbed = ratio_of([100 / 1.02] * 20 + [100 / 7.14] * 20, [100.0] * 20 + [100 / 7.0] * 20)
    assert disturbed.median == pytest.approx(1 / 1.02)
    assert disturbed.high < 1
    noisy = [0.9, 1.12] * 20
    ratio = ratio_of(side("ours", noisy).speeds, steady.speeds)
    assert (ratio.low, ratio.high) == pytest.approx((1 / 1.12, 1 / 0.9))
    assert (ratio.tenth, ratio.ninetieth) == pytest.approx((1 / 1.12, 1 / 0.9))
    assert not report([side("ours", noisy), steady])
    assert report([side("ours", [1.02] * 40), steady])
    assert not report([side("ours", [0.98] * 40), steady])
    assert "1.020" in capsys.readouterr().out


@pytest.mark.parametrize("other", [8.001, float("nan")])
def test_sides_that_do_not_agree_have_no_speed(other: float) -> None:
    same, wrong = Side("ours", loss_before=8.0), Side("theirs", loss_before=other)
    check_same([same, same], "before", 1e-5)
    with pytest.raises(TrunklineError, match=r"differ before training.*ours 8\.0000000, theirs"):
        check_same([same, wrong], "before", 1e-5)


def test_without_accelerate_the_extra_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["causal_lm"]) == 2
    assert "pip install -c constraints.txt '.[test]'" in capsys.readouterr().err
