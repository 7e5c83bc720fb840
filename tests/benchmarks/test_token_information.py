from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.token_image.conftest import make_store
from trunkline.benchmarks.token_information import bits_left
from trunkline.launchers.bench import main
from trunkline.models.token_image.encodings import Encoding


def test_bits_left_lie_between_all_and_none() -> None:
    frequencies = torch.tensor([0.5, 0.25, 0.125, 0.125])
    found = [bits_left(Encoding("bits", 4), frequencies, alpha, 4096) for alpha in (1e-6, 0.5, 0.99)]
    assert found[0] == pytest.approx(1.75, abs=0.01)
    assert 0.2 < found[1] < 1.5
    assert found[2] == pytest.approx(0, abs=1e-6)


def test_a_line_for_each_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path).root
    assert main(["token_information", "--store", str(store), "--times", "1,999", "--draws", "64"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[2:]] == ["rgb", "bits"]
    early, late = (float(value) for value in lines[3][-2:])
    assert early == pytest.approx(float(lines[0][3]), abs=0.01), "all of a token is there at time 1"
    assert late < 0.5
