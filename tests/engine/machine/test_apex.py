"""Real interpreters look at folders laid out as pip lays them out; importing what lies in them would leave a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

LOOK = """
import json
from trunkline.engine.machine.apex import find_apex
apex = find_apex()
print(json.dumps({"apex": apex and [apex.owner, str(apex.folder), apex.version, apex.has_cuda_extensions]}))
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


def test_the_web_toolkit_named_apex_is_not_nvidias(site: Path) -> None:
    install(site, "apex", "0.9.10.dev0", ["apex/__init__.py", "apex/views.py", "apex/lib/libapex.py", "apex/models.py"])
    assert _look(site, site, ROOT)["apex"] == ["other", str(site / "apex"), "0.9.10.dev0", False]


@pytest.mark.parametrize("extensions", [False, True])
def test_nvidias_apex_is_known_by_what_is_in_it(site: Path, extensions: bool) -> None:
    files = [f"apex/{part}__init__.py" for part in ("", "multi_tensor_apply/", "optimizers/", "normalization/")]
    install(site, "apex", "0.1", files + (["amp_C.py"] if extensions else []))
    assert _look(site, site, ROOT)["apex"] == ["nvidia", str(site / "apex"), "0.1", extensions]
