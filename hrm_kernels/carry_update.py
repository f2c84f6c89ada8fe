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
        state (rows, ..., d), steps' (rows,) int32, residual (rows,) float32 = ||new - old|| / max(||old||, eps) over all
        but the row dimension, 0 where halted. No result carries a graph.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        BackendError: `backend="triton"` where it cannot run.
    """
    _check(halted, steps, old, new, init, out, eps)
    if choose("carry_update", backend, old.device, None, None) == "reference":
        with torch.no_grad():
            state, steps, residual = carry_update_reference(halted, steps, old, new, init, eps=eps)
            return (state if out is None else out.copy_(state)), steps, residual
    raise AssertionError


def _check(halted, steps, old, new, init, out, eps: float) -> None:
    name = "carry_update"
    check_tensors(name, "old", {"old": old, "new": new, "init": init} | ({} if out is None else {"out": out}))
    if old.dim() < 2:
        fail(name, "old.shape", shape(old), "(rows, ..., d)")
    check_shape(name, "new", new, tuple(old.shape), "the shape of old")
    check_shape(name, "init", init, (old.shape[-1],), "the last size of old")
    if out is not None:
        check_shape(name, "out", out, tuple(old.shape), "the shape of old")
    for argument, tensor, dtype in (("halted", halted, torch.bool), ("steps", steps, torch.int32)):
        check_shape(name, argument, tensor, (old.shape[0],), "one entry a row")
        if tensor.dtype != dtype:
            fail(name, f"{argument}.dtype", tensor.dtype, str(dtype))
        if tensor.device != old.device:
            fail(name, f"{argument}.device", tensor.device, f"{old.device}, the device of old")
    check_eps(name, eps)
