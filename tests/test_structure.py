"""The house's rules that no other tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("engine", "kernels", "models", "launchers", "benchmarks")
MAY_IMPORT = {
    "engine": {"engine"},
    "kernels": {"kernels"},
    "models": {"models", "engine", "kernels"},
    "launchers": {"launchers", "models", "engine", "kernels"},
    "benchmarks": {"benchmarks", "launchers", "models", "engine", "kernels"},
}
SOURCES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*/*.json"))


def _imported(path: Path) -> dict[str, int]:
    """Every module that a file imports, anywhere in it, with the line."""
    modules = {}
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            modules[node.module or ""] = node.lineno
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if (ROOT / Path(*name.split(".")[1:])).with_suffix(".py").is_file():
                    modules[name] = node.lineno
    return modules


def _floor(module: str) -> str | None:
    """The top-level folder of one of our modules; None for anybody else's."""
    name, _, rest = module.partition(".")
    return rest.split(".")[0] if name == "trunkline" else None


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=str)
def test_our_modules_are_imported_under_one_name(path: Path) -> None:
    for module, line in _imported(path).items():
        assert module.split(".")[0] not in FLOORS, f"{path}:{line} imports {module}, not trunkline.{module}"


def test_the_folders_that_trunkline_links_to_are_no_packages_of_their_own() -> None:
    for floor in (*FLOORS, "configs"):
        assert (ROOT / "trunkline" / floor).resolve() == ROOT / floor
        assert not (ROOT / floor / "__init__.py").exists(), f"`import {floor}` would find it before anybody else's"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_only_go_down(path: Path) -> None:
    for module, line in _imported(path).items():
        assert _floor(module) in {None, ""} | MAY_IMPORT[path.parts[0]], f"{path}:{line} imports {module}"
        assert module.split(".")[0] != "tests", f"{path}:{line} imports {module}"


def test_workloads_do_not_import_one_another() -> None:
    """models/text is no workload: it is what those of text share."""
    for path in SOURCES:
        if path.parts[0] != "models" or len(path.parts) < 3:
            continue
        for module, line in _imported(path).items():
            if module.startswith("trunkline.models."):
                assert module.split(".")[2] in (path.parts[1], "text", "registry"), f"{path}:{line} imports {module}"


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a directed graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for after in sorted(graph.get(node, ())):
            if found := visit(after, [*trail, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_no_imports_run_in_a_circle() -> None:
    modules = {".".join(("trunkline", *path.with_suffix("").parts)): path for path in SOURCES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    graph = {name: {module for module in _imported(path) if module in modules} for name, path in modules.items()}
    for name, after in graph.items():  # a module and the package that only lists it are one
        graph[name] = {each for each in after if each not in packages or not name.startswith(f"{each}.")}
    assert not _circle(graph)


ENGINE = (
    *(
        "errors",
        "tracking",
        "whole_state",
        "task",
        "machine",
        "config",
        "progress",
        "ranks",
        "data",
        "record",
        "state",
        "optim",
    ),
    *("backends", "evaluation", "plan_text", "memory", "planned_memory", "plan", "checkpoint", "readiness", "preview"),
    *("assembly",),
    *("run", "room", "step", "validation", "trainer", "trials"),
)


def test_rooms_of_the_engine_import_only_those_before_them() -> None:
    for path in SOURCES:
        if path.parts[0] == "engine":
            room = path.relative_to("engine").parts[0].removesuffix(".py")
            for module, line in _imported(path).items():
                if module.startswith("trunkline.engine."):
                    other = module.split(".")[2]
                    assert ENGINE.index(other) <= ENGINE.index(room), f"{path}:{line} imports {module}"


ROOMS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "models").glob("[!_]*/"))


@pytest.mark.parametrize("floor", [*ROOMS, "kernels"])
def test_no_rooms_import_each_other_in_a_circle(floor: str) -> None:
    """A room is a folder; a file beside the rooms is one of its own."""
    graph: dict[str, set[str]] = {}
    prefix = "trunkline." + floor.replace("/", ".") + "."
    for path in SOURCES:
        if path.is_relative_to(floor) and path.name != "__init__.py":
            room = path.relative_to(floor).parts[0].removesuffix(".py")
            rooms = {name.removeprefix(prefix).split(".")[0] for name in _imported(path) if name.startswith(prefix)}
            graph.setdefault(room, set()).update(rooms - {room})
    assert not _circle(graph)


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in SOURCES if drawers & {part.removesuffix(".py") for part in path.parts}]


def test_every_test_file_mirrors_a_source_file() -> None:
    for floor in FLOORS:
        for test in (ROOT / "tests" / floor).rglob("test_*.py"):
            folder = ROOT / test.parent.relative_to(ROOT / "tests")
            assert folder.is_dir(), f"{test} tests a folder that does not exist"


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_shipped_configurations_are_valid(path: Path) -> None:
    from trunkline.engine.config.run_config import load_config
    from trunkline.models.registry import config_sections

    config = load_config(ROOT / path, sections=config_sections)
    assert config.workload == path.parts[1]


def test_tracked_files_are_small() -> None:
    for path in _tracked():
        assert path.stat().st_size < 2 * 2**20, f"{path} is large: data and weights do not belong here"


def test_no_file_names_a_place_on_one_machine() -> None:
    absolute = re.compile(r"(?<![\w./:$)}\]~<>-])/(\w+)/[\w.-]")
    everywhere = {"bin", "dev", "etc", "proc", "sys", "tmp", "usr", "path", "absolute"}
    for path in _tracked():
        if path.suffix in {".py", ".md", ".json", ".toml", ".txt", ".sh"} or path.name in {"Makefile", "run"}:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                for top in absolute.findall(line):
                    assert top in everywhere, f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_documents_only_point_at_files_that_exist() -> None:
    code_path = re.compile(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|md|json|toml|png))`|\]\((?!https?:|#)([^)#]+)")
    for document in ROOT.glob("*.md"):
        for pair in code_path.findall(document.read_text()):
            target = pair[0] or pair[1]
            made_by_a_run = target.split("/")[0] in {"data", "runs", "report", "best", "final", "checkpoints"}
            assert made_by_a_run or (ROOT / target).exists(), f"{document.name} names {target}"


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("page", ["README.md", "docs/safeguards.md"])
def test_every_test_that_a_page_names_is_there(page: str) -> None:
    written = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / page).read_text()))
    assert named
    assert not [name for name in named if f"def {name}(" not in written]
