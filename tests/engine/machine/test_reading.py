"""Whatever lies where a file is read back costs one error at once: no traceback, no wait, no made-up value."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.engine.checkpoint.weights import load_weights
from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.config.strict import read_json_object
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.machine.reading import MAX_DEPTH, check_regular, open_regular, parse_json, read_json, read_object
from trunkline.engine.memory.micro_batch import MicroBatches
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.ranks.watchdog import Watchdog
from trunkline.engine.record.metrics_file import MetricsFile, read_metrics
from trunkline.engine.record.report import write_report

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


OTHERS: dict[str, Callable[[Path], Any]] = {
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": bind,
    "nothing": lambda path: None,
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_an_error_at_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    OTHERS[kind](Path("here"))
    for read in (open_regular, read_json, read_object):
        with pytest.raises(OSError, match=kind if kind in ("a named pipe", "a folder", "a device") else None):
            read("here")
    with pytest.raises(ConfigError, match=r"here: cannot be read \(.*\); check the path"):
        read_json_object("here")
    if kind in ("a named pipe", "a device", "a socket"):
        with pytest.raises(OSError):
            check_regular(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "n" * 5000])
def test_a_name_that_no_file_has_is_an_error(name: str) -> None:
    with pytest.raises(OSError):
        open_regular(name)


def test_depth_and_numbers_are_bounded() -> None:
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        whole = opened * MAX_DEPTH + "1" + closed * MAX_DEPTH
        assert json.dumps(parse_json(whole), separators=(",", ":")) == whole
        for depth in (MAX_DEPTH + 1, 900, 100_000):
            with pytest.raises(ValueError, match="nested more than 64 deep"):
                parse_json(opened * depth + "1" + closed * depth)
        with pytest.raises(ValueError):
            parse_json(opened * 100_000)
    for text in ("1e400", "-1e400", "1" + "0" * 400, "9" * 5000):
        with pytest.raises(ValueError, match="larger than any number"):
            parse_json(text)
    assert parse_json("[1e308, -0.0, 12345678901234567890]") == [1e308, -0.0, 12345678901234567890]
    assert parse_json('{"a": Infinity}', finite=False) == {"a": float("inf")}


SIZES = {"micro_batch_size": 2, "evaluation_micro_batch_size": 2, "why": "it was so", "for": {}}
BAD_SIZES: dict[str, Callable[[Path], Any]] = {
    "negative": lambda path: path.write_text(json.dumps(SIZES | {"evaluation_micro_batch_size": -3})),
    "a fraction": lambda path: path.write_text(json.dumps(SIZES | {"micro_batch_size": 2.0})),
    "true": lambda path: path.write_text(json.dumps(SIZES | {"micro_batch_size": True})),
    "a list": lambda path: path.write_text(json.dumps(SIZES | {"micro_batch_size": [2]})),
    "no divisor": lambda path: path.write_text(json.dumps(SIZES | {"micro_batch_size": 3})),
    "endless": lambda path: path.write_text(json.dumps(SIZES)[:-1] + ', "evaluation_micro_batch_size": 1e400}'),
    "nested deep": lambda path: path.write_text('{"for":' * 100_000),
    "a list of all": lambda path: path.write_text("[1]"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("name", BAD_SIZES)
def test_remembered_sizes_that_are_none_are_left_aside(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = BatchSizes(8, 4, 2, 1)
    BAD_SIZES[name](tmp_path / "memory.json")
    micro = MicroBatches(tmp_path, sizes, {}, ALONE)
    assert (micro.sizes, micro.evaluation) == (sizes, 4)
    assert "memory.json is left aside (" in capsys.readouterr().out
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "memory.json").write_text(json.dumps(SIZES))
    assert MicroBatches(whole, sizes, {}, ALONE).sizes.micro_batch_size == 2


GOOD = '{"step": 1, "split": "train", "loss": null, "nonfinite": {"loss": "inf"}}\n'
BAD_LINES = [
    '{"step": 2, "split": "train", "nonfinite": {"loss": "many"}}\n',
    '{"step": 2, "split": "train", "nonfinite": 3}\n',
    '{"step": 2, "split": "train", "nonfinite": {"loss": [1]}}\n',
    '{"step": true, "split": "train", "loss": 1.0}\n',
    '{"step": 2, "split": "train", "loss": 1e999}\n',
    '{"step": 2, "split": "train", "loss": 1' + "0" * 400 + "}\n",
    '{"a":' * 100_000 + "\n",
]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_of_metrics_of_other_types_is_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(GOOD + line + GOOD)
    assert read_metrics(path) == [{"step": 1, "split": "train", "loss": float("inf")}] * 2
    assert "| steps | 1 |" in write_report(tmp_path).read_text()
    MetricsFile.open(path, 5).close()
    assert path.read_text() == GOOD + GOOD


def test_metrics_that_are_a_pipe_are_named_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be written \(it is a named pipe, where a file"):
        MetricsFile.open(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", ["config.json", "plan.json"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"training": [1], "parameters": "many", "world_size": {}, "steps": [2]}',
                '{"training": {"best": {"metric": [], "mode": 3}}}'],
)  # fmt: skip
def test_a_report_leaves_out_what_is_of_another_type(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD)
    (tmp_path / name).write_text(content)
    assert "| steps | 1 |" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", '{"count": "x"}', '{"count": 1, "step": 1, "doing": 1}'])
def test_a_note_of_another_rank_that_is_none_counts_as_none(tmp_path: Path, content: str) -> None:
    watchdog = Watchdog(tmp_path, Ranks(0, 2, 0, torch.device("cpu")), 60.0)
    (tmp_path / "rank-00001.json").write_text(content)
    assert "rank 1: left no note" in watchdog._report()


@pytest.mark.parametrize("places", [1, [], {}, {"a": 3}, {"a": ["x.safetensors"]}, {"a": "../x.safetensors"}])
def test_an_index_of_weights_of_other_types_is_named(tmp_path: Path, places: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"index.json: weight_map must name .safetensors files of this folder"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)


def test_a_part_of_weights_that_is_a_pipe_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "a.safetensors"}}')
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a.safetensors: cannot be loaded: .*it is a named pipe"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)
