"""The MLP with its residual norm: its numbers against float64, its one backward, and how the function behaves."""

import re

import pytest
import torch
from parity import (
    DTYPES,
    LAYOUTS,
    assert_compiles_into_one_graph,
    assert_cuda_graph_replays,
    assert_parity,
    bytes_saved_for_backward,
    mlp_tensors,
    operations_of_backward,
)

from hrm_kernels import (
    BackendError,
    residual_norm_reference,
    swiglu_block,
    swiglu_block_reference,
    swiglu_mlp_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("x", "w_gate_up", "w_down")


def test_reference_is_the_norm_of_the_residual_sum():
    x, w_gate_up, w_down = mlp_tensors(3, dtype=torch.float64).values()
    expected = residual_norm_reference(x, swiglu_mlp_reference(x, w_gate_up, w_down), eps=0.1)
    assert torch.equal(swiglu_block_reference(x, w_gate_up, w_down, eps=0.1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 16, 8), (17, 7, 5), (5, 64, 520)])
@pytest.mark.parametrize("wrt", [NAMES, ()], ids=["training", "inference"])
def test_parity(wrt, tokens, width, inner, dtype, device):
    tensors = mlp_tensors(tokens, width=width, inner=inner, dtype=dtype, device=device)
    assert_parity(swiglu_block, tensors, wrt=wrt)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_at_the_size_of_a_batch(dtype, device):
    assert_parity(swiglu_block, mlp_tensors(64, 97, width=512, inner=1536, dtype=dtype, device=device))


@pytest.mark.parametrize("wrt", [("x",), ("w_gate_up",), ("w_down",), ("x", "w_down")], ids="+".join)
def test_gradients_of_a_subset(wrt, device):
    assert_parity(swiglu_block, mlp_tensors(5, device=device), wrt=wrt)


@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3)])
def test_leading_dimensions(lead, device):
    assert_parity(swiglu_block, mlp_tensors(*lead, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_rows(layout, device):
    tensors = mlp_tensors(4, 6, device=device)
    tensors["x"] = LAYOUTS[layout](tensors["x"])
    assert_parity(swiglu_block, tensors)


@pytest.mark.parametrize("layout", ["transposed", "strided last", "expanded last"])
def test_layouts_of_the_weights_and_the_cotangent(layout, device):
    tensors = mlp_tensors(4, 6, device=device)
    for name in ("w_gate_up", "w_down"):
        tensors[name] = LAYOUTS[layout](tensors[name])
    assert_parity(swiglu_block, tensors, cotangent=LAYOUTS[layout](torch.randn_like(tensors["x"])))


def test_eps_is_the_norms(device):
    assert_parity(swiglu_block, mlp_tensors(5, device=device), eps=0.5)


def test_the_gradients_of_x_are_added_inside_the_product(device):
    leaves = [t.requires_grad_() for t in mlp_tensors(5, device=device).values()]
    names = operations_of_backward(swiglu_block(*leaves, backend="triton"), leaves)
    assert "aten::addmm_" in names
    assert not any("zero" in name or name.startswith("aten::add.") for name in names)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_for_the_backward(recompute, device):
    leaves = [t.requires_grad_() for t in mlp_tensors(9, device=device).values()]
    kept = bytes_saved_for_backward(lambda: swiglu_block(*leaves, recompute=recompute, backend="triton"))
    result_and_scale = 9 * (32 + 1) * 4
    assert kept <= sum(t.nbytes for t in leaves) + result_and_scale + (0 if recompute else 9 * 48 * 4)


def test_recompute_gives_the_same_numbers(device):
    leaves = [t.requires_grad_() for t in mlp_tensors(9, device=device).values()]
    kept, recomputed = (swiglu_block(*leaves, recompute=r, backend="triton") for r in (False, True))
    assert torch.equal(kept, recomputed)
    cotangent = torch.randn_like(kept)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, cotangent) for out in (kept, recomputed)), strict=True):
        assert torch.equal(ours, theirs)


def test_backward_through_a_retained_graph_twice_gives_the_same(device):
    leaves = [t.requires_grad_() for t in mlp_tensors(5, device=device).values()]
    out = swiglu_block(*leaves, backend="triton")
    cotangent = torch.randn_like(out)
    before = cotangent.clone()
    first = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, leaves, cotangent), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(cotangent, before)


def test_a_result_changed_in_place_is_an_error_and_not_a_wrong_gradient(device):
    leaves = [t.requires_grad_() for t in mlp_tensors(5, device=device).values()]
    out = swiglu_block(*leaves, backend="triton")
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_batch(backend, device):
    leaves = [t.requires_grad_() for t in mlp_tensors(2, 0, device=device).values()]
    out = swiglu_block(*leaves, backend=backend)
    assert out.shape == (2, 0, 32)
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and gradient.count_nonzero() == 0


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_runs_the_whole_operation_in_its_dtype(backend, device):
    tensors = mlp_tensors(9, device=device)
    expected = swiglu_block(*(t.half() for t in tensors.values()), backend=backend)
    leaves = [t.requires_grad_() for t in tensors.values()]
    with torch.autocast(device.type, torch.float16):
        out = swiglu_block(*leaves, backend=backend)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("wrt", [NAMES, ()], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend, wrt, device):
    def call(*args):
        return swiglu_block(*args, backend=backend) * 2

    assert_compiles_into_one_graph(call, mlp_tensors(9, device=device), wrt=wrt)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs(device):
    leaves = mlp_tensors(33, width=512, inner=1536, dtype=torch.bfloat16, device=device)
    leaves = [t.requires_grad_() for t in leaves.values()]

    def step() -> list[torch.Tensor]:
        out = swiglu_block(*leaves, backend="triton")
        with torch.no_grad():
            inference = swiglu_block(*leaves, backend="triton")
        return [out, inference, *torch.autograd.grad(out.sum(), leaves)]

    assert_cuda_graph_replays(step, changing=leaves[0])


def test_rows_wider_than_the_norms_kernels_take_the_reference(device):
    tensors = mlp_tensors(1, width=4097, inner=1, device=device)
    torch.testing.assert_close(swiglu_block(*tensors.values()), swiglu_block_reference(*tensors.values()))
    with pytest.raises(BackendError, match=r"swiglu_block: .*rows of 4097 are above 4096"):
        swiglu_block(*tensors.values(), backend="triton")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": lambda t: t[0, 0]}, {}, "x.shape is (); it should be (..., d) with d above 0"),
        ({"w_down": lambda t: t[:, :20]}, {}, "w_down.shape is (32, 20); it should be (32, 24), the width of x and"),
        ({"w_down": torch.Tensor.half}, {}, "w_down.dtype is torch.float16; it should be torch.float32"),
        ({}, {"eps": 0.0}, "eps is 0.0; it should be above 0"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it should be one of 'auto', 'triton', 'reference'"),
    ],
)
def test_errors_name_the_argument(change, options, message, device):
    tensors = mlp_tensors(5, device=device)
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    with pytest.raises(ValueError, match=re.escape("swiglu_block: " + message)):
        swiglu_block(*tensors.values(), **options)
