"""torch.compile: each block is one graph, all blocks share it, and the losses stay, at every stage of both backends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import run_distributed_test
from tests.engine.backends.test_fsdp import configuration, runs_on_a_rank
from tests.engine.test_trainer import losses, reference_losses
from tests.engine.tiny import Net, TinyModel
from trunkline.engine.backends.model_options import apply_options
from trunkline.engine.errors import ConfigError


class Counted:
    """A backend of torch.compile that runs each graph as it is, and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def counted() -> Iterator[Counted]:
    backend = Counted()
    torch._dynamo.reset()
    torch._dynamo.register_backend(compiler_fn=backend, name="counted")
    yield backend
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counted")
    torch._dynamo.reset()


@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_of_any_number_share_one_graph(counted: Counted, recomputed: bool, tmp_path: Path) -> None:
    model = Net(6, TinyModel(layers=5))
    expected = model(torch.ones(3, 6))
    training = configuration(tmp_path, training={"compile": "counted", "activation_checkpointing": recomputed}).training
    apply_options(model, training)
    assert not counted.graphs
    got = model(torch.ones(3, 6))
    got.sum().backward()
    assert len(counted.graphs) == 1
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_model_without_blocks_is_compiled_whole(counted: Counted, tmp_path: Path) -> None:
    class Whole(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).tanh()

    model = Whole(3, 3)
    apply_options(model, configuration(tmp_path, training={"compile": "counted"}).training)
    model(torch.ones(2, 3))
    assert len(counted.graphs) == 1


class Branching(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_block_that_is_not_one_graph_is_named_with_its_line_and_the_remedy(counted: Counted, tmp_path: Path) -> None:
    model = nn.Sequential(Branching(3, 3))
    model._no_split_modules = ["Branching"]  # type: ignore[assignment]
    apply_options(model, configuration(tmp_path, training={"compile": "counted"}).training)
    with pytest.raises(
        ConfigError,
        match=r'^training.compile: Branching: cannot .* branching, ".*test_model_options.py", line \d+: set training.c',
    ):
        model(torch.ones(2, 3))


@pytest.mark.distributed
@pytest.mark.slow
def test_blocks_that_inductor_compiles_leave_the_losses_alone_on_two_ranks(tmp_path: Path) -> None:
    """tests/engine/backends/test_fsdp.py does it fast, with "aot_eager"."""
    runs = {
        f"{backend}-{stage}-{recomputed}": (
            backend,
            {
                "stage": stage,
                "training": {"compile": "inductor", "activation_checkpointing": recomputed},
                "zero_optimization": {"stage3_param_persistence_threshold": 0}
                if (backend, stage) == ("deepspeed", 3)
                else {},
            },
        )
        for backend in ("deepspeed", "fsdp")
        for stage in range(4)
        for recomputed in (False, True)
    }
    run_distributed_test(runs_on_a_rank, 2, tmp_path, runs, backend=None, timeout_s=1500)
    expected = reference_losses(configuration(tmp_path))
    for name in runs:
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name
