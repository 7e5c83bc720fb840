"""Configuration: a JSON file, command-line settings on top, and the origin of every value.

    config = load_config(path, settings=["training.seed=1"], sections=lookup)
    config.training.seed, config.deepspeed.train_batch_size, config.data, config.model
    config.origins["training.seed"] == "command line"

A workload describes its own "data" and "model" sections with subclasses of `Strict`; `sections(workload)` hands them
in, so that this module knows no workload.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trunkline.engine.config.deepspeed_section import DeepSpeedSection
from trunkline.engine.config.draft import Draft, leaves, value_at, whence
from trunkline.engine.config.epochs import Steps, in_steps
from trunkline.engine.config.meaning import FolderPath
from trunkline.engine.config.strict import Strict, nearest, show, validated
from trunkline.engine.config.weights_section import Ema, ParameterRule
from trunkline.engine.errors import ConfigError, TrunklineError


class Best(Strict):
    """Which validation metric decides the best weights."""

    metric: str = Field("loss", description="validation metric that decides; metrics.jsonl names all of them")
    mode: Literal["auto", "min", "max"] = Field(
        default="auto", description="whether lower or higher is better; auto: as the task states of the metric"
    )


class EarlyStopping(Strict):
    """Stop after `patience` evaluations in a row that improved the best metric by less than `min_delta`."""

    patience: int = Field(gt=0, description="evaluations in a row without improvement after which training stops")
    min_delta: float = Field(
        default=0.0, ge=0, description="by how much the metric must be better to count as improved, in its own unit"
    )


class AdaptiveClipping(Strict):
    """Clip gradients at `factor` times a moving average of recent norms, beside deepspeed.gradient_clipping."""

    factor: float = Field(default=2.0, gt=0, description="gradients are clipped at this times the average norm")
    beta: float = Field(default=0.98, gt=0, lt=1, description="of the average, over about 1 / (1 - beta) steps")
    warmup_steps: int = Field(default=50, ge=0, description="steps that only enter the average")


class Tracked(Strict):
    """Where and under which names a run is shown. What is given wins over the environment, and that over the task."""

    experiment: str | None = Field(None, min_length=1, description="MLflow's experiment, Weights & Biases' project")
    run: str | None = Field(None, min_length=1, description="what the run is called there")
    uri: str | None = Field(None, min_length=1, description="MLflow's server, database or folder")
    leave_out: tuple[str, ...] = Field((), description="of the files that the task hands over, those that stay here")


class Training(Strict):
    """What the engine itself decides. Batch sizes, optimizer, schedule and precision are DeepSpeed's section."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [one], "properties": {one: {"type": "integer"}, other: {"type": "null"}}}
                for one, other in (("epochs", "steps"), ("steps", "epochs"))
            ]
        }
    )

    epochs: int | None = Field(default=None, gt=0, description="passes over the training data; give this or steps")
    steps: int | None = Field(default=None, gt=0, description="optimizer steps; give this or epochs")
    eval_every: Steps = Field(default=500, description="optimizer steps between evaluations, or epochs")
    eval_at_start: bool = Field(default=False, description="evaluate before the first step too")
    eval_samples: int | None = Field(
        default=None, gt=0, description="evenly spaced validation samples used; all if null"
    )
    save_every: Steps = Field(default=1000, description="optimizer steps between checkpoints, or epochs")
    async_save: bool = Field(default=True, description="write checkpoints while training continues")
    keep_last: int = Field(default=3, gt=0, description="checkpoints kept")
    keep_best: bool = Field(default=False, description="save at each new best too, and keep that of the best step")
    log_every: Steps = Field(default=10, description="optimizer steps between lines of metrics.jsonl, or epochs")
    log_means: bool = Field(default=False, description="log the mean over the steps since the last line, not a step")
    best: Best = Field(Best(), description="which metric decides best/")
    early_stopping: EarlyStopping | None = Field(None, description="when training stops before its end; never if null")
    adaptive_clipping: AdaptiveClipping | None = Field(
        None, description="gradient clipping that follows the recent norms; none if null"
    )
    parameters: tuple[ParameterRule, ...] = Field(
        (), description="rules for weight decay, rates and freezing; of several rules the first that matches wins"
    )
    ema: Ema | None = Field(None, description="a moving average of the weights; none if null")
    seed: int = Field(
        default=42, ge=0, description="of initial weights, order of samples, dropout and all that is drawn"
    )
    group_by_length: bool = Field(
        default=False, description="batches of samples of about one length, which need less padding"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="programs that show the run: tensorboard, wandb, mlflow"
    )
    tracked: Tracked = Field(Tracked(), description="names under which trackers show the run")
    start_from: FolderPath | None = Field(
        default=None, description="another program's checkpoint, which a run begins with that has none of its own"
    )
    activation_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass: less memory, more time"
    )
    compile: bool | str = Field(
        default=False, description="true, or the name of a torch.compile backend; each block must be one graph"
    )
    num_workers: int = Field(default=0, ge=0, le=1024, description="processes a rank that prepare batches ahead")
    nonfinite_limit: int = Field(default=10, gt=0, description="stop after this many skipped steps in a row")
    hang_timeout_s: float = Field(
        default=1800, gt=0, description="seconds without progress on any rank after which the run ends"
    )
    deterministic: bool = Field(default=False, description="torch.use_deterministic_algorithms")

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("name each tracker once")
        return trackers

    @field_validator("compile")
    @classmethod
    def _known_backend(cls, backend: bool | str) -> bool | str:
        if isinstance(backend, str) and backend != "inductor":
            from torch._dynamo import list_backends  # which takes seconds

            if backend not in (known := list_backends(exclude_tags=())):
                raise ValueError(f"torch.compile has no such backend{nearest(backend, known)}")
        return backend

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either 'epochs' or 'steps'")
        return self


