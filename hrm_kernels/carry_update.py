"""Carry update: the bookkeeping between two segments, without graph.

Equation (per row, a sequence or a token):

    state    = init where halted, else new
    steps'   = 0    where halted, else steps + 1
    residual = 0    where halted, else ||new - old|| / max(||old||, eps)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_kernels._backend import choose
from hrm_kernels._checks import check_eps, check_shape, check_tensors, fail, shape
from hrm_kernels._triton import ceil_div, device_of, jit, multiprocessors, tl

# ---------------------------------------------------------------------------------------------------- reference


def carry_update_reference(
    halted: Tensor,  # (rows,) bool
    steps: Tensor,  # (rows,) int32
    old: Tensor,  # (rows, ..., d)
    new: Tensor,  # (rows, ..., d)
    init: Tensor,  # (d,)
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `carry_update`, in plain PyTorch; also takes float64."""
    rows = halted.view(-1, *[1] * (old.dim() - 1))
    state = torch.where(rows, init, new)
    wide_old, wide_new = (t if t.dtype == torch.float64 else t.float() for t in (old, new))
    change = torch.linalg.vector_norm((wide_new - wide_old).flatten(1), dim=1)
    residual = change / torch.linalg.vector_norm(wide_old.flatten(1), dim=1).clamp_min(eps)
    return state, torch.where(halted, 0, steps + 1).to(steps.dtype), residual.masked_fill(halted, 0.0)


# ---------------------------------------------------------------------------------------------------- Triton kernels

CARRY_BLOCKS = (512, 2048, 4096)  # elements that a program loads at a time
FINISH_BLOCK, FINISH_WARPS = 256, 2
CHUNK = 2 * CARRY_BLOCKS[-1]  # elements of a row that one program handles; longer rows are shared among programs


