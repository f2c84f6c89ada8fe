"""The SwiGLU MLP with its residual norm at the sizes of the puzzle models, in training; forward it is its two parts."""

from functools import partial

import pytest
from measurement import DEVICE, DTYPE, ON_GPU, VARIANTS, Case, count
from parity import assert_parity, mlp_tensors

from hrm_kernels import swiglu_block

WIDTH, INNER = (512, 1536) if ON_GPU else (64, 192)
SHAPES = ((768, 81), (768, 97), (64, 900)) if ON_GPU else ((4, 81),)  # sequences and their tokens


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_swiglu_block(shape, variant, measure):
    tensors = mlp_tensors(*shape, width=WIDTH, inner=INNER, dtype=DTYPE, device=DEVICE)
    wrt = [t.requires_grad_() for t in tensors.values()]
    tokens = shape[0] * shape[1]
    # as swiglu_mlp (bench_swiglu_mlp.py), and the norm's rows (bench_residual_norm.py)
    elements = tokens * (12 * WIDTH + 14 * INNER) + 9 * WIDTH * INNER
    measure(
        variant,
        Case(
            "swiglu_block",
            f"{count(tokens)}, forward+backward",
            tokens,
            lambda backend: partial(swiglu_block, *tensors.values(), backend=backend),
            lambda: assert_parity(swiglu_block, tensors),
            wrt,
            flops=9 * 2 * tokens * WIDTH * INNER,
            bytes=DTYPE.itemsize * elements + 8 * tokens,
        ),
    )
