"""Rotary attention at the sizes of the puzzle models: short sequences in one kernel, long ones around PyTorch's."""

import pytest
import torch
from measurement import DEVICE, DTYPE, ON_GPU, VARIANTS, Case, count
from parity import REFERENCES, assert_parity

from hrm_kernels import rope_attention, rope_attention_reference

HEADS, SIZE = (8, 64) if ON_GPU else (2, 32)
SHAPES = ((768, 81), (768, 97), (64, 900)) if ON_GPU else ((4, 81),)  # sequences and their tokens


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_rope_attention(backward, shape, variant, measure):
    batch, length = shape
    qkv = torch.randn(batch, length, 3 * HEADS * SIZE, device=DEVICE).to(DTYPE)
    angles = torch.arange(length)[:, None] * 10000 ** -(torch.arange(0, SIZE, 2) / SIZE).repeat(2)
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    wrt = [qkv.requires_grad_()] if backward else []

    def op(qkv: torch.Tensor, **options) -> torch.Tensor:
        return rope_attention(qkv, cos, sin, heads=HEADS, **options)

    def check() -> None:
        few = qkv.detach()[:8]  # the float64 run keeps every score
        REFERENCES[op] = lambda x: rope_attention_reference(x, cos.double(), sin.double(), heads=HEADS)
        assert_parity(op, {"qkv": few}, wrt=("qkv",) if backward else (), cotangent=torch.randn_like(op(few)))

    tokens = batch * length
    measure(
        variant,
        Case(
            "rope_attention",
            f"{batch} sequences of {count(length)}, forward" + (" + backward" if backward else ""),
            tokens,
            lambda backend: lambda: op(qkv, backend=backend),
            check,
            wrt,
            flops=2 * tokens * length * HEADS * SIZE * (7 if backward else 2),  # two products forward, five backward
            # q, k, v in, out; backward: these three and the gradient in, three out
            bytes=DTYPE.itemsize * (4 + (7 if backward else 0)) * tokens * HEADS * SIZE,
        ),
    )
