"""H update: gate, candidate, interpolation and head-wise norm of the slow state.

Equation (per token and head j; a is z_H after its mixer, `inputs` is z_L W_l + b_h in the order p, q, r):

    [p, q, r] = inputs + a [R_p[j], R_q[j], R_r[j]]
    v = (1 - sigmoid(r)) * a + sigmoid(r) * (silu(p) * q)
    z = v / sqrt(mean(v^2) + eps)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_eps, check_shape, check_tensors, fail, shape

# ---------------------------------------------------------------------------------------------------- reference


def h_update_reference(
    z: Tensor,  # (..., J * D)
    inputs: Tensor,  # (..., 3 * J * D)
    w: Tensor,  # (3, J, D, D)
    *,
    eps: float = 1e-6,
) -> Tensor:
    """The specification of `h_update`, in plain PyTorch; also takes float64."""
    heads = w.shape[1:3]
    a = z.unflatten(-1, heads)
    p, q, r = (
        third.unflatten(-1, heads) + torch.einsum("...jd,jde->...je", a, w[i])
        for i, third in enumerate(inputs.chunk(3, dim=-1))
    )
    v = torch.lerp(a, F.silu(p) * q, torch.sigmoid(r))
    wide = v if v.dtype == torch.float64 else v.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(z.dtype).flatten(-2)


# ---------------------------------------------------------------------------------------------------- public function


def h_update(z: Tensor, inputs: Tensor, w: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """One update of the slow state, forward and backward in one launch each.

    Source: the H-module of arXiv 2506.21734, section 2, with the gated cell of docs/equations.md.

    Args:
        z: (..., J*D), the mixed slow state `a`; float32, bfloat16 or float16; contiguous or not.
        inputs: (..., 3*J*D), z_L W_l + b_h, the thirds in the order p, q, r. Same dtype as `z`.
        w: (3, J, D, D) block-diagonal weights, applied as row-vector @ w[i, j]. Same dtype as `z`.
        eps: added to the mean square inside the root.
        backend: "auto" (Triton on CUDA, else the reference), "triton" or "reference".

    Returns:
        (..., J*D) the new slow state, in the dtype of `z` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    z, inputs, w = autocast(z, inputs, w)
    _check(z, inputs, w, eps)
    if choose("h_update", backend, z.device, w.shape[-1], z.dtype) == "reference":
        with torch.autocast(z.device.type, enabled=False):
            return h_update_reference(z, inputs, w, eps=eps)
    raise AssertionError


def _check(z: Tensor, inputs: Tensor, w: Tensor, eps: float) -> None:
    name = "h_update"
    check_tensors(name, "z", {"z": z, "inputs": inputs, "w": w})
    if w.dim() != 4 or w.shape[0] != 3 or w.shape[2] != w.shape[3]:
        fail(name, "w.shape", shape(w), "(3, J, D, D)")
    _, heads, size, _ = w.shape
    if z.dim() < 1 or z.shape[-1] != heads * size:
        fail(name, "z.shape", shape(z), f"(..., {heads * size}), the {heads} heads of size {size} of w")
    check_shape(name, "inputs", inputs, (*z.shape[:-1], 3 * heads * size), "z's leading sizes and three thirds of J*D")
    check_eps(name, eps)
