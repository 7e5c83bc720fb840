"""Baselines by name: which are taken, that they are kept with the store, and what happens to damaged ones."""

import json
import shutil

import pytest
import torch

from tests.models.fluid.baselines.switched_network import switched_day, write_switched_store
from tests.models.fluid.toy_network import write_toy_store
from trunkline.engine.errors import ConfigError
from trunkline.models.fluid.baselines import catalog, switches
from trunkline.models.fluid.baselines.catalog import baselines_of
from trunkline.models.fluid.baselines.graph import ROUNDS
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.store import Store

MINUTES = 0.004
NETWORKS = ("mlp", "graph")


@pytest.fixture(scope="module", autouse=True)
def few_steps_are_enough():
    """Networks here train for a moment. The one test of what is said then has the true number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "FEW_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A store, every baseline of it, and what each says of a window."""
    store = write_switched_store(tmp_path_factory.mktemp("catalog") / "store")
    found = baselines_of(store, normalization_of(store), ("ridge", "switches", "persistence", *NETWORKS), MINUTES)
    return store, found


@pytest.fixture
def store(fitted, tmp_path):
    """A copy to damage."""
    shutil.copytree(fitted[0].root, tmp_path / "store")
    return Store.open(tmp_path / "store")


def normalization_of(store):
    schema = store.schema
    return Normalization(schema.num_boundary, schema.num_states).fit(store.statistics, "standard")


def window():
    return torch.cat([torch.from_numpy(x)[None, :2] for x in switched_day(50)], dim=-1)


def said(found):
    return {title: forecaster.next_state(window()) for title, forecaster in found.forecasters.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[title], b[title]) for title in a)


def test_titles_stand_in_the_order_of_tables(fitted):
    _, found = fitted
    assert list(found.forecasters) == ["ridge", "ridge with switches", "ridge + MLP", "graph network", "persistence"]
    assert not found.notes
    assert all(found.facts[title]["steps"] > 0 for title in ("ridge + MLP", "graph network"))


def test_what_is_kept_is_not_fitted_again_and_says_the_same(fitted, store):
    again = baselines_of(store, normalization_of(store))
    assert same(said(again), said(fitted[1])), "the networks too, since they are kept"
    assert again.facts == fitted[1].facts
    assert not again.notes


def test_networks_are_in_the_default_only_once_they_are_kept(tmp_path):
    store = write_switched_store(tmp_path)
    assert list(baselines_of(store, normalization_of(store)).forecasters) == [
        "ridge",
        "ridge with switches",
        "persistence",
    ]
    asked = baselines_of(store, normalization_of(store), ("mlp",), MINUTES)
    assert list(asked.forecasters) == ["ridge + MLP"]
    by_default = baselines_of(store, normalization_of(store), without=("ridge", "switches"))
    assert list(by_default.forecasters) == ["ridge + MLP", "persistence"]
    assert by_default.facts["ridge + MLP"] == asked.facts["ridge + MLP"]
    longer = baselines_of(store, normalization_of(store), ("mlp",), 2 * MINUTES)
    assert longer.facts["ridge + MLP"] != asked.facts["ridge + MLP"]
    assert baselines_of(store, normalization_of(store)).facts["ridge + MLP"] == longer.facts["ridge + MLP"]


def test_a_network_of_few_steps_is_named_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "FEW_STEPS", 100)
    store = write_switched_store(tmp_path)
    found = baselines_of(store, normalization_of(store), ("persistence", "mlp"), 1e-9)
    assert found.facts["ridge + MLP"]["steps"] == 0
    (note,) = found.notes
    assert note.startswith("ridge + MLP: trained for 0 steps only")
    assert "--baseline-minutes" in note
    assert baselines_of(store, normalization_of(store), ("mlp",)).notes == [note], "of what is kept, too"


