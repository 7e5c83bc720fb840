"""The tasks under the engine: against transformers' Trainer, over any split of a batch, packed and padded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_distributed_test
from tests.models.causal_lm.toy_language import toy_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import CheckpointError, ConfigError, TrunklineError
from trunkline.engine.optim.schedules import learning_rates
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.launchers.export import main as export
from trunkline.models.causal_lm.prepare import prepare
from trunkline.models.registry import make_task
from trunkline.models.text.linear_loss import IGNORE


def train(config: RunConfig, folder: Path, backend: str = "deepspeed") -> Trainer:
    trainer = Trainer(make_task(config), config, start(), folder, backend=backend)
    trainer.run()
    return trainer


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def batch_of(task: Any, places: list[int], split: str = "train") -> dict[str, torch.Tensor]:
    dataset = task.dataset(split)
    batch = task.collate([dataset[place] for place in places])
    return batch | {"valid": torch.ones(len(places), dtype=torch.bool), "draw": torch.arange(len(places))}


def losses_of_transformers_trainer(config: RunConfig, folder: Path) -> list[float]:
    """The same run by transformers' Trainer: its loop, its loss, its accumulation and its clipping."""
    from transformers import Trainer as TheirTrainer
    from transformers import TrainingArguments

    task: Any = make_task(config)
    seed_torch(config.training.seed, 0)
    model = task.build_model().lm
    model.get_output_embeddings().__class__ = torch.nn.Linear
    model.set_attn_implementation("sdpa")
    steps, section = config.training.steps or 0, config.deepspeed
    size = section.train_batch_size or 0
    batches = GlobalBatches(len(task.dataset("train")), size, config.training.seed)
    order = np.concatenate([batches.samples(step) for step in range(steps)])
    recorded: list[float] = []

    class InOrder(TheirTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def training_step(self, *arguments: Any, **keys: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **keys)
            recorded.append(float(loss))
            return loss

    def collate(places: list[int]) -> dict[str, torch.Tensor]:
        batch = batch_of(task, [max(place, 0) for place in places])
        labels = torch.full_like(batch["targets"], IGNORE)
        labels[:, 1:] = batch["targets"][:, :-1]  # transformers shifts them itself
        labels[torch.tensor(places) == FILLER] = IGNORE
        return {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": torch.ones_like(labels)}

    params = section.optimizer.params
    names = TheirTrainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # it uses no self
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name in names].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        lr=params["lr"], weight_decay=params["weight_decay"],
    )  # fmt: skip
    rates = learning_rates(section.scheduler, params["lr"], steps, list(range(steps + 1)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step] / params["lr"])
    accumulate = 2
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=size // accumulate,
        gradient_accumulation_steps=accumulate, max_grad_norm=section.gradient_clipping, report_to=[],
        remove_unused_columns=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    InOrder(
        model=model, args=arguments, train_dataset=order.tolist(), data_collator=collate,
        optimizers=(optimizer, schedule),
    ).train()  # fmt: skip
    return np.array(recorded).reshape(steps, accumulate).sum(1).tolist()


@pytest.mark.parametrize("objective", ["pretrain", "sft"])
def test_fifty_steps_have_the_losses_of_transformers_trainer(
    stores: Path, pretrained: Path, tmp_path: Path, objective: str
) -> None:
    model = {} if objective == "pretrain" else {"path": str(pretrained / "best")}
    config = toy_config(
        tmp_path, stores, objective, model=model, training={"steps": 50, "eval_every": 50, "save_every": 50},
        deepspeed={"train_micro_batch_size_per_gpu": 2},
    )  # fmt: skip
    train(config, tmp_path / "run")
    expected = losses_of_transformers_trainer(config, tmp_path / "theirs")
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.9 * expected[0]


def train_split(rank: int, world_size: int, runs: list[tuple[RunConfig, Path, str]]) -> None:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for run in runs:
            train(*run)


