"""The one numerical criterion of the kernels, and the inputs that their tests and benchmarks share.

A kernel, the eager reference in the same dtype, and the reference in float64 start from the same rounded inputs. The
kernel's relative RMS error against float64 may be 1.25 times the eager path's own, for the output and every gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_kernels import (
    carry_update,
    carry_update_reference,
    h_update,
    h_update_reference,
    l_recurrence,
    l_recurrence_reference,
    residual_norm,
    residual_norm_reference,
    rope_attention,
    rope_attention_reference,
    swiglu_block,
    swiglu_block_reference,
    swiglu_mlp,
    swiglu_mlp_reference,
    token_mixer,
    token_mixer_reference,
)

REFERENCES: dict[Callable, Callable] = {
    l_recurrence: l_recurrence_reference,
    h_update: h_update_reference,
    carry_update: carry_update_reference,
    residual_norm: residual_norm_reference,
    swiglu_mlp: swiglu_mlp_reference,
    swiglu_block: swiglu_block_reference,
    rope_attention: rope_attention_reference,
    token_mixer: token_mixer_reference,
}

ALLOWANCE = 1.25  # times the eager path's own error
FLOAT32_LIMIT = 1e-5
# An error below the floor passes whatever eager's is. For 16-bit dtypes it is the unit roundoff, which a correctly
# rounded result may err by, so that on a handful of elements the luck of the rounding decides nothing. In float32 sums
# of up to 64 products in another order differ by a few ulp, on either side of the truth alike.
FLOOR = {
    torch.float32: 8 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2,
    torch.float16: torch.finfo(torch.float16).eps / 2,
}

# bfloat16 needs a GPU: Triton's interpreter computes its products wrongly
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """RMS of the error over RMS of the truth; where the truth is all zeros or empty, the RMS of the value."""
    truth = truth.double()
    error = torch.linalg.vector_norm(value.double() - truth).item()
    return error / (torch.linalg.vector_norm(truth).item() or 1.0)


def assert_as_exact_as_eager(name: str, kernel: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The criterion for one tensor: shape, dtype, device and error. A NaN anywhere fails."""
    assert kernel.shape == eager.shape, f"{name}: shape {tuple(kernel.shape)} should be {tuple(eager.shape)}"
    assert kernel.dtype == eager.dtype, f"{name}: dtype {kernel.dtype} should be {eager.dtype}"
    assert kernel.device == eager.device, f"{name}: device {kernel.device} should be {eager.device}"
    error, own = relative_rms(kernel, exact), relative_rms(eager, exact)
    allowed = max(ALLOWANCE * own, FLOOR[kernel.dtype])
    assert error <= allowed, f"{name}: relative RMS error {error:.3g}, eager's own {own:.3g}, allowed {allowed:.3g}"
    if kernel.dtype == torch.float32:
        assert error < FLOAT32_LIMIT, f"{name}: relative RMS error {error:.3g} in float32, allowed {FLOAT32_LIMIT}"


def run_with_gradients(
    function: Callable, tensors: dict[str, Tensor], cotangent: Tensor, wrt: Iterable[str], **options
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Calls `function` on leaves that keep the strides of `tensors`; returns the output and the gradients of `wrt`."""
    leaves = {name: t.detach().requires_grad_(name in wrt) for name, t in tensors.items()}
    out = function(*leaves.values(), **options)
    names = [name for name in leaves if name in wrt]
    if not out.requires_grad:  # no gradient reaches any of them
        return out.detach(), dict.fromkeys(names)
    gradients = torch.autograd.grad(out, [leaves[n] for n in names], cotangent.to(out.dtype), allow_unused=True)
    return out.detach(), dict(zip(names, gradients, strict=True))


def assert_parity(
    op: Callable,
    tensors: dict[str, Tensor],
    *,
    wrt: Iterable[str] | None = None,
    cotangent: Tensor | None = None,
    **options,
) -> None:
    """Holds the Triton path of a differentiable `op` to the criterion, for the output and the gradients of `wrt`.

    Args:
        op: a key of `REFERENCES`.
        tensors: its tensor arguments in order, by name; all on one device and of one dtype.
        wrt: names of the tensors that require gradient; None takes all of them.
        cotangent: gradient of the output; None draws one.
        options: the operation's other arguments.
    """
    wrt = tuple(tensors if wrt is None else wrt)
    if cotangent is None:
        cotangent = torch.randn_like(next(iter(tensors.values())), memory_format=torch.contiguous_format)
    wide = {name: t.double() for name, t in tensors.items()}
    kernel, kernel_grads = run_with_gradients(op, tensors, cotangent, wrt, backend="triton", **options)
    eager, eager_grads = run_with_gradients(op, tensors, cotangent, wrt, backend="reference", **options)
    exact, exact_grads = run_with_gradients(REFERENCES[op], wide, cotangent.double(), wrt, **options)
    assert_as_exact_as_eager("output", kernel, eager, exact)
    for name in wrt:
        if eager_grads[name] is None:
            assert kernel_grads[name] is None, f"gradient of {name}: there should be none"
        else:
            assert kernel_grads[name] is not None, f"gradient of {name}: there should be one"
            assert_as_exact_as_eager(f"gradient of {name}", kernel_grads[name], eager_grads[name], exact_grads[name])


def assert_compiles_into_one_graph(function: Callable, tensors: dict[str, Tensor], wrt: Iterable[str]) -> None:
    """`function` compiles without a graph break and gives eager's output and gradients of `wrt`."""
    torch._dynamo.reset()
    backend = "inductor" if next(iter(tensors.values())).is_cuda else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    cotangent = torch.randn_like(next(iter(tensors.values())))
    ours, our_gradients = run_with_gradients(compiled, tensors, cotangent, wrt)
    theirs, their_gradients = run_with_gradients(function, tensors, cotangent, wrt)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradients, their_gradients)


