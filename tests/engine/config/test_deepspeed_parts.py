"""Every object of the "deepspeed" section is checked to its last key, and what acts on nothing is an error."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from trunkline.engine.config import deepspeed_parts as parts
from trunkline.engine.config import zero_section
from trunkline.engine.config.deepspeed_section import DeepSpeedSection
from trunkline.engine.config.strict import validated
from trunkline.engine.config.zero_section import Zero
from trunkline.engine.errors import ConfigError


def section(**keys: Any) -> DeepSpeedSection:
    whole = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}} | keys
    return validated(DeepSpeedSection, whole, "deepspeed", "run.json")


def objects(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The places of all objects in the section."""
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield (*prefix, name)
                yield from objects(kind, (*prefix, name))


@pytest.mark.parametrize("place", [*objects(DeepSpeedSection)], ids=".".join)
def test_an_unknown_key_in_any_object_is_an_error(place: tuple[str, ...]) -> None:
    value: Any = {"bogus": True}
    for name in reversed(place):
        value = {name: value}
    with pytest.raises(ConfigError, match=rf"run.json: (.|\n)*deepspeed\.{'.'.join(place)}\.bogus: unknown key; "):
        section(**value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation_checkpointing": {"partition_activations": True}}, "partition_activations: has no effect here: "
         "use training.activation_checkpointing; remove the key, found true"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile: has no effect here: use training.compile"),
        ({"aio": {"block_size": 1}}, "aio.block_size: has no effect here: nothing is offloaded to files"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype: has no effect here"),
        ({"data_types": {"grad_accum_dtype": "float"}}, "data_types.grad_accum_dtype: .*'fp32', 'bf16' or 'fp16'"),
        ({"data_types": {"param_dtype": "bf16"}}, "param_dtype 'bf16' contradicts the precision in force, fp32"),
        ({"disable_allgather": True}, "disable_allgather: has no effect here"),
        ({"use_node_local_storage": True}, "use_node_local_storage: has no effect here"),
        ({"nebula": {"enabled": False}}, "'nebula' is not supported here"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}, "legacy_fusion": True}}, "legacy_fusion: has no effect"),
        ({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}, "whole fp32 weights"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint: has no effect here"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload to files is not"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio: has no"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"pin_memory": False}}}, 'while device is "none"'),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer has no effect at stage 0"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "or set stage to 3"),
        ({"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 1}}, "no effect at stage 2: remove it"),
        ({"zero_optimization": {"stage": 3, "round_robin_gradients": True}}, "set stage to 1 or 2"),
        ({"fp16": {"loss_scale": 8}}, 'fp16: loss_scale has no effect while enabled is false: add "enabled"'),
        ({"flops_profiler": {"profile_step": 3}}, "flops_profiler: profile_step has no effect while enabled is false"),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "immediate_grad_update has no effect but at"),
        ({"comms_logger": {"enabled": True}}, "nothing is shown without verbose"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast: dtype is missing"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "dtype: its loss scale could not be saved"),
        ({"log_level": "loud"}, "log_level: .*'debug'"),
        ({"steps_per_print": 0}, "steps_per_print: .*greater than 0"),
        ({"timers": {"throughput": {"synchronised": True}}}, "did you mean 'synchronized'"),
    ],
)  # fmt: skip
def test_what_does_nothing_is_an_error_that_says_so(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"flops_profiler": {"enabled": False, "profile_step": 3}},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"zero_optimization": {"stage": 0, "reduce_bucket_size": 5e8, "overlap_comm": False}},
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}},
        {"fp16": {"enabled": False, "initial_scale_power": 8}},
        {"comms_logger": {"enabled": False, "verbose": False}},
    ],
)
def test_what_asks_for_nothing_passes(keys: dict[str, Any]) -> None:
    section(**keys)


@pytest.mark.parametrize(
    ("keys", "reports"),
    [
        ({"comms_logger": {"enabled": True, "verbose": True}}, True),
        ({"comms_logger": {"enabled": False, "verbose": True}}, False),
        ({"steps_per_print": 10}, True),
        ({"dump_state": True}, False),  # which is at the start
        ({}, False),
    ],
)
def test_whether_deepspeed_is_to_print_what_training_does(keys: dict[str, Any], reports: bool) -> None:
    assert section(**keys).reports == reports


