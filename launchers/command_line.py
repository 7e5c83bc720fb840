"""The command line of launchers/train.py: a configuration file or a workload, the workload's own flags, and --set.

    command = parse(words)                 the file is read first, for it says whose flags there are
    draft = command.draft(world_size)       the file, then flags in the order of their declaration, then --set

This module imports nothing that takes long.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trunkline.engine.config.draft import Draft
from trunkline.engine.config.flags import LENGTH, Flag, Parser
from trunkline.engine.config.shipped import shipped
from trunkline.engine.errors import ConfigError
from trunkline.models.registry import flags_of, workloads

_USAGE = "%(prog)s --config FILE [flags]\n       %(prog)s WORKLOAD [flags]"
"""`--workload NAME`, at any place, is the same as NAME before all flags."""


@dataclass
class Command:
    """arguments: the launcher's own, by name, and those of `flags`, by option; file: the run's, or the defaults; name:
    the last part of the run's folder, where no other is given."""

    arguments: argparse.Namespace
    file: Draft
    flags: Sequence[Flag]
    name: str

    def draft(self, world_size: int) -> Draft:
        """The configuration that is asked for, on `world_size` ranks, unchecked. Called once. Raises ConfigError.

        What flags decide of --output-dir and --resume enters `arguments`, where a user has not.
        """
        given, options = vars(self.arguments), {}
        if given["--epochs"] is not None and given["--steps"] is not None:
            raise ConfigError(f"--epochs {given['--epochs']} and --steps {given['--steps']}: give one of them")
        for flag in self.flags:
            value, is_default = given[flag.option], False
            if value is None and self.arguments.config is None:
                value, is_default = flag.default, True
            changes = {} if value is None else flag.changes(self.file.values, value, world_size)
            for key, meant in changes.items():
                if key.startswith("--"):
                    options[key.removeprefix("--").replace("-", "_")] = meant
                elif not is_default:
                    self.file.assign(key, meant, flag.option)
                elif not self._was_given(key):
                    self.file.assign(key, meant, f"{flag.option} by default")
        for name, meant in options.items():
            given[name] = meant if given[name] is None else given[name]
        if isinstance(given["resume"], str) and Path(given["resume"]).is_file():
            self.file.assign("training.start_from", given["resume"], "--resume")
            given["resume"] = "auto"  # what the run itself saves after it has begun with the file comes first
        for setting in self.arguments.set:
            self.file.set(setting)
        for flag in self.flags:
            if flag.is_missing(self.file.values):
                raise ConfigError(f"{flag.option}: is needed: {flag.help}")
            if flag.check is not None and given[flag.option] is not None:
                self.file.notes += flag.check(self.file.values, given[flag.option])
        return self.file

    def _was_given(self, key: str) -> bool:
        """Whether a flag that a user has given, or a DeepSpeed file, has set the key or something in it."""
        origins = [origin for name, origin in self.file.origins.items() if name == key or name.startswith(f"{key}.")]
        return any(origin not in ("file", "default") and not origin.endswith(" by default") for origin in origins)


def parse(words: Sequence[str], description: str | None = None) -> Command:
    """Raises ConfigError. Ends the process for --help, and where argparse finds a mistake."""
    workload, words = _workload_of(words)
    files = Parser(add_help=False, usage=_USAGE)
    files.add_argument("--config", type=Path, metavar="FILE", help="the run's JSON file, or a shipped one: fluid/demo")
    files.add_argument("--deepspeed", type=Path, metavar="FILE", help="a DeepSpeed file in place of the section")
    given = files.parse_known_args(words)[0]
    path, name = given.config, (given.config or Path("default")).stem
    if path is None and workload is not None:
        path, name = _defaults(workload, words)
    if path is None:
        _parser(files, description, workload, LENGTH).parse_args(words)  # --help ends here
        raise ConfigError(f"give --config FILE{f': {workload} has no defaults' if workload else _choices()}")
    file = Draft.read(path, given.deepspeed)
    if given.config is None:  # the workload's own, which no user has written
        file.origins = {key: "default" if origin == "file" else origin for key, origin in file.origins.items()}
    held = file.values.get("workload")
    if workload not in (None, held):
        raise ConfigError(f"{path}: workload: is {held!r}, but {workload!r} stands on the command line: leave that out")
    try:
        own = flags_of(held)[0] if isinstance(held, str) else ()
    except ConfigError as error:
        raise ConfigError(f"{file.where('workload')}: {error}") from error
    flags = (*own, *(flag for flag in LENGTH if flag.name not in {each.name for each in own}))
    return Command(_parser(files, description, held, flags).parse_args(words), file, flags, name)


