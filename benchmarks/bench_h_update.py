"""The H update: one step of the slow state, forward and with its backward."""

import pytest
from measurement import DEVICE, DTYPE, HEAD_SIZE, TOKENS, VARIANTS, Case, count
from measurement import WIDTH as FAST_WIDTH
from parity import assert_parity, h_tensors

from hrm_kernels import h_update

WIDTH = 2 * FAST_WIDTH


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_h_update(backward, tokens, variant, measure):
    tensors = h_tensors(tokens, heads=WIDTH // HEAD_SIZE, size=HEAD_SIZE, dtype=DTYPE, device=DEVICE)
    wrt = [t.requires_grad_() for t in tensors.values()] if backward else []

    def call(backend: str):
        return lambda: h_update(*tensors.values(), backend=backend)

    product = 2 * tokens * WIDTH * HEAD_SIZE  # three forward; backward: the same again, and six for the gradients
    rows = 5 + (9 if backward else 0)  # z, p, q, r in and z out; backward: these four and the gradient in, four out
    weights = 3 * WIDTH * HEAD_SIZE * (3 if backward else 1)
    measure(
        variant,
        Case(
            "h_update",
            f"{count(tokens)}, forward" + (" + backward" if backward else ""),
            tokens,
            call,
            lambda: assert_parity(h_update, tensors),
            wrt,
            flops=product * (12 if backward else 3),
            bytes=DTYPE.itemsize * (rows * tokens * WIDTH + weights),
        ),
    )
