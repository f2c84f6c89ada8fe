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
from torch.autograd.function import once_differentiable

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_eps, check_shape, check_tensors, fail, shape
from hrm_kernels._triton import (
    device_of,
    dot_add,
    halve_for_silu,
    jit,
    plan,
    rms_scale,
    rows_of,
    sigmoid,
    silu_times,
    tile_offsets,
    tl,
    weight_offsets,
    widen,
)

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


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _step(
    z, gate_context, up_context, w_gate, w_up, w_down, eps, D: tl.constexpr, PRECISION: tl.constexpr, MATH: tl.constexpr
):
    """One step on a tile held in registers: z (BLOCK_N, BLOCK_D) float32, the rest in the dtype of the call; the gate's
    weights and context come as `halve_for_silu` gives them."""
    low = z.to(w_gate.dtype)
    g = dot_add(low, w_gate, widen(gate_context, low, MATH), PRECISION, MATH)
    u = dot_add(low, w_up, widen(up_context, low, MATH), PRECISION, MATH)
    hidden = silu_times(g, u, MATH).to(w_gate.dtype)
    # z is added after the product: as its accumulator, a loop-carried value, it would make ptxas serialize every wgmma
    y = tl.fma(z, 1.0, tl.dot(hidden, w_down, input_precision=PRECISION))
    return y * rms_scale(y, eps, D, MATH)


