"""The registry: names lead to workloads, and mistakes are named."""

import json

import pytest

from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.models.registry import WORKLOADS, config_sections, workload_of_run


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_its_rooms(name):
    workload = WORKLOADS[name]
    data, model = config_sections(name)
    assert data.model_fields
    assert model.model_fields
    for room in ("evaluate", "predict"):
        module = workload.open(room)
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_an_unknown_workload_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="fluid"):
        config_sections("fluit")


@pytest.mark.parametrize("inside", [".", "best", "final"])
def test_a_run_tells_its_workload(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / inside / "config.json").write_text(json.dumps({"workload": "fluid"}))
    assert workload_of_run(tmp_path) is WORKLOADS["fluid"]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        workload_of_run(tmp_path)
    (tmp_path / "config.json").write_text('{"workload": "gas"}')
    with pytest.raises(ConfigError, match="'gas'"):
        workload_of_run(tmp_path)
