"""Trunkline in Python: `from trunkline import load_config, parse_config, train`.

    trained = train(load_config("fluid/demo", {"training.steps": 20}))
    trained = train(MyTask(), parse_config({"training": {...}, "deepspeed": {...}}), output_dir="runs/mine")

launchers/train.py trains by the same function.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from trunkline.engine.backends import choose_backend
from trunkline.engine.checkpoint.best import outcome
from trunkline.engine.config.draft import SETTINGS, Draft
from trunkline.engine.config.run_config import RunConfig, checked
from trunkline.engine.errors import ConfigError, DataError, TrunklineError
from trunkline.engine.machine import stopping
from trunkline.engine.machine.log import LOG
from trunkline.engine.ranks.agreement import agree
from trunkline.engine.ranks.distributed import Ranks, from_main, world
from trunkline.engine.record.metrics_file import METRICS, read_metrics
from trunkline.engine.record.report import write_report
from trunkline.engine.task import Task
from trunkline.engine.trainer import Trainer
from trunkline.engine.trials import find_micro_batch as find
from trunkline.models.registry import config_sections, make_task, workloads

_NO_FILE = "configuration"
"""The source of a configuration that is from no file."""
_training = threading.Lock()


@dataclass(frozen=True)
class Trained:
    """What a run has come to, the same on all ranks.

    folder: the run's, with final/, and with best/ unless no evaluation was finite
    step: the last one
    train, val: the last line of each in metrics.jsonl, without step and split; empty if none was written
    best, best_step: all that the best evaluation has measured, and its step, which is 0 for the one before training;
        `best` is empty and `best_step` 0 if none was finite
    """

    folder: Path
    step: int
    train: dict[str, Any] = field(repr=False)
    val: dict[str, Any] = field(repr=False)
    best: dict[str, float] = field(repr=False)
    best_step: int


class _Anything(BaseModel):
    """The "data" or "model" section of a user's own task: whatever JSON can hold."""

    model_config = ConfigDict(extra="allow", frozen=True)


def load_config(path: str | Path, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration in a JSON file, or a shipped one by its name, such as "fluid/demo".

    settings: values by dotted key that win over the file, {"training.steps": 20}
    Raises ConfigError: file, key, value and remedy.
    """
    draft = Draft.read(path)
    for key, value in _json(settings or {}, SETTINGS).items():
        draft.assign(key, value, SETTINGS)
    return _checked(draft)


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """The same from a dictionary with the sections of a file, which it leaves as it is. Raises ConfigError.

    Without "workload" it is for a task of one's own: then "data" and "model" may hold anything, or be left out.
    """
    return _checked(Draft(_json(values, _NO_FILE), _NO_FILE))


def _json(values: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """A copy as JSON has it: lists for tuples. Raises ConfigError for what JSON cannot hold."""
    copied = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            copied[key] = _json(value, source, f"{prefix}{key}.")
            continue
        try:
            copied[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{source}: {prefix}{key}: JSON cannot hold {value!r:.80} ({error}): give a number, a text or a list"
            ) from error
    return copied


def _checked(draft: Draft) -> RunConfig:
    if "workload" in draft.values:
        return checked(draft, config_sections)
    draft.values = {"workload": "", "data": {}, "model": {}} | draft.values
    return checked(draft, lambda _: (_Anything, _Anything))


def train(
    task: Task | RunConfig, config: RunConfig | None = None, *, output_dir: str | Path | None = None,
    backend: str = "auto", resume: str = "none", accept_new_data: bool = False, find_micro_batch: bool = False,
) -> Trained:  # fmt: skip
    """Train a configuration of a known workload, `train(config)`, or a task of one's own, `train(task, config)`.

    It is called on one process, in a notebook or a thread, too, or on all ranks that a launcher has started. Afterwards
    process group, environment, signal handlers and torch's settings are what they were before.

    Args:
        output_dir: the run's folder; runs/<workload>/<name of the file> unless given.
        backend: "deepspeed", "fsdp", or "auto", which is DeepSpeed where it is installed.
        resume: "none", "auto" for the newest good checkpoint in the folder, or the path of a run or a checkpoint.
        accept_new_data: resume although the data set has changed.
        find_micro_batch: first find the largest micro-batch that fits, by trying.

    Raises:
        TrunklineError: what launchers/train.py prints, of `trunkline.engine.errors`. After an interrupt or a signal,
            when the last step is saved, it is an InterruptedRunError of `trunkline.engine.machine.stopping`.
    """
    given: tuple[Any, Any] = (None, task) if config is None else (task, config)
    own, config = given
    if not isinstance(config, RunConfig):
        raise ConfigError(
            "train: expected train(config) or train(task, config), with a config of load_config or parse_config, found "
            f"a {type(config).__name__}"
        )
    if not config.workload:
        if own is None:
            raise ConfigError(
                f"{config.source}: workload: is missing: name one of {', '.join(workloads())}, or train a task of your "
                "own: train(task, config)"
            )
        config = replace(config, workload=type(own).__name__)
    if output_dir == "":
        raise ConfigError("output_dir: give the path of a folder, found ''")
    name = "default" if config.source == _NO_FILE else Path(config.source).stem
    folder = Path("runs") / config.workload / name if output_dir is None else Path(output_dir)
    backend = choose_backend(backend)
    if not _training.acquire(blocking=False):
        raise TrunklineError("train: this process trains already, in another thread: wait for that run to end")
    try:
        with world(config.training.hang_timeout_s) as ranks, _settings_of_torch(ranks):
            agree({"--find-micro-batch": find_micro_batch})
            trainer = Trainer(
                make_task(config) if own is None else own, config, ranks, folder,
                backend=backend, resume=resume, accept_new_data=accept_new_data,
            )  # fmt: skip
            try:
                if find_micro_batch:
                    with trainer.starting():
                        find(trainer)
                return _finished(trainer)
            finally:
                if not stopping.is_listening():  # a program that ends waits for no device that may be stuck
                    trainer.close()
    finally:
        _training.release()


def _finished(trainer: Trainer) -> Trained:
    progress, folder, ranks = trainer.run(), trainer.folder, trainer.ranks
    if ranks.is_main:
        try:
            report = str(write_report(folder).relative_to(folder))
        except Exception as error:  # whatever it is, the run is done, and the other ranks wait for the lines below
            why = str(error) if isinstance(error, OSError | DataError) else f"{type(error).__name__}: {error}"
            report = (
                f"no report ({why}); `python -m trunkline.engine.record.report {folder}` writes it once that is mended"
            )
        LOG.info(f"done: {folder} holds {outcome(folder, trainer.config.training.best, progress, report)}")
    rows = from_main(_last_rows(folder) if ranks.is_main else {}, ranks)
    return Trained(
        folder,
        progress.step,
        rows.get("train", {}),
        rows.get("val", {}),
        dict(progress.best_metrics),
        progress.best_step,
    )


def _last_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line of metrics.jsonl by split."""
    try:
        rows = {row.get("split"): row for row in read_metrics(folder / METRICS)}
    except OSError:
        return {}
    return {str(split): {k: v for k, v in row.items() if k not in ("step", "split")} for split, row in rows.items()}


@contextmanager
def _settings_of_torch(ranks: Ranks) -> Iterator[None]:
    """Afterwards torch's random state and mode, Python's warnings and DeepSpeed's logger are what they were."""
    mode, log = torch.get_deterministic_debug_mode(), logging.getLogger("DeepSpeed")
    level = log.level
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        try:
            yield
        finally:
            log.setLevel(level)
            if mode != torch.get_deterministic_debug_mode():
                torch.set_deterministic_debug_mode(mode)
