"""What a process has imported once DeepSpeed is there."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from tests.distributed import run_distributed_test


def imported(rank: int, world_size: int) -> tuple[bool, bool, bool]:
    """Whether DeepSpeed is there, which `import_deepspeed` brought to this process, MLflow too, and MLflow can be."""
    return "deepspeed" in sys.modules, "mlflow" in sys.modules, find_spec("mlflow") is not None


def test_deepspeed_is_imported_without_mlflow_which_can_be_imported_later() -> None:
    assert run_distributed_test(imported, 1, backend=None) == [(True, False, True)]
