"""Which backend runs, why, and what the errors say where it cannot."""

import subprocess
import sys

import pytest
import torch
from parity import carry_tensors, h_tensors, l_tensors

import hrm_kernels
from hrm_kernels import (
    BackendError,
    _backend,
    _triton,
    carry_update,
    explain,
    h_update,
    l_recurrence,
    residual_norm,
    rope_attention,
    swiglu_block,
    swiglu_mlp,
    token_mixer,
)
from hrm_kernels._triton import TABLE, Config, override_config

CALLS = {
    "l_recurrence": lambda **options: l_recurrence(*l_tensors(3).values(), steps=2, **options),
    "h_update": lambda **options: h_update(*h_tensors(3).values(), **options),
    "carry_update": lambda **options: carry_update(*carry_tensors(3).values(), **options),
    "residual_norm": lambda **options: residual_norm(torch.ones(3, 16), torch.ones(3, 16), **options),
    "swiglu_mlp": lambda **options: swiglu_mlp(torch.ones(3, 16), torch.ones(16, 16), torch.ones(16, 8), **options),
    "swiglu_block": lambda **options: swiglu_block(torch.ones(3, 16), torch.ones(16, 16), torch.ones(16, 8), **options),
    "rope_attention": lambda **options: rope_attention(torch.ones(1, 3, 48), None, None, heads=1, **options),
    "token_mixer": lambda **options: token_mixer(torch.ones(1, 3, 16), torch.ones(8, 3), torch.ones(3, 4), **options),
}
FUNCTIONS = tuple(CALLS)


@pytest.fixture
def without_interpreter(monkeypatch):
    """The CPU as users have it, where Triton cannot run; the cached answers are for the tests' own environment."""
    caches = [f for f in vars(_backend).values() if hasattr(f, "cache_clear")]
    for cached in caches:
        cached.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_triton_on_the_cpu_names_what_is_missing(function, without_interpreter):
    message = (
        f'{function}: backend="triton" cannot run here: the tensors are on the CPU and TRITON_INTERPRET=1 is not set'
    )
    with pytest.raises(BackendError, match=message):
        CALLS[function](backend="triton")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_triton_that_cannot_be_imported_is_named(function, without_interpreter):
    without_interpreter.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match=f'{function}: backend="triton" cannot run here: triton cannot be imported'):
        CALLS[function](backend="triton")
    assert all(choice.backend == "reference" for choice in explain("cpu"))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_auto_on_the_cpu_runs_the_reference(function, without_interpreter):
    tensors = CALLS[function](backend="auto")
    assert tensors is not None
    assert [choice.backend for choice in explain("cpu")] == ["reference"] * len(FUNCTIONS)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_auto_never_picks_the_interpreter(backend):
    assert _backend.choose("l_recurrence", backend, torch.device("cpu"), 16, torch.float32) == "reference"


def test_bfloat16_in_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="interpreter computes bfloat16 products wrongly"):
        l_recurrence(*l_tensors(3, dtype=torch.bfloat16).values(), steps=2, backend="triton")


def test_a_device_without_kernels_is_named():
    with pytest.raises(BackendError, match="the tensors are on meta; the Triton kernels need a CUDA device"):
        h_update(*h_tensors(3, device="meta").values(), backend="triton")


def test_rocm_and_old_devices_are_named(without_interpreter):
    cuda = torch.device("cuda", 0)
    without_interpreter.setattr(torch.version, "hip", None)
    without_interpreter.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(BackendError, match=r"compute capability 7\.5 is below 8\.0"):
        _backend.choose("h_update", "triton", cuda, 64, torch.float32)
    assert _backend.choose("h_update", "auto", cuda, 64, torch.float32) == "reference"
    without_interpreter.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    _backend._missing_on.cache_clear()
    assert _backend.choose("l_recurrence", "auto", cuda, 64, torch.float32) == "triton"
    without_interpreter.setattr(torch.version, "hip", "6.0")
    _backend._missing_on.cache_clear()
    with pytest.raises(BackendError, match="built for ROCm"):
        _backend.choose("carry_update", "triton", cuda, None, None)


def test_explain_names_every_function_and_the_reason(without_interpreter):
    choices = explain("cpu")
    assert [choice.function for choice in choices] == list(FUNCTIONS)
    for choice in choices:
        expected = f"{choice.function} on cpu: reference (the tensors are on the CPU and TRITON_INTERPRET=1 is not set)"
        assert str(choice) == expected


def test_explain_knows_the_limit_of_the_head_size():
    by_function = {choice.function: choice for choice in explain(head_size=128)}
    for function in ("l_recurrence", "h_update"):
        assert by_function[function].backend == "reference"
        assert "head size 128 is above 64" in by_function[function].reason
    assert not any("head size" in by_function[name].reason for name in FUNCTIONS[2:])


@pytest.mark.gpu
def test_explain_on_a_gpu_says_triton():
    choices = explain()
    assert all(choice.backend == "triton" for choice in choices)
    assert torch.cuda.get_device_name() in choices[0].device


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
def test_cpu_tensors_beside_a_gpu_run_the_reference(function):
    assert CALLS[function](backend="auto") is not None


def test_kernels_import_neither_models_nor_transformers():
    code = "import sys, hrm_kernels; print([m for m in ('hrm', 'transformers', 'peft') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hrm_kernels\n"
        "out = hrm_kernels.l_recurrence(torch.ones(2, 8), torch.ones(2, 16), *torch.ones(3, 1, 8, 8), steps=2)\n"
        "print(tuple(out.shape))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(2, 8)"


def test_public_names():
    for name in hrm_kernels.__all__:
        assert getattr(hrm_kernels, name).__doc__, f"{name} has no docstring"


# ---------------------------------------------------------------------------------------------------- launch table


def test_override_of_an_unknown_kernel_is_an_error():
    with (
        pytest.raises(ValueError, match="'forward' is no kernel; it should be one of l_forward, l_backward"),
        override_config(forward=Config(16, 4, 1)),
    ):
        pass


def test_override_ends_with_its_block_even_after_an_error():
    like = torch.empty(0)
    usual = _triton.plan("l_forward", 100, 2, 16, like)
    with pytest.raises(RuntimeError, match="inside"), override_config(l_forward=Config(32, 8, 1)):
        changed = _triton.plan("l_forward", 100, 2, 16, like)
        raise RuntimeError("inside")
    assert (changed.options["BLOCK_N"], changed.options["num_warps"]) == (32, 8)
    assert _triton.plan("l_forward", 100, 2, 16, like) == usual


@pytest.mark.parametrize("kernel", TABLE)
@pytest.mark.parametrize("tokens", [1, 15, 16, 64, 4096, 10**6])
@pytest.mark.parametrize("heads", [1, 3, 64, 1000])
def test_every_plan_has_work_for_each_program(kernel, tokens, heads):
    launch = _triton.plan(kernel, tokens, heads, 64, torch.empty(0, dtype=torch.float16))
    tiles = -(-tokens // launch.options["BLOCK_N"])
    assert launch.grid[0] == heads
    assert 1 <= launch.grid[1] <= tiles