@pytest.mark.distributed
def test_ragged_conversations_give_one_step_however_they_are_split(
    stores: Path, pretrained: Path, tmp_path: Path
) -> None:
    def config(micro: int, stage: int, packing: bool) -> RunConfig:
        return toy_config(
            tmp_path / f"{micro}-{stage}-{packing}", stores, "sft",
            data={"packing": packing}, model={"path": str(pretrained / "best")},
            deepspeed={"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage}},
        )  # fmt: skip

    for packing in (False, True):
        whole = tmp_path / f"whole-{packing}"
        train(config(8, 0, packing), whole)
        expected = losses(whole)
        train(config(1, 2, packing), tmp_path / f"ones-{packing}")
        assert losses(tmp_path / f"ones-{packing}") == pytest.approx(expected, rel=1e-5)
    runs = [(config(micro, 3, True), tmp_path / backend, backend) for micro, backend in ((2, "deepspeed"), (4, "fsdp"))]
    run_distributed_test(train_split, 2, runs, backend=None)
    for _, folder, backend in runs:
        assert losses(folder) == pytest.approx(expected, rel=1e-5), backend


@pytest.mark.distributed
def test_preferences_are_learned_alike_with_policy_and_reference_sharded(
    stores: Path, pretrained: Path, tmp_path: Path
) -> None:
    def config(stage: int) -> RunConfig:
        return toy_config(
            tmp_path / str(stage), stores, "dpo", model={"path": str(pretrained / "best")},
            deepspeed={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}},
        )  # fmt: skip

    trainer = train(config(0), tmp_path / "one")
    expected = losses(tmp_path / "one")
    assert expected[0] == pytest.approx(np.log(2), rel=1e-6), "policy and reference are equal at first"
    assert expected[-1] < expected[0]
    reference = trainer.backend.module.reference  # type: ignore[union-attr]
    start_of_it = make_task(config(0)).build_model().reference  # type: ignore[union-attr]
    for one, two in zip(reference.parameters(), start_of_it.parameters(), strict=True):  # type: ignore[operator, union-attr]
        assert torch.equal(one, two)
    runs = [(config(3), tmp_path / backend, backend) for backend in ("deepspeed", "fsdp")]
    run_distributed_test(train_split, 2, runs, backend=None)
    for _, folder, backend in runs:
        assert losses(folder) == pytest.approx(expected, rel=1e-5), backend


@pytest.mark.parametrize("objective", ["pretrain", "sft"])
def test_a_document_has_the_same_loss_packed_and_padded(
    stores: Path, pretrained: Path, tmp_path: Path, objective: str
) -> None:
    found = []
    for packing in (False, True):
        config = toy_config(
            tmp_path, stores, objective, data={"packing": packing},
            model={} if objective == "pretrain" else {"path": str(pretrained / "best")},
        )  # fmt: skip
        task: Any = make_task(config)
        seed_torch(0, 0)
        model = task.build_model()
        batch = batch_of(task, list(range(len(task.dataset("train")))))
        loss, predicted = task.by_token(model, batch)
        total = task.loss(model, batch)["loss"]
        assert float(total.detach()) == pytest.approx(float(loss.detach().sum()), rel=1e-5)
        number = batch.get("document", torch.zeros_like(batch["targets"]))
        documents: dict[tuple[int, ...], float] = {}
        for row in range(len(loss)):
            for document in range(int(number[row].max()) + 1):
                here = predicted[row] & (number[row] == document)
                # with what is read: documents of one token to predict may differ only in the one before it
                tokens = (*batch["input_ids"][row, here].tolist(), *batch["targets"][row, here].tolist())
                documents[tokens] = float(loss[row, here].detach().sum())
        found.append(documents)
    padded, packed = found
    assert padded.keys() == packed.keys()
    assert len(padded) > 30
    assert list(packed.values()) == pytest.approx([padded[tokens] for tokens in packed], rel=1e-5)


