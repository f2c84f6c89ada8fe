"""The residual norm: the reference against its equation, the kernels against float64, and how the function behaves."""

import re

import pytest
import torch
from parity import (
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_eager,
    assert_compiles_into_one_graph,
    assert_cuda_graph_replays,
    assert_parity,
    bytes_saved_for_backward,
    operations_of_backward,
)

from hrm_kernels import BackendError, residual_norm, residual_norm_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("x", "update")


def norm_tensors(*lead: int, width: int = 32, dtype=torch.float32, device="cpu") -> dict[str, torch.Tensor]:
    return {name: torch.randn(*lead, width, device=device).to(dtype) for name in NAMES}


# ---------------------------------------------------------------------------------------------------- reference


def test_reference_follows_the_equation_row_by_row():
    x, update = norm_tensors(4, dtype=torch.float64).values()
    expected = torch.empty_like(x)
    for row in range(4):
        v = x[row] + update[row]
        expected[row] = v / torch.sqrt((v * v).mean() + 1e-5)
    torch.testing.assert_close(residual_norm_reference(x, update), expected)


def test_reference_gradcheck():
    leaves = [t.requires_grad_() for t in norm_tensors(3, width=5, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(residual_norm_reference, leaves)


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 65])
def test_parity_over_rows(rows, dtype, device):
    assert_parity(residual_norm, norm_tensors(rows, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 16, 81, 512, 1000, 1024, 4096])
def test_parity_over_widths(width, dtype, device):
    assert_parity(residual_norm, norm_tensors(5, width=width, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_at_the_size_of_a_batch(dtype, device):
    assert_parity(residual_norm, norm_tensors(768, 97, width=512, dtype=dtype, device=device))


@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (2, 1, 3)])
def test_leading_dimensions(lead, device):
    assert_parity(residual_norm, norm_tensors(*lead, device=device))


@pytest.mark.parametrize("eps", [1e-12, 1e-2, 1.0])
def test_eps(eps, device):
    assert_parity(residual_norm, norm_tensors(5, device=device), eps=eps)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_parity_over_the_size_of_the_inputs(scale, device):
    assert_parity(residual_norm, {name: t * scale for name, t in norm_tensors(9, device=device).items()})


def test_rows_of_zeros_stay_zero_and_have_a_gradient(device):
    leaves = [torch.zeros(3, 16, device=device, requires_grad=True) for _ in NAMES]
    out = residual_norm(*leaves, backend="triton")
    assert out.count_nonzero() == 0
    for gradient in torch.autograd.grad(out.sum(), leaves):
        torch.testing.assert_close(gradient, torch.full_like(gradient, 1e-5**-0.5))


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("wrt", NAMES)
def test_gradient_of_one_input(wrt, device):
    assert_parity(residual_norm, norm_tensors(5, device=device), wrt=(wrt,))


@pytest.mark.parametrize("layout", ["transposed", "strided last", "expanded rows", "expanded last"])
def test_layout_of_the_cotangent(layout, device):
    tensors = norm_tensors(4, 6, device=device)
    assert_parity(residual_norm, tensors, cotangent=LAYOUTS[layout](torch.randn_like(tensors["x"])))


def test_a_state_that_is_its_own_update_gets_both_gradients(device):
    x = torch.randn(4, 32, device=device, requires_grad=True)
    ours, expected = (
        torch.autograd.grad(residual_norm(x, x, backend=backend)[0, 3], x) for backend in ("triton", "reference")
    )
    torch.testing.assert_close(ours, expected)


def test_no_graph_under_no_grad(device):
    leaves = [t.requires_grad_() for t in norm_tensors(3, device=device).values()]
    with torch.no_grad():
        assert not residual_norm(*leaves, backend="triton").requires_grad


def test_backward_fills_no_gradient_of_what_it_keeps(device):
    leaves = [t.requires_grad_() for t in norm_tensors(5, device=device).values()]
    names = operations_of_backward(residual_norm(*leaves, backend="triton"), leaves)
    assert names and not any("zero" in name for name in names)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number(device):
    leaves = [t.requires_grad_() for t in norm_tensors(5, device=device).values()]
    out = residual_norm(*leaves, backend="triton")
    gradient = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_result_changed_in_place_is_an_error_and_not_a_wrong_gradient(device):
    leaves = [t.requires_grad_() for t in norm_tensors(5, device=device).values()]
    out = residual_norm(*leaves, backend="triton")
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaves)


def test_only_the_result_and_a_scale_a_row_are_saved(device):
    leaves = [t.requires_grad_() for t in norm_tensors(9, device=device).values()]
    assert bytes_saved_for_backward(lambda: residual_norm(*leaves, backend="triton")) <= 9 * 32 * 4 + 9 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype, device):
    tensors = norm_tensors(77, width=100, dtype=dtype, device=device)
    cotangent = torch.randn_like(tensors["x"])

    def run() -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        out = residual_norm(*leaves, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, cotangent)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name, layout, device):
    tensors = norm_tensors(4, 6, device=device)
    tensors[name] = LAYOUTS[layout](tensors[name])
    assert_parity(residual_norm, tensors)


