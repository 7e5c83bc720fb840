"""The command that continues a run, as its user typed it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from trunkline.engine.machine.again import resume_with, typed

PROGRAM = """
import sys
from pathlib import Path
from trunkline.engine.machine.again import resume_with, typed
with typed(sys.argv[1:]):
    print(resume_with(Path("run")))
"""
LAUNCHER = f"""#!{sys.executable}
import subprocess, sys
words = sys.argv[sys.argv.index("train.py"):]
subprocess.run([sys.executable, "-u", words[0], "--local_rank=0", *words[1:]], check=True)
"""


def test_what_was_typed_is_said_again_with_resume_auto_and_quoted() -> None:
    words = ["--config", "my run.json", "--resume", "none", "--set", 'training.best={"metric": "mse"}', "--resume=x"]
    with typed(words):
        assert resume_with(Path("run")) == (
            "resume with `python launchers/train.py --config 'my run.json' "
            """--set 'training.best={"metric": "mse"}' --resume auto`"""
        )
    assert resume_with(Path("run")) == "resume with --resume auto --output-dir run"


def test_the_launcher_and_srun_are_said_again_too(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/torchrun").write_text(LAUNCHER)
    (tmp_path / "bin/torchrun").chmod(0o755)
    root = str(Path(__file__).parents[3])
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": root
    }  # fmt: skip

    def said(*command: str, **variables: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=env | variables, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip()

    flags = ["--config", "a.json", "--output-dir", "b c"]
    shown = "train.py --config a.json --output-dir 'b c' --resume auto`"
    assert said("torchrun", "--nproc_per_node", "2", "train.py", *flags) == (
        f"resume with `torchrun --nproc_per_node 2 {shown}"
    )
    assert said(sys.executable, "train.py", *flags, SLURM_STEP_NUM_TASKS="4").endswith(shown)
    assert said(sys.executable, "train.py", *flags, SLURM_STEP_NUM_TASKS="4").startswith("resume with `srun ")
