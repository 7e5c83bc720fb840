"""Pages point at what is there: links, files, and flags of the commands that they show."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, commands, read, section, spans
from trunkline.engine.config.flags import Parser
from trunkline.engine.errors import ConfigError
from trunkline.launchers import command_line, evaluate
from trunkline.launchers.cli import COMMANDS
from trunkline.models.registry import add_flags, workloads

HEADINGS = [
    "What it does", "Quick start", "Your own data", "Configuration", "Training", "Evaluating and predicting", "Results",
    "Limits",
]  # fmt: skip
MADE_BY_A_RUN = {"data", "runs", "report", "best", "final", "checkpoints", "tensorboard", "shown", "evaluation"}


@pytest.mark.parametrize("workload", workloads())
def test_the_pages_of_all_workloads_have_the_same_headings_in_the_same_order(workload: str) -> None:
    assert re.findall("^## (.*)", read(f"docs/{workload}.md"), re.MULTILINE) == HEADINGS


def anchor(heading: str) -> str:
    """As GitHub names a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", read(page)):
        name, _, place = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if place:
            headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            assert place in map(anchor, headings), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    for span in spans(read(page)):
        for path in re.findall(r"(?<![\w/.<-])(?:[\w-]+/)+[\w.-]+\.(?:py|md|json|toml|png|sh|yaml)\b", span):
            assert path.split("/")[0] in MADE_BY_A_RUN or (ROOT / path).exists(), f"{page} names {path}"


def launcher_call(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The launcher that a command line starts, by any program, and its flags."""
    for place, word in enumerate(words):
        if found := re.fullmatch(r"(?:launchers/)?(\w+)\.py|trunkline\.launchers\.(\w+)", word):
            name = found[1] or found[2]
            if (ROOT / "launchers" / f"{name}.py").exists():
                return name, list(words[place + 1 :])
    for place, word in enumerate(words[:-1]):
        if word == "trunkline" and words[place + 1] in COMMANDS:
            return words[place + 1].replace("-", "_"), list(words[place + 2 :])
    return None


def calls(page: Path) -> list[tuple[str, list[str]]]:
    """The launchers that a page starts with flags, in blocks and in running text, but for a workload that it makes."""
    lines = list(commands(read(page)))
    for span in spans(read(page)):
        with contextlib.suppress(ValueError):
            lines.append(shlex.split(span))
    called = [call for line in lines if (call := launcher_call(line))]
    made = {words[0] for name, words in called if name == "new_workload" and words}
    return [
        (name, words)
        for name, words in called
        if any(word.startswith("-") for word in words) and not made & set("/".join(words).split("/"))
    ]


def complaint(launcher: str, words: Sequence[str], workload: str) -> str:
    """What a launcher's parser says against its flags; nothing runs. "..." stands for a value, or for more flags."""
    plain = [word if word[:1] + word[-1:] == "[]" else word.strip("[];") for word in words]
    plain = ["1" if word == "N" else word for word in plain]
    said = ""
    for line in (plain, [word for word in plain if word != "..."]):
        heard = io.StringIO()
        try:
            with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
                parse(launcher, line, workload)
        except (SystemExit, ConfigError) as error:
            if not isinstance(error, SystemExit) or error.code:
                said = said or str(error) + heard.getvalue()
                continue
        return ""
    return said


def parse(launcher: str, words: list[str], workload: str) -> None:
    """Raises SystemExit or ConfigError, as the launcher itself would."""
    parser = Parser()
    if launcher == "train":
        config = words.index("--config") + 1 if "--config" in words else 0
        if config and not (ROOT / words[config]).is_file() and not (ROOT / f"configs/{words[config]}.json").is_file():
            words = [*words[:config], f"{workload}/demo", *words[config + 1 :]]  # the user's own
        if not config and words[0] not in workloads() and "--workload" not in words:
            words = [*words, "--config", f"{workload}/demo"]  # a flag alone
        command_line.parse(words)
    elif launcher == "prepare":
        add_flags(words[0], "prepare", parser)
        parser.parse_args(words[1:])
    elif launcher in ("evaluate", "predict"):
        parser.add_argument("--run")
        parser.add_argument("--device")
        if launcher == "evaluate":
            evaluate._add_arguments(parser, None)
        add_flags(workload, launcher, parser)
        parser.parse_args(words)
    elif launcher == "bench":
        getattr(importlib.import_module("trunkline.benchmarks.flags"), words[0])(parser)
        parser.parse_args(words[1:])
    else:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            importlib.import_module(f"trunkline.launchers.{launcher}").main(["--help"])
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            if not re.search(rf"{flag}\b", shown.getvalue()):
                raise ConfigError(f"{launcher} has no flag {flag}")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_has_flags_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    own = [page.stem] if page.stem in workloads() else workloads()
    for launcher, words in calls(page):
        complaints = [complaint(launcher, words, workload) for workload in own]
        assert not all(complaints), f"{page}: {launcher} {shlex.join(words)}: {complaints[0]}"


def test_a_flag_that_does_not_exist_is_found() -> None:
    for line in (
        "python launchers/train.py --config fluid/demo --stepz 3",
        "trunkline prepare causal_lm --kind text --source a --out b --train-tokenizer --vocab 3",
        "python launchers/evaluate.py --run RUN --horizonz 3",
        "python launchers/export.py --run RUN --out b --dtyp bfloat16",
        "python launchers/bench.py attention --sweeep forward",
        "python launchers/doctor.py --slow",
    ):
        call = launcher_call(line.split())
        assert call is not None
        assert complaint(*call, "fluid"), line


def test_every_module_that_a_page_runs_is_there() -> None:
    for page in PAGES:
        for module in re.findall(r"python -m (trunkline[\w.]+)", read(page)):
            assert importlib.util.find_spec(module), f"{page} runs {module}"


def diagrams() -> list[list[tuple[str, str]]]:
    """The arrows of each diagram of CONTRIBUTING, from file or folder to file or folder. Every line is understood."""
    node, found = re.compile(r'(\w+)(?:\["([^"]+)"\])?'), []
    for _, block in re.findall(r"^```mermaid\nflowchart (TD|LR)\n(.*?)^```", read("CONTRIBUTING.md"), re.M | re.S):
        names: dict[str, str] = {}
        arrows = []
        for line in block.splitlines():
            ends = re.fullmatch(rf"    {node.pattern} -->(?:\|[\w ,-]+\|)? {node.pattern}", line)
            assert ends, line
            for name, label in ((ends[1], ends[2]), (ends[3], ends[4])):
                assert name in names or label, f"{line}: {name} has no label"
                assert label is None or names.setdefault(name, label) == label
            arrows.append((names[ends[1]], names[ends[3]]))
        found.append(arrows)
    return found


def test_the_diagrams_show_files_that_exist_and_imports_that_are_there() -> None:
    imports, one_step = diagrams()
    assert not [name for arrow in (*imports, *one_step) for name in arrow if not (ROOT / name).exists()]
    for start, end in imports:
        files = [ROOT / start] if start.endswith(".py") else (ROOT / start).rglob("*.py")
        module = "trunkline." + end.removesuffix(".py").replace("/", ".")
        assert any(re.search(rf"(from|import) {module}\b", file.read_text()) for file in files), (start, end)


def test_a_section_is_read_to_its_end() -> None:
    assert "shutdown-timeout" in section("docs/operating.md", "Signals")
    assert "## " not in section("docs/operating.md", "Signals")