def assert_cuda_graph_replays(step: Callable[[], list[Tensor]], changing: Tensor) -> None:
    """`step` captured in a CUDA graph gives, after `changing` took new values, what it gives outside of the graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles and warms up outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        changing.copy_(torch.randn_like(changing))
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


def unit_state(*shape: int, head_size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A state as the cells leave it: standard normal, head-wise RMS 1."""
    state = torch.randn(*shape, device=device).unflatten(-1, (-1, head_size))
    return (state * state.square().mean(-1, keepdim=True).rsqrt()).flatten(-2).to(dtype)


def mlp_tensors(
    *lead: int,
    width: int = 32,
    inner: int = 24,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensor arguments of `swiglu_mlp` and `swiglu_block` for leading dimensions `lead`."""
    tensors = {
        "x": torch.randn(*lead, width, device=device),
        "w_gate_up": torch.randn(2 * inner, width, device=device) * width**-0.5,
        "w_down": torch.randn(width, inner, device=device) * inner**-0.5,
    }
    return {name: t.to(dtype) for name, t in tensors.items()}


def block_weights(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(..., D, D) weights that keep the size of what they multiply."""
    return (torch.randn(*shape, device=device) * shape[-1] ** -0.5).to(dtype)


def l_tensors(
    *lead: int, heads: int = 2, size: int = 16, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The tensor arguments of `l_recurrence` for leading dimensions `lead`."""
    width = heads * size
    like = {"dtype": dtype, "device": device}
    return {
        "z": unit_state(*lead, width, head_size=size, **like),
        "context": torch.randn(*lead, 2 * width, **like),
        **{name: block_weights(heads, size, size, **like) for name in ("w_gate", "w_up", "w_down")},
    }


def h_tensors(
    *lead: int, heads: int = 2, size: int = 16, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The tensor arguments of `h_update` for leading dimensions `lead`."""
    width = heads * size
    like = {"dtype": dtype, "device": device}
    return {
        "z": unit_state(*lead, width, head_size=size, **like),
        "inputs": torch.randn(*lead, 3 * width, **like),
        "w": block_weights(3, heads, size, size, **like),
    }


def carry_tensors(
    rows: int,
    *lead: int,
    width: int = 48,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensor arguments of `carry_update`; every third row halted, the change a tenth of the state."""
    old = torch.randn(rows, *lead, width, device=device)
    return {
        "halted": torch.arange(rows, device=device) % 3 == 1,
        "steps": torch.arange(rows, device=device, dtype=torch.int32) % 7,
        "old": old.to(dtype),
        "new": (old + 0.1 * torch.randn_like(old)).to(dtype),
        "init": torch.randn(width, device=device).to(dtype),
    }


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "strided rows": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "strided last": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "columns of a wider tensor": lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],
    "offset storage": lambda t: torch.cat((t[:1], t))[1:],
    "expanded rows": lambda t: t[:1, :1].expand(t.shape),
    "expanded last": lambda t: t[..., :1].expand(t.shape),
}


def bytes_saved_for_backward(function: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between the forward and the backward of `function`, each storage counted once."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    assert out.requires_grad, "nothing is saved where nothing requires gradient"
    return sum(storages.values())


def operations_of_backward(out: Tensor, leaves: list[Tensor]) -> set[str]:
    """Names of the PyTorch operations, such as "aten::mm", that the backward of `out` calls."""
    names: set[str] = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.name())
            return function(*args, **(kwargs or {}))

    with Calls():
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    return names