def carry_warps(block: int) -> int:
    """Warps for a block: four 16-byte loads in flight a thread and bfloat16 tensor, and many programs side by side,
    which hides that a row's flag is read before its values."""
    return max(1, block // 1024)


@jit
def _carry_kernel(
    halted_ptr, steps_ptr, old_ptr, new_ptr, init_ptr, state_ptr, new_steps_ptr, residual_ptr, partial_ptr,
    size, width, old_stride, new_stride, state_stride, parts, chunk, eps,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one row; `chunk` is a multiple of BLOCK. WHOLE: the chunk is the row, so its residual is done here;
    else sums go to `partial`."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    halted = tl.load(halted_ptr + row)
    first = part.to(tl.int64) * chunk
    last = tl.minimum(first + chunk, size)
    index = tl.arange(0, BLOCK)
    changes = tl.zeros((BLOCK,), tl.float32)
    norms = tl.zeros((BLOCK,), tl.float32)
    state = state_ptr + row * state_stride
    if halted:  # the row's old and new values are not even read
        for start in range(first, last, BLOCK):
            offsets = start + index
            init = tl.load(init_ptr + offsets % width, mask=offsets < size, other=0.0)
            tl.store(state + offsets, init, mask=offsets < size)
    else:
        for start in range(first, last, BLOCK):
            offsets = start + index
            mask = offsets < size  # against the size, whose divisibility is known: the loads stay 16 bytes wide
            old = tl.load(old_ptr + row * old_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            new = tl.load(new_ptr + row * new_stride + offsets, mask=mask, other=0.0)
            tl.store(state + offsets, new, mask=mask)
            change = new.to(tl.float32) - old
            changes += change * change
            norms += old * old
    change = tl.sum(changes, 0)
    norm = tl.sum(norms, 0)
    if WHOLE:
        _finish_row(row, halted, change, norm, steps_ptr, new_steps_ptr, residual_ptr, eps)
    else:
        sums = partial_ptr + (row * parts + part) * 2
        tl.store(sums, change)
        tl.store(sums + 1, norm)


@jit
def _finish_row(row, halted, change, norm, steps_ptr, new_steps_ptr, residual_ptr, eps):
    residual = tl.sqrt_rn(change) / tl.maximum(tl.sqrt_rn(norm), eps)
    tl.store(residual_ptr + row, tl.where(halted, 0.0, residual))
    tl.store(new_steps_ptr + row, tl.where(halted, 0, tl.load(steps_ptr + row) + 1))


@jit(do_not_specialize=["parts"])
def _finish_kernel(halted_ptr, steps_ptr, partial_ptr, new_steps_ptr, residual_ptr, parts, eps, BLOCK: tl.constexpr):
    """Adds the chunks' sums of one row, in one fixed order."""
    row = tl.program_id(0).to(tl.int64)
    changes = tl.zeros((BLOCK,), tl.float32)
    norms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        index = start + tl.arange(0, BLOCK)
        sums = partial_ptr + (row * parts + index) * 2
        changes += tl.load(sums, mask=index < parts, other=0.0)
        norms += tl.load(sums + 1, mask=index < parts, other=0.0)
    halted = tl.load(halted_ptr + row)
    _finish_row(row, halted, tl.sum(changes, 0), tl.sum(norms, 0), steps_ptr, new_steps_ptr, residual_ptr, eps)


# ---------------------------------------------------------------------------------------------------- registration


def _flat(tensor: Tensor) -> Tensor:
    """(rows, ..., d) as (rows, size) with unit stride inside a row, without a copy where the strides allow."""
    flat = tensor.flatten(1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _launch(
    halted: Tensor, steps: Tensor, old: Tensor, new: Tensor, init: Tensor, state: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Writes `state`, which may be `old` or `new`, and returns steps' and residual."""
    rows, width = old.shape[0], old.shape[-1]
    new_steps = torch.empty_like(steps)
    residual = torch.empty(rows, dtype=torch.float32, device=old.device)
    if old.numel() == 0:
        new_steps.copy_(torch.where(halted, 0, steps + 1))
        return new_steps, residual.zero_()
    old, new, flat = _flat(old), _flat(new), state.flatten(1)
    size = flat.shape[1]
    parts = ceil_div(size, CHUNK) if rows < 4 * multiprocessors(old.device) else 1  # enough rows fill the device
    block = next((b for b in CARRY_BLOCKS if b >= size), CARRY_BLOCKS[-1])
    chunk = ceil_div(ceil_div(size, parts), block) * block
    partial = torch.empty((rows, parts, 2) if parts > 1 else (0,), dtype=torch.float32, device=old.device)
    halted, steps, init = halted.contiguous(), steps.contiguous(), init.contiguous()
    with device_of(old):
        _carry_kernel[(rows * parts,)](
            halted, steps, old, new, init, flat, new_steps, residual, partial,
            size, width, old.stride(0), new.stride(0), flat.stride(0), parts, chunk, eps,
            WHOLE=parts == 1, BLOCK=block, num_warps=carry_warps(block),
        )  # fmt: skip
        if parts > 1:
            _finish_kernel[(rows,)](
                halted, steps, partial, new_steps, residual, parts, eps,
                BLOCK=FINISH_BLOCK, num_warps=FINISH_WARPS,
            )  # fmt: skip
    return new_steps, residual


@torch.library.custom_op("hrm::carry_update", mutates_args=())
def _carry(
    halted: Tensor, steps: Tensor, old: Tensor, new: Tensor, init: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.empty(old.shape, dtype=old.dtype, device=old.device)
    return state, *_launch(halted, steps, old, new, init, state, eps)


@torch.library.custom_op("hrm::carry_update_out", mutates_args=("out",))
def _carry_out(
    halted: Tensor, steps: Tensor, old: Tensor, new: Tensor, init: Tensor, out: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(halted, steps, old, new, init, out, eps)


@torch.library.custom_op("hrm::carry_update_over_old", mutates_args=("old",))
def _carry_over_old(
    halted: Tensor, steps: Tensor, old: Tensor, new: Tensor, init: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(halted, steps, old, new, init, old, eps)


@torch.library.custom_op("hrm::carry_update_over_new", mutates_args=("new",))
def _carry_over_new(
    halted: Tensor, steps: Tensor, old: Tensor, new: Tensor, init: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(halted, steps, old, new, init, new, eps)


@_carry.register_fake
def _(halted, steps, old, new, init, eps):
    return old.new_empty(old.shape), torch.empty_like(steps), steps.new_empty(steps.shape, dtype=torch.float32)


def _fake_counts(halted, steps, old, new, init, *_):
    return torch.empty_like(steps), steps.new_empty(steps.shape, dtype=torch.float32)


for _op in (_carry_out, _carry_over_old, _carry_over_new):
    _op.register_fake(_fake_counts)


# ---------------------------------------------------------------------------------------------------- public function


def carry_update(
    halted: Tensor,
    steps: Tensor,
    old: Tensor,
    new: Tensor,
    init: Tensor,
    *,
    out: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Restarts, keeps and counts the rows of a carry and measures how far each moved, in one pass over `old` and `new`.

    Source: the ACT bookkeeping of arXiv 2506.21734, section 2 ("Adaptive computation time"): halted rows start afresh,
    all others go on with a detached state.

    Args:
        halted: (rows,) bool; rows that start afresh.
        steps: (rows,) int32; segments that each row has run.
        old, new: (rows, ..., d) state before and after a segment; same shape, dtype and device.
        init: (d,) the initial state, same dtype.
        out: where `state` is written: a contiguous tensor like `old`, or `old` or `new` themselves; None allocates.
        eps: lower bound of the norm that `residual` divides by.
        backend: "auto" (Triton on CUDA, else the reference), "triton" or "reference".

    Returns:
        state (rows, ..., d), steps' (rows,) int32, residual (rows,) float32 = ||new - old|| / max(||old||, eps) over
        all but the row dimension, 0 where halted. No result carries a graph.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    _check(halted, steps, old, new, init, out, eps)
    if choose("carry_update", backend, old.device, None, None) == "reference":
        with torch.no_grad():
            state, steps, residual = carry_update_reference(halted, steps, old, new, init, eps=eps)
            return (state if out is None else out.copy_(state)), steps, residual
    # results carry no graph, and a custom operation has no gradient unless one is registered
    over_old, over_new = out is old, out is new
    halted, steps, old, new, init = (tensor.detach() for tensor in (halted, steps, old, new, init))
    if not torch.compiler.is_compiling():  # the operations below cost an eager call 0.1 ms
        state = torch.empty(old.shape, dtype=old.dtype, device=old.device) if out is None else out
        counts = _launch(halted, steps, old, new, init, state.detach(), eps)
        if out is not None:
            torch.autograd.graph.increment_version(out)  # a kernel writes behind autograd's back
        return state, *counts
    if out is None:
        return _carry(halted, steps, old, new, init, eps)
    # an operation may not take one tensor twice and write it, so each way to be in place has its own
    if over_old:
        return out, *_carry_over_old(halted, steps, old, new, init, eps)
    if over_new:
        return out, *_carry_over_new(halted, steps, old, new, init, eps)
    return out, *_carry_out(halted, steps, old, new, init, out.detach(), eps)


def _check(halted, steps, old, new, init, out, eps: float) -> None:
    name = "carry_update"
    check_tensors(name, "old", {"old": old, "new": new, "init": init} | ({} if out is None else {"out": out}))
    if old.dim() < 2:
        fail(name, "old.shape", shape(old), "(rows, ..., d)")
    check_shape(name, "new", new, tuple(old.shape), "the shape of old")
    check_shape(name, "init", init, (old.shape[-1],), "the last size of old")
    if out is not None:
        check_shape(name, "out", out, tuple(old.shape), "the shape of old")
        if out.numel() and not (out[0].is_contiguous() and (out.shape[0] == 1 or out.stride(0) >= out[0].numel())):
            fail(name, "out.stride()", out.stride(), "that of contiguous rows which do not overlap")
    for argument, tensor, dtype in (("halted", halted, torch.bool), ("steps", steps, torch.int32)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} is {type(tensor).__name__}; it should be a torch.Tensor")
        check_shape(name, argument, tensor, (old.shape[0],), "one entry a row")
        if tensor.dtype != dtype:
            fail(name, f"{argument}.dtype", tensor.dtype, str(dtype))
        if tensor.device != old.device:
            fail(name, f"{argument}.device", tensor.device, f"{old.device}, the device of old")
    check_eps(name, eps)