def test_a_number_without_a_fraction_is_an_integer() -> None:
    zero = {"stage": 2.0, "reduce_bucket_size": 5e8, "allgather_bucket_size": 2e8}
    found = section(train_batch_size=1e1, zero_optimization=zero, fp16={"enabled": True, "loss_scale_window": 1e3})
    assert found.train_batch_size == 10
    assert found.zero_optimization.model_dump(exclude_none=True) == {
        "stage": 2, "reduce_bucket_size": 500_000_000, "allgather_bucket_size": 200_000_000
    }  # fmt: skip
    for wrong in (2.5, True, "8", float("inf"), 1e300):
        with pytest.raises(ConfigError, match=r"deepspeed\.train_batch_size: "):
            section(train_batch_size=wrong)


def test_auto_is_what_a_key_has_that_is_left_out() -> None:
    words: dict[str, Any] = {
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    }
    found = section(**words)
    assert (found.gradient_clipping, found.bf16.enabled, found.fp16.enabled) == (0.0, False, False)
    assert found.zero_optimization.reduce_bucket_size is None  # the engine sizes it by the model
    assert found.zero_optimization.stage3_prefetch_bucket_size == 50_000_000
    assert found.optimizer.params == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    assert found.scheduler is not None
    assert found.scheduler.params == {"warmup_min_lr": 0.0, "warmup_num_steps": "auto"}  # the run's length decides


def test_each_auto_that_nothing_decides_is_named_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        section(
            train_batch_size="auto",
            optimizer={"type": "auto", "params": {}},
            zero_optimization={"stage": 1, "offload_optimizer": "auto", "leaf_module": {"names": 3}},
        )
    text = str(caught.value)
    assert 'train_micro_batch_size_per_gpu: "auto" is derived from train_batch_size' in text
    assert "deepspeed.optimizer.type" in text
    assert "deepspeed.zero_optimization.leaf_module.names" in text


def test_parts_have_the_keys_and_defaults_of_the_installed_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    def defaults(model: type[BaseModel]) -> dict[str, Any]:
        return {field.alias or name: field.default for name, field in model.model_fields.items()}

    same: list[tuple[type[BaseModel], dict[str, Any]]] = [
        (parts.ActivationCheckpointing, ACT_CHKPT_DEFAULT),
        (parts.Aio, AIO_DEFAULT_DICT),
        (parts.Compile, defaults(CompileConfig)),
        (parts.CommsLogger, defaults(CommsLoggerConfig) | {"prof_ops": None}),
        (parts.FlopsProfiler, vars(DeepSpeedFlopsProfilerConfig({}))),
        (parts.Throughput, defaults(DeepSpeedThroughputTimerConfig)),
        (zero_section.OffloadOptimizer, defaults(offload_config.DeepSpeedZeroOffloadOptimizerConfig)),
        (zero_section.OffloadParam, defaults(offload_config.DeepSpeedZeroOffloadParamConfig)),
    ]
    for ours, theirs in same:
        assert defaults(ours) == theirs, ours
    assert set(zero_section.LeafModule.model_fields) == set(DeepSpeedZeroLeafModuleConfig.model_fields)
    zero = defaults(DeepSpeedZeroConfig)
    assert {key: zero[key] for key in zero_section.ZERO_DEFAULTS if key != "overlap_comm"} == {
        key: value for key, value in zero_section.ZERO_DEFAULTS.items() if key != "overlap_comm"
    }
    assert set(zero_section.ZERO_STAGES) <= set(Zero.model_fields)


def test_what_is_read_as_a_plain_dictionary_is_known_too() -> None:
    """torch_autocast and data_types have no model in DeepSpeed: their keys are its constants."""
    from deepspeed.runtime import constants

    autocast = {
        getattr(constants, f"TORCH_AUTOCAST_{name}") for name in ("ENABLED", "DTYPE", "LOWER_PRECISION_SAFE_MODULES")
    }
    assert autocast == set(parts.TorchAutocast.model_fields)
    names = ("GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES")
    assert {getattr(constants, name) for name in names} == set(parts.DataTypes.model_fields)
