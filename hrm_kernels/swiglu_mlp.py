"""SwiGLU MLP: two products in, a gated product of the halves, one product out.

Equation (rows are tokens; W_gate and W_up are the halves of `w_gate_up`):

    gate = x W_gate^T,  up = x W_up^T
    y = (silu(gate) * up) W_down^T

Products are cuBLAS's, except without graph: there one kernel computes both halves of the first product and writes only
silu(gate) * up, half of what the product itself would write and the next pass would read. On Hopper it takes the tensor
memory accelerator to gain by that; loads through pointers are as slow as cuBLAS and the pass. With graph, gate and up
are kept, and one elementwise pass each way stands between the products.

`swiglu_block` is the MLP with the residual norm behind it. One backward of both adds the two gradients of x inside the
last product, where autograd would add them in a pass of its own:

    grad_x = grad_v + grad_gate_up W_gate_up        grad_v: the gradient that the norm gives both its inputs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_eps, check_shape, check_tensors, fail, shape
from hrm_kernels._triton import (
    _capability,
    _math,
    ceil_div,
    device_of,
    halve_for_silu,
    jit,
    multiprocessors,
    rows_of,
    sigmoid,
    silu_times,
    tl,
    triton,
)
from hrm_kernels.residual_norm import _launch_backward as _norm_backward
from hrm_kernels.residual_norm import _launch_forward as _norm_forward
from hrm_kernels.residual_norm import residual_norm, residual_norm_reference, too_wide

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

# ---------------------------------------------------------------------------------------------------- reference


def swiglu_mlp_reference(
    x: Tensor,  # (..., d)
    w_gate_up: Tensor,  # (2 * I, d)
    w_down: Tensor,  # (d, I)
) -> Tensor:
    """The specification of `swiglu_mlp`, in plain PyTorch; also takes float64."""
    gate, up = F.linear(x, w_gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w_down)


def swiglu_block_reference(
    x: Tensor,  # (..., d)
    w_gate_up: Tensor,  # (2 * I, d)
    w_down: Tensor,  # (d, I)
    *,
    eps: float = 1e-5,
) -> Tensor:
    """The specification of `swiglu_block`, in plain PyTorch; also takes float64."""
    return residual_norm_reference(x, swiglu_mlp_reference(x, w_gate_up, w_down), eps=eps)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@dataclass(frozen=True)
class Tile:
    """How the gated product is launched: rows, columns of each half, depth of a step, warps, pipeline stages; with
    `tma`, by one program a multiprocessor that reads and writes through the tensor memory accelerator."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False


# {major compute capability: tile of the gated product}, 16-bit types; None: cuBLAS and an elementwise pass instead
TILES: dict[int, Tile | None] = {8: Tile(128, 64, 32, 4, 3), 9: Tile(128, 128, 64, 8, 3, tma=True)}
GROUP = 8  # tiles of rows that walk over the columns together, so that what they read stays in L2
BLOCK, BLOCK_WARPS = 512, 1  # columns of an elementwise program: 16-byte loads, two of each tensor in flight a thread


