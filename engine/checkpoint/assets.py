"""<run>/assets/: what stands beside a run's weights, written at its start.

With it a checkpoint becomes whole weights when the training data is gone, from which a task makes these files.
"""

from __future__ import annotations

from pathlib import Path

from trunkline.engine.checkpoint.digests import DIGESTS, DRAFT, check_digests, replace_files
from trunkline.engine.checkpoint.weights import write_assets
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import copy_tree, write_json
from trunkline.engine.machine.reading import read_object, reason
from trunkline.engine.ranks.distributed import Ranks, on_main
from trunkline.engine.task import Task

ASSETS = "assets"
_CONFIG = "config.json"


def keep_assets(run: Path, task: Task, config: RunConfig, ranks: Ranks) -> None:
    """Write <run>/assets/. Called on all ranks. Raises CheckpointError on all, if a file could not be written."""
    folder = run / ASSETS
    on_main(
        lambda: replace_files(folder, lambda draft: write_assets(draft, task, config)),
        ranks,
        f"{folder}: cannot write it",
    )


def has_assets(run: Path) -> bool:
    """Whether the run kept them; those of earlier versions did not."""
    return (run / ASSETS / _CONFIG).is_file()


def copy_assets(run: Path, out: Path, dtype: str = "float32") -> None:
    """Put a run's assets beside weights of `dtype`. Raises CheckpointError if they are damaged, OSError."""
    folder = run / ASSETS
    check_digests(folder)
    try:
        config = read_object(folder / _CONFIG, finite=False)  # transformers writes Infinity
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: cannot be read: {reason(error)}") from error
    copy_tree(folder, out, left_out=(DIGESTS, DRAFT))
    write_json(out / _CONFIG, config | {"dtype": dtype})
