"""How launchers begin and end: --help at once, statuses, and messages."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.machine.stopping import InterruptedRunError
from trunkline.launchers.entry import status_of

ROOT = Path(__file__).parents[2]
HELP = """
import runpy, sys
module = sys.argv.pop(1)
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    heavy = {"torch", "pydantic", "deepspeed", "transformers", "numpy"} & sys.modules.keys()
    print("status", end.code, sorted(heavy))
"""


@pytest.mark.parametrize(
    ("launcher", "words", "said"),
    [
        (
            "train",
            [],
            [
                "--config FILE",
                "WORKLOAD --help",
                "--epochs",
                "The workloads: causal_lm, fluid, image_classification, seq2seq, token_image.",
            ],
        ),
        ("train", ["causal_lm"], ["flags of causal_lm:", "--model-path"]),
        ("train", ["--config", "configs/fluid/demo.json"], ["flags of fluid:", "--store"]),
        (
            "evaluate",
            [],
            [
                "--run DIR --help",
                "--out",
                "--device",
                "causal_lm: --batch-size",
            ],
        ),
        (
            "predict",
            [],
            [
                "--run DIR --help",
                "--device",
                "token_image: --",
            ],
        ),
        ("prepare", [], ["causal_lm|fluid"]),
        ("export", [], ["--max-shard-gib"]),
        ("bench", [], ["masked_mse"]),
        ("doctor", [], ["--quick"]),
    ],
)
def test_help_is_there_before_anything_that_takes_seconds(launcher: str, words: list[str], said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, f"trunkline.launchers.{launcher}", *words, "--help"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["status 0 []"], done.stdout + done.stderr
    assert [text for text in said if text not in " ".join(done.stdout.split())] == []


def fails(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("a: b"), 2, "error: a: b\n"),
        (InterruptedRunError("by SIGTERM"), 75, "stopped: by SIGTERM\n"),
        (OSError(errno.ENOSPC, "No space left on device", "run/x"), 2, "error: run/x: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again\n"),
    ],
)
def test_an_error_is_one_message_and_a_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert status_of(lambda: fails(error)) == status
    assert capsys.readouterr().err == message


def test_a_rank_says_its_own_number(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert status_of(lambda: fails(TrunklineError("no"))) == 2
    assert capsys.readouterr().err == "rank 3: error: no\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("of no file")])
def test_an_error_of_the_program_is_told_and_raised(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[Exception] = []
    with pytest.raises(type(error)):
        status_of(lambda: fails(error), on_error=told.append)
    assert told == [error]
    assert capsys.readouterr().err == ""


def test_a_command_gives_its_status_and_none_is_0() -> None:
    assert [status_of(lambda: None), status_of(lambda: 0), status_of(lambda: 1)] == [0, 0, 1]


def test_the_launchers_folder_hides_no_package_of_a_launchers_name() -> None:
    """`import evaluate` is Hugging Face's, if it is anybody's."""
    look = "import importlib.util, sys; from trunkline.launchers.entry import begin; begin(); "
    look += f"print({str(ROOT / 'launchers')!r} in sys.path)"
    program = f"import sys; sys.path[0] = {str(ROOT / 'launchers')!r}; sys.path.append({str(ROOT)!r}); {look}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_reader_that_has_enough_ends_a_program_without_a_word() -> None:
    """As in `launchers/compare.py ... | head -1`."""
    code = """
import sys
from trunkline.launchers.entry import begin, status_of
begin("stderr")
sys.exit(status_of(lambda: print("a line\\n" * 100_000)))
"""
    command = f"{sys.executable} -c '{code}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("a line\n", "", 141)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("flush", ["True", "False"])
def test_a_full_standard_output_is_one_line(flush: str, unbuffered: str) -> None:
    """As in `launchers/predict.py ... > /dev/full`."""
    code = f"""
import sys
from trunkline.launchers.entry import begin, status_of
begin("stderr")
sys.exit(status_of(lambda: print("a line", flush={flush})))
"""
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{code}' > /dev/full"],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    said = "error: standard output, or a file that is written: No space left on device: make room\n"
    assert (done.stderr, done.returncode) == (said, 2)


@pytest.mark.parametrize(("world_size", "status"), [("1", -signal.SIGABRT), ("2", 75)])
def test_nothing_of_cpp_changes_the_status_of_one_of_several_ranks(world_size: str, status: int) -> None:
    """C++'s end aborts here, as now and then gloo's does. Python's comes before it: threads and exit functions."""
    code = """
import atexit, ctypes, threading, time
from trunkline.launchers.entry import begin, leave
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
begin()
atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
leave(75)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"WORLD_SIZE": world_size, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("thread\nexit function\n", "", status)
