"""The residual norm at the sizes of the puzzle models, forward and with its backward."""

import pytest
import torch
from measurement import DEVICE, DTYPE, ON_GPU, VARIANTS, Case, count
from parity import assert_parity

from hrm_kernels import residual_norm

WIDTH = 512 if ON_GPU else 128
SHAPES = ((768, 81), (768, 97), (64, 900)) if ON_GPU else ((4, 81),)  # sequences and their tokens


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_residual_norm(backward, shape, variant, measure):
    tensors = {name: torch.randn(*shape, WIDTH, device=DEVICE).to(DTYPE) for name in ("x", "update")}
    wrt = [t.requires_grad_() for t in tensors.values()] if backward else []
    tokens = shape[0] * shape[1]

    def call(backend: str):
        return lambda: residual_norm(*tensors.values(), backend=backend)

    rows = 3 + (3 if backward else 0)  # x and update in, y out; backward: gradient and y in, one gradient out
    measure(
        variant,
        Case(
            "residual_norm",
            f"{count(tokens)}, forward" + (" + backward" if backward else ""),
            tokens,
            call,
            lambda: assert_parity(residual_norm, tensors),
            wrt,
            bytes=DTYPE.itemsize * rows * tokens * WIDTH + (8 * tokens if backward else 0),
        ),
    )
