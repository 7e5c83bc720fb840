"""The workloads by name: name -> package -> room, a module of the package that every workload has.

    config                the "data" and "model" sections: Data and Model, subclasses of Strict
    task                  make_task(data, model); weights_task(data, model) where the names of weights need no data: a
                          task that raises MissingDataError where it does need them, for --plan too
    prepare, evaluate,
    predict               run(arguments), for the launchers of those names
    onnx                  where there is one, write_onnx(folder), for launchers/export.py --onnx
    flags                 prepare(parser), evaluate(parser) and predict(parser), which add those launchers' flags; where
                          launchers/train.py has any, FLAGS, and DEFAULTS, the file in place of --config. It imports
                          nothing that takes long, so that --help is quick

A folder under models/ with a task.py is a workload, trunkline.models.<name>. Other packages add theirs by an entry
point of the group "trunkline.workloads": name = package. To find names imports none of them, and neither PyTorch nor
pydantic.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from trunkline.engine.config.flags import Flag
from trunkline.engine.config.json_object import nearest
from trunkline.engine.errors import CheckpointError, ConfigError, MissingDataError
from trunkline.engine.machine.reading import read_object, reason

if TYPE_CHECKING:
    from pydantic import BaseModel

    from trunkline.engine.config.run_config import RunConfig
    from trunkline.engine.task import Task

GROUP = "trunkline.workloads"


def workloads() -> list[str]:
    """The names of all workloads."""
    return sorted(_packages())


def open_room(workload: str, room: str) -> ModuleType:
    """A module of a workload. Raises ConfigError for an unknown name, one given twice, and a room that is not there."""
    packages = _packages()
    if workload not in packages:
        raise ConfigError(f"workload: unknown '{workload}'{nearest(workload, list(packages))}")
    (package, giver), *others = packages[workload].items()
    if others:
        given = " and ".join(f"{package} of {giver}" for package, giver in packages[workload].items())
        raise ConfigError(f"workload '{workload}': given by {given}: uninstall one of them")
    try:
        return importlib.import_module(f"{package}.{room}")
    except ModuleNotFoundError as error:
        if f"{package}.{room}.".startswith(f"{error.name}."):
            raise ConfigError(f"workload '{workload}': {giver} gives no module {error.name}") from error
        raise ConfigError(f"workload '{workload}': {package}.{room} needs {error.name}: install it") from error


def config_sections(workload: str) -> tuple[type[BaseModel], type[BaseModel]]:
    """The models of a workload's "data" and "model" sections. Raises ConfigError."""
    config = open_room(workload, "config")
    return config.Data, config.Model


def make_task(config: RunConfig) -> Task:
    """The task of a run, made from its "data" and "model" sections."""
    from trunkline.engine.task import checked_task

    with config.naming_origins():
        return checked_task(open_room(config.workload, "task").make_task(config.data, config.model))


def weights_task(config: RunConfig) -> Task:
    """The task of a run for what it says of weights alone. It needs no data where the workload can do without."""
    from trunkline.engine.task import checked_task

    task = open_room(config.workload, "task")
    with config.naming_origins():
        return checked_task(getattr(task, "weights_task", task.make_task)(config.data, config.model))


def planned_task(config: RunConfig) -> Task:
    """The task of a run, or where there are no data the one for what can be said without."""
    try:
        return make_task(config)
    except MissingDataError:
        return weights_task(config)


def flags_of(workload: str) -> tuple[tuple[Flag, ...], Path | None]:
    """A workload's own flags of launchers/train.py, and the file with its defaults. Raises ConfigError."""
    try:
        flags = open_room(workload, "flags")
    except ConfigError as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and str(error.__cause__.name).endswith(".flags"):
            return (), None
        raise
    return getattr(flags, "FLAGS", ()), getattr(flags, "DEFAULTS", None)


def add_flags(workload: str, command: str, parser: ArgumentParser) -> None:
    """Add a workload's own flags of launchers/<command>.py, not of train.py. Raises ConfigError."""
    add = getattr(open_room(workload, "flags"), command, None)
    if add is None:
        raise ConfigError(f"workload '{workload}': its module flags has no function {command}(parser)")
    add(parser)


def onnx_writer(workload: str) -> Callable[[Path], None]:
    """What writes model.onnx beside the weights in a folder. Raises ConfigError where a workload, or a package, has
    none."""
    try:
        write_onnx: Callable[[Path], None] = open_room(workload, "onnx").write_onnx
    except ConfigError as error:
        raise ConfigError(f"--onnx: {error}; without it the weights alone are written") from error
    return write_onnx


def workload_of_run(run: Path) -> str:
    """The workload of a run's folder, or of one with weights. Raises CheckpointError or ConfigError."""
    for folder in (run, run / "best", run / "final"):
        if (path := folder / "config.json").is_file():
            try:
                name = read_object(path, finite=False).get("workload")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be read ({reason(error)}): name another folder") from error
            if name not in (known := workloads()):
                raise ConfigError(f"{path}: workload: unknown {name!r}{nearest(str(name), known)}")
            return name
    if not run.exists():
        beside = [path.name for path in run.parent.iterdir() if path.is_dir()] if run.parent.is_dir() else []
        close = difflib.get_close_matches(run.name, beside, n=1)
        hint = f"; did you mean {run.parent / close[0]}?" if close else ""
        raise CheckpointError(f"{run}: not the folder of a run: nothing is there{hint}")
    raise CheckpointError(f"{run}: not the folder of a run: there is no config.json in it, nor in best/ or final/")


def _packages() -> dict[str, dict[str, str]]:
    """Name -> {package: who gives it}; of a name that is given twice, both."""
    return _packages_on(tuple(sys.path))


@functools.lru_cache
def _packages_on(_path: tuple[str, ...]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for path in sorted(Path(__file__).parent.glob("*/task.py")):
        found[path.parent.name] = {f"trunkline.models.{path.parent.name}": "Trunkline"}
    for entry in importlib.metadata.entry_points(group=GROUP):
        giver = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed distribution"
        found.setdefault(entry.name, {})[entry.value] = giver
    return found
