"""constraints.txt pins the whole set-up: everything that Trunkline and its tests bring, for every supported Python."""

from __future__ import annotations

import importlib.metadata
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def _pins(python: str | None = None) -> dict[str, list[str]]:
    """Versions by package that hold for a Python ("3.10"), or for the one that runs."""
    environment = {} if python is None else {"python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, list[str]] = {}
    for line in CONSTRAINTS.read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pins.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    return pins


def _needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> None:
    """Add `name` and all that it needs here to `seen`."""
    key = (canonicalize_name(name), extras)
    if key in seen:
        return
    seen.add(key)
    for line in importlib.metadata.requires(name) or ():
        requirement = Requirement(line)
        wanted = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in wanted):
            _needed(requirement.name, frozenset(requirement.extras), seen)


def test_what_is_installed_is_what_is_pinned() -> None:
    try:
        importlib.metadata.version("trunkline")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Trunkline is not installed as a package")
    seen: set[tuple[str, frozenset[str]]] = set()
    _needed("trunkline", frozenset({"test"}), seen)
    names = {name for name, _ in seen} - {"trunkline"}
    assert {"torch", "deepspeed", "numpy", "pytest", "hjson", "pluggy"} <= names
    pins = _pins()
    assert not sorted(names - pins.keys()), "not pinned"
    installed = {name: Version(importlib.metadata.version(name)).public for name in sorted(names)}
    assert installed == {name: pins[name][0] for name in sorted(names)}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_has_one_version_for_each_python(python: str) -> None:
    assert {name: versions for name, versions in _pins(python).items() if len(versions) > 1} == {}


def test_every_package_is_pinned_for_every_python() -> None:
    first, *others = (_pins(python).keys() for python in PYTHONS)
    assert all(names == first for names in others)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py says."""
    said: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: said.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return said


@pytest.mark.parametrize("python", PYTHONS)
def test_what_setup_py_asks_for_has_a_floor_that_the_pinned_version_reaches(asked: dict[str, Any], python: str) -> None:
    pins = _pins(python)
    extras = (line for lines in asked["extras_require"].values() for line in lines)
    requirements = [Requirement(line) for line in (*asked["install_requires"], *extras)]
    outside = [each for each in requirements if each.name != "trunkline"]
    assert {"torch", "jinja2", "mypy", "wandb", "onnxscript"} <= {each.name for each in outside}
    for requirement in outside:
        assert [each.operator for each in requirement.specifier] == [">="], requirement
        (pinned,) = pins[canonicalize_name(requirement.name)]
        assert pinned in requirement.specifier, f"{requirement}, but {pinned} is pinned"


def test_setup_py_admits_the_pythons_that_the_pins_are_for(asked: dict[str, Any]) -> None:
    admitted = SpecifierSet(asked["python_requires"])
    assert [version for version in ("3.9", *PYTHONS, "3.14") if version in admitted] == list(PYTHONS)
    assert [each.rpartition(" ")[2] for each in asked["classifiers"]] == list(PYTHONS)
