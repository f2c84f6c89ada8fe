"""Attention of the puzzle blocks: rotary positions, every token sees every other.

Equation (per sequence and head; [q, k, v] = qkv; x1, x2 are the halves of a head's columns):

    rotate(x) = x * cos + [-x2, x1] * sin            in float32, then in the dtype of qkv
    out = softmax(rotate(q) rotate(k)^T / sqrt(D)) v

A short sequence fits one program a head, which rotates, multiplies and writes where the heads lie side by side; its
backward computes the weights again. Longer ones are rotated by one elementwise pass and handed to PyTorch's attention.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_kernels._backend import choose, interpreting
from hrm_kernels._checks import autocast, check_shape, check_tensors, fail, shape
from hrm_kernels._triton import _capability, ceil_div, device_of, jit, tl, triton

# ---------------------------------------------------------------------------------------------------- reference


def rope_attention_reference(
    qkv: Tensor,  # (B, L, 3 * heads * D)
    cos: Tensor | None,  # (L, D)
    sin: Tensor | None,  # (L, D)
    *,
    heads: int,
) -> Tensor:
    """The specification of `rope_attention`, in plain PyTorch; also takes float64."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, D)
    if cos is not None and sin is not None:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


# ---------------------------------------------------------------------------------------------------- Triton kernels

MAX_LENGTH = 128  # tokens of a sequence that one program holds
HEAD_SIZES = (16, 32, 64)

# {(kernel, major compute capability): (queries of a tile, 16 to a warp; keys past 64 are padded to a multiple of this
# power of two; most registers a thread)}
STEPS: dict[tuple[str, int], tuple[int, int, int | None]] = {
    ("forward", 8): (128, 32, None),
    ("backward", 8): (128, 32, None),
    ("forward", 9): (64, 32, 128),
    ("backward", 9): (128, 32, 128),
}
# What replaces an entry for more than 96 keys: capped at 128 registers, the backward spills 504 bytes a thread there
LONG_STEPS: dict[tuple[str, int], tuple[int, int, int | None]] = {("backward", 9): (128, 32, None)}
ROTATE_ROWS, ROTATE_WARPS = 64, 4  # heads of tokens that a program of the rotation handles


