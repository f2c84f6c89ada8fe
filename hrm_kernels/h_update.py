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
from torch.autograd.function import once_differentiable

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_eps, check_shape, check_tensors, fail, shape
from hrm_kernels._triton import (
    device_of,
    dot_add,
    jit,
    plan,
    rms_scale,
    rows_of,
    sigmoid,
    tile_offsets,
    tl,
    weight_offsets,
)

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


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit(do_not_specialize=["n"])
def _h_forward_kernel(
    z_ptr, inputs_ptr, w_ptr, out_ptr,
    n, z_stride, inputs_stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    third = tl.num_programs(0) * D  # where q begins; r begins at twice that
    block, inside = weight_offsets(head, BLOCK_D, D)
    w_p = tl.load(w_ptr + block, mask=inside, other=0.0)
    w_q = tl.load(w_ptr + third * D + block, mask=inside, other=0.0)
    w_r = tl.load(w_ptr + 2 * third * D + block, mask=inside, other=0.0)
    # bound by memory: the next tile's loads are under way while this one is worked on
    for tile in tl.range(tl.program_id(1), tl.cdiv(n, BLOCK_N), tl.num_programs(1), num_stages=2):
        offsets, mask = tile_offsets(tile, n, z_stride, head * D, BLOCK_N, BLOCK_D, D)
        a = tl.load(z_ptr + offsets, mask=mask, other=0.0)
        offsets, mask = tile_offsets(tile, n, inputs_stride, head * D, BLOCK_N, BLOCK_D, D)
        p = tl.load(inputs_ptr + offsets, mask=mask, other=0.0)
        q = tl.load(inputs_ptr + third + offsets, mask=mask, other=0.0)
        r = tl.load(inputs_ptr + 2 * third + offsets, mask=mask, other=0.0)
        p = dot_add(a, w_p, p.to(tl.float32), PRECISION, MATH)
        q = dot_add(a, w_q, q.to(tl.float32), PRECISION, MATH)
        r = dot_add(a, w_r, r.to(tl.float32), PRECISION, MATH)
        wide = a.to(tl.float32)
        v = wide + sigmoid(r, MATH) * (p * sigmoid(p, MATH) * q - wide)
        v = v * rms_scale(v, eps, D, MATH)
        offsets, mask = tile_offsets(tile, n, third, head * D, BLOCK_N, BLOCK_D, D)
        tl.store(out_ptr + offsets, v.to(a.dtype), mask=mask)


@jit(do_not_specialize=["n"])
def _h_backward_kernel(
    grad_ptr, z_ptr, inputs_ptr, w_ptr, grad_z_ptr, grad_inputs_ptr, grad_w_ptr,
    n, grad_stride, z_stride, inputs_stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Recomputes the update and walks it back; weight gradients stay on chip until the end."""
    head = tl.program_id(0)
    third = tl.num_programs(0) * D
    block, inside = weight_offsets(head, BLOCK_D, D)
    w_p = tl.load(w_ptr + block, mask=inside, other=0.0)
    w_q = tl.load(w_ptr + third * D + block, mask=inside, other=0.0)
    w_r = tl.load(w_ptr + 2 * third * D + block, mask=inside, other=0.0)
    dtype = w_p.dtype
    grad_w_p = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    grad_w_q = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    grad_w_r = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(n, BLOCK_N), tl.num_programs(1), disable_licm=True):
        offsets, mask = tile_offsets(tile, n, z_stride, head * D, BLOCK_N, BLOCK_D, D)
        a = tl.load(z_ptr + offsets, mask=mask, other=0.0)
        offsets, mask = tile_offsets(tile, n, inputs_stride, head * D, BLOCK_N, BLOCK_D, D)
        p = tl.load(inputs_ptr + offsets, mask=mask, other=0.0)
        q = tl.load(inputs_ptr + third + offsets, mask=mask, other=0.0)
        r = tl.load(inputs_ptr + 2 * third + offsets, mask=mask, other=0.0)
        offsets, mask = tile_offsets(tile, n, grad_stride, head * D, BLOCK_N, BLOCK_D, D)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        p = dot_add(a, w_p, p.to(tl.float32), PRECISION, MATH)
        q = dot_add(a, w_q, q.to(tl.float32), PRECISION, MATH)
        r = dot_add(a, w_r, r.to(tl.float32), PRECISION, MATH)
        wide = a.to(tl.float32)
        s = sigmoid(p, MATH)
        silu = p * s
        gate = sigmoid(r, MATH)
        move = silu * q - wide
        v = wide + gate * move
        # what the gradients of p, q and r need of them, in half the registers
        slope_p = (gate * q * (s + silu * (1.0 - s))).to(dtype)
        slope_q = (gate * silu).to(dtype)
        slope_r = (move * gate * (1.0 - gate)).to(dtype)
        keep = (1.0 - gate).to(dtype)
        scale = rms_scale(v, eps, D, MATH)
        v = v * scale
        grad = scale * (grad - v * (tl.sum(grad * v, 1) * (1.0 / D))[:, None])  # of v
        grad_p = (grad * slope_p.to(tl.float32)).to(dtype)
        grad_q = (grad * slope_q.to(tl.float32)).to(dtype)
        grad_r = (grad * slope_r.to(tl.float32)).to(dtype)
        grad_a = grad * keep.to(tl.float32)
        offsets, mask = tile_offsets(tile, n, 3 * third, head * D, BLOCK_N, BLOCK_D, D)
        tl.store(grad_inputs_ptr + offsets, grad_p, mask=mask)
        tl.store(grad_inputs_ptr + third + offsets, grad_q, mask=mask)
        tl.store(grad_inputs_ptr + 2 * third + offsets, grad_r, mask=mask)
        grad_a = dot_add(grad_p, tl.trans(w_p), grad_a, PRECISION, MATH)
        grad_w_p = dot_add(tl.trans(a), grad_p, grad_w_p, PRECISION, MATH)
        grad_a = dot_add(grad_q, tl.trans(w_q), grad_a, PRECISION, MATH)
        grad_w_q = dot_add(tl.trans(a), grad_q, grad_w_q, PRECISION, MATH)
        grad_a = dot_add(grad_r, tl.trans(w_r), grad_a, PRECISION, MATH)
        grad_w_r = dot_add(tl.trans(a), grad_r, grad_w_r, PRECISION, MATH)
        offsets, mask = tile_offsets(tile, n, third, head * D, BLOCK_N, BLOCK_D, D)
        tl.store(grad_z_ptr + offsets, grad_a.to(dtype), mask=mask)
    partial = grad_w_ptr + tl.program_id(1).to(tl.int64) * 3 * third * D + block  # (programs, 3, heads, D, D)
    tl.store(partial, grad_w_p, mask=inside)
    tl.store(partial + third * D, grad_w_q, mask=inside)
    tl.store(partial + 2 * third * D, grad_w_r, mask=inside)


# ---------------------------------------------------------------------------------------------------- autograd


def _launch_forward(z: Tensor, inputs: Tensor, w: Tensor, eps: float) -> Tensor:
    _, heads, size, _ = w.shape
    rows, thirds = rows_of(z), rows_of(inputs)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if rows.shape[0] > 0:
        launch = plan("h_forward", rows.shape[0], heads, size, rows)
        with device_of(rows):
            _h_forward_kernel[launch.grid](
                rows, thirds, w.contiguous(), out,
                rows.shape[0], rows.stride(0), thirds.stride(0), eps, **launch.options,
            )  # fmt: skip
    return out


_h_forward = torch.library.custom_op("hrm::h_update", _launch_forward, mutates_args=())


@_h_forward.register_fake
def _(z, inputs, w, eps):
    return z.new_empty(z.shape)


def _launch_backward(grad: Tensor, z: Tensor, inputs: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, size, _ = w.shape
    grads, rows, thirds = rows_of(grad), rows_of(z), rows_of(inputs)
    n = rows.shape[0]
    grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    grad_inputs = torch.empty(inputs.shape, dtype=z.dtype, device=z.device)
    if n == 0:
        return grad_z, grad_inputs, w.new_zeros(w.shape)
    launch = plan("h_backward", n, heads, size, rows)
    partial = torch.empty((launch.grid[1], *w.shape), dtype=torch.float32, device=z.device)
    with device_of(rows):
        _h_backward_kernel[launch.grid](
            grads, rows, thirds, w.contiguous(), grad_z, grad_inputs, partial,
            n, grads.stride(0), rows.stride(0), thirds.stride(0), eps, **launch.options,
        )  # fmt: skip
    # one fixed order of summation: the same gradients every time
    return grad_z, grad_inputs, partial.sum(0).to(w.dtype)


_h_backward = torch.library.custom_op("hrm::h_update_backward", _launch_backward, mutates_args=())


@_h_backward.register_fake
def _(grad, z, inputs, w, eps):
    return z.new_empty(z.shape), z.new_empty(inputs.shape), w.new_empty(w.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.eps = inputs[3]
    ctx.save_for_backward(*inputs[:3])


def _gradients(launch, ctx, grad):
    """Gradients of the arguments of `_launch_forward`; `launch` is `_launch_backward` or the operation made of it."""
    gradients = launch(grad, *ctx.saved_tensors, ctx.eps)
    return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)), None


_h_forward.register_autograd(lambda ctx, grad: _gradients(_h_backward, ctx, grad), setup_context=_setup_context)


class _HUpdate(torch.autograd.Function):
    """What eager calls use: an operation of torch.library, which torch.compile needs, costs them 0.1 ms a call."""

    forward = staticmethod(_launch_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(_launch_backward, ctx, grad)


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
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (z, inputs, w))
    run = _h_forward if torch.compiler.is_compiling() else _HUpdate.apply if graph else _launch_forward
    return run(z, inputs, w, eps)


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
