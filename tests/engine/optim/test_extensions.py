"""What is compiled on first use is announced; a lock that nobody holds is named and not waited for."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from tests.engine.tiny import tiny_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim import extensions
from trunkline.engine.optim.extensions import check_compiler, compilation_watched


@pytest.mark.fault("kill -9 of a compilation")
def test_a_lock_that_a_killed_compilation_left_behind_is_named_within_5_s(tmp_path: Path) -> None:
    (tmp_path / "build.ninja").touch()
    lock = tmp_path / "lock"
    lock.touch()
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"{lock}: .*Delete it and start again"), compilation_watched(is_main=True):
        FileBaton(str(lock)).wait()
    assert time.monotonic() - began < 5
    assert lock.exists()


@pytest.mark.parametrize("sign_of_life", ["open", "changes"])
def test_a_compilation_that_goes_on_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign_of_life: str
) -> None:
    monkeypatch.setattr(extensions, "_QUIET_S", 1.0)
    lock = tmp_path / "lock"
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    if sign_of_life == "changes":  # on another machine, which nobody here can see
        os.close(descriptor)

    def compile_for_a_while() -> None:
        for place in range(6):
            time.sleep(0.4)
            if sign_of_life == "changes":
                (tmp_path / f"{place}.o").touch()
        if sign_of_life == "open":
            os.close(descriptor)
        lock.unlink()

    thread = threading.Thread(target=compile_for_a_while)
    thread.start()
    with compilation_watched(is_main=True):
        FileBaton(str(lock)).wait()
    assert not lock.exists()
    thread.join()


def test_afterwards_torch_is_as_it_was() -> None:
    before = cpp_extension.load, FileBaton.wait
    with compilation_watched(is_main=False):
        assert (cpp_extension.load, FileBaton.wait) != before
    assert (cpp_extension.load, FileBaton.wait) == before


def test_a_compilation_is_announced_and_its_failure_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    source = tmp_path / "broken.cpp"
    source.write_text("no C++")
    with pytest.raises(ConfigError, match=r"broken cannot be compiled: .*AdamW"), compilation_watched(is_main=True):
        cpp_extension.load("broken", [str(source)])
    assert f"compiling DeepSpeed's broken for its first use, into {tmp_path}" in capfd.readouterr().out


def with_optimizer(folder: Path, kind: str, **zero: object) -> RunConfig:
    return tiny_config(
        folder, deepspeed={"optimizer": {"type": kind, "params": {"lr": 0.1}}, "zero_optimization": zero}
    )


def test_without_a_compiler_what_has_to_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("PATH", str(tmp_path))
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for kind, zero in (("Muon", {"stage": 0}), ("Lion", offload)):
        section = with_optimizer(tmp_path, kind, **zero).deepspeed
        with pytest.raises(ConfigError, match=rf"{kind} is compiled on first use, for which ninja and c\+\+ cannot be"):
            check_compiler(section, torch.device("cpu"))
    check_compiler(with_optimizer(tmp_path, "AdamW", stage=1).deepspeed, torch.device("cpu"))
    with pytest.raises(ConfigError, match="DeepSpeed has Lion for GPUs only"):
        check_compiler(with_optimizer(tmp_path, "Lion", stage=1).deepspeed, torch.device("cpu"))