@dataclass(frozen=True)
class RunConfig:
    """A whole, validated configuration. `origins` says of every dotted key where its value came from."""

    source: str
    workload: str
    data: Any
    model: Any
    training: Training
    deepspeed: DeepSpeedSection
    origins: dict[str, str]
    in_epochs: dict[str, Any] = field(default_factory=dict)
    """What was asked for in epochs, by dotted key. The sections hold steps in its place after `in_steps`."""
    notes: tuple[str, ...] = ()
    """What flags of the command line have to say when the run starts."""

    def in_steps(self, steps_per_epoch: int) -> RunConfig:
        """The same run with steps in place of epochs. `as_dict` keeps the epochs."""

        def steps(asked: dict[str, Any]) -> dict[str, Any]:
            found = {key: in_steps(value, steps_per_epoch) for key, value in asked.items()}
            return {key: value for key, value in found.items() if value != asked[key]}

        training, section, schedule = self.training, self.deepspeed, self.deepspeed.scheduler
        in_epochs = {f"training.{key}": getattr(training, key) for key in steps(dict(training))}
        if schedule is not None:
            params = schedule.params
            in_epochs |= {f"deepspeed.scheduler.params.{key}": params[key] for key in steps(params)}
            schedule = schedule.model_copy(update={"params": params | steps(params)})
            section = section.model_copy(update={"scheduler": schedule})
        training = training.model_copy(update=steps(dict(training)))
        return replace(self, training=training, deepspeed=section, in_epochs=self.in_epochs | in_epochs)

    def in_force(self, key: str) -> Any:
        """The value of a dotted key that the run goes by."""
        return value_at(self._values(), key)

    def as_dict(self) -> dict[str, Any]:
        """The configuration of record: every value, defaults included, as it was asked for, ready for JSON."""
        values = self._values()
        for key, value in self.in_epochs.items():
            holder, _, name = key.rpartition(".")
            value_at(values, holder)[name] = value
        return values

    def _values(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "data": self.data.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "deepspeed": self.deepspeed.model_dump(mode="json", exclude_none=True),
        }

    def where(self, key: str) -> str:
        """What a message about a dotted key begins with: where its value came from."""
        return whence(key, self.origins, self.source)

    @contextmanager
    def naming_origins(self) -> Iterator[None]:
        """Within, an error that begins with one of the configuration's keys is given its origin, once."""
        try:
            yield
        except TrunklineError as error:
            begins = _BEGINS_WITH_A_KEY.match(str(error))
            if error.origin is None and begins is not None:
                section, _, below = begins[0].partition(".")
                if not below or below.partition(".")[0] in dict(getattr(self, section)):  # else a file's name
                    error.origin = self.where(begins[0])
            raise


Sections = Callable[[str], tuple[type[BaseModel], type[BaseModel]]]
SECTIONS = ("workload", "data", "model", "training", "deepspeed")
_BEGINS_WITH_A_KEY = re.compile(rf"(?:{'|'.join(SECTIONS[1:])})(?:(?:\.\w+)+|(?=: ))")


def load_config(
    path: str | Path,
    *,
    sections: Sections,
    settings: Sequence[str] = (),
    deepspeed: str | Path | None = None,
) -> RunConfig:
    """Read and validate a run's configuration.

    Args:
        path: the JSON file, or the name of a configuration that is shipped, such as fluid/demo.
        sections: gives the models of the "data" and "model" sections for a workload's name; raises ConfigError for
            a name that it does not know.
        settings: "dotted.key=value" strings that win over the file; values are JSON, or else plain text.
        deepspeed: a DeepSpeed configuration file that takes the place of the "deepspeed" section.

    Raises:
        ConfigError: with file, key, value and remedy; all mistakes of one section in one message.
    """
    draft = Draft.read(path, deepspeed)
    for setting in settings:
        draft.set(setting)
    return checked(draft, sections)


def checked(draft: Draft, sections: Sections) -> RunConfig:
    """The draft as a configuration. Raises ConfigError as `load_config` does."""
    raw, path = draft.values, draft.source
    for key in raw:
        if key not in SECTIONS:
            raise ConfigError(
                f"{draft.where(key)}: unknown key '{key}'{nearest(key, SECTIONS)}; the sections are {SECTIONS}"
            )
    for key in SECTIONS:
        if key not in raw:
            raise ConfigError(f"{path}: the section '{key}' is missing; a run's file has {', '.join(SECTIONS)}")
    if not isinstance(raw["workload"], str):
        raise ConfigError(
            f"{draft.where('workload')}: workload: expected a name in quotes, found {show(raw['workload'])}"
        )
    data_model, model_model = sections(raw["workload"])
    config = RunConfig(
        source=path,
        workload=raw["workload"],
        data=validated(data_model, raw["data"], "data", draft.where),
        model=validated(model_model, raw["model"], "model", draft.where),
        training=validated(Training, raw["training"], "training", draft.where),
        deepspeed=validated(DeepSpeedSection, raw["deepspeed"], "deepspeed", draft.where),
        origins=draft.origins,
        notes=tuple(draft.notes),
    )
    values, origins = config.as_dict(), config.origins
    origins |= {key: "auto" for key in origins if value_at(raw, key) == "auto" != value_at(values, key)}
    for key in leaves(values):
        origins.setdefault(key, "default")
    return config
