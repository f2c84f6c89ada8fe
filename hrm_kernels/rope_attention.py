"""Attention of the puzzle blocks: rotary positions, every token sees every other.

Equation (per sequence and head; [q, k, v] = qkv; x1, x2 are the halves of a head's columns):

    rotate(x) = x * cos + [-x2, x1] * sin            in float32, then in the dtype of qkv
    out = softmax(rotate(q) rotate(k)^T / sqrt(D)) v
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_kernels._backend import choose
from hrm_kernels._checks import autocast, check_shape, check_tensors, fail, shape

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
    choose("rope_attention", backend, qkv.device, None, qkv.dtype)
    with torch.autocast(qkv.device.type, enabled=False):
        return rope_attention_reference(qkv, cos, sin, heads=heads)


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
