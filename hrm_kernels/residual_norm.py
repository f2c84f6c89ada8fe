"""Residual norm: the post-norm of the paper's block, a residual sum and its RMS norm without weight.

Equation (per token; x is the block's state, `update` what attention or the MLP adds to it):

    v = x + update
    y = v / sqrt(mean(v^2) + eps)

Gradient, with r = 1 / sqrt(mean(v^2) + eps) of the row, alike for both inputs:

    grad_v = r * (g - y * mean(g * y))
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_eps, check_shape, check_tensors, fail, shape

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
    choose("residual_norm", backend, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return residual_norm_reference(x, update, eps=eps)


def _check(x: Tensor, update: Tensor, eps: float) -> None:
    name = "residual_norm"
    check_tensors(name, "x", {"x": x, "update": update})
    if x.dim() < 1 or x.shape[-1] < 1:
        fail(name, "x.shape", shape(x), "(..., d) with d above 0")
    check_shape(name, "update", update, tuple(x.shape), "the shape of x")
    check_eps(name, eps)
