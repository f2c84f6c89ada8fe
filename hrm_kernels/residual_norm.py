"""Residual norm: the post-norm of the paper's block, a residual sum and its RMS norm without weight.

Equation (per token; x is the block's state, `update` what attention or the MLP adds to it):

    v = x + update
    y = v / sqrt(mean(v^2) + eps)

Gradient, with r = 1 / sqrt(mean(v^2) + eps) of the row, alike for both inputs:

    grad_v = r * (g - y * mean(g * y))
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_eps, check_shape, check_tensors, fail, shape
from hrm_kernels._triton import _math, ceil_div, device_of, jit, rms_scale, rows_of, tile_offsets, tl, triton

# ---------------------------------------------------------------------------------------------------- reference


def residual_norm_reference(
    x: Tensor,  # (..., d)
    update: Tensor,  # (..., d)
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The specification of `residual_norm`, in plain PyTorch; also takes float64."""
    v = x + update
    wide = v if v.dtype == torch.float64 else v.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(v.dtype)


# ---------------------------------------------------------------------------------------------------- Triton kernels

MAX_WIDTH = 4096  # columns of a row that one program holds


@cache
def norm_options(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants and launch options: 1024 elements a warp, which is four 16-byte loads in flight a thread
    and bfloat16 tensor, and as few warps a row as that gives, so that sums rarely leave a warp."""
    block = triton.next_power_of_2(width)
    return {
        "D": width,
        "BLOCK_D": block,
        "BLOCK_N": max(1, 1024 // block),
        "MATH": _math(dtype),
        "num_warps": max(1, block // 1024),
        "enable_fp_fusion": True,  # Triton's default until 3.9
    }


@jit(do_not_specialize=["n"])
def _norm_forward_kernel(
    x_ptr, update_ptr, out_ptr, scale_ptr,
    n, x_stride, update_stride, eps,
    SAVE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    offsets, mask = tile_offsets(tl.program_id(0), n, x_stride, 0, BLOCK_N, BLOCK_D, D)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    offsets, mask = tile_offsets(tl.program_id(0), n, update_stride, 0, BLOCK_N, BLOCK_D, D)
    update = tl.load(update_ptr + offsets, mask=mask, other=0.0)
    v = x.to(tl.float32) + update.to(tl.float32)
    scale = rms_scale(v, eps, D, MATH)
    offsets, mask = tile_offsets(tl.program_id(0), n, D, 0, BLOCK_N, BLOCK_D, D)
    tl.store(out_ptr + offsets, (v * scale).to(x.dtype), mask=mask)
    if SAVE:
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(scale_ptr + rows[:, None], scale, mask=(rows < n)[:, None])


@jit(do_not_specialize=["n"])
def _norm_backward_kernel(
    grad_ptr, out_ptr, scale_ptr, grad_v_ptr,
    n, grad_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    offsets, mask = tile_offsets(tl.program_id(0), n, grad_stride, 0, BLOCK_N, BLOCK_D, D)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    offsets, mask = tile_offsets(tl.program_id(0), n, D, 0, BLOCK_N, BLOCK_D, D)
    y = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + rows, mask=rows < n, other=0.0)[:, None]
    wide = grad.to(tl.float32)
    grad_v = scale * (wide - y * (tl.sum(wide * y, 1) * (1.0 / D))[:, None])
    tl.store(grad_v_ptr + offsets, grad_v.to(grad.dtype), mask=mask)


# ---------------------------------------------------------------------------------------------------- autograd


def _launch_forward(x: Tensor, update: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    """The result and, where `save`, the scale of each row, which the backward needs."""
    rows, updates = rows_of(x), rows_of(update)
    n = rows.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = torch.empty(n if save else 0, dtype=torch.float32, device=x.device)
    if n > 0:
        options = norm_options(x.shape[-1], x.dtype)
        with device_of(x):
            _norm_forward_kernel[(ceil_div(n, options["BLOCK_N"]),)](
                rows, updates, out, scale, n, rows.stride(0), updates.stride(0), eps, SAVE=save, **options
            )
    return out, scale


_norm_forward = torch.library.custom_op("hrm::residual_norm", _launch_forward, mutates_args=())


@_norm_forward.register_fake
def _(x, update, eps, save):
    rows = x.numel() // x.shape[-1] if save else 0
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


def _launch_backward(grad: Tensor, out: Tensor, scale: Tensor) -> Tensor:
    grads = rows_of(grad)
    n = grads.shape[0]
    grad_v = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if n > 0:
        options = norm_options(out.shape[-1], out.dtype)
        with device_of(out):
            _norm_backward_kernel[(ceil_div(n, options["BLOCK_N"]),)](
                grads, out, scale, grad_v, n, grads.stride(0), **options
            )
    return grad_v


_norm_backward = torch.library.custom_op("hrm::residual_norm_backward", _launch_backward, mutates_args=())


@_norm_backward.register_fake
def _(grad, out, scale):
    return out.new_empty(out.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # else autograd fills a gradient of zeros for the scale at every backward
    ctx.save_for_backward(*output)


def _gradients(launch, ctx, grad):
    """One tensor is the gradient of both inputs; `launch` is `_launch_backward` or the operation made of it."""
    if grad is None:
        return (None,) * 4
    grad_v = launch(grad, *ctx.saved_tensors)
    return *(grad_v if need else None for need in ctx.needs_input_grad[:2]), None, None


_norm_forward.register_autograd(
    lambda ctx, grad, _: _gradients(_norm_backward, ctx, grad), setup_context=_setup_context
)


class _ResidualNorm(torch.autograd.Function):
    """What eager calls use: an operation of torch.library, which torch.compile needs, costs them 0.1 ms a call."""

    forward = staticmethod(_launch_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return _gradients(_launch_backward, ctx, grad)


# ---------------------------------------------------------------------------------------------------- public function


def residual_norm(x: Tensor, update: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """Adds an update to a state and divides each row by its root mean square, in one pass forward and one backward.

    Statistics are float32, whatever the dtype. For the backward it keeps the result and a scale a row.

    Source: the post-norm block of arXiv 2506.21734, section 2, `docs/equations.md`.

    Args:
        x: (..., d); float32, bfloat16 or float16; contiguous or not; d up to 4096 in the Triton kernels.
        update: like `x`.
        eps: added to the mean square inside the root.
        backend: "auto" (Triton on CUDA, else the reference), "triton" or "reference".

    Returns:
        (..., d) in the dtype of `x` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    x, update = autocast(x, update)
    _check(x, update, eps)
    if choose("residual_norm", backend, x.device, unfit=too_wide(x)) == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return residual_norm_reference(x, update, eps=eps)
    graph = torch.is_grad_enabled() and (x.requires_grad or update.requires_grad)
    run = _norm_forward if torch.compiler.is_compiling() else _ResidualNorm.apply if graph else _launch_forward
    return run(x, update, eps, graph)[0]


def too_wide(x: Tensor) -> str | None:
    """Why the kernels cannot take rows of x; None where they can."""
    return f"rows of {x.shape[-1]} are above {MAX_WIDTH}, the widest" if x.shape[-1] > MAX_WIDTH else None


def _check(x: Tensor, update: Tensor, eps: float) -> None:
    name = "residual_norm"
    check_tensors(name, "x", {"x": x, "update": update})
    if x.dim() < 1 or x.shape[-1] < 1:
        fail(name, "x.shape", shape(x), "(..., d) with d above 0")
    check_shape(name, "update", update, tuple(x.shape), "the shape of x")
    check_eps(name, eps)
