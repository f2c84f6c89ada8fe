"""The token mixer: the MLP over positions of TRM's puzzle model, forward and with its backward."""

import pytest
import torch
from measurement import DEVICE, DTYPE, ON_GPU, VARIANTS, Case
from parity import REFERENCES, assert_parity

from hrm_kernels.token_mixer import token_mixer, token_mixer_reference

REFERENCES[token_mixer] = token_mixer_reference
BATCH, WIDTH = (768, 512) if ON_GPU else (4, 64)
SHAPES = ((81, 256), (97, 512)) if ON_GPU else ((16, 64),)  # Sudoku's cells; with 16 puzzle tokens and twice the I


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("length", "inner"), SHAPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_token_mixer(backward, length, inner, variant, measure):
    like = {"dtype": DTYPE, "device": DEVICE}
    tensors = {
        "x": torch.randn(BATCH, length, WIDTH, **like),
        "w_gate_up": torch.randn(2 * inner, length, **like) * length**-0.5,
        "w_down": torch.randn(length, inner, **like) * inner**-0.5,
    }
    wrt = [t.requires_grad_() for t in tensors.values()] if backward else []

    def call(backend: str):
        return lambda: token_mixer(*tensors.values(), backend=backend)

    product = 2 * BATCH * WIDTH * length * inner  # three forward; backward: two again, and six for the gradients
    states = 2 + (5 if backward else 0)  # x in and y out; backward: x, y and the gradient in, x's gradient out, x again
    measure(
        variant,
        Case(
            "token_mixer",
            f"{BATCH} x {length} positions, forward" + (" + backward" if backward else ""),
            BATCH * length,
            call,
            lambda: assert_parity(token_mixer, tensors),
            wrt,
            flops=product * (11 if backward else 3),
            bytes=DTYPE.itemsize * (states * BATCH * length * WIDTH + 3 * inner * length * (2 if backward else 1)),
        ),
    )
