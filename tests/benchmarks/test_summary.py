"""The table from files as the benchmarks write them: the reports are real, the figures made up."""

import pytest
import torch

from trunkline.benchmarks import attention as bench_attention
from trunkline.benchmarks import masked_mse as bench_masked_mse
from trunkline.benchmarks.report import OK, OUT_OF_TIME, Report
from trunkline.benchmarks.summary import (
    BEGIN,
    END,
    FOLDER,
    NOT_YET,
    ROOT,
    beside_others,
    everything,
    put_into,
    table,
    training_step,
)

FORWARD_64, FORWARD_32, BACKWARD_64, BACKWARD_32, SHARE, MSE = range(2, 8)


def reports(tmp_path):
    """The attention and the masked_mse report of a whole run, nothing of it measured yet."""
    attention = Report("attention", "", torch.device("cpu"), tmp_path)
    bench_attention._jobs(attention, [32, 64, 128], [3, 5, 7, 10], 6712)
    masked_mse = Report("masked_mse", "", torch.device("cpu"), tmp_path)
    sizes = {"masked_mse": (148_176, 2**26, 2**28, 2**30), "linear_masked_mse": (2**20, 2**22)}
    bench_masked_mse._jobs(masked_mse, [(kernel, size) for kernel, some in sizes.items() for size in some])
    return attention, masked_mse


def lines(*written):
    """The lines of the table of these reports."""
    for report in written:
        folder = report.save()
    return table(folder).splitlines()


def cell(line):
    return line.split("|")[-2].strip()


def fill_in(report, figure, of, **wanted):
    for row in report.rows:
        if all(row[key] == value for key, value in wanted.items()):
            row |= {figure: of(row), "status": OK}


def test_the_page_of_figures_holds_the_tables_of_the_files_in_benchmarks():
    page = (ROOT / "docs/measured.md").read_text()
    assert page == put_into(page, everything(FOLDER))


def test_without_files_nothing_is_measured(tmp_path):
    written = table(tmp_path).splitlines()
    assert len(written) == 8
    assert [cell(line) for line in written[2:]] == [NOT_YET] * 6


def test_figures_stand_beside_their_aims(tmp_path):
    attention, masked_mse = reports(tmp_path)
    rate = {6712 * count: 430.0 + count for count in (3, 5, 7, 10)}
    ours = {"contender": "ours", "head_dim": 64}
    for direction in ("forward", "backward"):
        fill_in(attention, "tflop_per_s", lambda row: rate[row["tokens"]], **ours, direction=direction)
    fill_in(attention, "tflop_per_s", lambda row: 500.0, **ours, pattern="full", direction="forward")
    fill_in(attention, "tflop_per_s", lambda row: 999.0, contender="cuDNN, slices")
    large = bench_masked_mse.AIMED_AT
    fill_in(masked_mse, "of_copy", lambda row: 0.5 if row["values"] < large[row["kernel"]] else 0.92, contender="ours")
    fill_in(masked_mse, "of_copy", lambda row: 0.87, contender="ours", values=2**28, direction="backward")
    written = lines(attention, masked_mse)
    assert written[FORWARD_64].endswith("D = 64 | 450 TFLOP/s | 500 TFLOP/s | 433 to 440 TFLOP/s |")
    assert written[BACKWARD_64].endswith("D = 64 | 400 TFLOP/s | 470 TFLOP/s | 433 to 440 TFLOP/s |")
    assert cell(written[FORWARD_32]) == cell(written[BACKWARD_32]) == NOT_YET
    assert cell(written[SHARE]) == "forward 87 to 88 % (4 of 8 sizes), backward 100 % (4 of 8 sizes)"
    assert written[MSE].endswith("| 90 % of the measured copy bandwidth | 95 % | forward 92 %, backward 87 to 92 % |")
    assert written[8] == ""
    assert written[9].startswith("CPU (")
    assert f", torch {torch.__version__}" in written[9]
    assert len(written) == 10