def test_inputs_stay_as_they_were(device):
    tensors = norm_tensors(20, device=device)
    before = {name: t.clone() for name, t in tensors.items()}
    out = residual_norm(*(t.requires_grad_() for t in tensors.values()), backend="triton")
    torch.autograd.grad(out.sum(), list(tensors.values()))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was changed"


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_batch(lead, backend, device):
    leaves = [t.requires_grad_() for t in norm_tensors(*lead, device=device).values()]
    out = residual_norm(*leaves, backend=backend)
    assert out.shape == (*lead, 32)
    assert all(g.shape == (*lead, 32) for g in torch.autograd.grad(out.sum(), leaves))


def test_nan_stays_in_its_row(device):
    tensors = norm_tensors(70, device=device)
    tensors["x"][7] = float("nan")
    out = residual_norm(*tensors.values(), backend="triton")
    assert out[7].isnan().all()
    assert out[torch.arange(70, device=device) != 7].isfinite().all()


# ---------------------------------------------------------------------------------------------------- PyTorch around it


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_runs_the_whole_operation_in_its_dtype(backend, device):
    tensors = norm_tensors(9, device=device)
    expected = residual_norm(*(t.half() for t in tensors.values()), backend=backend)
    leaves = [t.requires_grad_() for t in tensors.values()]
    with torch.autocast(device.type, torch.float16):
        out = residual_norm(*leaves, backend=backend)
    assert torch.equal(out, expected)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("wrt", [NAMES, ()], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend, wrt, device):
    def call(*args):
        return residual_norm(*args, backend=backend) * 2

    assert_compiles_into_one_graph(call, norm_tensors(9, device=device), wrt=wrt)


@pytest.mark.parametrize("save", [True, False])
def test_operator_registration(save, device):
    leaves = [t.requires_grad_(save) for t in norm_tensors(5, device=device).values()]
    torch.library.opcheck(torch.ops.hrm.residual_norm.default, (*leaves, 1e-5, save))


def test_backward_operator_registration(device):
    grad, out = norm_tensors(5, device=device).values()
    torch.library.opcheck(torch.ops.hrm.residual_norm_backward.default, (grad, out, torch.rand(5, device=device)))


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs(device):
    leaves = [t.requires_grad_() for t in norm_tensors(33, width=512, dtype=torch.bfloat16, device=device).values()]

    def step() -> list[torch.Tensor]:
        out = residual_norm(*leaves, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    assert_cuda_graph_replays(step, changing=leaves[0])


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    rows = 2**31 // 512 + 3
    needed = rows * 512 * 2 * 5
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tail = norm_tensors(40, width=512, dtype=torch.bfloat16, device=device)
    wide = {name: torch.zeros(rows, 512, dtype=torch.bfloat16, device=device) for name in NAMES}
    for name in NAMES:
        wide[name][-40:] = tail[name]
        wide[name].requires_grad_()
        tail[name].requires_grad_()
    out, expected = (residual_norm(*t.values(), backend="triton") for t in (wide, tail))
    assert torch.equal(out[-40:], expected)
    gradient = torch.autograd.grad(out, wide["x"], torch.ones_like(out))[0]
    assert torch.equal(gradient[-40:], torch.autograd.grad(expected, tail["x"], torch.ones_like(expected))[0])


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": lambda t: t[0, 0]}, {}, "x.shape is (); it should be (..., d) with d above 0"),
        ({"x": lambda t: t[:, :0]}, {}, "x.shape is (5, 0); it should be (..., d) with d above 0"),
        ({"update": lambda t: t[:4]}, {}, "update.shape is (4, 32); it should be (5, 32), the shape of x"),
        ({"x": torch.Tensor.double}, {}, "x.dtype is torch.float64; it should be float32, bfloat16 or float16"),
        ({"update": torch.Tensor.half}, {}, "update.dtype is torch.float16; it should be torch.float32"),
        ({"update": lambda t: t.to("meta")}, {}, "update.device is meta; it should be {device}"),
        ({}, {"eps": 0.0}, "eps is 0.0; it should be above 0"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it should be one of 'auto', 'triton', 'reference'"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_errors_name_the_argument(change, options, message, backend, device):
    tensors = norm_tensors(5, device=device)
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    message = "residual_norm: " + message.format(device=tensors["x"].device)
    with pytest.raises(ValueError, match=re.escape(message)):
        residual_norm(*tensors.values(), **({"backend": backend} | options))


def test_error_for_what_is_no_tensor():
    with pytest.raises(TypeError, match=re.escape("residual_norm: update is list; it should be a torch.Tensor")):
        residual_norm(torch.ones(3), [1.0])


def test_rows_above_the_limit_are_an_error_for_triton_and_work_otherwise(device):
    tensors = norm_tensors(2, width=4097, device=device)
    with pytest.raises(BackendError, match=r'residual_norm: backend="triton" cannot run here: rows of 4097 are above'):
        residual_norm(*tensors.values(), backend="triton")
    exact = residual_norm_reference(*(t.double() for t in tensors.values()))
    assert_as_exact_as_eager("output", residual_norm(*tensors.values()), exact.float(), exact)