@cache
def attention_options(kernel: str, length: int, size: int, major: int) -> dict[str, Any]:
    """Compile-time constants and launch options of the "forward" or "backward" kernel. Blocks are powers of two, so
    keys may come in two parts: 81 in 64 + 32, not in 128."""
    entry = (kernel, 9 if major >= 9 else 8)
    tile, step, registers = LONG_STEPS.get(entry, STEPS[entry]) if length > 96 else STEPS[entry]
    rest = max(0, length - 64)
    tile = tile if rest else 64
    tiles = {"TILES": ceil_div(length, tile) if rest else 1} if kernel == "forward" else {}
    return tiles | {
        "D": size,
        "BLOCK_H": max(16, size // 2),
        "BLOCK_L": tile,
        "PART1": 64,
        "PART2": min(64, ceil_div(rest, step) * step),
        "COMPILED": not interpreting(),
        "num_warps": tile // 16,
        "num_stages": 1,
        "maxnreg": registers,
        "enable_fp_fusion": True,  # Triton's default until 3.9
    }


def rotate_options(size: int) -> dict[str, Any]:
    """Compile-time constants and launch options of the rotation."""
    return {"D": size, "BLOCK_H": triton.next_power_of_2(size // 2), "BLOCK_N": ROTATE_ROWS, "num_warps": ROTATE_WARPS}


@jit
def _rotated(first, second, cos_1, cos_2, sin_1, sin_2):
    """x * cos + [-x2, x1] * sin of the halves of x, in float32."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos_1 - second * sin_1, second * cos_2 + first * sin_2


@jit
def _halves(x_ptr, offsets, mask, D: tl.constexpr):
    return tl.load(x_ptr + offsets, mask=mask, other=0.0), tl.load(x_ptr + D // 2 + offsets, mask=mask, other=0.0)


@jit
def _table(cos_ptr, sin_ptr, offsets, mask, D: tl.constexpr):
    """The halves of cos and of sin, in float32."""
    cos_1, cos_2 = _halves(cos_ptr, offsets, mask, D)
    sin_1, sin_2 = _halves(sin_ptr, offsets, mask, D)
    return cos_1.to(tl.float32), cos_2.to(tl.float32), sin_1.to(tl.float32), sin_2.to(tl.float32)


@jit
def _rows(x_ptr, rows, length, row_stride, D: tl.constexpr):
    """These rows of one head; zero past the end."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + tl.arange(0, D)[None, :]
    return tl.load(x_ptr + offsets, mask=(rows < length)[:, None], other=0.0)


@jit
def _rotated_rows(
    x_ptr, cos_ptr, sin_ptr, rows, length, row_stride,
    ROTATE: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """These rows of one head, rotated, (rows, 2 * BLOCK_H); zero past the end and past the size of a half. Joining the
    halves moves nothing between threads."""
    if not ROTATE:
        return _rows(x_ptr, rows, length, row_stride, D)
    half = tl.arange(0, BLOCK_H)[None, :]
    mask = (rows < length)[:, None] & (half < D // 2)
    first, second = _halves(x_ptr, rows.to(tl.int64)[:, None] * row_stride + half, mask, D)
    cos_1, cos_2, sin_1, sin_2 = _table(cos_ptr, sin_ptr, rows[:, None] * D + half, mask, D)
    wide_1, wide_2 = _rotated(first, second, cos_1, cos_2, sin_1, sin_2)
    both = tl.join(wide_1.to(first.dtype), wide_2.to(first.dtype))
    both = tl.reshape(tl.permute(both, (0, 2, 1)), (rows.shape[0], 2 * BLOCK_H))
    if COMPILED:  # does nothing, but once: else every product that takes the rows rotates them again in its own layout
        both = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [both], both.dtype, False, 2)
    return both


@jit
def _store_rotated_back(
    both, to_ptr, cos_ptr, sin_ptr, rows, length, row_stride,
    ROTATE: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of rows of which `both` is the gradient after rotation."""
    dtype = to_ptr.dtype.element_ty
    to = to_ptr + rows.to(tl.int64)[:, None] * row_stride
    if ROTATE:  # the other way: the sines' halves exchanged and negated
        half = tl.arange(0, BLOCK_H)[None, :]
        mask = (rows < length)[:, None] & (half < D // 2)
        first, second = tl.split(tl.permute(tl.reshape(both, (rows.shape[0], 2, BLOCK_H)), (0, 2, 1)))
        cos_1, cos_2, sin_1, sin_2 = _table(cos_ptr, sin_ptr, rows[:, None] * D + half, mask, D)
        first, second = _rotated(first, second, cos_1, cos_2, -sin_2, -sin_1)
        tl.store(to + half, first.to(dtype), mask=mask)
        tl.store(to + D // 2 + half, second.to(dtype), mask=mask)
    else:
        tl.store(to + tl.arange(0, D)[None, :], both.to(dtype), mask=(rows < length)[:, None])


@jit
def _scores(q, k, keys, length, MASK: tl.constexpr):
    """q k^T; -inf for keys past the end, which only the last part of the keys has."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK:
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
    return scores


@jit(do_not_specialize=["length"])
def _attention_forward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr,
    length, heads, batch_stride, row_stride,
    SAVE: tl.constexpr, ROTATE: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr,
    TILES: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: all keys, rotated once, and the queries a tile at a time. `lse` is the logarithm, base
    2, of the softmax's denominator."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    q_ptr = qkv_ptr + sequence * batch_stride + head * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    out_ptr += sequence * length * (heads * D) + head * D
    lse_ptr += tl.program_id(0).to(tl.int64) * length
    to_base_2: tl.constexpr = 1.4426950408889634 / (D**0.5)
    dtype = qkv_ptr.dtype.element_ty
    keys1 = tl.arange(0, PART1)
    k1 = _rotated_rows(k_ptr, cos_ptr, sin_ptr, keys1, length, row_stride, ROTATE, D, BLOCK_H, COMPILED)
    v1 = _rows(v_ptr, keys1, length, row_stride, D)
    if PART2 > 0:
        keys2 = PART1 + tl.arange(0, PART2)
        k2 = _rotated_rows(k_ptr, cos_ptr, sin_ptr, keys2, length, row_stride, ROTATE, D, BLOCK_H, COMPILED)
        v2 = _rows(v_ptr, keys2, length, row_stride, D)
    for tile in tl.static_range(TILES):
        queries = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        q = _rotated_rows(q_ptr, cos_ptr, sin_ptr, queries, length, row_stride, ROTATE, D, BLOCK_H, COMPILED)
        scores1 = _scores(q, k1, keys1, length, PART2 == 0)
        top = tl.max(scores1, 1)
        if PART2 > 0:
            scores2 = _scores(q, k2, keys2, length, True)
            top = tl.maximum(top, tl.max(scores2, 1))
        top *= to_base_2
        weights1 = tl.exp2(scores1 * to_base_2 - top[:, None])
        total = tl.sum(weights1, 1)
        out = tl.dot(weights1.to(dtype), v1, input_precision="ieee")
        if PART2 > 0:
            weights2 = tl.exp2(scores2 * to_base_2 - top[:, None])
            total += tl.sum(weights2, 1)
            out = tl.dot(weights2.to(dtype), v2, out, input_precision="ieee")
        out = (out * (1.0 / total)[:, None]).to(dtype)
        to = out_ptr + queries[:, None] * (heads * D) + tl.arange(0, D)[None, :]
        tl.store(to, out, mask=(queries < length)[:, None])
        if SAVE:
            tl.store(lse_ptr + queries, top + tl.log2(total), mask=queries < length)


@jit
def _store_grad_k(
    grad_scores, q, to_ptr, cos_ptr, sin_ptr, keys, length, stride,
    ROTATE: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Transposed, the product has the D columns of q as its rows: enough for the matrix units, however few the keys."""
    grad_k = tl.trans(tl.dot(tl.trans(q), grad_scores, input_precision="ieee")) * (1.0 / (D**0.5))
    _store_rotated_back(grad_k, to_ptr, cos_ptr, sin_ptr, keys, length, stride, ROTATE, D, BLOCK_H)


@jit
def _store_grad_v(weights, grad, to_ptr, keys, length, stride, D: tl.constexpr):
    grad_v = tl.trans(tl.dot(tl.trans(grad), weights, input_precision="ieee").to(grad.dtype))
    to = to_ptr + keys.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(to, grad_v, mask=(keys < length)[:, None])


@jit(do_not_specialize=["length"])
def _attention_backward_kernel(
    grad_ptr, qkv_ptr, cos_ptr, sin_ptr, lse_ptr, grad_qkv_ptr,
    length, heads, grad_batch_stride, grad_row_stride, batch_stride, row_stride,
    ROTATE: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr,
    PART1: tl.constexpr, PART2: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """One head of one sequence, all queries against all keys: five products, each once."""
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    q_ptr = qkv_ptr + sequence * batch_stride + head * D
    k_ptr = q_ptr + heads * D
    v_ptr = k_ptr + heads * D
    grad_ptr += sequence * grad_batch_stride + head * D
    lse_ptr += tl.program_id(0).to(tl.int64) * length
    stride = 3 * heads * D
    to_q_ptr = grad_qkv_ptr + sequence * length * stride + head * D
    to_k_ptr = to_q_ptr + heads * D
    to_v_ptr = to_k_ptr + heads * D
    dtype = qkv_ptr.dtype.element_ty
    to_base_2: tl.constexpr = 1.4426950408889634 / (D**0.5)

    rows = tl.arange(0, BLOCK_L)
    keys1 = tl.arange(0, PART1)
    q = _rotated_rows(q_ptr, cos_ptr, sin_ptr, rows, length, row_stride, ROTATE, D, BLOCK_H, COMPILED)
    k1 = _rotated_rows(k_ptr, cos_ptr, sin_ptr, keys1, length, row_stride, ROTATE, D, BLOCK_H, COMPILED)
    grad = _rows(grad_ptr, rows, length, grad_row_stride, D)
    v1 = _rows(v_ptr, keys1, length, row_stride, D)
    lse = tl.load(lse_ptr + rows, mask=rows < length, other=0.0)[:, None]
    if PART2 > 0:
        keys2 = PART1 + tl.arange(0, PART2)
        k2 = _rotated_rows(k_ptr, cos_ptr, sin_ptr, keys2, length, row_stride, ROTATE, D, BLOCK_H, COMPILED)
        v2 = _rows(v_ptr, keys2, length, row_stride, D)

    # masked before the exponential: scores 0 of keys past the end may lie far above a row's lse
    weights1 = tl.exp2(_scores(q, k1, keys1, length, PART2 == 0) * to_base_2 - lse)
    _store_grad_v(weights1.to(dtype), grad, to_v_ptr, keys1, length, stride, D)
    if PART2 > 0:
        weights2 = tl.exp2(_scores(q, k2, keys2, length, True) * to_base_2 - lse)
        _store_grad_v(weights2.to(dtype), grad, to_v_ptr, keys2, length, stride, D)
    grad_weights1 = tl.dot(grad, tl.trans(v1), input_precision="ieee")
    delta = tl.sum(weights1 * grad_weights1, 1)
    if PART2 > 0:
        grad_weights2 = tl.dot(grad, tl.trans(v2), input_precision="ieee")
        delta += tl.sum(weights2 * grad_weights2, 1)
    grad1 = (weights1 * (grad_weights1 - delta[:, None])).to(dtype)
    grad_q = tl.dot(grad1, k1, input_precision="ieee")
    _store_grad_k(grad1, q, to_k_ptr, cos_ptr, sin_ptr, keys1, length, stride, ROTATE, D, BLOCK_H)
    if PART2 > 0:
        grad2 = (weights2 * (grad_weights2 - delta[:, None])).to(dtype)
        grad_q = tl.dot(grad2, k2, grad_q, input_precision="ieee")
        _store_grad_k(grad2, q, to_k_ptr, cos_ptr, sin_ptr, keys2, length, stride, ROTATE, D, BLOCK_H)
    grad_q = grad_q * (1.0 / (D**0.5))
    _store_rotated_back(grad_q, to_q_ptr, cos_ptr, sin_ptr, rows, length, stride, ROTATE, D, BLOCK_H)


@jit(do_not_specialize=["n", "length"])
def _rotate_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, to_q_ptr, to_k_ptr, to_v_ptr,
    n, length, heads, batch_stride, row_stride, head_stride, to_row_stride,
    INVERSE: tl.constexpr, COPY_V: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rotates q and k, back where INVERSE, and copies v; a row is one head of one token, `n` of them."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, BLOCK_H)[None, :]
    mask = (index < n)[:, None] & (half < D // 2)
    head = index % heads
    token = index // heads
    position = token % length
    source = (token // length * batch_stride + position * row_stride + head * head_stride)[:, None] + half
    target = (token * to_row_stride + head * D)[:, None] + half
    cos_1, cos_2, sin_1, sin_2 = _table(cos_ptr, sin_ptr, position[:, None] * D + half, mask, D)
    if INVERSE:
        sin_1, sin_2 = -sin_2, -sin_1
    dtype = q_ptr.dtype.element_ty
    first, second = _halves(q_ptr, source, mask, D)
    first, second = _rotated(first, second, cos_1, cos_2, sin_1, sin_2)
    tl.store(to_q_ptr + target, first.to(dtype), mask=mask)
    tl.store(to_q_ptr + D // 2 + target, second.to(dtype), mask=mask)
    first, second = _halves(k_ptr, source, mask, D)
    first, second = _rotated(first, second, cos_1, cos_2, sin_1, sin_2)
    tl.store(to_k_ptr + target, first.to(dtype), mask=mask)
    tl.store(to_k_ptr + D // 2 + target, second.to(dtype), mask=mask)
    if COPY_V:
        plain_1, plain_2 = _halves(v_ptr, source, mask, D)
        tl.store(to_v_ptr + target, plain_1, mask=mask)
        tl.store(to_v_ptr + D // 2 + target, plain_2, mask=mask)


# ---------------------------------------------------------------------------------------------------- autograd: short


def _unit(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch_forward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, save: bool
) -> tuple[Tensor, Tensor]:
    """The result and, where `save`, the logarithm of each softmax's denominator (B, heads, L), base 2."""
    batch, length, width = qkv.shape
    qkv = _unit(qkv)
    out = torch.empty((batch, length, width // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, heads, length) if save else (0,), dtype=torch.float32, device=qkv.device)
    if out.numel() > 0:
        options = attention_options("forward", length, width // (3 * heads), _capability(qkv.device)[0])
        with device_of(qkv):
            _attention_forward_kernel[(batch * heads,)](
                qkv, *_tables(qkv, cos, sin), out, lse, length, heads, qkv.stride(0), qkv.stride(1),
                SAVE=save, ROTATE=cos is not None, **options,
            )  # fmt: skip
    return out, lse


def _tables(like: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a kernel takes for cos and sin; any pointer where it does not rotate."""
    return (like, like) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())


_attention_forward = torch.library.custom_op("hrm::rope_attention", _launch_forward, mutates_args=())


@_attention_forward.register_fake
def _(qkv, cos, sin, heads, save):
    batch, length, width = qkv.shape
    lse = (batch, heads, length) if save else (0,)
    return qkv.new_empty(batch, length, width // 3), qkv.new_empty(lse, dtype=torch.float32)


def _launch_backward(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, lse: Tensor, heads: int
) -> Tensor:
    batch, length, width = qkv.shape
    grad, qkv = _unit(grad), _unit(qkv)
    grad_qkv = torch.empty((batch, length, width), dtype=qkv.dtype, device=qkv.device)
    if qkv.numel() > 0:
        options = attention_options("backward", length, width // (3 * heads), _capability(qkv.device)[0])
        with device_of(qkv):
            _attention_backward_kernel[(batch * heads,)](
                grad, qkv, *_tables(qkv, cos, sin), lse, grad_qkv,
                length, heads, grad.stride(0), grad.stride(1), qkv.stride(0), qkv.stride(1),
                ROTATE=cos is not None, **options,
            )  # fmt: skip
    return grad_qkv


_attention_backward = torch.library.custom_op("hrm::rope_attention_backward", _launch_backward, mutates_args=())


@_attention_backward.register_fake
def _(grad, qkv, cos, sin, lse, heads):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    qkv, cos, sin, ctx.heads, _ = inputs
    ctx.save_for_backward(qkv, cos, sin, output[1])


_attention_forward.register_autograd(
    lambda ctx, grad, _: (_attention_backward(grad, *ctx.saved_tensors, ctx.heads), None, None, None, None),
    setup_context=_setup_context,
)


class _RopeAttention(torch.autograd.Function):
    """What eager calls use: an operation of torch.library, which torch.compile needs, costs them 0.1 ms a call."""

    forward = staticmethod(_launch_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        _setup_context(ctx, inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        qkv, cos, sin, lse = ctx.saved_tensors
        return _launch_backward(grad, qkv, cos, sin, lse, ctx.heads), None, None, None, None


# ---------------------------------------------------------------------------------------------------- autograd: long


def _rotate_rows(sources: list[Tensor], targets: list[Tensor], cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Rotates (B, L, heads, D) tensors, q and k, and copies v if it is there, into targets of the same shape.

    All sources have the same strides; targets have the same strides and heads side by side, sequences one by one."""
    source, target = sources[0], targets[0]
    batch, length, heads, size = source.shape
    if source.numel() == 0:
        return
    copy_v = len(sources) == 3
    pointers = [*sources, *sources[: 3 - len(sources)]], [*targets, *targets[: 3 - len(targets)]]
    n = batch * length * heads
    with device_of(source):
        _rotate_kernel[(ceil_div(n, ROTATE_ROWS),)](
            *pointers[0], cos.contiguous(), sin.contiguous(), *pointers[1],
            n, length, heads, source.stride(0), source.stride(1), source.stride(2), target.stride(1),
            INVERSE=inverse, COPY_V=copy_v, **rotate_options(size),
        )  # fmt: skip


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v as views (B, L, heads, D)."""
    return qkv.unflatten(-1, (3, heads, -1)).unbind(2)


def _launch_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, copy_v: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q and k and, where `copy_v`, v, each (B, L, heads, D); a copy of v lets go of `qkv`, of which PyTorch's
    attention would keep all three parts for the sake of one."""
    sources = list(_parts(_unit(qkv), heads))[: 3 if copy_v else 2]
    targets = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in sources]
    _rotate_rows(sources, targets, cos, sin, inverse=False)
    return targets[0], targets[1], targets[2] if copy_v else qkv.new_empty(0)


_rotate_forward = torch.library.custom_op("hrm::rope_rotate", _launch_rotate, mutates_args=())


@_rotate_forward.register_fake
def _(qkv, cos, sin, heads, copy_v):
    size = (*qkv.shape[:2], heads, qkv.shape[2] // (3 * heads))
    return qkv.new_empty(size), qkv.new_empty(size), qkv.new_empty(size if copy_v else 0)


def _launch_rotate_back(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, length, heads, size = grad_q.shape
    grads = [grad_q, grad_k, grad_v]
    if grad_q.stride(-1) != 1 or any(g.stride() != grad_q.stride() for g in grads):
        grads = [g.contiguous() for g in grads]
    grad_qkv = torch.empty((batch, length, 3 * heads * size), dtype=grad_q.dtype, device=grad_q.device)
    _rotate_rows(grads, list(_parts(grad_qkv, heads)), cos, sin, inverse=True)
    return grad_qkv


_rotate_backward = torch.library.custom_op("hrm::rope_rotate_backward", _launch_rotate_back, mutates_args=())


@_rotate_backward.register_fake
def _(grad_q, grad_k, grad_v, cos, sin):
    return grad_q.new_empty(*grad_q.shape[:2], 3 * grad_q.shape[2] * grad_q.shape[3])


def _rotate_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:3])


_rotate_forward.register_autograd(
    lambda ctx, *grads: (_rotate_backward(*grads, *ctx.saved_tensors), None, None, None, None),
    setup_context=_rotate_context,
)


class _Rotate(torch.autograd.Function):
    """What eager calls use, as above."""

    forward = staticmethod(_launch_rotate)
    setup_context = staticmethod(_rotate_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return _launch_rotate_back(*grads, *ctx.saved_tensors), None, None, None, None


def _long(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, graph: bool) -> Tensor:
    qkv = _unit(qkv)  # PyTorch's fast attention wants unit strides
    q, k, v = _parts(qkv, heads)
    if cos is not None and sin is not None:
        run = _rotate_forward if torch.compiler.is_compiling() else _Rotate.apply if graph else _launch_rotate
        q, k, copy = run(qkv, cos, sin, heads, graph)
        v = copy if graph else v
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(-2)


# ---------------------------------------------------------------------------------------------------- public function


def rope_attention(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, *, heads: int, backend: str = "auto") -> Tensor:
    """Attention over whole sequences, without mask, on queries and keys rotated by their positions.

    Source: the blocks of arXiv 2506.21734, section 2; rotary positions of arXiv 2104.09864 ("rotate half").

    Args:
        qkv: (B, L, 3*heads*D), queries, keys, values, each with its heads side by side; float32, bfloat16 or float16;
            contiguous or not.
        cos, sin: (L, D) in float32 or the dtype of `qkv`, or both None: no rotation. They get no gradient.
        heads: number of heads.
        backend: "auto" (Triton on CUDA, else the reference), "triton" or "reference".

    Returns:
        (B, L, heads*D) in the dtype of `qkv` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    _check(qkv, cos, sin, heads)
    (qkv,) = autocast(qkv)
    if cos is not None and sin is not None:
        cos, sin = cos.detach(), sin.detach()
    reference = choose("rope_attention", backend, qkv.device, None, qkv.dtype) == "reference"
    with torch.autocast(qkv.device.type, enabled=False):
        if reference:
            return rope_attention_reference(qkv, cos, sin, heads=heads)
        graph = torch.is_grad_enabled() and qkv.requires_grad
        if not _short(qkv, heads):
            return _long(qkv, cos, sin, heads, graph)
        compiling = torch.compiler.is_compiling()
        run = _attention_forward if compiling else _RopeAttention.apply if graph else _launch_forward
        return run(qkv, cos, sin, heads, graph)[0]


def _short(qkv: Tensor, heads: int) -> bool:
    """Whether a head of a sequence fits one program of an sm_86; float32 would take twice the shared memory."""
    size = qkv.shape[-1] // (3 * heads)
    return qkv.dtype.itemsize == 2 and qkv.shape[1] <= MAX_LENGTH and size in HEAD_SIZES


def _check(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int) -> None:
    name = "rope_attention"
    check_tensors(name, "qkv", {"qkv": qkv})
    if not isinstance(heads, int) or heads < 1:
        fail(name, "heads", repr(heads), "an integer above 0")
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * heads) or qkv.shape[-1] == 0:
        fail(name, "qkv.shape", shape(qkv), f"(B, L, 3*{heads}*D), queries, keys and values of {heads} heads")
    if cos is None and sin is None:
        return
    size = qkv.shape[-1] // (3 * heads)
    for argument, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"{name}: {argument} is {type(table).__name__}; cos and sin should be two tensors or None")
        if table.device != qkv.device:
            fail(name, f"{argument}.device", table.device, f"{qkv.device}, the device of qkv")
        if table.dtype not in (torch.float32, qkv.dtype):
            fail(name, f"{argument}.dtype", table.dtype, f"torch.float32 or {qkv.dtype}, the dtype of qkv")
        check_shape(name, argument, table, (qkv.shape[1], size), "the length of qkv and the size of its heads")
    if size % 2:
        fail(name, "the head size", size, "even, since its halves are rotated")