@jit(do_not_specialize=["n", "steps", "save_at"])
def _l_forward_kernel(
    z_ptr, context_ptr, w_gate_ptr, w_up_ptr, w_down_ptr, out_ptr, saved_ptr,
    n, z_stride, context_stride, out_stride, steps, save_at, eps,
    SAVE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    half = tl.num_programs(0) * D  # where the up half of the context begins
    block, inside = weight_offsets(head, BLOCK_D, D)
    w_gate = halve_for_silu(tl.load(w_gate_ptr + block, mask=inside, other=0.0), MATH)
    w_up = tl.load(w_up_ptr + block, mask=inside, other=0.0)
    w_down = tl.load(w_down_ptr + block, mask=inside, other=0.0)
    for tile in range(tl.program_id(1), tl.cdiv(n, BLOCK_N), tl.num_programs(1)):
        offsets, mask = tile_offsets(tile, n, z_stride, head * D, BLOCK_N, BLOCK_D, D)
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets, mask = tile_offsets(tile, n, context_stride, head * D, BLOCK_N, BLOCK_D, D)
        gate_context = halve_for_silu(tl.load(context_ptr + offsets, mask=mask, other=0.0), MATH)
        up_context = tl.load(context_ptr + half + offsets, mask=mask, other=0.0)
        out_offsets, mask = tile_offsets(tile, n, out_stride, head * D, BLOCK_N, BLOCK_D, D)
        if SAVE:
            for _ in range(save_at):
                z = _step(z, gate_context, up_context, w_gate, w_up, w_down, eps, D, PRECISION, MATH)
            low = z.to(w_gate.dtype)
            tl.store(saved_ptr + out_offsets, low, mask=mask)
            z = low.to(tl.float32)  # the backward starts from the saved value, so the forward does too
        for _ in range(save_at if SAVE else 0, steps):
            z = _step(z, gate_context, up_context, w_gate, w_up, w_down, eps, D, PRECISION, MATH)
        tl.store(out_ptr + out_offsets, z.to(w_gate.dtype), mask=mask)


@jit(do_not_specialize=["n", "grad_steps", "scratch_stride"])
def _l_backward_kernel(
    grad_ptr, z_ptr, context_ptr, w_gate_ptr, w_up_ptr, w_down_ptr,
    grad_z_ptr, grad_context_ptr, grad_w_ptr, scratch_ptr,
    n, grad_stride, z_stride, context_stride, scratch_stride, grad_steps, eps,
    MANY: tl.constexpr, GRAD_Z: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Recomputes the steps that carry gradient and walks them back; weight gradients stay on chip until the end.

    MANY: grad_steps > 1. The states between steps then go through a scratch of this program's own, which stays in L2.
    """
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    half = heads * D
    block, inside = weight_offsets(head, BLOCK_D, D)
    w_gate = tl.load(w_gate_ptr + block, mask=inside, other=0.0)
    w_up = tl.load(w_up_ptr + block, mask=inside, other=0.0)
    w_down = tl.load(w_down_ptr + block, mask=inside, other=0.0)
    dtype = w_gate.dtype
    grad_w_gate = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    grad_w_up = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    grad_w_down = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    program = (tl.program_id(1) * heads + head).to(tl.int64)
    own = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    scratch = scratch_ptr + program * scratch_stride + own
    for tile in tl.range(tl.program_id(1), tl.cdiv(n, BLOCK_N), tl.num_programs(1), disable_licm=True):
        offsets, mask = tile_offsets(tile, n, z_stride, head * D, BLOCK_N, BLOCK_D, D)
        state = z_ptr + offsets
        offsets, mask = tile_offsets(tile, n, context_stride, head * D, BLOCK_N, BLOCK_D, D)
        context = context_ptr + offsets
        if MANY:
            tl.debug_barrier()  # the last tile's reads of the scratch come before this tile's writes
            z = tl.load(state, mask=mask, other=0.0).to(tl.float32)
            gate_context = halve_for_silu(tl.load(context, mask=mask, other=0.0), MATH)
            up_context = tl.load(context + half, mask=mask, other=0.0)
            half_w_gate = halve_for_silu(w_gate, MATH)
            for step in range(grad_steps - 1):
                tl.store(scratch + step * BLOCK_N * BLOCK_D, z.to(dtype))
                z = _step(z, gate_context, up_context, half_w_gate, w_up, w_down, eps, D, PRECISION, MATH)
            tl.store(scratch + (grad_steps - 1) * BLOCK_N * BLOCK_D, z.to(dtype))
            tl.debug_barrier()  # other threads of this program may read what a thread wrote
        offsets, mask = tile_offsets(tile, n, grad_stride, head * D, BLOCK_N, BLOCK_D, D)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad_gate = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        grad_up = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for back in tl.range(grad_steps if MANY else 1, disable_licm=True):
            # loaded where they are used: registers are what this loop is short of, and L1 holds the context
            if MANY:
                low = tl.load(scratch + (grad_steps - 1 - back) * BLOCK_N * BLOCK_D)
            else:
                low = tl.load(state, mask=mask, other=0.0)
            gate_context = tl.load(context, mask=mask, other=0.0)
            up_context = tl.load(context + half, mask=mask, other=0.0)
            g = dot_add(low, w_gate, gate_context.to(tl.float32), PRECISION, MATH)
            u = dot_add(low, w_up, up_context.to(tl.float32), PRECISION, MATH)
            s = sigmoid(g, MATH)
            silu = g * s
            hidden = (silu * u).to(dtype)
            # what the gradients of g and u need of g and u, in half the registers
            slope_g = (u * (s + silu * (1.0 - s))).to(dtype)
            slope_u = silu.to(dtype)
            y = dot_add(hidden, w_down, low.to(tl.float32), PRECISION, MATH)
            scale = rms_scale(y, eps, D, MATH)
            y = y * scale
            grad_y = scale * (grad - y * (tl.sum(grad * y, 1) * (1.0 / D))[:, None])
            low_grad_y = grad_y.to(dtype)
            grad_w_down = dot_add(tl.trans(hidden), low_grad_y, grad_w_down, PRECISION, MATH)
            grad_hidden = tl.dot(low_grad_y, tl.trans(w_down), input_precision=PRECISION)
            grad_g = grad_hidden * slope_g.to(tl.float32)
            grad_gate += grad_g
            low_g = grad_g.to(dtype)
            grad_w_gate = dot_add(tl.trans(low), low_g, grad_w_gate, PRECISION, MATH)
            grad_u = grad_hidden * slope_u.to(tl.float32)
            grad_up += grad_u
            low_u = grad_u.to(dtype)
            grad_w_up = dot_add(tl.trans(low), low_u, grad_w_up, PRECISION, MATH)
            if MANY or GRAD_Z:
                grad = dot_add(low_g, tl.trans(w_gate), grad_y, PRECISION, MATH)
                grad = dot_add(low_u, tl.trans(w_up), grad, PRECISION, MATH)
        offsets, mask = tile_offsets(tile, n, 2 * half, head * D, BLOCK_N, BLOCK_D, D)
        tl.store(grad_context_ptr + offsets, grad_gate.to(dtype), mask=mask)
        tl.store(grad_context_ptr + half + offsets, grad_up.to(dtype), mask=mask)
        if GRAD_Z:
            offsets, mask = tile_offsets(tile, n, half, head * D, BLOCK_N, BLOCK_D, D)
            tl.store(grad_z_ptr + offsets, grad.to(dtype), mask=mask)
    partial = grad_w_ptr + tl.program_id(1).to(tl.int64) * 3 * heads * D * D + block  # (programs, 3, heads, D, D)
    tl.store(partial, grad_w_gate, mask=inside)
    tl.store(partial + heads * D * D, grad_w_up, mask=inside)
    tl.store(partial + 2 * heads * D * D, grad_w_down, mask=inside)


# ---------------------------------------------------------------------------------------------------- autograd


def _launch_forward(
    z: Tensor, context: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor,
    steps: int, grad_steps: int, eps: float, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward; returns the new state and, if `save`, the state before the last grad_steps."""
    heads, size, _ = w_gate.shape
    rows, contexts = rows_of(z), rows_of(context)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    saved = torch.empty(z.shape if save else (0,), dtype=z.dtype, device=z.device)
    if rows.shape[0] > 0:
        launch = plan("l_forward", rows.shape[0], heads, size, rows)
        with device_of(rows):
            _l_forward_kernel[launch.grid](
                rows, contexts, w_gate.contiguous(), w_up.contiguous(), w_down.contiguous(), out, saved,
                rows.shape[0], rows.stride(0), contexts.stride(0), heads * size, steps, steps - grad_steps, eps,
                SAVE=save, **launch.options,
            )  # fmt: skip
    return out, saved


_l_forward = torch.library.custom_op("hrm::l_recurrence", _launch_forward, mutates_args=())


@_l_forward.register_fake
def _(z, context, w_gate, w_up, w_down, steps, grad_steps, eps, save):
    return z.new_empty(z.shape), z.new_empty(z.shape if save else (0,))


def _launch_backward(
    grad: Tensor, z: Tensor, context: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor,
    grad_steps: int, eps: float, grad_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of z (empty unless `grad_z`), of context, and of the weights (3, J, D, D); z as it was saved."""
    heads, size, _ = w_gate.shape
    grads, rows, contexts = rows_of(grad), rows_of(z), rows_of(context)
    n = rows.shape[0]
    out_z = torch.empty(z.shape if grad_z else (0,), dtype=z.dtype, device=z.device)
    out_context = torch.empty(context.shape, dtype=z.dtype, device=z.device)
    if n == 0:
        return out_z, out_context, w_gate.new_zeros((3, heads, size, size))
    many = grad_steps > 1
    launch = plan("l_backward_many" if many else "l_backward_one", n, heads, size, rows)
    programs = launch.grid[1]
    partial = torch.empty((programs, 3, heads, size, size), dtype=torch.float32, device=z.device)
    tile = launch.options["BLOCK_N"] * launch.options["BLOCK_D"]  # type: ignore[operator]
    scratch_stride = grad_steps * tile if many else 0
    scratch = torch.empty(programs * heads * scratch_stride, dtype=z.dtype, device=z.device)
    with device_of(rows):
        _l_backward_kernel[launch.grid](
            grads, rows, contexts, w_gate.contiguous(), w_up.contiguous(), w_down.contiguous(),
            out_z, out_context, partial, scratch,
            n, grads.stride(0), rows.stride(0), contexts.stride(0), scratch_stride, grad_steps, eps,
            MANY=many, GRAD_Z=grad_z, **launch.options,
        )  # fmt: skip
    # one fixed order of summation: the same gradients every time
    return out_z, out_context, partial.sum(0).to(w_gate.dtype)


_l_backward = torch.library.custom_op("hrm::l_recurrence_backward", _launch_backward, mutates_args=())


@_l_backward.register_fake
def _(grad, z, context, w_gate, w_up, w_down, grad_steps, eps, grad_z):
    return z.new_empty(z.shape if grad_z else (0,)), z.new_empty(context.shape), w_gate.new_empty((3, *w_gate.shape))


def _setup_context(ctx, inputs, output) -> None:
    z, context, w_gate, w_up, w_down, steps, grad_steps, eps, save = inputs
    ctx.set_materialize_grads(False)
    ctx.grad_steps, ctx.eps, ctx.whole = grad_steps, eps, grad_steps == steps
    ctx.save_for_backward(output[1] if save else z, context, w_gate, w_up, w_down)


def _gradients(launch, ctx, grad):
    """Gradients of the arguments of `_launch_forward`; `launch` is `_launch_backward` or the operation made of it."""
    if grad is None:
        return (None,) * 9
    needs = ctx.needs_input_grad
    grad_z, grad_context, grad_w = launch(grad, *ctx.saved_tensors, ctx.grad_steps, ctx.eps, ctx.whole and needs[0])
    return (
        grad_z if ctx.whole and needs[0] else None,
        grad_context if needs[1] else None,
        *(grad_w[i] if needs[2 + i] else None for i in range(3)),
        None, None, None, None,
    )  # fmt: skip


_l_forward.register_autograd(lambda ctx, grad, _: _gradients(_l_backward, ctx, grad), setup_context=_setup_context)


class _LRecurrence(torch.autograd.Function):
    """What eager calls use: an operation of torch.library, which torch.compile needs, costs them 0.1 ms a call."""

    forward = staticmethod(_launch_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _grad_saved):
        return _gradients(_launch_backward, ctx, grad)


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

    Source: the L-module of arXiv 2506.21734, section 2, with the gated cell of docs/equations.md.

    Args:
        z: (..., J*D) state z_L; float32, bfloat16 or float16; contiguous or not.
        context: (..., 2*J*D), the constant x W_x + z_H W_c + b_c; the gate's half first. Same dtype as `z`.
        w_gate, w_up, w_down: (J, D, D) block-diagonal weights, applied as row-vector @ w[j]. Same dtype as `z`.
        steps: T, at least 1.
        grad_steps: how many of the last steps carry gradient, 1 to `steps`. Nothing is saved for the others.
            `z` has a gradient only if `grad_steps == steps`: the state before the last `grad_steps` is detached.
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
            return l_recurrence_reference(z, context, w_gate, w_up, w_down, steps=steps, grad_steps=grad_steps, eps=eps)
    tensors = (z, context, w_gate, w_up, w_down)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    run = _l_forward if torch.compiler.is_compiling() else _LRecurrence.apply if graph else _launch_forward
    return run(*tensors, steps, grad_steps, eps, graph and grad_steps < steps)[0]


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