def _choices() -> str:
    """What can be trained, a line each, and what to type first."""
    about = shipped()
    width = max(map(len, about))
    program = sys.argv[0] if sys.argv[0].startswith("trunkline ") else "python launchers/train.py"
    return "\n".join([
        f", or one of the workloads {', '.join(workloads())}. These come with Trunkline:", "",
        *(f"  {name:<{width}}  {trains}" for name, trains in about.items()), "",
        f"To try: `{program} --config causal_lm/demo --plan` shows what a run would be and needs no data.",
        "In a clone `make train` makes data, trains, evaluates and predicts, in minutes.",
    ])  # fmt: skip


def _defaults(workload: str, words: Sequence[str]) -> tuple[Path | None, str]:
    """The file that stands for one where none is given, and what its runs are called."""
    flags, path = flags_of(workload)
    asked, own = Parser(add_help=False), {flag.option: flag.defaults for flag in flags if flag.defaults is not None}
    for flag in flags:
        flag.add_to(asked)
    given = vars(asked.parse_known_args(words)[0]) if own else {}
    return next(((file, file.stem) for option, file in own.items() if given[option]), (path, "default"))


def _workload_of(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The workload, if the first word or --workload names one, and the words without it. A launcher may put its own
    before it."""
    first = 0
    for place, word in enumerate(words):
        flag, equals, name = word.partition("=")
        if flag == "--workload":
            end = place + (1 if equals else 2)
            name = name if equals else "".join(words[place + 1 : end])
            if not name or name.startswith("-"):
                raise ConfigError(f"--workload: needs a name: use one of {', '.join(workloads())}")
            return name, [*words[:place], *words[end:]]
    while first < len(words) and (found := re.fullmatch("--local[_-]rank(=.*)?", words[first])):
        first += 1 if found[1] else 2
    if first >= len(words) or words[first].startswith("-"):
        return None, list(words)
    return words[first], [*words[:first], *words[first + 1 :]]


def _parser(files: Parser, description: str | None, workload: str | None, flags: Sequence[Flag]) -> Parser:
    parser = Parser(
        parents=[files], usage=_USAGE, description=description,
        epilog=None if workload else f"The workloads: {', '.join(workloads())}.",
        hint=f"{workload} has {', '.join(flag.option for flag in flags)}" if workload else "",
    )  # fmt: skip
    parser.add_argument("--output-dir", type=Path, help="the run's folder; default runs/<workload>/<name of the file>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a.b=c wins over all else")
    parser.add_argument("--backend", default="auto", help="deepspeed, fsdp, or auto (default)")
    parser.add_argument(
        "--resume", metavar="none|auto|PATH",
        help="auto: the newest good checkpoint; default none; a file begins with another program's checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--find-micro-batch", action="store_true", help="first find the largest micro-batch that fits, by trying"
    )
    parser.add_argument("--onnx", action="store_const", const=True, help="in the end also best/model.onnx; extra: onnx")
    parser.add_argument("--accept-new-data", action="store_true", help="resume although the data set has changed")
    parser.add_argument(
        "--plan", nargs="?", const="text", choices=["text", "json"], help="show the plan, train nothing"
    )
    parser.add_argument("--world-size", type=int, help="with --plan: the number of ranks to plan for")
    parser.add_argument("--samples", type=int, help="with --plan: the number of training samples; needs no data then")
    parser.add_argument("--explain", metavar="KEY", help="say what a key of the configuration is: training.eval_every")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.set_defaults(instead=None)
    group = parser.add_argument_group(f"flags of {workload}" if workload else "flags of every workload")
    for flag in flags:
        flag.add_to(group)
    return parser