def product_options(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants and launch options of the gated product."""
    return {
        "GROUP": GROUP,
        "BLOCK_N": tile.rows,
        "BLOCK_I": tile.columns,
        "BLOCK_K": tile.depth,
        "MATH": _math(dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,  # Triton's default until 3.9
    }


def gate_options(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants and launch options of the elementwise kernels."""
    return {"BLOCK": BLOCK, "MATH": _math(dtype), "num_warps": BLOCK_WARPS}


@jit(do_not_specialize=["n"])
def _gated_product_kernel(
    x_ptr, w_ptr, out_ptr,
    n, inner, width, x_stride,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """out (n, inner) = silu(x W_gate^T) * (x W_up^T); `width`, the columns of x, is a multiple of BLOCK_K."""
    across = tl.cdiv(inner, BLOCK_I)
    group = tl.program_id(0) // (GROUP * across)
    first = group * GROUP
    rows_here = tl.minimum(tl.cdiv(n, BLOCK_N) - first, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    rows = (first + within % rows_here) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (within // rows_here) * BLOCK_I + tl.arange(0, BLOCK_I)
    depth = tl.arange(0, BLOCK_K)
    # past the end the last row and column are read again and not written: no mask in the loop
    x = x_ptr + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * x_stride + depth[None, :]
    w_gate = w_ptr + tl.minimum(columns, inner - 1)[None, :] * width + depth[:, None]
    w_up = w_gate + inner * width
    gate = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    for _ in range(0, width, BLOCK_K):
        tile = tl.load(x)
        gate = tl.dot(tile, tl.load(w_gate), gate)
        up = tl.dot(tile, tl.load(w_up), up)
        x += BLOCK_K
        w_gate += BLOCK_K
        w_up += BLOCK_K
    act = gate * sigmoid(gate, MATH) * up
    out = out_ptr + rows.to(tl.int64)[:, None] * inner + columns[None, :]
    tl.store(out, act.to(out_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (columns < inner)[None, :])


@jit(do_not_specialize=["n"])
def _gated_product_tma_kernel(
    x_desc, w_desc, out_desc,
    n, inner, width,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors: what lies past an end is read as zeros and not written. (Past the end of
    the gate, rows of `up` are read; those columns are not written.)"""
    across = tl.cdiv(inner, BLOCK_I)
    down = tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), across * down, tl.num_programs(0)):
        first = tile // (GROUP * across) * GROUP
        rows_here = tl.minimum(down - first, GROUP)
        within = tile % (GROUP * across)
        row = (first + within % rows_here) * BLOCK_N
        column = (within // rows_here) * BLOCK_I
        gate = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
        for k in range(0, width, BLOCK_K):
            x = x_desc.load([row, k])
            gate = tl.dot(x, w_desc.load([column, k]).T, gate)
            up = tl.dot(x, w_desc.load([inner + column, k]).T, up)
        act = silu_times(halve_for_silu(gate, MATH), up, MATH)
        out_desc.store([row, column], act.to(out_desc.dtype))


@jit
def _gate_forward_kernel(gate_up_ptr, act_ptr, inner, BLOCK: tl.constexpr, MATH: tl.constexpr):
    """act = silu(gate) * up, rows contiguous."""
    blocks = tl.cdiv(inner, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < inner
    gate = tl.load(gate_up_ptr + row * (2 * inner) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * inner) + inner + columns, mask=mask, other=0.0).to(tl.float32)
    act = gate * sigmoid(gate, MATH) * up
    tl.store(act_ptr + row * inner + columns, act.to(act_ptr.dtype.element_ty), mask=mask)


@jit
def _gate_backward_kernel(gate_up_ptr, act_ptr, grad_gate_up_ptr, inner, BLOCK: tl.constexpr, MATH: tl.constexpr):
    """`act` comes in as its own gradient and leaves as the activation, which the gradient of w_down needs."""
    blocks = tl.cdiv(inner, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < inner
    gate = tl.load(gate_up_ptr + row * (2 * inner) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * inner) + inner + columns, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(act_ptr + row * inner + columns, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(gate, MATH)
    silu = gate * s
    dtype = act_ptr.dtype.element_ty
    grad_gate = grad * up * (s + silu * (1.0 - s))
    tl.store(grad_gate_up_ptr + row * (2 * inner) + columns, grad_gate.to(dtype), mask=mask)
    tl.store(grad_gate_up_ptr + row * (2 * inner) + inner + columns, (grad * silu).to(dtype), mask=mask)
    tl.store(act_ptr + row * inner + columns, (silu * up).to(dtype), mask=mask)


# ---------------------------------------------------------------------------------------------------- autograd


def _gated_product(rows: Tensor, w_gate_up: Tensor, tile: Tile) -> Tensor:
    (n, width), inner = rows.shape, w_gate_up.shape[0] // 2
    act = torch.empty((n, inner), dtype=rows.dtype, device=rows.device)
    w_gate_up, options = w_gate_up.contiguous(), product_options(tile, rows.dtype)
    tiles = ceil_div(n, tile.rows) * ceil_div(inner, tile.columns)
    with device_of(rows):
        if tile.tma:
            _gated_product_tma_kernel[(min(tiles, multiprocessors(rows.device)),)](
                TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]),
                TensorDescriptor.from_tensor(w_gate_up, [tile.columns, tile.depth]),
                TensorDescriptor.from_tensor(act, [tile.rows, tile.columns]),
                n, inner, width, **options,
            )  # fmt: skip
        else:
            _gated_product_kernel[(tiles,)](rows, w_gate_up, act, n, inner, width, rows.stride(0), **options)
    return act


def _gate_forward(gate_up: Tensor) -> Tensor:
    n, inner = gate_up.shape[0], gate_up.shape[1] // 2
    act = torch.empty((n, inner), dtype=gate_up.dtype, device=gate_up.device)
    with device_of(gate_up):
        _gate_forward_kernel[(n * ceil_div(inner, BLOCK),)](gate_up, act, inner, **gate_options(act.dtype))
    return act


def _gate_backward(gate_up: Tensor, grad_act: Tensor) -> Tensor:
    """The gradient of `gate_up`; leaves the activation in `grad_act`."""
    n, inner = grad_act.shape
    grad_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    with device_of(gate_up):
        _gate_backward_kernel[(n * ceil_div(inner, BLOCK),)](
            gate_up, grad_act, grad_gate_up, inner, **gate_options(grad_act.dtype)
        )
    return grad_gate_up


def _tile_for(rows: Tensor, w_gate_up: Tensor) -> Tile | None:
    """The tile of the gated product; None where cuBLAS and an elementwise pass do it: in float32, whose products keep
    the user's tf32 setting, where the depth of a step does not divide the width, for weights that 32 bits cannot
    address, and for rows that the tensor memory accelerator cannot."""
    tile = TILES.get(_capability(rows.device)[0]) if rows.dtype.itemsize == 2 else None
    if tile is None or rows.shape[1] % tile.depth or w_gate_up.numel() >= 2**31:
        return None
    return tile if not tile.tma or _tma_fits(rows, w_gate_up) else None


def _tma_fits(rows: Tensor, w_gate_up: Tensor) -> bool:
    """Whether rows, weight rows and rows of the result start at multiples of 16 bytes, one behind the other."""
    aligned = rows.data_ptr() % 16 == 0 and w_gate_up.data_ptr() % 16 == 0
    strides = (rows.stride(0), rows.shape[1], w_gate_up.shape[0] // 2)
    return aligned and rows.stride(0) >= rows.shape[1] and all(stride % 8 == 0 for stride in strides)


def _launch_inference(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    rows = rows_of(x)
    if rows.shape[0] == 0:
        return x.new_empty(x.shape)
    tile = _tile_for(rows, w_gate_up)
    act = _gate_forward(torch.mm(rows, w_gate_up.t())) if tile is None else _gated_product(rows, w_gate_up, tile)
    return torch.mm(act, w_down.t()).view(x.shape)


def _launch_forward(x: Tensor, w_gate_up: Tensor, w_down: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
    """The result, and gate and up for the backward: (n, 2*I), or (0, 2*I) where the backward is to recompute them."""
    rows = rows_of(x)
    if rows.shape[0] == 0:
        return x.new_empty(x.shape), x.new_empty(0, w_gate_up.shape[0])
    gate_up = torch.mm(rows, w_gate_up.t())
    out = torch.mm(_gate_forward(gate_up), w_down.t()).view(x.shape)
    return out, gate_up.new_empty(0, gate_up.shape[1]) if recompute else gate_up


_mlp_inference = torch.library.custom_op("hrm::swiglu_mlp_inference", _launch_inference, mutates_args=())
_mlp_forward = torch.library.custom_op("hrm::swiglu_mlp", _launch_forward, mutates_args=())


@_mlp_inference.register_fake
def _(x, w_gate_up, w_down):
    return x.new_empty(x.shape)


@_mlp_forward.register_fake
def _(x, w_gate_up, w_down, recompute):
    rows = 0 if recompute else x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(rows, w_gate_up.shape[0])


def _launch_backward(
    grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return x.new_empty(x.shape), torch.zeros_like(w_gate_up), torch.zeros_like(w_down)
    grad_gate_up, grad_w, grad_w_down = _inner_gradients(rows_of(grad), rows_of(x), w_gate_up, w_down, gate_up)
    return torch.mm(grad_gate_up, w_gate_up).view(x.shape), grad_w, grad_w_down


def _inner_gradients(
    grads: Tensor, rows: Tensor, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, of `w_gate_up` and of `w_down`."""
    if gate_up.shape[0] == 0:
        gate_up = torch.mm(rows, w_gate_up.t())
    act = torch.mm(grads, w_down)  # its gradient, until `_gate_backward` puts the activation there
    grad_gate_up = _gate_backward(gate_up, act)
    return grad_gate_up, torch.mm(grad_gate_up.t(), rows), torch.mm(grads.t(), act)


_mlp_backward = torch.library.custom_op("hrm::swiglu_mlp_backward", _launch_backward, mutates_args=())


@_mlp_backward.register_fake
def _(grad, x, w_gate_up, w_down, gate_up):
    return x.new_empty(x.shape), w_gate_up.new_empty(w_gate_up.shape), w_down.new_empty(w_down.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # else autograd fills a gradient of zeros for gate and up at every backward
    ctx.save_for_backward(*inputs[:3], output[1])


def _gradients(launch, ctx, grad):
    """Gradients of the arguments of `_launch_forward`; `launch` is `_launch_backward` or the operation made of it."""
    if grad is None:
        return (None,) * 4
    gradients = launch(grad, *ctx.saved_tensors)
    return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)), None


_mlp_forward.register_autograd(lambda ctx, grad, _: _gradients(_mlp_backward, ctx, grad), setup_context=_setup_context)


class _SwigluMlp(torch.autograd.Function):
    """What eager calls use: an operation of torch.library, which torch.compile needs, costs them 0.1 ms a call."""

    forward = staticmethod(_launch_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return _gradients(_launch_backward, ctx, grad)


class _SwigluBlock(torch.autograd.Function):
    @staticmethod
    def forward(x, w_gate_up, w_down, eps, recompute):
        update, gate_up = _launch_forward(x, w_gate_up, w_down, recompute)
        return *_norm_forward(x, update, eps, True), gate_up

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:3], *output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _grad_scale, _grad_gate_up):
        if grad is None:
            return (None,) * 5
        gradients = _block_backward(grad, *ctx.saved_tensors)
        needs = ctx.needs_input_grad[:3]
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


def _block_backward(
    grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, out: Tensor, scale: Tensor, gate_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_v = _norm_backward(grad, out, scale)
    if x.numel() == 0:
        return grad_v, torch.zeros_like(w_gate_up), torch.zeros_like(w_down)
    grads = rows_of(grad_v)
    grad_gate_up, grad_w, grad_w_down = _inner_gradients(grads, rows_of(x), w_gate_up, w_down, gate_up)
    grads.addmm_(grad_gate_up, w_gate_up)  # nothing reads grad_v any more: it becomes the gradient of x
    return grad_v, grad_w, grad_w_down


# ---------------------------------------------------------------------------------------------------- public functions


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
    _check("swiglu_mlp", x, w_gate_up, w_down)
    reference = choose("swiglu_mlp", backend, x.device, None, x.dtype) == "reference"
    compiling = torch.compiler.is_compiling()
    with torch.autocast(x.device.type, enabled=False):
        if reference:
            return swiglu_mlp_reference(x, w_gate_up, w_down)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate_up, w_down))):
            return (_mlp_inference if compiling else _launch_inference)(x, w_gate_up, w_down)
        return (_mlp_forward if compiling else _SwigluMlp.apply)(x, w_gate_up, w_down, recompute)[0]


def swiglu_block(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    *,
    eps: float = 1e-5,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`residual_norm(x, swiglu_mlp(x, ...))`, with one backward of both that makes a pass over x's gradients less.

    Source: the post-norm block of arXiv 2506.21734, section 2, `docs/equations.md`.

    Args:
        x: (..., d); float32, bfloat16 or float16; contiguous or not; d up to 4096 in the Triton kernels.
        w_gate_up, w_down, recompute, backend: as `swiglu_mlp` takes them.
        eps: as `residual_norm` takes it.

    Returns:
        (..., d) in the dtype of `x` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    x, w_gate_up, w_down = autocast(x, w_gate_up, w_down)
    _check("swiglu_block", x, w_gate_up, w_down)
    check_eps("swiglu_block", eps)
    chosen = choose("swiglu_block", backend, x.device, None, x.dtype, too_wide(x))
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate_up, w_down))
    if chosen == "reference" or not graph or torch.compiler.is_compiling():  # torch.compile is given the parts
        update = swiglu_mlp(x, w_gate_up, w_down, recompute=recompute, backend=chosen)
        return residual_norm(x, update, eps=eps, backend=chosen)
    with torch.autocast(x.device.type, enabled=False):
        return _SwigluBlock.apply(x, w_gate_up, w_down, eps, recompute)[0]


def _check(name: str, x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> None:
    check_tensors(name, "x", {"x": x, "w_gate_up": w_gate_up, "w_down": w_down})
    if x.dim() < 1 or x.shape[-1] < 1:
        fail(name, "x.shape", shape(x), "(..., d) with d above 0")
    width = x.shape[-1]
    if w_gate_up.dim() != 2 or w_gate_up.shape[1] != width or w_gate_up.shape[0] % 2 or w_gate_up.shape[0] == 0:
        fail(name, "w_gate_up.shape", shape(w_gate_up), f"(2*I, {width}), the width of x")
    check_shape(
        name, "w_down", w_down, (width, w_gate_up.shape[0] // 2), "the width of x and half the rows of w_gate_up"
    )
