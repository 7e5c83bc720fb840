"""Standard output and error may go away, fill up, stop or know ASCII alone: whoever prints goes on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.machine.output import lasting_output
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

ROOT = Path(__file__).parents[3]
PRINTING = """
from trunkline.engine.machine.output import keep_printing

keep_printing()
import sys, threading, warnings
from tqdm import tqdm

for n in tqdm(range(2000), mininterval=0):
    print("line", n, "é", "\\udcff")
    tqdm.write(100 * "x", file=sys.stderr)
warnings.warn("mind this")
thread = threading.Thread(target=print, args=("of a thread",))
thread.start()
thread.join()
print("no end of line", end="")
open("done", "w").write("done")
"""
SHELL = {
    "a reader that has seen enough": '"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}',
    "a full disk": '"$@" > /dev/full 2>&1',
    "closed": '"$@" >&- 2>&-',
    "closed, with input": '"$@" <&- >&- 2>&-',
    "ASCII": 'PYTHONIOENCODING=ascii "$@" > out 2>&1; status=$?; grep -q "line 1999 .xe9 .udcff" out; '
    "grep -q 'mind this' out; grep -q 'of a thread' out; grep -q 'no end of line' out; exit $status",
    "unbuffered, a full disk": 'PYTHONUNBUFFERED=1 "$@" > /dev/full 2>&1',
}


@pytest.mark.fault("output to {kind}")
@pytest.mark.parametrize("kind", SHELL)
def test_a_program_ends_as_it_would_wherever_its_output_goes(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        ["bash", "-euc", SHELL[kind], "bash", sys.executable, "-c", PRINTING], cwd=tmp_path, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "done").exists()
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


@pytest.mark.fault("output to a reader that has stopped reading")
def test_a_reader_that_never_reads_is_not_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINTING], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.wait(60) == 0
    assert (tmp_path / "done").exists()


def test_a_terminal_that_is_gone_is_no_error() -> None:
    gone, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        os.close(gone)
        with lasting_output():
            print("who hears me?", flush=True)
            print("nobody")


class Broken(io.StringIO):
    """What stands for standard output in a notebook whose client has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [Broken, lambda: None, lambda: open("/dev/full", "w")])  # noqa: SIM115
def test_a_trainer_of_a_library_trains_whatever_stands_for_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    config = tiny_config(tmp_path, training={"steps": 2, "eval_every": 1})
    out, err = stream(), stream()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        trainer = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run")
        assert trainer.run().step == 2
        assert sys.stdout is out  # what was there is there again
        assert sys.stderr is err


def test_what_is_printed_comes_out_whole_and_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    text = "".join(f"{n} ä\n" for n in range(5000))
    with lasting_output():
        print(text, end="")
        print("the", "end", end="")
    assert capfd.readouterr().out == text + "the end"
