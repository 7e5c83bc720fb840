"""A checkpoint of any backend, ZeRO stage and number of ranks goes on under any other, with a whole run's losses."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from tests.distributed import run_distributed_test
from tests.engine.test_trainer import lines, losses, seen
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config import deepspeed_section
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

SAVED, STEPS = 4, 8


class Layout(NamedTuple):
    backend: str
    stage: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.backend}-{self.stage}x{self.ranks}"

    @property
    def told(self) -> str:
        return f"{self.backend} ZeRO {self.stage}, fp32, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


LAYOUTS = [
    Layout(backend, stage, ranks)
    for ranks in (1, 2, 4)
    for backend, stage in [*(("deepspeed", stage) for stage in range(4)), ("fsdp", 3)]
]


def train(folder: Path, layout: Layout, steps: int, resume: str = "none", rank: int = 0) -> None:
    section: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": layout.stage}}
    training = {"steps": steps, "save_every": SAVED, "eval_every": 3}
    section["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}
    own = folder.parent / f"config-{folder.name}-{rank}"
    config = tiny_config(own, data={"noise": 0.1}, training=training, deepspeed=section)
    task = TinyTask(config.data, config.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_section, "shares_nothing", lambda section, world_size: False)  # on one rank, too
        Trainer(task, config, start(), folder, backend=layout.backend, resume=resume).run()


def save_all(rank: int, world_size: int, folder: Path, layouts: Sequence[Layout]) -> None:
    for layout in layouts:
        train(folder / f"from-{layout}", layout, SAVED, rank=rank)


def resume_all(rank: int, world_size: int, folder: Path, pairs: Sequence[tuple[Layout, Layout]]) -> None:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        for source, target in pairs:
            train(folder / f"{source}-to-{target}", target, STEPS, str(folder / f"from-{source}"), rank)


def cycle(layouts: Sequence[Layout]) -> list[tuple[Layout, Layout]]:
    """Each layout to one other, over all from and to every layout; each of two ranks, and FSDP on one, to itself."""
    others = {(one, layouts[(place * 3 + 7) % len(layouts)]) for place, one in enumerate(layouts)}
    return sorted(others | {(one, one) for one in layouts if one.ranks == 2 or one == Layout("fsdp", 3, 1)})


@pytest.mark.distributed
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_any_layout_goes_on_from_any_other(tmp_path: Path, every: bool, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = LAYOUTS if every else [layout for layout in LAYOUTS if layout.ranks < 4]
    pairs = list(itertools.product(layouts, layouts)) if every else cycle(layouts)
    whole = LAYOUTS[0]
    train(tmp_path / "whole", whole, STEPS)
    for ranks in sorted({layout.ranks for layout in layouts}):
        run_distributed_test(save_all, ranks, tmp_path, [x for x in layouts if x.ranks == ranks], backend=None)
    for ranks in sorted({layout.ranks for layout in layouts}):
        some = [(source, target) for source, target in pairs if target.ranks == ranks]
        run_distributed_test(resume_all, ranks, tmp_path, some, backend=None, timeout_s=600)
    expected = losses(tmp_path / "whole")[SAVED:]
    worst: dict[tuple[Layout, Layout], float] = {}
    for source, target in pairs:
        found = losses(tmp_path / f"{source}-to-{target}")
        assert len(found) == STEPS - SAVED
        after = [seen(row) for row in lines(tmp_path / f"{source}-to-{target}")]
        assert after == [seen(row) for row in lines(tmp_path / "whole")][SAVED:]
        (resumed,) = lines(tmp_path / f"{source}-to-{target}", "resumed")
        assert (resumed["step"], resumed["from"], resumed["to"]) == (SAVED, source.told, target.told)
        worst[source, target] = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    with capsys.disabled():
        print("\n" + table(worst))
    assert {pair: error for pair, error in worst.items() if error > 1e-5} == {}
    reference = load_file(tmp_path / "whole/final/model.safetensors")
    for source, target in pairs:
        final = load_file(tmp_path / f"{source}-to-{target}/final/model.safetensors")
        assert all(final[name].allclose(reference[name], rtol=1e-4, atol=1e-6) for name in reference)


def table(worst: dict[tuple[Layout, Layout], float]) -> str:
    """Rows: written by; columns: read by; the largest relative difference of a loss from those of the whole run."""
    lines = [f"{'written by / read by':>20}" + "".join(f"{target!s:>15}" for target in LAYOUTS)]
    for source in LAYOUTS:
        cells = [f"{worst[source, target]:.0e}" if (source, target) in worst else "." for target in LAYOUTS]
        lines.append(f"{source!s:>20}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)
