"""--help of every command is quick, since it imports nothing that takes long."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from trunkline.launchers.bench import BENCHMARKS
from trunkline.launchers.cli import COMMANDS
from trunkline.models.registry import workloads

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("torch", "deepspeed", "triton", "transformers", "tokenizers", "safetensors"),
    *("numpy", "scipy", "numba", "polars", "pandas", "matplotlib", "tensorboard"),
}
ASKS = """
import importlib, json, sys
for command, *words in json.loads(sys.argv[1]):
    try:
        importlib.import_module(f"trunkline.launchers.{command.replace('-', '_')}").main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0, (command, words)
    else:
        raise AssertionError(f"{command} {words} went past --help")
    assert not set(sys.argv[2:]) & sys.modules.keys(), (command, words, set(sys.argv[2:]) & sys.modules.keys())
"""


def test_help_of_every_command_and_workload_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    asked = [[command] for command in COMMANDS] + [["bench", name] for name in BENCHMARKS]
    for name in workloads():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"workload": name}))
        run = ["--run", str(tmp_path / name)]
        asked += [["prepare", name], ["train", name], ["evaluate", *run], ["predict", *run]]
    done = subprocess.run(
        [sys.executable, "-c", ASKS, json.dumps(asked), *HEAVY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--help") >= len(asked)
