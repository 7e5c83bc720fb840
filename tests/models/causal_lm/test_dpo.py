"""Direct preference optimization against the paper's formula, and against TRL on the same batch."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.models.causal_lm.toy_language import toy_config
from trunkline.models.causal_lm.build import llama_config, make_network
from trunkline.models.causal_lm.config import DPO, CausalLMModel, LlamaShape, Pretrain
from trunkline.models.causal_lm.dpo import PolicyAndReference, dpo_loss
from trunkline.models.causal_lm.network import CausalLM
from trunkline.models.registry import make_task
from trunkline.models.text.linear_loss import IGNORE


def network() -> CausalLM:
    torch.manual_seed(0)
    shape = LlamaShape(64, 32, 2, 2, 1, 48)
    model = CausalLMModel(objective=Pretrain(type="pretrain"), **shape._asdict())
    return make_network(model, llama_config(shape, 32))


def test_the_loss_is_that_of_the_paper() -> None:
    policy = torch.tensor([[-3.0, -5.0], [-7.0, -2.0]], dtype=torch.float64)
    reference = torch.tensor([[-4.0, -4.5], [-6.0, -2.5]], dtype=torch.float64)
    found = dpo_loss(policy, reference, DPO(type="dpo", beta=0.3))
    margins = [0.3 * ((-3 + 4) - (-5 + 4.5)), 0.3 * ((-7 + 6) - (-2 + 2.5))]
    assert found.loss.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-m))) for m in margins], rel=1e-12)
    assert found.chosen_reward.tolist() == pytest.approx([0.3, -0.3], rel=1e-12)
    assert found.rejected_reward.tolist() == pytest.approx([-0.15, 0.15], rel=1e-12)


def test_label_smoothing_takes_a_share_of_the_pairs_to_be_exchanged() -> None:
    policy, reference = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(5, 2)
    smooth = dpo_loss(policy, reference, DPO(type="dpo", label_smoothing=0.2)).loss
    plain, exchanged = (dpo_loss(p, reference, DPO(type="dpo")).loss for p in (policy, policy.flip(1)))
    torch.testing.assert_close(smooth, 0.8 * plain + 0.2 * exchanged)


@pytest.mark.parametrize("margin", [-1e5, 1e5])
def test_no_margin_is_too_large(margin: float) -> None:
    policy = torch.tensor([[margin, 0.0]], requires_grad=True)
    loss = dpo_loss(policy, torch.zeros(1, 2), DPO(type="dpo", beta=1.0)).loss
    loss.sum().backward()
    assert loss.item() == max(0.0, -margin)
    assert policy.grad is not None
    assert policy.grad.tolist() == [[-float(margin < 0), float(margin < 0)]]


def test_only_the_policy_learns_and_the_reference_is_never_in_training_mode() -> None:
    policy, reference = network(), network()
    both = PolicyAndReference(policy, reference).train()
    assert policy.training
    assert not any(module.training for module in reference.modules())
    ids = torch.randint(64, (2, 2, 16), generator=torch.Generator().manual_seed(2))
    ours, theirs = both(ids, ids.roll(-1, 2))
    assert torch.equal(ours, theirs), "the copies are equal"
    ours.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reference.parameters())


def test_log_probabilities_are_sums_over_the_response() -> None:
    both = PolicyAndReference(network(), network())
    ids = torch.randint(64, (3, 2, 16), generator=torch.Generator().manual_seed(3))
    targets = ids.roll(-1, 2)
    for row, (chosen, rejected) in enumerate([(5, 9), (15, 1), (7, 7)]):
        targets[row, 0, chosen:] = targets[row, 1, rejected:] = -100
    logits = both.policy.lm(input_ids=ids.flatten(0, 1)).logits
    each = -F.cross_entropy(logits.transpose(1, 2), targets.flatten(0, 1), reduction="none", ignore_index=-100)
    assert (each != 0).sum(1).tolist() == [5, 9, 15, 1, 7, 7]
    torch.testing.assert_close(both(ids, targets)[0], each.sum(1).view(3, 2))


@pytest.mark.parametrize("length_average", [False, True])
def test_loss_rewards_and_gradients_are_those_of_trl(
    stores: Path, pretrained: Path, tmp_path: Path, length_average: bool
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    options = {"type": "dpo", "beta": 0.3, "length_average": length_average}
    config = toy_config(tmp_path, stores, "dpo", model={"objective": options, "path": str(pretrained / "best")})
    task = make_task(config)
    both = task.build_model().double()  # rewards are differences of sums, whose fp32 rounding would hide a mistake
    with torch.no_grad():  # away from the reference, or every reward is 0
        for parameter in both.policy.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    policy, reference = copy.deepcopy(both.policy.lm), copy.deepcopy(both.reference.lm)
    for model in (policy, reference):  # their own head and attention
        model.get_output_embeddings().__class__ = torch.nn.Linear
        model.set_attn_implementation("sdpa")

    dataset = task.dataset("train")
    batch = task.collate([dataset[place] for place in range(6)])
    batch["valid"] = torch.ones(6, dtype=torch.bool)
    ids, learned = (batch[key].transpose(0, 1).flatten(0, 1) for key in ("input_ids", "targets"))
    completion = F.pad(learned[:, :-1] != IGNORE, (1, 0)).long()
    ends = torch.tensor([row.nonzero().max() for row in completion])
    theirs = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=0.3, loss_type="sigmoid_norm" if length_average else "sigmoid",
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_dropout=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=task.tokenizer,
    )  # fmt: skip
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) <= ends[:, None]).long(),
        "completion_mask": completion,
    }
    expected = theirs._compute_loss(policy.train(), inputs, False)
    expected.backward()

    sums = task.loss(both, batch)
    (sums["loss"] / 6).backward()
    torch.testing.assert_close(sums["loss"].detach() / 6, expected.detach().double(), rtol=1e-5, atol=0)
    reported = {key: values[-1] for key, values in theirs._metrics["train"].items()}
    if not length_average:  # TRL's rewards are sums whatever the loss
        for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies"):
            assert float(sums[name] / 6) == pytest.approx(reported[name], rel=1e-5), name
        # TRL's are fp32 and of size 4, so their difference is only as near as they are; ours is fp64
        margin = sums["rewards/chosen"] - sums["rewards/rejected"]
        assert float(sums["rewards/margins"]) == pytest.approx(float(margin), rel=1e-12)
        assert float(margin / 6) == pytest.approx(reported["rewards/margins"], abs=5e-6)
    found = dict(both.policy.lm.named_parameters())
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        error = (found[name].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name
