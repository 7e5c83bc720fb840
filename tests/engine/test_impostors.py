"""Real interpreters look at folders laid out as pip lays them out; importing what lies in them would leave a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

LOOK = """
import json
from engine.errors import ConfigError
from engine.impostors import find_apex, hugging_face_kernels, own_packages, refuse_shadowed
try:
    refuse_shadowed()
    error = None
except ConfigError as refused:
    error = str(refused)
apex, other = find_apex(), hugging_face_kernels()
print(json.dumps({
    "packages": {each.name: [str(each.place), each.is_ours] for each in own_packages()},
    "apex": apex and [apex.owner, str(apex.folder), apex.version, apex.has_cuda_extensions],
    "hugging_face": other and other.version,
    "error": error,
}))
"""


def install(site: Path, name: str, version: str, files: list[str]) -> None:
    """Lay out a package in `site` as pip would. Its modules leave a file named IMPORTED behind if they are run."""
    trace = f"open({str(site / 'IMPORTED')!r}, 'w')\nraise RuntimeError('imported')\n"
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(trace)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def _look(site: Path, *path: Path) -> dict[str, Any]:
    """What a new interpreter sees with `path` before its own packages, from a folder that holds none of ours."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    outcome = subprocess.run(
        [sys.executable, "-P", "-c", LOOK] if sys.version_info >= (3, 11) else [sys.executable, "-c", LOOK],
        env=environment, cwd=site, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert not (site / "IMPORTED").exists(), "looking at a package ran its code"
    return json.loads(outcome.stdout)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return folder


def test_without_impostors_all_packages_are_ours(site: Path) -> None:
    seen = _look(site, ROOT)
    assert seen["packages"] == {name: [str(ROOT / name), True] for name in ("engine", "kernels", "models")}
    assert seen["error"] is None
    assert seen["hugging_face"] is None
    assert seen["apex"] is None


def test_hugging_faces_kernels_before_ours_is_refused_by_name(site: Path) -> None:
    install(site, "kernels", "0.17.2", ["kernels/__init__.py", "kernels/layer.py"])
    seen = _look(site, site, ROOT)
    assert seen["packages"]["kernels"] == [str(site / "kernels"), False]
    assert seen["packages"]["engine"][1]
    assert f"`import kernels` leads to {site / 'kernels'}; Hugging Face's `kernels` 0.17.2" in seen["error"]
    assert "pip uninstall kernels" in seen["error"]
    assert f"PYTHONPATH={ROOT}" in seen["error"]


def test_hugging_faces_kernels_behind_ours_is_seen_and_does_no_harm(site: Path) -> None:
    install(site, "kernels", "0.17.2", ["kernels/__init__.py"])
    seen = _look(site, ROOT, site)
    assert seen["packages"]["kernels"] == [str(ROOT / "kernels"), True]
    assert seen["hugging_face"] == "0.17.2"
    assert seen["error"] is None


@pytest.mark.parametrize("file", ["models/__init__.py", "models.py"])
def test_another_projects_models_is_refused(site: Path, file: str) -> None:
    install(site, "somebody", "1.0", [file])
    seen = _look(site, site, ROOT)
    assert not seen["packages"]["models"][1]
    assert "another project's `models` hides Trunkline's" in seen["error"]


def test_the_web_toolkit_named_apex_is_not_nvidias(site: Path) -> None:
    install(site, "apex", "0.9.10.dev0", ["apex/__init__.py", "apex/views.py", "apex/lib/libapex.py", "apex/models.py"])
    assert _look(site, site, ROOT)["apex"] == ["other", str(site / "apex"), "0.9.10.dev0", False]


@pytest.mark.parametrize("extensions", [False, True])
def test_nvidias_apex_is_known_by_what_is_in_it(site: Path, extensions: bool) -> None:
    files = [f"apex/{part}__init__.py" for part in ("", "multi_tensor_apply/", "optimizers/", "normalization/")]
    install(site, "apex", "0.1", files + (["amp_C.py"] if extensions else []))
    assert _look(site, site, ROOT)["apex"] == ["nvidia", str(site / "apex"), "0.1", extensions]
