"""launchers/evaluate.py from end to end on a small run, and what it says to mistakes."""

import json

import pytest

from tests.models.fluid.toy_network import write_toy_store
from tests.models.fluid.trained_run import write_run
from trunkline.launchers.evaluate import main


@pytest.fixture
def run(tmp_path):
    write_toy_store(tmp_path / "store")
    write_run(tmp_path / "run", tmp_path / "store")
    return tmp_path / "run"


def test_writes_tables_and_a_picture(run, capsys):
    assert main(["--run", str(run), "--device", "cpu", "--max-cases", "1", "--horizons", "60 minutes"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "60 minutes"
    assert lines[1].split()[:2] == ["surrogate", "ridge"]
    record = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert list(record["scores"]) == ["60 minutes"]
    assert record["cases"] == ["case_0000"]
    assert record["facts"] == {"step": 7}
    assert (run / "evaluation" / "evaluation.png").stat().st_size > 10_000
    assert "By kind of device" in (run / "evaluation" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "best" / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda run: (run / "best" / "model.safetensors").write_bytes(b"x" * 100), "cannot be loaded"),
        (lambda run: (run / "best" / "schema.json").write_text("{}"), "cannot be read as a schema"),
        (lambda run: (run / "config.json").write_text('{"workload": "gas"}'), "unknown 'gas'"),
        (lambda run: (run.parent / "store" / "store.json").unlink(), "not finished"),
    ],
)
def test_damage_is_named(run, capsys, change, message):
    change(run)
    assert main(["--run", str(run), "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
