"""The registry: names lead to workloads, of this and of other packages, and mistakes are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.machine.test_apex import install
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.models.registry import config_sections, flags_of, open_room, workload_of_run, workloads

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", workloads())
def test_every_workload_has_its_rooms(name: str) -> None:
    data, model = config_sections(name)
    assert data.model_fields
    assert model.model_fields
    assert callable(open_room(name, "task").make_task)
    for room in ("prepare", "evaluate", "predict"):
        assert callable(open_room(name, room).run)
        assert callable(getattr(open_room(name, "flags"), room))
    flags, defaults = flags_of(name)
    assert {"store", "data_path"} & {flag.name for flag in flags}
    assert defaults is not None
    assert json.loads(defaults.read_text())["workload"] == name


def test_the_workloads_are_the_folders_under_models() -> None:
    assert workloads() == ["causal_lm", "fluid", "image_classification", "seq2seq", "token_image"]
    listed = subprocess.run(
        ["make", "--no-print-directory", "-f", "-", "names"], cwd=ROOT, capture_output=True, text=True, check=True,
        input="include Makefile\nnames:\n\t@echo $(sort $(WORKLOADS))\n",
    )  # fmt: skip
    assert listed.stdout.split() == workloads()


def test_an_unknown_workload_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown 'fluit'; did you mean 'fluid'"):
        config_sections("fluit")


@pytest.mark.parametrize("inside", [".", "best", "final"])
def test_a_run_tells_its_workload(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / inside / "config.json").write_text(json.dumps({"workload": "fluid"}))
    assert workload_of_run(tmp_path) == "fluid"


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        workload_of_run(tmp_path)
    (tmp_path / "fluid-demo").mkdir()
    with pytest.raises(CheckpointError, match=r"nothing is there; did you mean .*/fluid-demo\?"):
        workload_of_run(tmp_path / "fluid-dem")
    (tmp_path / "config.json").write_text('{"workload": "gas"}')
    with pytest.raises(ConfigError, match="'gas'"):
        workload_of_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read \(Expecting"):
        workload_of_run(tmp_path)


def add_workload(site: Path, distribution: str, name: str, package: str) -> None:
    """A package that adds a workload, laid out as pip lays it out. Its modules leave a trace if they are imported."""
    install(site, distribution, "1.0", [f"{package}/__init__.py"])
    (site / f"{distribution}-1.0.dist-info/entry_points.txt").write_text(f"[trunkline.workloads]\n{name} = {package}\n")


def ask(site: Path, code: str) -> str:
    """What a new interpreter prints that sees the packages in `site`."""
    done = subprocess.run(
        [sys.executable, "-c", f"from trunkline.models.registry import *\n{code}"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}, cwd=site, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_package_adds_a_workload_and_names_are_found_without_importing_it(tmp_path: Path) -> None:
    add_workload(tmp_path, "audio-tools", "audio", "audio_tools")
    printed = ask(tmp_path, "import sys; print(workloads(), {'torch', 'pydantic'} & sys.modules.keys())")
    assert printed == "['audio', 'causal_lm', 'fluid', 'image_classification', 'seq2seq', 'token_image'] set()\n"
    assert not (tmp_path / "IMPORTED").exists()
    (tmp_path / "audio_tools/__init__.py").write_text("")
    (tmp_path / "audio_tools/config.py").write_text("class Data: ...\nclass Model: ...\n")
    assert ask(tmp_path, "print([kind.__module__ for kind in config_sections('audio')])").count("audio_tools") == 2
    assert ask(tmp_path, "print(flags_of('audio'))") == "((), None)\n"


def test_a_room_that_is_not_there_is_named(tmp_path: Path) -> None:
    add_workload(tmp_path, "audio-tools", "audio", "audio_tools")
    (tmp_path / "audio_tools/__init__.py").write_text("")
    said = "try: open_room('audio', 'predict')\nexcept ConfigError as error: print(error)"
    assert ask(tmp_path, said) == "workload 'audio': audio-tools 1.0 gives no module audio_tools.predict\n"
    (tmp_path / "audio_tools/predict.py").write_text("import a_library_that_it_needs")
    assert ask(tmp_path, said) == "workload 'audio': audio_tools.predict needs a_library_that_it_needs: install it\n"
    (tmp_path / "audio_tools/flags.py").write_text("import another")
    said = "try: flags_of('audio')\nexcept ConfigError as error: print(error)"
    assert ask(tmp_path, said) == "workload 'audio': audio_tools.flags needs another: install it\n"
    (tmp_path / "audio_tools/flags.py").write_text("")
    assert ask(tmp_path, "print(flags_of('audio'))") == "((), None)\n"
    said = "try: add_flags('audio', 'predict', None)\nexcept ConfigError as error: print(error)"
    assert ask(tmp_path, said) == "workload 'audio': its module flags has no function predict(parser)\n"


@pytest.mark.parametrize(("name", "first"), [("audio", "audio_tools of audio-tools 1.0"),
                                             ("fluid", "trunkline.models.fluid of Trunkline")])  # fmt: skip
def test_two_packages_that_give_one_name_are_both_named(tmp_path: Path, name: str, first: str) -> None:
    add_workload(tmp_path, "audio-tools", "audio", "audio_tools")
    add_workload(tmp_path, "other", name, "other_package")
    said = ask(tmp_path, f"try: open_room('{name}', 'task')\nexcept ConfigError as error: print(error)")
    assert said.startswith(f"workload '{name}': given by ")
    assert {first, "other_package of other 1.0"} == set(said[said.index("by ") + 3 : said.rindex(":")].split(" and "))
    assert "causal_lm" in ask(tmp_path, "print(open_room('causal_lm', 'flags').__name__)")
    assert not (tmp_path / "IMPORTED").exists()
