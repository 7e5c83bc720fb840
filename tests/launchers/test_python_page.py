"""docs/python.md: its blocks run one after the other, in a plain process and as a notebook."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.fluid.toy_network import write_toy_store
from trunkline.engine.machine.log import LOG

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for the demo's data, which is the present one."""
    write_toy_store(tmp_path / "data" / "fluid-demo" / "store")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def _log() -> Iterator[None]:
    before = LOG.level, LOG.handlers[:]
    yield
    LOG.level, LOG.handlers[:] = before
    LOG.manager._clear_cache()


@pytest.mark.slow  # test_api.py is the short test of the same
@pytest.mark.usefixtures("_log")
def test_every_block_runs(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}

    async def cells() -> list[Any]:  # a notebook's kernel runs its cells within an event loop, too
        printed = []
        for block in BLOCKS:
            exec(compile(block, "docs/python.md", "exec"), names)
            printed.append(capfd.readouterr())
            await asyncio.sleep(0)
        return printed

    printed = asyncio.run(cells())
    run, resumed, own, loaded, silent, logged, script = printed
    assert "done: runs/notebook holds best/" in run.out
    assert "runs/notebook: holds checkpoints/, metrics.jsonl" in resumed.out
    (shown,) = re.findall(r"#.* of an earlier run; (.*), \.\.\.$", "\n".join(BLOCKS), re.MULTILINE)
    assert f" of an earlier run; {shown}, " in resumed.out
    assert resumed.out.endswith("\n30\n")
    assert float(own.out.split()[-1]) < 0.1
    x = torch.tensor([[0.5]])
    assert names["model"](x).item() == pytest.approx(torch.sin(x).item(), abs=0.3)
    assert [loaded, silent] == [("", "")] * 2
    assert logged.out == script.out == ""
    assert "done: runs/logged holds best/" in Path("trunkline.log").read_text()


@pytest.mark.slow
def test_the_page_is_a_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nbclient and ipykernel are installed, which Trunkline's extras do not bring."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("RANK", "WORLD_SIZE"):  # which other tests leave behind, and a kernel inherits
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(block) for block in BLOCKS])
    check = "import os, torch; print({'RANK', 'WORLD_SIZE'} & set(os.environ), torch.distributed.is_initialized())"
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert "done: runs/notebook holds best/" in said[0]
    assert said[-1] == "set() False\n"
    assert logging.getLogger("trunkline").level == logging.INFO  # the notebook's process is another
    metrics = [json.loads(line) for line in Path("runs/sine/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 100
