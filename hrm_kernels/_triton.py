"""What the Triton kernels share: the guarded import, device functions, and the table of launch configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from hrm_kernels._backend import interpreting

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    jit = triton.jit
except ImportError:  # the reference runs without Triton; `choose` never picks the kernels then
    triton = tl = libdevice = None  # type: ignore[assignment]

    def jit(function=None, **_options):  # type: ignore[misc]
        return function if function is not None else jit


# ---------------------------------------------------------------------------------------------------- device functions


# MATH, a compile-time constant of every tiled kernel (`_math`):
#   "plain"  what Triton makes of tl.exp and a division
#   "exact"  float32: correctly rounded division, libdevice's exp, sums added to products instead of products to sums
#   "fast"   one special-function operation instead of two; its error, below 2^-11, is a quarter of bfloat16's rounding


@jit
def sigmoid(x, MATH: tl.constexpr):
    if MATH == "exact":
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + libdevice.exp(-x))
    if MATH == "plain":
        return tl.sigmoid(x)
    half_tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x * 0.5], tl.float32, True, 1)
    return 0.5 + 0.5 * half_tanh


@jit
def halve_for_silu(x, MATH: tl.constexpr):
    """x / 2 (exact) where `silu_times` takes half its gate: the weights and the context of the gate, once a tile."""
    if MATH == "fast":
        return (x.to(tl.float32) * 0.5).to(x.dtype)
    return x


@jit
def silu_times(g, u, MATH: tl.constexpr):
    """silu(g) * u in float32; g comes halved where `halve_for_silu` halves."""
    if MATH == "fast":
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [g], tl.float32, True, 1)
        return (g * tanh + g) * u
    return g * sigmoid(g, MATH) * u


@jit
def dot_add(a, b, c, PRECISION: tl.constexpr, MATH: tl.constexpr):
    """a @ b + c in float32. In float32 arithmetic c is added last: as the accumulator, every product would be rounded
    to c's size. (`fma` with 1, since Triton turns a plain sum back into an accumulator.)"""
    if MATH == "exact":
        return tl.fma(c, 1.0, tl.dot(a, b, input_precision=PRECISION))
    return tl.dot(a, b, c, input_precision=PRECISION)


@jit
def widen(x, beside, MATH: tl.constexpr):
    """x as float32. Where x is bfloat16 and compiled, the conversion is tied to `beside`, a tile of the same shape and
    type that changes with every step: the compiler then neither hoists it out of the loop, so x stays packed, two
    elements a register, nor leaves x in another layout than the product's accumulator."""
    if MATH == "fast":
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r,r", [x, beside], tl.float32, True, 2
        )
    return x.to(tl.float32)


@jit
def rms_scale(y, eps, D: tl.constexpr, MATH: tl.constexpr):
    """1 / sqrt(mean(y^2) + eps) of every row of y (BLOCK_N, BLOCK_D); columns past D are zero."""
    mean = tl.sum(y * y, 1) * (1.0 / D) + eps
    if MATH == "exact":
        return tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean))[:, None]
    return tl.rsqrt(mean)[:, None]