def test_final_is_a_folder_that_transformers_opens_with_the_same_logits(
    stores: Path, pretrained: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config = toy_config(tmp_path, stores, "dpo", model={"path": str(pretrained / "best")})
    trainer = train(config, tmp_path / "run")
    assert export(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--max-shard-gib", "2e-5"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ids = torch.arange(40)[None]
    ours: Any = trainer.backend.module.policy  # type: ignore[union-attr]
    expected = ours.lm(input_ids=ids).logits
    for folder in (tmp_path / "run/final", tmp_path / "out"):
        lm = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(lm(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer("What is a list?")["input_ids"]) == "What is a list?"
        assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(folder).eos_token_id
        assert json.loads((folder / "config.json").read_text())["workload"] == "causal_lm"


@pytest.mark.parametrize("objective", ["pretrain", "dpo"])
def test_weights_are_exported_when_the_data_is_gone(
    stores: Path, pretrained: Path, tmp_path: Path, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"path": str(pretrained / "best")} if objective == "dpo" else {}
    train(toy_config(tmp_path, stores, objective, model=model, training={"steps": 1}), tmp_path / "run")
    monkeypatch.setattr("trunkline.models.causal_lm.task.Store.open", None)  # whoever opens it fails
    assert export(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    for name in {path.name for path in (tmp_path / "run/final").iterdir()} - {"digests.json"}:
        final, out = (folder / name for folder in (tmp_path / "run/final", tmp_path / "out"))
        if name == "model.safetensors":
            one, two = load_file(final), load_file(out)
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)
        else:
            assert final.read_bytes() == out.read_bytes(), name


def test_a_damaged_model_is_not_trained_on(stores: Path, pretrained: Path, tmp_path: Path) -> None:
    shutil.copytree(pretrained / "best", tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 2
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"base/model.safetensors: is not the file that was written"):
        make_task(toy_config(tmp_path, stores, "dpo", model={"path": str(tmp_path / "base")}))


def test_a_store_of_another_tokenizer_is_refused(stores: Path, pretrained: Path, tmp_path: Path) -> None:
    prepare(
        [stores / "conversations.jsonl"], tmp_path / "other", kind="conversations", vocab_size=300, val_fraction=0.2
    )
    data = {"store": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=r"its token \d+ is .*, but .* to the model of .*best: prepare .*--tokenizer"):
        make_task(toy_config(tmp_path, stores, "sft", data=data, model={"path": str(pretrained / "best")}))
    base = Path(shutil.copytree(pretrained / "best", tmp_path / "base"))
    for name in ("digests.json", "tokenizer_config.json"):  # tokenizer.json alone says what an id means
        (base / name).unlink()
    with pytest.raises(ConfigError, match=r"its token \d+ is .*, but .* to the model of .*base"):
        make_task(toy_config(tmp_path, stores, "sft", data=data, model={"path": str(base)}))
    make_task(toy_config(tmp_path, stores, "sft", model={"path": str(base)}))


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_recomputed_activations_change_nothing(stores: Path, tmp_path: Path, backend: str) -> None:
    for again in (False, True):
        settings = {"steps": 4, "activation_checkpointing": again}
        train(toy_config(tmp_path, stores, data={"packing": True}, training=settings), tmp_path / str(again), backend)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-6)


def test_what_does_not_fit_together_is_named(stores: Path, pretrained: Path, tmp_path: Path) -> None:
    best = {"path": str(pretrained / "best")}
    for objective, sections, message in (
        ("pretrain", {"data": {"store": str(stores / "conversations")}}, "pretrain learns from text, but data.store"),
        ("pretrain", {"model": {"vocab_size": 300}}, r"its tokenizer has \d+ tokens, but the model's shape has 300"),
        ("dpo", {"model": best, "data": {"packing": True}}, "pairs of answers are not packed"),
        ("sft", {"model": {"path": str(tmp_path / "nowhere")}}, "holds no config.json"),
    ):
        with pytest.raises(TrunklineError, match=message):
            make_task(toy_config(tmp_path, stores, objective, **sections))  # type: ignore[arg-type]


def test_flops_agree_with_torch_s_own_count(stores: Path, tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = toy_config(tmp_path, stores, model={"attention": "eager"}, data={"max_length": 32})
    task: Any = make_task(config)
    model = task.build_model()
    full = [place for place, length in enumerate(task.dataset("train").lengths) if length == 32][:4]
    batch = batch_of(task, full)
    with FlopCounterMode(display=False) as counter:
        model.lm(input_ids=batch["input_ids"], use_cache=False)
    lengths = task.store.split("train").lengths
    exact = task.flops_per_sample() * len(task.dataset("train")) / 3
    tokens = sum(min(32, length - start) for length in lengths for start in range(0, length, 32))
    assert tokens == lengths.sum()
    # eager attention computes all pairs, visible or not: 32 in place of 16.5 a token
    attention = 4 * 2 * 32 * 16.5
    assert counter.get_total_flops() / (4 * 32) - attention * 32 / 16.5 + attention == pytest.approx(
        exact / tokens, rel=0.02
    )
