"""Flags of the command line that belong to one workload. Each is a function of the configuration.

    FLAGS = (
        Flag("data_path", "folder of pictures", str, "data.path", required=("data.path",)),
        Flag("batch_size", "pictures per GPU", int, batch_per_gpu, default=256),
    )

    def batch_per_gpu(config, value, world_size):
        accumulation = value_at(config, "deepspeed.gradient_accumulation_steps") or 1
        return {"deepspeed.train_micro_batch_size_per_gpu": value,
                "deepspeed.train_batch_size": value * world_size * accumulation}

Flags act in the order in which they are declared, on top of the configuration file, and --set on top of them. Without
a file, flags that are not given act by their `default`, but leave alone what a flag before them was given for.
A user may write `_` or `-` in a flag's name, and --flag, --flag=true, --flag false, --no-flag for true or false.
This module imports nothing that takes long.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline.engine.config.draft import value_at
from trunkline.engine.config.json_object import nearest
from trunkline.engine.errors import ConfigError

Change = Callable[[dict[str, Any], Any, int], dict[str, Any]]
"""(configuration so far, the flag's value, number of ranks) -> {dotted key: value}; raises ConfigError.

A key "--output-dir", "--resume" or "--onnx" stands for that flag of launchers/train.py, which a user's own wins over.
"--resume" may be True: from the run's own folder, which must hold a checkpoint then.
"--instead" names a launcher that works on the run's folder in place of training, and its flags: ["evaluate", "--split",
"val"].
"""


@dataclass(frozen=True)
class Flag:
    """One flag.

    name, help: as `--name`, and what --help says of it
    type: bool, or a function of the text that raises ValueError, such as int and str
    sets: the dotted key that takes the value, or a function that says what changes
    default: what is taken where a run starts without a configuration file; None: nothing
    required: dotted keys of which one has to be set in the end, by this flag or otherwise
    alone: what stands for a value where the flag is given without one; None: it needs one
    defaults: the file in place of the workload's, where the flag is true and there is no configuration file
    check: of the finished configuration and the value, what to say at the start; raises ConfigError
    """

    name: str
    help: str
    type: Callable[[str], Any]
    sets: str | Change
    default: Any = None
    choices: tuple[Any, ...] | None = None
    required: tuple[str, ...] = ()
    alone: Any = None
    defaults: Path | None = None
    check: Callable[[dict[str, Any], Any], list[str]] | None = None

    @property
    def option(self) -> str:
        """As a user types it."""
        return f"--{self.name}"

    def add_to(self, parser: Any) -> None:
        """Add the flag to a parser or a group of one; its value is None where it is not given."""
        text = self.help.replace("%", "%%") + ("" if self.default is None else f" (without --config: {self.default})")
        if self.type is bool:
            parser.add_argument(self.option, dest=self.option, type=boolean, nargs="?", const=True, help=text,
                                metavar="true|false")  # fmt: skip
            parser.add_argument(f"--no-{self.name}", dest=self.option, action="store_const", const=False,
                                help=argparse.SUPPRESS)  # fmt: skip
        else:
            without: dict[str, Any] = {} if self.alone is None else {"nargs": "?", "const": self.alone}
            parser.add_argument(self.option, dest=self.option, type=self.type, choices=self.choices, help=text,
                                metavar=None if self.choices else self.name.upper().replace("-", "_"),
                                **without)  # fmt: skip

    def is_missing(self, config: dict[str, Any]) -> bool:
        """Whether what the flag is needed for is set by nothing."""
        return bool(self.required) and all(value_at(config, key) is None for key in self.required)

    def changes(self, config: dict[str, Any], value: Any, world_size: int) -> dict[str, Any]:
        """{dotted key: value} that the flag means with `value`. Raises ConfigError."""
        if isinstance(self.sets, str):
            return {self.sets: value}
        try:
            return self.sets(config, value, world_size)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # at unchecked values
            raise ConfigError(f"{self.option} {value}: means nothing with this configuration ({error!r})") from error


LENGTH = (
    Flag("epochs", "passes over the training data", int,
         lambda config, value, world_size: {"training.epochs": value, "training.steps": None}),
    Flag("steps", "optimizer steps, in place of epochs", int,
         lambda config, value, world_size: {"training.steps": value, "training.epochs": None}),
)  # fmt: skip
"""The flags that every workload has."""


def boolean(text: str) -> bool:
    """True or False, from what people write. Raises argparse.ArgumentTypeError."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return known[text.lower()]


def seed(text: str) -> int:
    """The type of a flag for a seed: what numpy, torch and Python all take. Raises argparse.ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"use a whole number from 0 to 2^63 - 1, found {text[:80]!r}")
    return int(text)


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """The type of a flag that takes one of some names, in any case; of another word it names the nearest."""

    def name_of(text: str) -> str:
        found = {name.lower(): name for name in names}
        if text.lower() not in found:
            raise argparse.ArgumentTypeError(f"unknown '{text}'{nearest(text, names)}")
        return found[text.lower()]

    return name_of


def _path(text: str) -> Path:
    """Path("") would be the working directory, which nobody who writes --out "$UNSET" means."""
    if not text:
        raise argparse.ArgumentTypeError("give a path, found ''")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """Takes `_` for `-` in flags, no abbreviations and no empty paths, and names the nearest to a flag that is unknown.

    hint: what an error about an unknown flag adds
    """

    def __init__(self, *, hint: str = "", **how: Any) -> None:
        ours: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**ours | how)
        self.register("type", Path, _path)
        self._hint = f" ({hint}; --help lists all flags)" if hint else " (--help lists all flags)"

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's. Raises ConfigError for a flag that is unknown."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                again = "; write --set before it, too" if "=" in unknown[0] and "--set" in self.options() else ""
                raise ConfigError(f"{name}: no flag stands before it{again}{self._hint}")
            close = difflib.get_close_matches(name, sorted(self.options()), n=1, cutoff=0.6)
            raise ConfigError(f"{name}: unknown flag{f'; did you mean {close[0]}?' if close else ''}{self._hint}")
        return parsed

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._as_declared(word) for word in words], namespace)

    def _as_declared(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in self._option_string_actions:
            same = (each for each in self._option_string_actions if each.replace("_", "-") == name.replace("_", "-"))
            return next(same, name) + equals + value
        return word

    def options(self) -> set[str]:
        """Of this parser and of those of its sub-commands."""
        nested = [action.choices.values() for action in self._actions if isinstance(action.choices, dict)]
        return set(self._option_string_actions).union(*(each.options() for group in nested for each in group))
