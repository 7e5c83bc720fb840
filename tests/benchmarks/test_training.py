"""The benchmark of a training step, at a size that says nothing of speed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from trunkline.benchmarks import training
from trunkline.launchers.bench import main

RATES = ("median_s", "fastest_s", "slowest_s", "tokens_per_s", "tflop_per_s", "of_matmul")


def rows_of(folder: Path, name: str = "training") -> dict[str, dict[str, str]]:
    (path,) = folder.glob(f"*/{name}.csv")
    return {row["contender"]: row for row in csv.DictReader(path.open())}


def small(folder: Path, *only: str) -> list[str]:
    return ["training", "--quick", "--steps", "2", "--out", str(folder), *(["--only", *only] if only else [])]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without those that compile, which takes a minute."""
    kept = {name: each for name, each in training.CONTENDERS.items() if not each.compiled}
    monkeypatch.setattr(training, "CONTENDERS", kept)


@pytest.mark.usefixtures("short")
def test_all_begin_alike_and_have_a_rate_or_a_reason(tmp_path: Path) -> None:
    assert main(small(tmp_path)) == 0
    rows = rows_of(tmp_path)
    on_a_cpu = {name for name in rows if "cuDNN" not in name and "Flash" not in name and "Flex" not in name}
    assert on_a_cpu == {"ours, DeepSpeed", "ours, FSDP", "plain loop, our attention", "plain loop, SDPA in slices"}
    plain = rows["plain loop, SDPA in slices"]
    for name, row in rows.items():
        if name not in on_a_cpu:
            assert row["status"].startswith("not run: ")
            assert not any(row[key] for key in RATES)
            continue
        assert row["status"] == "ok"
        assert float(row["tokens_per_s"]) == pytest.approx(2 * 3 * 64 / float(row["median_s"]))
        for key in ("first_loss", "first_grad_norm"):
            assert float(row[key]) == pytest.approx(float(plain[key]), rel=1e-4)
    assert {path.suffix for path in tmp_path.glob("*/training.*")} == {".csv", ".md", ".json", ".png"}


@pytest.mark.usefixtures("short")
def test_what_begins_otherwise_has_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "flash_attention", lambda q, k, v, *, causal_block: torch.zeros_like(v))
    assert main(small(tmp_path, "our attention")) == 1  # the reference runs beside it, unasked
    wrong = rows_of(tmp_path, "training-our-attention")["plain loop, our attention"]
    assert wrong["status"].startswith("wrong: first_")
    assert not any(wrong[key] for key in RATES)


def test_only_names_what_there_is(tmp_path: Path) -> None:
    assert main(small(tmp_path, "fastest")) == 2


def test_device_tokens_are_refused(tmp_path: Path) -> None:
    arguments = ["training", "--config", "configs/fluid/device-small.json", "--out", str(tmp_path)]
    assert main(arguments) == 2


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small(tmp_path), "--config", "configs/fluid/nowhere.json"]) == 2
    assert "configs/fluid/nowhere.json" in capsys.readouterr().err
