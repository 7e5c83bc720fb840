"""<run>/assets/: what stands beside a run's weights, and what its tensors are called in files; written at its start.

With it a checkpoint becomes whole weights when the training data is gone, which a task needs to say both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.config import RunConfig
from engine.digests import DIGESTS, check_digests, replace_files
from engine.distributed import Ranks, on_main
from engine.errors import CheckpointError
from engine.files import write_json
from engine.reading import read_object, reason
from engine.task import Task
from engine.weights import write_assets

ASSETS = "assets"
_NAMES = "weight_names.json"


def keep_assets(run: Path, task: Task, config: RunConfig, names: Iterable[str], ranks: Ranks) -> None:
    """Write <run>/assets/. `names` are those of the model's parameters and buffers. Called on all ranks.

    Raises CheckpointError on all ranks, if a file could not be written.
    """

    def write(folder: Path) -> None:
        write_assets(folder, task, config)
        write_json(folder / _NAMES, {name: task.weight_name(name) for name in names})

    on_main(lambda: replace_files(run / ASSETS, write), ranks, f"{run / ASSETS}: cannot write what belongs to weights")


class Assets:
    """The assets of a run. Raises CheckpointError, also later, if a file is damaged or does not fit."""

    def __init__(self, run: Path) -> None:
        self.folder = run / ASSETS
        check_digests(self.folder)
        try:
            self._names = read_object(self.folder / _NAMES)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / _NAMES}: cannot be read: {reason(error)}") from error

    @staticmethod
    def are_in(run: Path) -> bool:
        """Whether the run has them; runs of earlier versions do not."""
        return (run / ASSETS / _NAMES).is_file()

    @property
    def weight_name(self) -> Callable[[str], str | None]:
        """See `Task.weight_name`."""

        def called(name: str) -> str | None:
            if name not in self._names:
                raise CheckpointError(
                    f"{self.folder / _NAMES}: does not know the tensor {name}: the checkpoint is of another run"
                )
            return self._names[name]

        return called

    def copy_to(self, folder: Path, dtype: str) -> None:
        """Write them beside weights of `dtype`. Raises OSError."""
        leave_out = shutil.ignore_patterns(_NAMES, DIGESTS, ".draft")
        shutil.copytree(self.folder, folder, ignore=leave_out, dirs_exist_ok=True)
        write_json(folder / "config.json", read_object(self.folder / "config.json") | {"dtype": dtype})
