"""SwiGLU MLP: two products in, a gated product of the halves, one product out.

Equation (rows are tokens; W_gate and W_up are the halves of `w_gate_up`):

    gate = x W_gate^T,  up = x W_up^T
    y = (silu(gate) * up) W_down^T
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_shape, check_tensors, fail, shape

# ---------------------------------------------------------------------------------------------------- reference


def swiglu_mlp_reference(
    x: Tensor,  # (..., d)
    w_gate_up: Tensor,  # (2 * I, d)
    w_down: Tensor,  # (d, I)
) -> Tensor:
    """The specification of `swiglu_mlp`, in plain PyTorch; also takes float64."""
    gate, up = F.linear(x, w_gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_down)


# ---------------------------------------------------------------------------------------------------- public function


def swiglu_mlp(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, *, recompute: bool = False, backend: str = "auto"
) -> Tensor:
    """The feed-forward half of a transformer block.

    Source: arXiv 2002.05202 ("GLU variants improve transformer"), as in the blocks of arXiv 2506.21734, section 2.

    Args:
        x: (..., d); float32, bfloat16 or float16; contiguous or not.
        w_gate_up: (2*I, d), gate rows first, as `torch.nn.Linear` holds them. Same dtype as `x`.
        w_down: (d, I). Same dtype as `x`.
        recompute: keep only `x` for the backward and compute gate and up again there: the same numbers, 2*I values a
            token less memory, one product more.
        backend: "auto" (Triton on CUDA, else the reference), "triton" or "reference".

    Returns:
        (..., d) in the dtype of `x` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    x, w_gate_up, w_down = autocast(x, w_gate_up, w_down)
    _check(x, w_gate_up, w_down)
    choose("swiglu_mlp", backend, x.device, None, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return swiglu_mlp_reference(x, w_gate_up, w_down)


def _check(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> None:
    name = "swiglu_mlp"
    check_tensors(name, "x", {"x": x, "w_gate_up": w_gate_up, "w_down": w_down})
    if x.dim() < 1 or x.shape[-1] < 1:
        fail(name, "x.shape", shape(x), "(..., d) with d above 0")
    width = x.shape[-1]
    if w_gate_up.dim() != 2 or w_gate_up.shape[1] != width or w_gate_up.shape[0] % 2 or w_gate_up.shape[0] == 0:
        fail(name, "w_gate_up.shape", shape(w_gate_up), f"(2*I, {width}), the width of x")
    check_shape(
        name, "w_down", w_down, (width, w_gate_up.shape[0] // 2), "the width of x and half the rows of w_gate_up"
    )
