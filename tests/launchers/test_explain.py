"""--explain: one key, a section, the value and its origin, and the nearest of what is not known."""

from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.engine.errors import ConfigError
from trunkline.launchers import train
from trunkline.launchers.explain import explain


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert train.main(list(words)) == 0
    return capsys.readouterr().out


def test_a_key_is_explained_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--explain", "training.eval_every") == (
        "training.eval_every: optimizer steps between evaluations, or epochs\n"
        '  type      integer above 0 or {"epochs": number}\n'
        "  default   500\n"
    )
    assert "\n  with FSDP obeyed: the global batch\n" in said(capsys, "--explain", "deepspeed.train_batch_size")
    shared = said(capsys, "--explain", "deepspeed.zero_optimization.offload_param.buffer_count")
    assert "  with FSDP refused: only device and pin_memory mean something to FSDP\n" in shared


def test_a_key_of_several_workloads_is_explained_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    each = said(capsys, "--explain", "data.max_length").split("\n\n")
    assert [text.splitlines()[0] for text in each] == ["causal_lm:"]
    owners = {text.splitlines()[0] for text in said(capsys, "--explain", "model.preset").split("\n\n")}
    assert owners == {"causal_lm:", "fluid:", "seq2seq:", "token_image:"}
    assert said(capsys, "fluid", "--explain", "model.preset").startswith("model.preset: ")


def test_a_parameter_of_optimizers_and_schedules_says_what_it_is_and_of_which(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = said(capsys, "--explain", "deepspeed.optimizer.params.momentum_decay").splitlines()
    assert lines[0] == "deepspeed.optimizer.params.momentum_decay: how fast the momentum comes to its full value"
    assert lines[2] == "  of        NAdam"
    gamma = said(capsys, "--explain", "deepspeed.scheduler.params.gamma")
    assert "gamma: factor of the rate at a fall; or: factor of the rate at every step; or: " in gamma
    assert "  of        StepLR, MultiStepLR, ExponentialLR, CyclicLR\n" in gamma
    assert "warmup: length of the rise: below 1 a share of the run, from 1 on optimizer steps\n" in said(
        capsys, "--explain", "deepspeed.scheduler.params.warmup"
    )


def test_a_section_lists_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--explain", "training.ema.").splitlines()
    assert lines[0] == "training.ema: a moving average of the weights; none if null"
    listed = [line.split()[0] for line in lines[lines.index("  keys:") + 1 :]]
    assert listed == ["training.ema.decay", "training.ema.warmup", "training.ema.every", "training.ema.use"]


def test_the_value_and_its_origin_are_those_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def now(key: str, *words: str) -> str:
        return said(capsys, "--config", "fluid/demo", "--explain", key, *words).splitlines()[-1].strip()

    file = str(Path(train.__file__).parents[1] / "configs/fluid/demo.json")
    assert now("training.eval_every", "--set", "training.eval_every=9") == "now       9 (--set)"
    assert now("training.epochs", "--epochs", "3") == "now       3 (--epochs)"
    assert now("training.keep_best") == "now       false (default)"
    assert now("deepspeed.optimizer.type") == f'now       "AdamW" ({file})'
    assert now("deepspeed.optimizer.params.eps") == "now       not given"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--explain", "training.eval_evry"], "training.eval_evry: unknown key; did you mean 'training.eval_every'?"),
        (["fluid", "--explain", "data.max_length"], "--explain data.max_length: unknown key"),
        (["--explain", "data.historry"], "did you mean 'data.history'?"),
        (["--explain", ""], "--explain '': give a key, such as training.eval_every, or a section, such as training\n"),
        (["--explain", "training", "--config", "nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_what_is_not_known_is_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_key_is_found_by_its_last_part_and_an_unknown_one_is_answered_shortly() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'deepspeed\.optimizer\.params\.lr'"):
        explain("lr", [])
    with pytest.raises(ConfigError, match="known: data, deepspeed, model, training, workload"):
        explain("qqqq", [])
