"""What every test shares: one thread a process, no GPU unless asked for, and NaN in memory that nobody wrote."""

from __future__ import annotations

import gc
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # torch and polars read these when they are imported
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["POLARS_MAX_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import pytest
import torch
from _pytest.mark.expression import Expression
from torch import Tensor

from tests.distributed import find_free_port
from tests.interpreted import import_interpreted

# the same examples in every run, however busy the machine
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("house")


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Hide GPUs, so that a run does the same on every machine, and have Triton interpret; unless only GPU tests run.

    No option is added. This hook alone is called before conftest.py files further down are imported, which may import
    kernels.
    """
    config = pluginmanager.get_plugin("pytestconfig")
    if not selects_gpu_tests_alone(config.known_args_namespace.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import_interpreted()


def selects_gpu_tests_alone(markexpr: str) -> bool:
    """Whether `-m markexpr` selects tests marked gpu and no others, such as "gpu and not slow", but not "slow"."""
    try:
        expression = Expression.compile(markexpr)
    except Exception:  # what it raises depends on pytest's version, which says so itself when it selects
        return False
    names = set(re.findall(r"\w+", markexpr))
    selected = [
        marks
        for marks in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
        if expression.evaluate(lambda name, /, marks=marks, **_: name in marks)
    ]
    return bool(selected) and all("gpu" in marks for marks in selected)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is there now stays until the end: garbage collections need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and a run of GPU tests alone, as with `-m gpu`")


@pytest.fixture
def free_port() -> int:
    """A TCP port that was free a moment ago."""
    return find_free_port()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests of kernels and benchmarks, allocations hold NaN: an output element that no program wrote shows."""
    if not {"kernels", "benchmarks"} & set(request.path.relative_to(request.config.rootpath).parts):
        return

    with torch.device("meta"):  # torch notes now which functions a device is for: not those that follow
        torch.empty(0)

    def filled(allocate):
        def allocate_nan(*args, **kwargs) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and not torch.compiler.is_compiling():  # inductor takes no such write
                tensor.detach().fill_(float("nan"))
            return tensor

        return allocate_nan

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _record_the_fault(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
    """Note what a test marked `fault("...")` breaks; the parameters of the test fill the text's braces."""
    if marker := request.node.get_closest_marker("fault"):
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        fault = marker.args[0].format(**parameters)
        record_property("fault", fault.encode("ascii", "backslashreplace").decode())  # a report is sent as UTF-8


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """After `-m fault`: what was broken, how often, and how often the run survived it."""
    tries: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, name in report.user_properties:
                if key == "fault" and report.when == "call":
                    tries[name] += 1
                    survived[name] += outcome == "passed"
    if tries and config.option.markexpr.startswith("fault"):
        terminalreporter.section("faults: tried, survived")
        for name, count in sorted(tries.items()):
            terminalreporter.write_line(f"{name:<70} {count:>5} {survived[name]:>8}")
