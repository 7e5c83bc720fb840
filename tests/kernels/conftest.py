"""What the kernels' tests share: `interpreter` and `device`, under which Triton kernels run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trunkline.kernels import triton_path


@pytest.fixture(autouse=True)
def torch_s_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's ZeRO 3 leaves one of its own in the process, which has no forward-mode derivative."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture(autouse=True)
def triton_always_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROWS_PER_CHANNEL", 0), ("PRODUCTS", 0), ("WIDEST", 256)):
        monkeypatch.setattr(f"trunkline.kernels.attention.flash.{name}", value)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """While this module's tests run, the kernels run on CPU tensors, through Triton's interpreter."""
    with interpreted():
        yield


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device on which the kernels run: the CPU, through Triton's interpreter, and with `-m gpu` the GPU."""
    with interpreted() if request.param == "cpu" else contextlib.nullcontext():
        yield torch.device(request.param)


@pytest.fixture
def overflows_are_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and products of integers that need more bits than they have are errors, where kernels are interpreted."""
    if device.type == "cpu":
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))


@pytest.fixture
def bf16_rounds_to_nearest(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. The interpreter cuts fp32 down to bf16, an error that adds up."""
    if device.type == "cuda":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != interpreter.tl.float32 or dtype.scalar != interpreter.tl.bfloat16:
            return cast(self, source, dtype)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(rounded, dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within, the kernels run on CPU tensors, as far as tests/interpreted.py has imported them."""
    if triton_path.triton is None:
        pytest.skip("needs Triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for kernels in modules that are imported when first needed
        patch.setattr(triton_path, "INTERPRETED", True)
        _prepare_the_language_once(patch)
        _look_types_up_once(patch)
        yield


def _prepare_the_language_once(patch: pytest.MonkeyPatch) -> None:
    """A launch has Triton's language made ready for its interpreter, and so has each call of a function in a kernel.

    The latter finds it ready, and takes a third of the tests' time to see it. Here it looks at one name alone.
    """
    from triton.runtime import interpreter

    make_ready, languages = interpreter._patch_lang, {}

    def make_ready_once(function: Callable[..., Any]) -> Any:
        if function not in languages:
            known = (interpreter.tl, interpreter.tl.core)
            languages[function] = [
                value for value in function.__globals__.values() if any(value is one for one in known)
            ]
        if any(interpreter.tl.core.is_builtin(language.load) for language in languages[function]):
            return make_ready(function)
        return interpreter._LangPatchScope()

    if hasattr(interpreter, "_LangPatchScope"):  # of Triton 3.7
        patch.setattr(interpreter, "_patch_lang", make_ready_once)


def _look_types_up_once(patch: pytest.MonkeyPatch) -> None:
    """Half of the time that is left goes into what no GPU does: types made anew for every value of a kernel.

    And every sum and product of integers is made again in 64 bits, to see that it fits: see `overflows_are_found`.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))

    numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def numpy_type_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(dtype)
        return numpy_types[name]

    patch.setattr(interpreter, "_get_np_dtype", numpy_type_once)

    make_block, blocks = interpreter.tl.block_type.__init__, {}

    def make_block_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    patch.setattr(interpreter.tl.block_type, "__init__", make_block_once)

    tensor, made = interpreter.tl.tensor, {}
    make_tensor = tensor.__init__

    def make_shape_once(self: Any, handle: Any, type: Any) -> None:
        key = (*type.shape,) if type.is_block() else ()
        if key not in made:
            make_tensor(self, handle, type)
            made[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(made[key], handle=handle, type=type, dtype=type.scalar)

    patch.setattr(tensor, "__init__", make_shape_once)
