"""A run that is killed while it trains, and resumed by the same command, beside one that nothing stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def unbroken_and_killed(arguments: Sequence[str], folder: Path, flag: str = "--output_dir") -> tuple[Path, Path]:
    """Both runs' folders. `arguments` of launchers/train.py save every other step and resume what is there.

    flag: names a run's folder
    """
    command = [sys.executable, str(ROOT / "launchers/train.py"), *arguments, flag]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    unbroken, broken = folder / "unbroken", folder / "broken"
    subprocess.run([*command, str(unbroken)], env=environment, check=True, capture_output=True)
    process = subprocess.Popen([*command, str(broken)], env=environment, stdout=subprocess.DEVNULL)
    while not (broken / "checkpoints/step-00000004").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "final").exists()
    done = subprocess.run([*command, str(broken)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    return unbroken, broken
