"""Token mixer: the gated MLP over positions, its residual and its norm over positions, in one launch.

Equation (per sequence b and channel c; x_c = x[b, :, c] is a column of L positions):

    g = W_g x_c ;  u = W_u x_c                      (I,)
    v = x_c + W_d (silu(g) * u)                     (L,)
    y[b, :, c] = v / sqrt(mean(v^2) + eps)          mean over the L positions, no weight

A program holds one sequence's tile of channels, all its positions, and walks over chunks of I: neither x transposed nor
the I hidden values of a channel reach memory. Nothing is saved without graph; with it x, y and the norm's scale are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

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
    dot_add,
    halve_for_silu,
    jit,
    multiprocessors,
    overridden,
    sigmoid,
    silu_times,
    tl,
)

MAX_LENGTH = 128  # positions of a tile that, with a chunk of the weights, fits one block of an sm_86

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


# ---------------------------------------------------------------------------------------------------- Triton kernels

# Blocks are powers of two, so L positions may come in two parts, PART1 and PART2: 81 in 64 + 32, not in 128. PART2 is 0
# where one part holds them all.


@jit
def _pack_kernel(
    gate_up_ptr, down_ptr, packed_ptr,
    inner, padded_inner, gate_up_stride, down_stride,
    LENGTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Lays the weights out in rows of PADDED, zero past I and L: INNER rows of the gate, INNER of up, and so on; in the
    end down, transposed. Rows of 81 or 97 elements, which are not aligned, could be loaded only one element at a time,
    and gate and up side by side make one product of two."""
    which = tl.program_id(1)
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < inner) & (columns < LENGTH)
    target = 2 * padded_inner + rows
    if which == 2:
        values = tl.load(down_ptr + columns.to(tl.int64) * down_stride + rows, mask=inside, other=0.0)
    else:
        source = (which * inner + rows).to(tl.int64) * gate_up_stride + columns
        values = tl.load(gate_up_ptr + source, mask=inside, other=0.0)
        if which == 0:
            values = halve_for_silu(values, MATH)
        target = (2 * (rows // INNER) + which) * INNER + rows % INNER
    mask = (rows < padded_inner) & (columns < PADDED)
    tl.store(packed_ptr + target * PADDED + columns, values, mask=mask)


@jit
def _tile(tile, FIRST: tl.constexpr, PART: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
          CHANNELS: tl.constexpr):  # fmt: skip
    """Offsets (int64) in (B, L, d) and mask of positions [FIRST, FIRST + PART) of the tile's sequence and channels."""
    blocks = tl.cdiv(WIDTH, CHANNELS)
    channels = (tile % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    positions = FIRST + tl.arange(0, PART)
    mask = (positions < LENGTH)[:, None] & (channels < WIDTH)[None, :]
    start = (tile // blocks).to(tl.int64) * (LENGTH * WIDTH)
    return start + (positions[:, None] * WIDTH + channels[None, :]), mask


@jit
def _scales(tile, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Offsets (int64) and mask of the tile's channels in (B, d)."""
    blocks = tl.cdiv(WIDTH, CHANNELS)
    channels = (tile % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return (tile // blocks).to(tl.int64) * WIDTH + channels, channels < WIDTH


@jit
def _weights(packed_ptr, first, FIRST: tl.constexpr, PART: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Rows [first, first + ROWS) and columns [FIRST, FIRST + PART) of the packed weights."""
    return tl.load(packed_ptr + (first + tl.arange(0, ROWS))[:, None] * PADDED + FIRST + tl.arange(0, PART)[None, :])


@jit
def _halves(both, ROWS: tl.constexpr, INNER: tl.constexpr):
    """The two (ROWS, INNER) halves of (ROWS, 2 * INNER); threads keep what they hold."""
    return tl.split(tl.permute(tl.reshape(both, (ROWS, 2, INNER)), (0, 2, 1)))


@jit
def _side_by_side(a, b, ROWS: tl.constexpr, INNER: tl.constexpr):
    """What `_halves` takes apart."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, 2 * INNER))


@jit
def _root(squares, eps, LENGTH: tl.constexpr, MATH: tl.constexpr):
    """1 / sqrt(mean + eps) of sums of LENGTH squares."""
    mean = squares * (1.0 / LENGTH) + eps
    if MATH == "exact":
        return tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean))
    return tl.rsqrt(mean)


@jit
def _mixer_forward_kernel(
    x_ptr, packed_ptr, out_ptr, scale_ptr,
    padded_inner, eps,
    SAVE: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr,
    CHANNELS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Rows are channels: the products of one dot are, in registers, the left operand of the next."""
    PADDED: tl.constexpr = PART1 + PART2
    tile = tl.program_id(0)
    down_ptr = packed_ptr + 2 * padded_inner * PADDED
    offsets1, mask1 = _tile(tile, 0, PART1, LENGTH, WIDTH, CHANNELS)
    x1 = tl.trans(tl.load(x_ptr + offsets1, mask=mask1, other=0.0))
    v1 = x1.to(tl.float32)
    if PART2 > 0:
        offsets2, mask2 = _tile(tile, PART1, PART2, LENGTH, WIDTH, CHANNELS)
        x2 = tl.trans(tl.load(x_ptr + offsets2, mask=mask2, other=0.0))
        v2 = x2.to(tl.float32)
    for first in tl.range(0, padded_inner, INNER, num_stages=STAGES):
        both1 = _weights(packed_ptr, 2 * first, 0, PART1, PADDED, 2 * INNER)
        both = tl.dot(x1, tl.trans(both1), input_precision=PRECISION)
        if PART2 > 0:
            both2 = _weights(packed_ptr, 2 * first, PART1, PART2, PADDED, 2 * INNER)
            both = dot_add(x2, tl.trans(both2), both, PRECISION, MATH)
        g, u = _halves(both, CHANNELS, INNER)
        hidden = silu_times(g, u, MATH).to(x1.dtype)
        down1 = _weights(down_ptr, first, 0, PART1, PADDED, INNER)
        v1 = dot_add(hidden, down1, v1, PRECISION, MATH)
        if PART2 > 0:
            down2 = _weights(down_ptr, first, PART1, PART2, PADDED, INNER)
            v2 = dot_add(hidden, down2, v2, PRECISION, MATH)
    squares = tl.sum(v1 * v1, 1)
    if PART2 > 0:
        squares += tl.sum(v2 * v2, 1)
    scale = _root(squares, eps, LENGTH, MATH)
    if SAVE:
        offsets, mask = _scales(tile, WIDTH, CHANNELS)
        tl.store(scale_ptr + offsets, scale, mask=mask)
    tl.store(out_ptr + offsets1, tl.trans((v1 * scale[:, None]).to(x1.dtype)), mask=mask1)
    if PART2 > 0:
        tl.store(out_ptr + offsets2, tl.trans((v2 * scale[:, None]).to(x1.dtype)), mask=mask2)


@jit
def _slopes(g, u, grad_hidden, MATH: tl.constexpr):
    """silu(g) * u and, given its gradient, those of g and u."""
    s = sigmoid(g, MATH)
    silu = g * s
    return silu * u, grad_hidden * u * (s + silu * (1.0 - s)), grad_hidden * silu


@jit
def _mixer_backward_x_kernel(
    grad_ptr, x_ptr, out_ptr, scale_ptr, packed_ptr, grad_v_ptr, grad_x_ptr,
    padded_inner, eps,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr,
    CHANNELS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Gradients of v, which the weights' gradients are made of, and of x; recomputes g and u."""
    PADDED: tl.constexpr = PART1 + PART2
    tile = tl.program_id(0)
    down_ptr = packed_ptr + 2 * padded_inner * PADDED
    dtype = x_ptr.dtype.element_ty
    offsets, mask = _scales(tile, WIDTH, CHANNELS)
    scale = tl.load(scale_ptr + offsets, mask=mask, other=0.0)
    offsets1, mask1 = _tile(tile, 0, PART1, LENGTH, WIDTH, CHANNELS)
    grad1 = tl.load(grad_ptr + offsets1, mask=mask1, other=0.0).to(tl.float32)
    y1 = tl.load(out_ptr + offsets1, mask=mask1, other=0.0).to(tl.float32)
    product, squares = tl.sum(grad1 * y1, 0), tl.sum(y1 * y1, 0)
    if PART2 > 0:
        offsets2, mask2 = _tile(tile, PART1, PART2, LENGTH, WIDTH, CHANNELS)
        grad2 = tl.load(grad_ptr + offsets2, mask=mask2, other=0.0).to(tl.float32)
        y2 = tl.load(out_ptr + offsets2, mask=mask2, other=0.0).to(tl.float32)
        product += tl.sum(grad2 * y2, 0)
        squares += tl.sum(y2 * y2, 0)
    # mean(grad * y) as it would be had y not been rounded: the mean of its squares is 1 - eps * scale^2
    along = (product / tl.maximum(squares, 1e-30) * (1.0 - eps * scale * scale))[None, :]
    scale = scale[None, :]
    grad1 = scale * (grad1 - y1 * along)  # of v
    tl.store(grad_v_ptr + offsets1, grad1.to(dtype), mask=mask1)
    low1, grad1 = tl.trans(grad1.to(dtype)), tl.trans(grad1)
    x1 = tl.trans(tl.load(x_ptr + offsets1, mask=mask1, other=0.0))
    if PART2 > 0:
        grad2 = scale * (grad2 - y2 * along)
        tl.store(grad_v_ptr + offsets2, grad2.to(dtype), mask=mask2)
        low2, grad2 = tl.trans(grad2.to(dtype)), tl.trans(grad2)
        x2 = tl.trans(tl.load(x_ptr + offsets2, mask=mask2, other=0.0))
    for first in tl.range(0, padded_inner, INNER, num_stages=STAGES):
        both1 = _weights(packed_ptr, 2 * first, 0, PART1, PADDED, 2 * INNER)
        down1 = _weights(down_ptr, first, 0, PART1, PADDED, INNER)
        both = tl.dot(x1, tl.trans(both1), input_precision=PRECISION)
        grad_hidden = tl.dot(low1, tl.trans(down1), input_precision=PRECISION)
        if PART2 > 0:
            both2 = _weights(packed_ptr, 2 * first, PART1, PART2, PADDED, 2 * INNER)
            down2 = _weights(down_ptr, first, PART1, PART2, PADDED, INNER)
            both = dot_add(x2, tl.trans(both2), both, PRECISION, MATH)
            grad_hidden = dot_add(low2, tl.trans(down2), grad_hidden, PRECISION, MATH)
        g, u = _halves(both, CHANNELS, INNER)
        _hidden, grad_g, grad_u = _slopes(g, u, grad_hidden, MATH)
        grad_both = _side_by_side(grad_g, grad_u, CHANNELS, INNER).to(dtype)
        grad1 = dot_add(grad_both, both1, grad1, PRECISION, MATH)
        if PART2 > 0:
            grad2 = dot_add(grad_both, both2, grad2, PRECISION, MATH)
    tl.store(grad_x_ptr + offsets1, tl.trans(grad1.to(dtype)), mask=mask1)
    if PART2 > 0:
        tl.store(grad_x_ptr + offsets2, tl.trans(grad2.to(dtype)), mask=mask2)


@jit
def _mixer_backward_w_kernel(
    x_ptr, grad_v_ptr, packed_ptr, partial_ptr,
    tiles, padded_inner,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    CHANNELS: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Weight gradients, transposed, of INNER of the I hidden values over this program's share of the tiles.

    The sums, (PADDED, 2 * INNER) and (PADDED, INNER), stay in registers until the end. Their rows are positions, as a
    matrix unit of sm_90 takes 64 rows or more: positions come in one part here.
    """
    first = tl.program_id(0) * INNER
    both = _weights(packed_ptr, 2 * first, 0, PADDED, PADDED, 2 * INNER)
    down = _weights(packed_ptr + 2 * padded_inner * PADDED, first, 0, PADDED, PADDED, INNER)
    dtype = both.dtype
    grad_both = tl.zeros((PADDED, 2 * INNER), tl.float32)
    grad_down = tl.zeros((PADDED, INNER), tl.float32)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1), num_stages=STAGES):
        offsets, mask = _tile(tile, 0, PADDED, LENGTH, WIDTH, CHANNELS)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        grad_v = tl.load(grad_v_ptr + offsets, mask=mask, other=0.0)
        g, u = _halves(tl.dot(tl.trans(x), tl.trans(both), input_precision=PRECISION), CHANNELS, INNER)
        grad_hidden = tl.dot(tl.trans(grad_v), tl.trans(down), input_precision=PRECISION)
        hidden, grad_g, grad_u = _slopes(g, u, grad_hidden, MATH)
        # rounded where they are used and in this order, nothing spills on sm_90 and one buffer serves both
        grads = _side_by_side(grad_g, grad_u, CHANNELS, INNER).to(dtype)
        grad_both = dot_add(x, grads, grad_both, PRECISION, MATH)
        grad_down = dot_add(grad_v, hidden.to(dtype), grad_down, PRECISION, MATH)
    # (programs, PADDED, 3 * padded I), columns as the packed weights' rows
    rows = tl.arange(0, PADDED)[:, None] * (3 * padded_inner)
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * (3 * padded_inner * PADDED) + rows
    tl.store(partial + 2 * first + tl.arange(0, 2 * INNER)[None, :], grad_both)
    tl.store(partial + 2 * padded_inner + first + tl.arange(0, INNER)[None, :], grad_down)


# ---------------------------------------------------------------------------------------------------- launch table


@dataclass(frozen=True)
class MixerConfig:
    """How one kernel is launched: channels of a tile, rows of I in a chunk, warps of a program, loads under way at
    once, programs wanted on each multiprocessor (`mixer_backward_w`: the others have one program a tile), and the most
    registers a thread may take (None: what the compiler likes)."""

    channels: int
    inner: int
    warps: int
    stages: int = 2
    programs: int = 1
    registers: int | None = None


Entries = dict[tuple[int, str], MixerConfig]

# {kernel: {(bytes of an element, "short" or "long" sequences, of more than 96 positions): config}}, sized for an sm_86
# block and its registers (docs/compile_table.md)
MIXER_TABLE: dict[str, Entries] = {
    "mixer_forward": {
        (2, "short"): MixerConfig(64, 32, 4),
        (2, "long"): MixerConfig(64, 32, 4),
        (4, "short"): MixerConfig(16, 16, 8, 1),
        (4, "long"): MixerConfig(16, 16, 8, 1),
    },
    "mixer_backward_x": {
        (2, "short"): MixerConfig(64, 16, 4),
        (2, "long"): MixerConfig(64, 32, 8),
        (4, "short"): MixerConfig(16, 16, 8, 1),
        (4, "long"): MixerConfig(16, 16, 8, 1),
    },
    "mixer_backward_w": {
        (2, "short"): MixerConfig(32, 32, 4, programs=2),
        (2, "long"): MixerConfig(32, 32, 4, programs=2),
        (4, "short"): MixerConfig(16, 16, 8, 1),
        (4, "long"): MixerConfig(16, 16, 8, 1),
    },
}
# What replaces entries from sm_90 on, whose matrix units want 64 rows a warpgroup
MIXER_HOPPER: dict[str, Entries] = {
    "mixer_forward": {(2, tokens): MixerConfig(128, 32, 8, 3, registers=128) for tokens in ("short", "long")},
    "mixer_backward_x": {(2, "short"): MixerConfig(64, 32, 4), (2, "long"): MixerConfig(64, 32, 4, 3)},
    # Triton 3.6 reads past its shared memory with (128, 32, 8) and (64, 32, 8): compute-sanitizer finds nothing here
    "mixer_backward_w": {(2, tokens): MixerConfig(128, 64, 8) for tokens in ("short", "long")},
}
_overrides: dict[str, MixerConfig] = {}


def override_mixer_config(**configs: MixerConfig) -> AbstractContextManager[None]:
    """Launches the named kernels (keys of `MIXER_TABLE`) with other configurations inside the `with` block.

    Raises:
        ValueError: a name is no kernel of the table.
    """
    return overridden("override_mixer_config", _overrides, MIXER_TABLE, configs)


@cache
def mixer_entries(kernel: str, capability: tuple[int, int]) -> Entries:
    """The launch table of one kernel on a device of this compute capability."""
    return MIXER_TABLE[kernel] | (MIXER_HOPPER.get(kernel, {}) if capability >= (9, 0) else {})


@cache
def parts(length: int) -> tuple[int, int]:
    """The powers of two, 16 or more, that the positions are split into; the second is 0 where one holds them all."""
    if 64 < length <= 96:
        return 64, 16 if length <= 80 else 32
    return next(size for size in (16, 32, 64, MAX_LENGTH) if size >= length), 0


def padded_length(kernel: str, length: int) -> int:
    """Columns of the packed weights that this kernel takes."""
    if kernel == "mixer_backward_w":
        return MAX_LENGTH if length > 64 else parts(length)[0]
    return sum(parts(length))


@cache
def mixer_options(
    kernel: str, config: MixerConfig, length: int, width: int, dtype: torch.dtype, exact: bool = True
) -> dict[str, object]:
    """The compile-time constants and launch options that a kernel of `MIXER_TABLE` takes."""
    positions = dict(zip(("PART1", "PART2"), parts(length), strict=True))
    if kernel == "mixer_backward_w":
        positions = {"PADDED": padded_length(kernel, length)}
    return {
        "LENGTH": length,
        "WIDTH": width,
        **positions,
        "CHANNELS": config.channels,
        "INNER": config.inner,
        "STAGES": config.stages,
        "PRECISION": "tf32" if dtype == torch.float32 and not exact else "ieee",
        "MATH": _math(dtype),
        "num_warps": config.warps,
        "maxnreg": config.registers,
        "enable_fp_fusion": True,  # Triton's default until 3.9
    }


def _configuration(kernel: str, x: Tensor) -> tuple[MixerConfig, dict[str, object]]:
    _, length, width = x.shape
    table = mixer_entries(kernel, _capability(x.device))
    config = _overrides.get(kernel) or table[x.dtype.itemsize, "long" if length > 96 else "short"]
    exact = torch.get_float32_matmul_precision() == "highest"  # unless the user turned tf32 on
    return config, mixer_options(kernel, config, length, width, x.dtype, exact)


# The kernels of the table with the sets of flags that change their code, for `hrm_kernels.compile_table`
MIXER_KERNELS = {
    "mixer_forward": (_mixer_forward_kernel, ({"SAVE": False}, {"SAVE": True})),
    "mixer_backward_x": (_mixer_backward_x_kernel, ({},)),
    "mixer_backward_w": (_mixer_backward_w_kernel, ({},)),
}


# ---------------------------------------------------------------------------------------------------- autograd


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pack(kernel: str, config: MixerConfig, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The weights as `_pack_kernel` lays them out for this kernel; the gate is halved for the forward's `silu_times`.

    Takes a few microseconds and is done for each call: nothing to keep in step with the optimizer.
    """
    length, inner = w_down.shape
    rows, padded = ceil_div(inner, config.inner) * config.inner, padded_length(kernel, length)
    packed = torch.empty((3 * rows, padded), dtype=w_down.dtype, device=w_down.device)
    gate_up, down = _unit_stride(w_gate_up), _unit_stride(w_down)
    _pack_kernel[ceil_div(rows, 16), 3](
        gate_up, down, packed, inner, rows, gate_up.stride(0), down.stride(0),
        LENGTH=length, PADDED=padded, BLOCK=padded_length("mixer_backward_w", length), INNER=config.inner,
        MATH=_math(w_down.dtype) if kernel == "mixer_forward" else "plain",
    )  # fmt: skip
    return packed


def _launch_forward(x: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    """Launches the forward; returns y and, if `save`, the norm's scale (B, d)."""
    batch, _, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = torch.empty((batch, width) if save else (0,), dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        config, options = _configuration("mixer_forward", x)
        with device_of(x):
            packed = _pack("mixer_forward", config, w_gate_up, w_down)
            _mixer_forward_kernel[(batch * ceil_div(width, config.channels),)](
                x.contiguous(), packed, out, scale, packed.shape[0] // 3, eps, SAVE=save, **options
            )
    return out, scale


_mixer_forward = torch.library.custom_op("hrm::token_mixer", _launch_forward, mutates_args=())


@_mixer_forward.register_fake
def _(x, w_gate_up, w_down, eps, save):
    shape = (x.shape[0], x.shape[2]) if save else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _launch_backward(
    grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, out: Tensor, scale: Tensor, eps: float, grad_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w_gate_up and w_down; the last two are empty unless `grad_w`."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    empty = x.new_empty(0), x.new_empty(0)
    if x.numel() == 0:
        return grad_x, *((torch.zeros_like(w_gate_up), torch.zeros_like(w_down)) if grad_w else empty)
    batch, _, width = x.shape
    config, options = _configuration("mixer_backward_x", x)
    x, grad_v = x.contiguous(), torch.empty_like(grad_x)
    with device_of(x):
        packed = _pack("mixer_backward_x", config, w_gate_up, w_down)
        _mixer_backward_x_kernel[(batch * ceil_div(width, config.channels),)](
            grad.contiguous(), x, out, scale, packed, grad_v, grad_x, packed.shape[0] // 3, eps, **options
        )
        if not grad_w:
            return grad_x, *empty
        return grad_x, *_weight_gradients(x, grad_v, w_gate_up, w_down)


def _weight_gradients(x: Tensor, grad_v: Tensor, w_gate_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, width = x.shape
    inner = w_down.shape[1]
    config, options = _configuration("mixer_backward_w", x)
    packed = _pack("mixer_backward_w", config, w_gate_up, w_down)
    rows, padded = packed.shape[0] // 3, packed.shape[1]
    tiles = batch * ceil_div(width, config.channels)
    chunks = rows // config.inner
    shares = max(1, min(tiles, multiprocessors(x.device) * config.programs // chunks))
    partial = torch.empty((shares, padded, 3 * rows), dtype=torch.float32, device=x.device)
    _mixer_backward_w_kernel[chunks, shares](x, grad_v, packed, partial, tiles, rows, **options)
    # one fixed order of summation: the same gradients every time
    summed = partial.sum(0)[:length].to(x.dtype)
    both = summed[:, : 2 * rows].view(length, chunks, 2, config.inner).permute(2, 1, 3, 0).reshape(2, rows, length)
    return both[:, :inner].reshape(2 * inner, length), summed[:, 2 * rows : 2 * rows + inner].contiguous()


_mixer_backward = torch.library.custom_op("hrm::token_mixer_backward", _launch_backward, mutates_args=())


@_mixer_backward.register_fake
def _(grad, x, w_gate_up, w_down, out, scale, eps, grad_w):
    shapes = (w_gate_up.shape, w_down.shape) if grad_w else ((0,), (0,))
    return x.new_empty(x.shape), *(x.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.eps = inputs[3]
    ctx.save_for_backward(*inputs[:3], *output)


def _gradients(launch, ctx, grad):
    """Gradients of the arguments of `_launch_forward`; `launch` is `_launch_backward` or the operation made of it."""
    if grad is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:3]
    gradients = launch(grad, *ctx.saved_tensors, ctx.eps, needs[1] or needs[2])
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None


_mixer_forward.register_autograd(
    lambda ctx, grad, _: _gradients(_mixer_backward, ctx, grad), setup_context=_setup_context
)


class _TokenMixer(torch.autograd.Function):
    """What eager calls use: an operation of torch.library, which torch.compile needs, costs them 0.1 ms a call."""

    forward = staticmethod(_launch_forward)
    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _grad_scale):
        return _gradients(_launch_backward, ctx, grad)


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
    if choose("token_mixer", backend, x.device, dtype=x.dtype, unfit=_too_long(x)) == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return token_mixer_reference(x, w_gate_up, w_down, eps=eps)
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_gate_up, w_down))
    run = _mixer_forward if torch.compiler.is_compiling() else _TokenMixer.apply if graph else _launch_forward
    return run(x, w_gate_up, w_down, eps, graph)[0]


def _too_long(x: Tensor) -> str | None:
    """Why the kernels cannot take so many positions; None where they can."""
    if x.shape[1] <= MAX_LENGTH:
        return None
    return f"{x.shape[1]} positions are above {MAX_LENGTH}, the most whose tile fits one block of an sm_86"


def _check(x: Tensor, w_gate_up: Tensor, w_down: Tensor, eps: float) -> None:
    name = "token_mixer"
    check_tensors(name, "x", {"x": x, "w_gate_up": w_gate_up, "w_down": w_down})
    if x.dim() != 3:
        fail(name, "x.shape", shape(x), "(B, L, d)")
    length = x.shape[1]
    inner = w_gate_up.shape[0] // 2 if w_gate_up.dim() == 2 else 0
    if inner < 1 or tuple(w_gate_up.shape) != (2 * inner, length):
        fail(name, "w_gate_up.shape", shape(w_gate_up), f"(2*I, {length}), I >= 1 rows of the gate and of up over L")
    check_shape(name, "w_down", w_down, (length, inner), "x's positions and half the rows of w_gate_up")
    check_eps(name, eps)
