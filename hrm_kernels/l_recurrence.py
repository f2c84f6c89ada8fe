"""L recurrence: the T fast steps of one cycle.

Equation (per token and head j, D = head size; `*` elementwise; x and z_H enter through the constant context c):

    g = z R_g[j] + c_g          u = z R_u[j] + c_u
    y = z + (silu(g) * u) R_d[j]
    z = y / sqrt(mean(y^2) + eps)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_eps, check_shape, check_tensors, fail, shape

# ---------------------------------------------------------------------------------------------------- reference


def l_step_reference(
    z: Tensor,  # (..., J, D)
    gate_context: Tensor,  # (..., J, D)
    up_context: Tensor,  # (..., J, D)
    w_gate: Tensor,  # (J, D, D)
    w_up: Tensor,  # (J, D, D)
    w_down: Tensor,  # (J, D, D)
    eps: float,
) -> Tensor:
    """One step of the equation above, in the dtype of its inputs; the norm's statistics in float32 or wider."""
    g = torch.einsum("...jd,jde->...je", z, w_gate) + gate_context
    u = torch.einsum("...jd,jde->...je", z, w_up) + up_context
    y = z + torch.einsum("...jd,jde->...je", F.silu(g) * u, w_down)
    wide = y if y.dtype == torch.float64 else y.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(z.dtype)


def l_recurrence_reference(
    z: Tensor,  # (..., J * D)
    context: Tensor,  # (..., 2 * J * D)
    w_gate: Tensor,  # (J, D, D)
    w_up: Tensor,  # (J, D, D)
    w_down: Tensor,  # (J, D, D)
    *,
    steps: int,
    grad_steps: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """The specification of `l_recurrence`, in plain PyTorch; also takes float64."""
    heads = w_gate.shape[:2]
    state = z.unflatten(-1, heads)
    gate, up = (half.unflatten(-1, heads) for half in context.chunk(2, dim=-1))
    with torch.no_grad():
        for _ in range(steps - grad_steps):
            state = l_step_reference(state, gate, up, w_gate, w_up, w_down, eps)
    for _ in range(grad_steps):
        state = l_step_reference(state, gate, up, w_gate, w_up, w_down, eps)
    return state.flatten(-2)


# ---------------------------------------------------------------------------------------------------- public function


def l_recurrence(
    z: Tensor,
    context: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    steps: int,
    grad_steps: int = 1,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """`steps` steps of the fast state in one launch; gradients flow through the last `grad_steps` of them.

    Source: the L-module of arXiv 2506.21734, section 2, with the gated cell and the head-wise norm of docs/equations.md.

    Args:
        z: (..., J*D) state z_L; float32, bfloat16 or float16; contiguous or not.
        context: (..., 2*J*D), the constant x W_x + z_H W_c + b_c; the gate's half first. Same dtype as `z`.
        w_gate, w_up, w_down: (J, D, D) block-diagonal weights, applied as row-vector @ w[j]. Same dtype as `z`.
        steps: T, at least 1.
        grad_steps: how many of the last steps carry gradient, 1 to `steps`. Nothing is saved for the others.
            The gradient of `z` is zero unless `grad_steps == steps`: the state before the last `grad_steps` is detached.
        eps: added to the mean square inside the root.
        backend: "auto" (Triton on CUDA, else the reference), "triton" or "reference".

    Returns:
        (..., J*D) the new state, in the dtype of `z` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    z, context, w_gate, w_up, w_down = autocast(z, context, w_gate, w_up, w_down)
    _check(z, context, w_gate, w_up, w_down, steps, grad_steps, eps)
    if choose("l_recurrence", backend, z.device, w_gate.shape[-1], z.dtype) == "reference":
        with torch.autocast(z.device.type, enabled=False):
            return l_recurrence_reference(
                z, context, w_gate, w_up, w_down, steps=steps, grad_steps=grad_steps, eps=eps
            )
    raise AssertionError


def _check(z, context, w_gate, w_up, w_down, steps: int, grad_steps: int, eps: float) -> None:
    name = "l_recurrence"
    check_tensors(name, "z", {"z": z, "context": context, "w_gate": w_gate, "w_up": w_up, "w_down": w_down})
    if w_gate.dim() != 3 or w_gate.shape[1] != w_gate.shape[2]:
        fail(name, "w_gate.shape", shape(w_gate), "(J, D, D)")
    heads, size, _ = w_gate.shape
    if z.dim() < 1 or z.shape[-1] != heads * size:
        fail(name, "z.shape", shape(z), f"(..., {heads * size}), the {heads} heads of size {size} of w_gate")
    check_shape(name, "context", context, (*z.shape[:-1], 2 * heads * size), "z's leading sizes and two halves of J*D")
    check_shape(name, "w_up", w_up, (heads, size, size), "the shape of w_gate")
    check_shape(name, "w_down", w_down, (heads, size, size), "the shape of w_gate")
    if steps < 1:
        fail(name, "steps", steps, "at least 1")
    if not 1 <= grad_steps <= steps:
        fail(name, "grad_steps", grad_steps, f"from 1 to steps = {steps}")
    check_eps(name, eps)
