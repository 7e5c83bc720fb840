"""Runs beside each other: what stands in the tables, and runs that are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.record.comparison import comparison, named, write_comparison
from trunkline.engine.record.history import Series, median, read_history
from trunkline.engine.record.metrics_file import RESUMED, MetricsFile

CONFIG: dict[str, Any] = {
    "workload": "tiny",
    "training": {"seed": 1, "best": {"metric": "bleu", "mode": "max"}, "ema": None, "trackers": []},
    "deepspeed": {"optimizer": {"params": {"lr": 0.1}}},
}


def run(
    folder: Path, config: dict[str, Any] | None = None, steps: int = 4, metric: str = "bleu", resumed: str = ""
) -> Path:
    """`resumed`: in what evaluations before step 3 were measured otherwise."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    (folder / "plan.json").write_text(json.dumps({"steps": 4}))
    file = MetricsFile.open(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        at = {
            "time": 1e9,
            "epoch": step / 2,
            "words_seen": 17_500_070.0 * step,
            "samples_seen": 8 * step,
            "seconds": 2.0 * step,
        }
        if step == 2:
            file.log(step, RESUMED, {}, {**at, "from": "one", "to": "two"})
        if step == 3 and resumed:
            file.log(2, RESUMED, {}, {**at, "from": "two", "to": "two", "measured_before": resumed})
        file.log(step, "train", {"loss": 1 / step, "words_per_s": 35.0, "samples_per_s": 4.0}, at)
        file.log(step, "val", {"loss": 2 / step, metric: [10.0, 30.0, 25.0, 20.0][step - 1]}, at)
    file.close()
    return folder


def test_two_runs_are_told_apart_by_what_they_reached_and_by_the_keys_that_differ(tmp_path: Path) -> None:
    other = json.loads(json.dumps(CONFIG)) | {"deepspeed": {"optimizer": {"params": {"lr": 0.2}}, "bf16": {}}}
    other["training"]["ema"] = {"decay": 0.9}
    text = comparison(named([run(tmp_path / "a"), run(tmp_path / "b", other, steps=3)]))
    assert (
        text
        == """\
|  | a | b |
| --- | --- | --- |
| workload | tiny | tiny |
| steps | 4 of 4 | 3 of 4 |
| epochs | 2 | 1.5 |
| samples | 32 | 24 |
| words | 70,000,280 | 52,500,210 |
| time in training steps | 8 s | 6 s |
| throughput, median | 4 samples/s, 35 words/s | 4 samples/s, 35 words/s |
| resumed after step | 2 | 2 |
| training loss, last | 0.25 | 0.333333 |
| largest difference from a | - | 0 at step 3 |

- b has made 3 of its 4 steps

## Validation

At the evaluation with the best bleu, and at the last one:

|  | a | b |
| --- | --- | --- |
| best step / last step | 2 / 4 | 2 / 3 |
| loss | 1 / 0.5 | 1 / 0.666667 |
| bleu | 30 / 20 | 30 / 25 |

## Configurations

| key | a | b |
| --- | --- | --- |
| training.ema | null | - |
| deepspeed.optimizer.params.lr | 0.1 | 0.2 |
| training.ema.decay | - | 0.9 |
| deepspeed.bf16 | - | {} |
"""
    )


def test_other_workloads_and_metrics_are_compared_as_far_as_they_go(tmp_path: Path) -> None:
    other = CONFIG | {"workload": "other"}
    runs = named([run(tmp_path / "a"), run(tmp_path / "b", other, metric="rouge")])
    lines = comparison(runs).splitlines()
    assert "- the workloads differ (a tiny, b other): a loss of one is no measure of another" in lines
    assert "- not measured by b, but by a: bleu" in lines
    assert "- not measured by a, but by b: rouge" in lines
    assert "| bleu | 30 / 20 | - |" in lines
    assert '| workload | "tiny" | "other" |' in lines
    page = write_comparison(runs, tmp_path / "out")
    assert page.read_text() == f"# a, b\n\n![training and validation loss](compare.png)\n\n{comparison(runs)}"
    assert imread(tmp_path / "out/compare.png").std() > 0.01


def test_the_best_is_of_the_evaluations_that_were_measured_as_the_last_one_was(tmp_path: Path) -> None:
    otherwise = "with training.eval_samples 2, and it is 11 now"
    lines = comparison(named([run(tmp_path / "a"), run(tmp_path / "b", resumed=otherwise)])).splitlines()
    assert "| best step / last step | 2 / 4 | 3 / 4 |" in lines
    assert "| bleu | 30 / 20 | 25 / 20 |" in lines
    note = f"after step 2 evaluations are measured in another way (just before: {otherwise})"
    assert f"- b: {note}: the best is one of the later ones" in lines
    assert not any(line.startswith("- a: after") for line in lines)


@pytest.mark.parametrize(
    ("lines", "best_step", "said"),
    [
        ([(2, None), (4, "A"), (4, "-"), (6, None)], 2, None),  # ended before its next evaluation, and as before again
        ([(2, None), (4, "A"), (4, "B"), (6, None)], 6, (4, "B")),
        ([(2, None), (4, "A"), (4, None), (4, "-"), (6, None)], 4, (4, "A")),
        ([(2, None), (4, "A"), (5, "-"), (6, None)], 6, (4, "A")),
        ([(2, None), (4, "A"), (6, None), (8, "B"), (10, None)], 10, (8, "B")),
        ([(4, "A"), (6, None), (8, None)], 6, None),  # those that were measured otherwise are of another run
        ([(2, None), (4, None), (4, "A")], 2, None),  # nothing is evaluated after it
    ],
)
def test_a_resume_counts_if_evaluations_before_and_after_it_differ(
    tmp_path: Path, lines: list[tuple[int, str | None]], best_step: int, said: tuple[int, str] | None
) -> None:
    """Of each line its step, and of a resume what it says of the evaluations before; "-" is nothing. Losses grow."""
    for step, before in lines:
        file = MetricsFile.open(tmp_path / "metrics.jsonl", step)
        if before is None:
            file.log(step, "val", {"loss": float(step)})
        else:
            otherwise = {} if before == "-" else {"measured_before": before}
            file.log(step, RESUMED, {}, {"from": "two", "to": "two", **otherwise})
        file.close()
    history = read_history(tmp_path)
    after = "after step {} evaluations are measured in another way (just before: {})"
    assert (history.best_step, history.measured_before) == (best_step, after.format(*said) if said else "")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1, "split": "train", "loss": 0.5}\n{"step"', "1 of its lines cannot be read"),
        ("metrics.jsonl", None, "metrics.jsonl: cannot be read (No such file or directory): nothing is known of its"),
        ("config.json", "{", "config.json: cannot be read ("),
        ("plan.json", "[]", "plan.json: cannot be read ("),
    ],
)
def test_what_is_damaged_is_named_once_and_the_rest_is_compared(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    broken = run(tmp_path / "b")
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_text(content)
    runs = named([run(tmp_path / "a"), broken])
    text = comparison(runs)
    assert text.count(said) == text.count(str(broken / name)) == 1
    assert "| steps | 4 of 4 |" in text


def test_folders_of_one_name_are_told_by_their_paths_and_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one/run"), run(tmp_path / "two/run")
    assert list(named([one, two, one])) == [str(one), str(two)]
    with pytest.raises(DataError, match=r"nowhere: not the folder of a run \(no metrics\.jsonl"):
        named([one, tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file: is a file: name a folder"):
        write_comparison(named([one, two]), tmp_path / "file")
    (out := tmp_path / "full").mkdir()
    (out / "compare.png").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"--out .*full: cannot be written \(No space left on device\): make room"):
        write_comparison(named([one, two]), out)


def test_runs_without_numbers_have_a_page_without_curves(tmp_path: Path) -> None:
    for name in "ab":
        (run(tmp_path / name) / "metrics.jsonl").write_text("")
    runs = named([tmp_path / "a", tmp_path / "b"])
    assert "None of the runs was evaluated." in comparison(runs)
    assert "The configurations are equal." in comparison(runs)
    assert "![" not in write_comparison(runs, tmp_path / "out").read_text()
    assert runs["a"].series("train", "loss") == Series([], [])
    assert median([1.0, 2.0]) == 2.0


def test_losses_that_lie_apart_or_are_none_are_named(tmp_path: Path) -> None:
    for name, third in (("b", 0.5), ("c", None)):  # as what is not finite is written
        with (run(tmp_path / name, steps=2) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 3, "split": "train", "loss": third}) + "\n")
    text = comparison(named([run(tmp_path / "a"), tmp_path / "b", tmp_path / "c"]))
    assert "| largest difference from a | - | 0.167 at step 3 | 0 at step 2, not finite at step 3 |" in text


def test_of_three_runs_it_is_said_what_each_did_not_measure(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, metric=metric) for name, metric in (("a", "bleu"), ("b", "bleu"), ("c", "rouge"))]
    rows = folders[0] / "metrics.jsonl"
    rows.write_text(rows.read_text().replace('"bleu"', '"chrf": 1.0, "bleu"'))
    lines = [line for line in comparison(named(folders)).splitlines() if "not measured" in line]
    assert lines == [
        "- not measured by b, but by a: chrf",
        "- not measured by c, but by a: chrf, bleu",
        "- not measured by c, but by b: bleu",
        "- not measured by a, b, but by c: rouge",
    ]
