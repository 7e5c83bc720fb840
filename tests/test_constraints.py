"""constraints.txt pins the whole set-up: everything that Trunkline and its tests bring, for every supported Python."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
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
