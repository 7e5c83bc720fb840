"""Tokens of devices: which columns they hold, what they know of older minutes, what they share."""

import numpy as np
import pytest
import torch

from tests.models.fluid.toy_network import SCHEMA
from trunkline.models.fluid.config import DecoderShape
from trunkline.models.fluid.device_tokens import DeviceEmbedding, DeviceProjection, Places, spans, summaries
from trunkline.models.fluid.schema import Schema, devices, parse_column


def test_a_device_has_its_set_points_and_its_states():
    found = {device.name: device for device in devices(SCHEMA)}
    assert list(found) == ["T_001", "E_001", "B_001", "H_001", "N_001", "N_002", "P_001"]
    assert found["E_001"] == ("E_001", "E", (1,), (7,))
    assert found["B_001"] == ("B_001", "B", (), (0, 1))
    for device in found.values():
        named = [SCHEMA.boundary[k] for k in device.boundary] + [SCHEMA.states[k] for k in device.states]
        assert {parse_column(name)[0] for name in named} == {device.name}


def test_every_column_stands_once_and_devices_of_one_kind_have_the_same_quantities():
    schema = Schema(
        ("C_001:ST", "C_001:SP_out", "C_002:SP_out", "C_002:ST", "E_001:SNQ"),
        {
            "B": (),
            "C": ("C_001_q", "C_002_q"),
            "H": (),
            "N": ("N_001_p", "N_002_p"),
            "P": (),
            "R": (),
            "T&E": ("E_001_q",),
        },
    )
    places = Places.of(schema)
    assert sorted(k for kind in places.inputs for device in kind for k in device) == list(range(10))
    assert sorted(k for kind in places.outputs for device in kind for k in device) == list(range(5))
    for inputs, outputs in zip(places.inputs, places.outputs):
        quantities = {tuple(parse_column(schema.columns[k])[1] for k in device) for device in inputs}
        assert len(quantities) == 1
        for device, states in zip(inputs, outputs):
            assert [k - 5 for k in device if k >= 5] == list(states)
    assert ((1, 0, 5), (2, 3, 6)) in places.inputs, "the columns of a kind stand in one order, whatever the files' is"


def test_a_set_point_and_a_state_of_one_name_do_not_make_one_kind():
    schema = Schema(
        ("T_001:p",),
        {"B": (), "C": (), "H": (), "N": ("N_001_p",), "P": (), "R": (), "T&E": ("T_001_q", "T_002_p", "T_002_q")},
    )
    places = Places.of(schema)
    assert len(places.inputs) == 3
    assert sorted(k for kind in places.outputs for device in kind for k in device) == list(range(4))
    assert DeviceProjection(4, places)(torch.randn(1, 1, 3, 4)).shape == (1, 1, 4)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [(0, 1)]),
        (2, [(0, 1), (1, 2)]),
        (3, [(0, 1), (1, 2), (2, 3)]),
        (12, [(0, 1), (1, 2), (2, 4), (4, 8), (8, 12)]),
    ],
)
def test_spans_double_and_end_with_the_window(window, expected):
    assert spans(window) == expected


@pytest.mark.parametrize(("minutes", "window"), [(3, 1), (4, 2), (13, 13), (20, 12)])
def test_older_minutes_are_seen_as_means_of_spans_less_the_value_now(minutes, window):
    x = torch.randn(2, minutes, 5, dtype=torch.float64)
    unit = torch.rand(5, dtype=torch.float64) + 0.5
    got = summaries(x, window, unit).numpy()
    values = x.numpy()
    assert got.shape == (2, minutes - window + 1, 5, len(spans(window)))
    for row in range(minutes - window + 1):
        now = row + window - 1
        np.testing.assert_allclose(got[:, row, :, 0], values[:, now])
        for k, (first, last) in enumerate(spans(window)[1:], start=1):
            older = np.mean([values[:, now - age] for age in range(first, last)], axis=0)
            age = np.mean(range(first, last))
            np.testing.assert_allclose(got[:, row, :, k], (values[:, now] - older) / (unit.numpy() * age**0.5))