@pytest.mark.parametrize("status", [OUT_OF_TIME, "not run: OutOfMemoryError"])
def test_a_length_that_was_not_run_gives_no_number(tmp_path, status):
    attention, _ = reports(tmp_path)
    fill_in(attention, "tflop_per_s", lambda row: 440.0, contender="ours")
    for row in attention.rows:
        if row["tokens"] == 5 * 6712:
            row |= {"tflop_per_s": 999.0, "status": status}
    written = lines(attention)
    assert cell(written[FORWARD_64]) == "440 TFLOP/s (3 of 4 sizes)"
    assert cell(written[SHARE]) == "forward 100 % (6 of 8 sizes), backward 100 % (6 of 8 sizes)"


def test_a_wrong_result_leaves_no_number_beside_it(tmp_path):
    attention, masked_mse = reports(tmp_path)
    fill_in(attention, "tflop_per_s", lambda row: 440.0, contender="ours")
    fill_in(masked_mse, "of_copy", lambda row: 0.92, contender="ours")
    for report in (attention, masked_mse):
        for row in report.rows:
            if row["direction"] == "backward" and row["contender"] == "ours":
                row["status"] = "wrong: result 1 is off by 2, allowed are 1"
    written = lines(attention, masked_mse)
    assert cell(written[FORWARD_64]) == "440 TFLOP/s"
    assert cell(written[BACKWARD_64]) == "wrong results"
    assert cell(written[SHARE]) == "forward 100 %, backward wrong results"
    assert cell(written[MSE]) == "forward 92 %, backward wrong results"


def test_rates_stand_beside_those_of_the_same_problem(tmp_path):
    attention, _ = reports(tmp_path)
    where = {"head_dim": 64, "direction": "forward", "pattern": "block-causal"}
    fill_in(attention, "tflop_per_s", lambda row: 400.0, contender="ours", **where)
    fill_in(attention, "tflop_per_s", lambda row: 200.0 if row["tokens"] < 40_000 else 500.0, contender="cuDNN, slices")
    for row in attention.rows:  # the longest was not run by one of them
        if row["tokens"] == 67_120 and row["contender"] == "cuDNN, slices":
            row |= {"tflop_per_s": None, "status": OUT_OF_TIME}
    written = beside_others(attention.save()).splitlines()
    assert written[2:] == ["| block-causal | 64 | forward | 400 | cuDNN, slices 200 to 500 | 0.80 to 2.00 |"]
    assert beside_others(tmp_path) == training_step(tmp_path) == ""


def test_training_steps_stand_the_fastest_first_and_only_the_right_ones(tmp_path):
    report = Report("training", "", torch.device("cpu"), tmp_path)
    report.notes.append("A note.")
    figures = {"tokens_per_s": 1234.5, "tflop_per_s": 300.0, "peak_gib": 31.96}
    report.add(contender="slow", median_s=0.75, slowest_s=0.8, **figures, status=OK)
    report.add(contender="fast", median_s=0.5, slowest_s=0.6, **figures, status=OK)
    report.add(contender="wrong", median_s=None, slowest_s=None, **figures, status="wrong: first_loss 3, not 1")
    folder = report.save()
    written = training_step(folder).splitlines()
    assert written[2] == "| fast | 0.500 s | 0.600 s | 1,234 | 300 | 32.0 GiB |"
    assert written[3].startswith("| slow | 0.750 s")
    assert written[4] == ""
    assert "A note." in written[5:]
    assert written[-1].startswith("CPU (")
    assert training_step(folder) in everything(folder)

    report.name = "training-compiled"
    report.rows = [report.rows[0]]
    report.save()
    both = training_step(folder).splitlines()
    assert both[: len(written)] == written
    assert [line for line in both[len(written) :] if line.startswith("| slow")] == [written[3]]
    assert both.count("A note.") == 1


def test_a_text_without_the_marks_is_left_alone():
    assert put_into(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    for text in ("nothing", f"{END}{BEGIN}{END}", BEGIN):
        with pytest.raises(ValueError, match=r"measured\.md must hold"):
            put_into(text, "new\n")
