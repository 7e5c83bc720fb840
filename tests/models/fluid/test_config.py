"""The fluid sections of a configuration: presets or widths, and mistakes that are named."""

import json
from pathlib import Path

import pytest

from trunkline.engine.config.strict import validated
from trunkline.engine.errors import ConfigError
from trunkline.models.fluid.config import PRESETS, DecoderShape, FluidData, FluidModel

WIDTHS = {"d_model": 64, "num_heads": 2, "num_layers": 3, "d_ff": 96, "d_token": 24}
CONFIGS = Path(__file__).parents[3] / "configs" / "fluid"


def model(**section):
    return validated(FluidModel, section, "model", "run.json")


def test_a_preset_or_widths_give_the_shape():
    assert model(preset="tiny").shape == PRESETS["tiny"]
    assert model(**WIDTHS).shape == DecoderShape(64, 2, 3, 96, 24)


BAD = {
    "give a preset": {},
    "num_heads, num_layers, d_ff, d_token is missing": {"d_model": 64},
    "either preset or widths": {"preset": "nano", **WIDTHS},
    "even multiple of num_heads": {**WIDTHS, "num_heads": 5},
    "16 to 256 channels": {**WIDTHS, "num_heads": 8},
    "d_modle: unknown key; did you mean 'd_model'": {**WIDTHS, "d_modle": 3},
    "model.preset": {"preset": "huge"},
    "model.input_noise": {"preset": "nano", "input_noise": -0.1},
    "model.target": {"preset": "nano", "target": "levels"},
    "model.linear_skip": {"preset": "nano", "linear_skip": "yes"},
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_in_the_model_section_are_named(message):
    with pytest.raises(ConfigError, match=message):
        model(**BAD[message])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "data.store"),
        ({"store": "x", "history": 0}, "data.history"),
        ({"store": "x", "normalization": "z"}, "data.norm"),
    ],
)
def test_mistakes_in_the_data_section_are_named(section, message):
    with pytest.raises(ConfigError, match=message):
        validated(FluidData, section, "data", "run.json")


@pytest.mark.parametrize("name", PRESETS)
def test_the_shipped_presets_are_what_they_are_called(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    section = model(**config["model"])
    assert section.shape == PRESETS[name]
    assert (section.target, section.input_noise, section.linear_skip) == ("level", 0.0, False)
