from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.engine.config.run_config import load_config
from trunkline.engine.config.shipped import find_config
from trunkline.engine.errors import ConfigError
from trunkline.models.registry import config_sections

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.json")), ids=lambda path: path.stem)
def test_a_name_is_the_file_that_is_shipped(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{path.parent.name}/{path.stem}"
    Path(name).mkdir(parents=True)  # as a user's folder may be called
    assert find_config(name).samefile(path)
    by_name, by_path = (load_config(each, sections=config_sections) for each in (name, path))
    assert by_name.as_dict() == by_path.as_dict()


def test_a_file_of_the_user_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fluid").mkdir()
    Path("fluid/demo").write_text("{}")
    assert find_config("fluid/demo") == Path("fluid/demo")
    with pytest.raises(ConfigError, match="fluid/demo: the section 'workload' is missing"):
        load_config("fluid/demo", sections=config_sections)


def test_what_is_neither_is_an_error_that_names_the_nearest_or_lists_what_is_shipped() -> None:
    with pytest.raises(ConfigError, match=r"fluid/dmo: neither a file nor .*; did you mean 'fluid/demo'\?$"):
        find_config("fluid/dmo")
    with pytest.raises(ConfigError, match=r"mine: neither a file nor .*causal_lm/demo-sft, .*fluid/demo, "):
        find_config("mine")
    with pytest.raises(ConfigError, match=r"fluid/dmo\.json: cannot be read \(.*\); check the path"):
        load_config("fluid/dmo.json", sections=config_sections)