def test_devices_of_one_kind_share_weights_and_are_told_apart():
    torch.manual_seed(0)
    places = Places(inputs=(((0, 3), (1, 4)), ((2, 5),)), outputs=(((0,), (1,)), ((2,),)))
    shape = DecoderShape(32, 2, 1, 32, 16)
    embedding = DeviceEmbedding(shape, places, num_boundary=3, window=1, minutes=1)
    x = torch.randn(1, 1, 6)
    swapped = x[..., [1, 0, 2, 4, 3, 5]]
    with torch.no_grad():
        embedding.set_points.weight.zero_()
        one, other = embedding(x[..., None])[0], embedding(swapped[..., None])[0]
        assert not torch.allclose(one[0], other[1], atol=1e-3)
        embedding.device.zero_()
        one, other = embedding(x[..., None])[0], embedding(swapped[..., None])[0]
    torch.testing.assert_close(one[[0, 1, 2]], other[[1, 0, 2]])


PLACES = Places(
    inputs=(((0, 8), (1, 9)), ((2,),), ((3, 10),), ((4, 5), (6, 7))),
    outputs=(((5, 0), (2, 1)), ((),), ((3, 4),), ((6,), (7,))),
)


def test_values_come_out_in_the_order_of_the_states():
    projection = DeviceProjection(4, PLACES)
    for parameter in projection.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randn(2, 3, 6, 4)
    got = projection(tokens)
    want = torch.empty(2, 3, 8)
    device = 0
    for k, kind in enumerate(PLACES.outputs):
        for states in kind:
            values = tokens[:, :, device] @ projection.kinds.weight[k] + projection.kinds.bias[k]
            for slot, state in enumerate(states):
                want[..., state] = values[..., slot]
            device += 1
    torch.testing.assert_close(got, want)


def test_a_device_s_values_meet_the_weights_of_its_kind():
    torch.manual_seed(0)
    shape = DecoderShape(32, 2, 1, 32, 16)
    embedding = DeviceEmbedding(shape, PLACES, num_boundary=8, window=1, minutes=2)
    x = torch.randn(3, 2, 11)
    got = embedding(x[..., None])
    device = 0
    want = torch.empty(3, 2, 6, 32)
    for k, kind in enumerate(PLACES.inputs):
        for columns in kind:
            weight = embedding.kinds.weight[k, : len(columns)]
            values = embedding.norm(torch.nn.functional.gelu(x[..., list(columns)] @ weight + embedding.kinds.bias[k]))
            want[:, :, device] = embedding.out(values) + embedding.set_points(x[..., :8]) + embedding.device[device]
            device += 1
    want += embedding.minute[:, None]
    torch.testing.assert_close(got, want.flatten(1, 2))


def test_each_device_may_have_weights_of_its_own():
    own = Places.of(SCHEMA, own_weights=True)
    assert [len(kind) for kind in own.inputs] == [1] * 7
    assert sorted(k for kind in own.outputs for device in kind for k in device) == list(range(8))


def test_a_new_projection_says_nothing():
    """Training then starts from the base: the state itself, or the autoregression."""
    assert not DeviceProjection(4, PLACES)(torch.randn(1, 1, 6, 4)).any()


def test_a_minute_s_change_reaches_a_bf16_model():
    shape = DecoderShape(32, 2, 1, 32, 16)
    places = Places(inputs=(((0, 1),),), outputs=(((0,),),))
    embedding = DeviceEmbedding(shape, places, num_boundary=1, window=2, minutes=1).to(torch.bfloat16)
    still = torch.tensor([[[0.5, 1.0], [0.5, 1.0]]])
    moved = torch.tensor([[[0.5, 1.0 - 2**-12], [0.5, 1.0]]])
    unit = torch.tensor([1.0, 2**-9])
    assert (embedding(summaries(still, 2, unit)) != embedding(summaries(moved, 2, unit))).any()
