"""The SwiGLU MLP at the sizes of the puzzle models: forward without graph, and training with and without recompute."""

from functools import partial

import pytest
from measurement import DEVICE, DTYPE, ON_GPU, VARIANTS, Case, count
from parity import assert_parity, mlp_tensors

from hrm_kernels import swiglu_mlp

WIDTH, INNER = (512, 1536) if ON_GPU else (64, 192)
SHAPES = ((768, 81), (768, 97), (64, 900)) if ON_GPU else ((4, 81),)  # sequences and their tokens
MODES = ("forward", "forward+backward", "forward+backward, recompute")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("mode", MODES)
def test_swiglu_mlp(mode, shape, variant, measure):
    tensors = mlp_tensors(*shape, width=WIDTH, inner=INNER, dtype=DTYPE, device=DEVICE)
    wrt = [] if mode == "forward" else [t.requires_grad_() for t in tensors.values()]
    recompute = "recompute" in mode
    tokens = shape[0] * shape[1]

    def call(backend: str):
        return partial(swiglu_mlp, *tensors.values(), recompute=recompute, backend=backend)

    product = 2 * tokens * WIDTH * INNER  # three forward, six backward, two recomputed
    weights = 3 * WIDTH * INNER * (3 if wrt else 1)
    # x in, out, the activation out and in; backward: the gradient in, twice, x in, its gradient out, gate and up and
    # their gradients out and in, the activation and its gradient out and in
    elements = tokens * ((2 + (4 if wrt else 0)) * WIDTH + (2 + (12 if wrt else 0)) * INNER)
    measure(
        variant,
        Case(
            "swiglu_mlp",
            f"{count(tokens)}, {mode}",
            tokens,
            call,
            lambda: assert_parity(swiglu_mlp, tensors, wrt=tensors if wrt else ()),
            wrt,
            flops=product * ((9 if wrt else 3) + (2 if recompute and variant.startswith("fused") else 0)),
            bytes=DTYPE.itemsize * (elements + weights),
        ),
    )
