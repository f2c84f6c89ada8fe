"""The carry between segments: restart, keep, count and measure, per token and per sequence, fresh and in place."""

import pytest
import torch
from measurement import DEVICE, DTYPE, TOKENS, VARIANTS, WIDTH, Case, count
from parity import assert_as_exact_as_eager, carry_tensors

from hrm_kernels import carry_update, carry_update_reference


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rows", ["token", "sequence"])
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in-place"])
def test_carry_update(in_place, rows, tokens, variant, measure):
    shape = (tokens,) if rows == "token" else (8, tokens // 8)
    if 0 in shape:
        pytest.skip("fewer tokens than sequences")
    tensors = carry_tensors(*shape, width=WIDTH, dtype=DTYPE, device=DEVICE)
    out = tensors["new"] if in_place else None

    def call(backend: str):
        return lambda: carry_update(*tensors.values(), out=out, backend=backend)[0]

    measure(
        variant,
        Case(
            "carry_update",
            f"{count(tokens)}, a row is a {rows}, " + ("in place" if in_place else "fresh"),
            tokens,
            call,
            lambda: check(tensors),
            bytes=DTYPE.itemsize * WIDTH * tokens * 3,  # old and new in, the state out
        ),
    )


def check(tensors: dict[str, torch.Tensor]) -> None:
    wide = [t.double() if t.is_floating_point() else t for t in tensors.values()]
    exact = carry_update_reference(*wide)
    fused, eager = (carry_update(*tensors.values(), backend=backend) for backend in ("triton", "reference"))
    assert torch.equal(fused[0], eager[0])
    assert torch.equal(fused[1], eager[1])
    assert_as_exact_as_eager("residual", fused[2], eager[2], exact[2])
