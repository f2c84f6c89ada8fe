"""The L recurrence: T steps of the fast state, forward, and with the backward of 1 or of all T steps."""

import pytest
from measurement import DEVICE, DTYPE, HEAD_SIZE, TOKENS, VARIANTS, WIDTH, Case, count
from parity import assert_parity, l_tensors

from hrm_kernels import l_recurrence

STEPS = 8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_forward(tokens, variant, measure):
    measure(variant, make_case(tokens, grad_steps=None))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("grad_steps", [1, STEPS])
def test_forward_and_backward(grad_steps, tokens, variant, measure):
    measure(variant, make_case(tokens, grad_steps))


def make_case(tokens: int, grad_steps: int | None) -> Case:
    """`grad_steps` None: forward only."""
    tensors = l_tensors(tokens, heads=WIDTH // HEAD_SIZE, size=HEAD_SIZE, dtype=DTYPE, device=DEVICE)
    options = {"steps": STEPS, "grad_steps": grad_steps or 1}
    wrt = []
    if grad_steps is not None:
        wrt = [t.requires_grad_() for name, t in tensors.items() if name != "z" or grad_steps == STEPS]

    def call(backend: str):
        return lambda: l_recurrence(*tensors.values(), **options, backend=backend)

    return Case(
        "l_recurrence",
        f"{count(tokens)}, " + ("forward" if grad_steps is None else f"forward + backward of {grad_steps} steps"),
        tokens,
        call,
        lambda: assert_parity(l_recurrence, tensors, **options),
        wrt,
        flops=_flops(tokens, grad_steps),
        bytes=_bytes(tokens, grad_steps),
    )


def _flops(tokens: int, grad_steps: int | None) -> float:
    """Three D x D products a step; its backward recomputes them and takes six more, less two where z needs none."""
    product = 2 * tokens * WIDTH * HEAD_SIZE
    backward = 0 if grad_steps is None else 9 * grad_steps - (2 if grad_steps < STEPS else 0)
    return product * (3 * STEPS + backward)


def _bytes(tokens: int, grad_steps: int | None) -> float:
    """State, two halves of context, new state; backward: saved state, context and gradient in, gradients out."""
    rows = 4
    if grad_steps is not None:
        rows += 7  # the seventh: the state saved in between, or where all steps carry gradient the one of z
    weights = 3 * WIDTH * HEAD_SIZE * (1 if grad_steps is None else 3)
    return DTYPE.itemsize * (rows * tokens * WIDTH + weights)