@jit
def tile_offsets(tile, n, stride, first, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Offsets (int64) and mask of rows [tile * BLOCK_N, ...) and columns [first, first + D)."""
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride + (first + columns)[None, :]
    mask = (rows < n)[:, None]
    if BLOCK_D != D:
        mask = mask & (columns < D)[None, :]
    return offsets, mask


@jit
def weight_offsets(matrix, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Offsets and mask of the `matrix`-th (D, D) block of a contiguous weight."""
    index = tl.arange(0, BLOCK_D)
    offsets = matrix * D * D + index[:, None] * D + index[None, :]
    mask = (index < D)[:, None] & (index < D)[None, :]
    return offsets, mask


# ---------------------------------------------------------------------------------------------------- launch table


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: rows of a tile, warps of a program, programs wanted on each multiprocessor, and the
    most registers a thread may take (None: what the compiler likes), where that lets another program in."""

    rows: int
    warps: int
    programs: int
    registers: int | None = None


Entries = dict[tuple[int, str], Config]

# {kernel: {(bytes of an element, "few" or "many" tokens): Config}}, sized for an sm_86 block and its registers
# (docs/compile_table.md). "few": tiles of the "many" entry would leave multiprocessors idle.
TABLE: dict[str, Entries] = {
    "l_forward": {
        (2, "few"): Config(16, 4, 4),
        (2, "many"): Config(64, 4, 32),
        (4, "few"): Config(16, 8, 2),
        (4, "many"): Config(16, 8, 2),
    },
    "l_backward_one": {  # one step carries gradient
        (2, "few"): Config(16, 4, 2),
        (2, "many"): Config(32, 8, 1),
        (4, "few"): Config(16, 8, 1),
        (4, "many"): Config(16, 8, 1),
    },
    "l_backward_many": {
        (2, "few"): Config(16, 4, 2),
        (2, "many"): Config(32, 8, 1),
        (4, "few"): Config(16, 8, 1),
        (4, "many"): Config(16, 8, 1),
    },
    "h_forward": {
        (2, "few"): Config(16, 4, 4),
        (2, "many"): Config(32, 4, 2),
        (4, "few"): Config(16, 8, 2),
        (4, "many"): Config(16, 8, 2),
    },
    "h_backward": {
        (2, "few"): Config(16, 8, 2),
        (2, "many"): Config(16, 8, 2),
        (4, "few"): Config(16, 8, 1),
        (4, "many"): Config(16, 8, 1),
    },
}
# What replaces entries from sm_90 on, whose matrix units want 64 rows a warpgroup
HOPPER: dict[str, Entries] = {
    "l_forward": {(2, "many"): Config(64, 4, 32, 168)},
    "l_backward_one": {(2, "many"): Config(64, 4, 2)},
    "l_backward_many": {(2, "many"): Config(128, 8, 1)},
    "h_forward": {(2, "many"): Config(64, 4, 3)},
    "h_backward": {(2, "few"): Config(16, 4, 2), (2, "many"): Config(32, 4, 2)},
}
_overrides: dict[str, Config] = {}


def override_config(**configs: Config) -> AbstractContextManager[None]:
    """Launches the named kernels (keys of `TABLE`) with other configurations inside the `with` block.

    Raises:
        ValueError: a name is no kernel of the table.
    """
    return overridden("override_config", _overrides, TABLE, configs)


@contextmanager
def overridden(
    function: str, overrides: dict[str, Any], table: Mapping[str, Any], configs: Mapping[str, Any]
) -> Iterator[None]:
    """`configs` among `overrides` inside the `with` block of `function`; their names are those of `table`."""
    for name in configs:
        if name not in table:
            raise ValueError(f"{function}: {name!r} is no kernel; it should be one of {', '.join(table)}")
    previous = dict(overrides)
    overrides.update(configs)
    try:
        yield
    finally:
        overrides.clear()
        overrides.update(previous)


@cache
def multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Launch:
    """The grid of one launch, (heads, programs), and the options that every kernel takes."""

    grid: tuple[int, int]
    options: dict[str, object]


@cache
def entries(kernel: str, capability: tuple[int, int]) -> Entries:
    """The launch table of one kernel on a device of this compute capability."""
    return TABLE[kernel] | (HOPPER.get(kernel, {}) if capability >= (9, 0) else {})


def plan(kernel: str, n: int, heads: int, head_size: int, like: Tensor) -> Launch:
    """Chooses the configuration for `n` tokens of `heads` heads; programs loop over tiles, their weights on chip."""
    exact = torch.get_float32_matmul_precision() == "highest"  # unless the user turned tf32 on
    return _plan(kernel, n, heads, head_size, like.dtype, like.device, _overrides.get(kernel), exact)


@lru_cache(maxsize=4096)  # decoding asks the same again and again
def _plan(
    kernel: str,
    n: int,
    heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    override: Config | None,
    exact: bool,
) -> Launch:
    units = multiprocessors(device)
    table = entries(kernel, _capability(device))
    many = table[dtype.itemsize, "many"]
    enough = ceil_div(n, many.rows) * heads >= units
    config = override or (many if enough else table[dtype.itemsize, "few"])
    programs = max(1, min(ceil_div(n, config.rows), units * config.programs // heads))
    return Launch((heads, programs), kernel_options(config, head_size, dtype, exact))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes 10 microseconds


@cache
def kernel_options(config: Config, head_size: int, dtype: torch.dtype, exact: bool = True) -> dict[str, object]:
    """The compile-time constants and launch options that every tiled kernel takes."""
    return {
        "D": head_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_N": config.rows,
        "PRECISION": "tf32" if dtype == torch.float32 and not exact else "ieee",
        "MATH": _math(dtype),
        "num_warps": config.warps,
        "num_stages": 1,
        "maxnreg": config.registers,
        "enable_fp_fusion": True,  # Triton's default until 3.9
    }


def _math(dtype: torch.dtype) -> str:
    if interpreting() or dtype == torch.float16:
        return "plain"
    return "exact" if dtype == torch.float32 else "fast"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches on the current device, wherever its arguments live."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rows_of(tensor: Tensor) -> Tensor:
    """(..., d) as (rows, d) with unit stride in d, without a copy where the strides allow (expanded rows do)."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