def test_another_normalisation_has_its_own(fitted, store):
    other = Normalization(2, 6).fit(store.statistics, "minmax")
    assert list(baselines_of(store, other).forecasters) == ["ridge", "ridge with switches", "persistence"]
    assert len(list((store.root / "baselines").iterdir())) == 6


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [
        ("ridge", "PENALTIES", (1e-3,)),
        ("ridge", "DEFAULT_PENALTY", 1e-3),
        ("switches", "JITTER", 0.5),
        ("mlp", "RIDGE_PENALTY", 1e-3),
        ("graph", "JITTER", 0.5),
    ],
)
def test_other_constants_make_another_baseline(store, monkeypatch, name, constant, value):
    assert len(list((store.root / "baselines").glob(f"{name}-*"))) == 1
    monkeypatch.setattr(catalog, constant, value)
    baselines_of(store, normalization_of(store), (name,), MINUTES)
    assert len(list((store.root / "baselines").glob(f"{name}-*"))) == 2


def test_the_rounds_of_messages_are_part_of_what_is_kept(store):
    (record,) = (store.root / "baselines").glob("graph-*/baseline.json")
    assert json.loads(record.read_text())["about"]["rounds"] == ROUNDS


def cut(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


def take_from_another(folder):
    record = json.loads((folder / "baseline.json").read_text())
    record["about"]["store"] = "0" * 64
    (folder / "baseline.json").write_text(json.dumps(record))


def lose(folder):
    (folder / "model.safetensors").unlink()


def garble(folder):
    (folder / "baseline.json").write_text("[")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "model.safetensors is not the file that was written"),
        (take_from_another, "is of another data set"),
        (lose, "model.safetensors: No such file"),
        (garble, "baseline.json: Expecting value"),
    ],
)
def test_a_damaged_or_foreign_one_is_named_and_fitted_anew(fitted, store, damage, why):
    (folder,) = (store.root / "baselines").glob("ridge-*")
    damage(folder)
    again = baselines_of(store, normalization_of(store), ("ridge",))
    (note,) = again.notes
    assert note.startswith(f"{folder}: ")
    assert why in note
    assert note.endswith("ridge was fitted anew")
    assert torch.equal(said(again)["ridge"], said(fitted[1])["ridge"])
    assert not baselines_of(store, normalization_of(store), ("ridge",)).notes


def test_a_network_whose_record_cannot_be_read_is_named(store):
    (folder,) = (store.root / "baselines").glob("mlp-*")
    garble(folder)
    found = baselines_of(store, normalization_of(store), without=("ridge", "switches"))
    assert list(found.forecasters) == ["graph network", "persistence"]
    (note,) = found.notes
    assert note.startswith(f"{folder / 'baseline.json'}: cannot be read")


def test_where_nothing_can_be_written_they_are_fitted_each_time_and_it_is_said_once(fitted, store):
    shutil.rmtree(store.root / "baselines")
    (store.root / "baselines").write_text("")  # no folder can be made here, by any user
    for _ in range(2):
        again = baselines_of(store, normalization_of(store), ("ridge", "switches"))
        (note,) = again.notes
        assert f"{store.root / 'baselines'}: cannot be written" in note
        assert torch.equal(said(again)["ridge"], said(fitted[1])["ridge"])


def test_a_limit_of_the_products_is_said(tmp_path, monkeypatch):
    store = write_switched_store(tmp_path)
    monkeypatch.setattr(switches, "MOST_FEATURES", 47)
    (note,) = baselines_of(store, normalization_of(store), ("switches",)).notes
    assert "its own device alone" in note


def test_what_does_not_fit_the_data_is_left_out_with_a_note_unless_it_was_asked_for(tmp_path):
    store = write_toy_store(tmp_path)
    found = baselines_of(store, normalization_of(store))
    assert list(found.forecasters) == ["ridge", "persistence"]
    (note,) = found.notes
    assert "without ridge with switches: " in note
    with pytest.raises(ConfigError, match="no set-point"):
        baselines_of(store, normalization_of(store), ("ridge", "switches"))
    with pytest.raises(ConfigError, match=r"no network\.json"):
        baselines_of(store, normalization_of(store), ("graph",))
