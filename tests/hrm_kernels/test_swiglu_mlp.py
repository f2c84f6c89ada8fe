"""The SwiGLU MLP: the reference against its equation, the kernels against float64, and how the function behaves."""

import itertools
import re
import sys
from dataclasses import replace
from functools import partial

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

from hrm_kernels import swiglu_mlp, swiglu_mlp_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

module = sys.modules["hrm_kernels.swiglu_mlp"]  # the package's attribute of that name is the function
NAMES = ("x", "w_gate_up", "w_down")


def fused_tile(tma: bool, device: torch.device):
    """A tile for the fused product; one that the interpreter is done with soon."""
    if device.type == "cpu":
        return module.Tile(32, 16, 16, 4, 2, tma=tma)
    if tma and module._capability(device)[0] != 9:
        pytest.skip("this GPU has no tensor memory accelerator that the kernel is sized for")
    return module.TILES[9 if tma else 8]


@pytest.fixture(params=["pointers", "tma", "cublas"])
def product(request, monkeypatch, device):
    """Each way to the first product without graph."""
    tile = None if request.param == "cublas" else fused_tile(request.param == "tma", device)
    monkeypatch.setitem(module.TILES, module._capability(device)[0], tile)


# ---------------------------------------------------------------------------------------------------- reference


def test_reference_follows_the_equation_token_by_token():
    x, w_gate_up, w_down = mlp_tensors(3, width=5, inner=4, dtype=torch.float64).values()
    expected = torch.empty_like(x)
    for token in range(3):
        gate, up = w_gate_up[:4] @ x[token], w_gate_up[4:] @ x[token]
        expected[token] = w_down @ (gate / (1 + torch.exp(-gate)) * up)
    torch.testing.assert_close(swiglu_mlp_reference(x, w_gate_up, w_down), expected)


def test_reference_gradcheck():
    leaves = [t.requires_grad_() for t in mlp_tensors(2, width=4, inner=3, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(swiglu_mlp_reference, leaves)


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 16, 8), (17, 7, 5), (5, 64, 520)])
def test_parity_with_gradients(tokens, width, inner, dtype, device):
    assert_parity(swiglu_mlp, mlp_tensors(tokens, width=width, inner=inner, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 64, 8), (33, 64, 24), (17, 7, 5)])
def test_parity_without_graph(tokens, width, inner, dtype, product, device):
    assert_parity(swiglu_mlp, mlp_tensors(tokens, width=width, inner=inner, dtype=dtype, device=device), wrt=())


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
def test_the_fused_product_takes_every_tile_of_a_group_once(tma, monkeypatch, device):
    monkeypatch.setattr(module, "GROUP", 3)
    tile = replace(fused_tile(tma, device), rows=16, columns=32)
    tensors = mlp_tensors(16 * 8 - 5, width=64, inner=72, dtype=torch.float16, device=device)
    x, w_gate_up, _ = tensors.values()
    act = module._gated_product(x, w_gate_up, tile)
    gate, up = (x.float() @ w_gate_up.float().t()).chunk(2, -1)
    torch.testing.assert_close(act.float(), torch.nn.functional.silu(gate) * up, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("rows", "inner", "fits"),
    [
        (lambda x: x, 24, True),
        (lambda x: x, 20, False),
        (lambda x: torch.cat((x, x[:, :8]), 1)[:, :64], 24, True),
        (lambda x: torch.cat((x, x[:, :8]), 1)[:, 8:], 24, True),
        (lambda x: torch.cat((x, x[:, :8]), 1)[:, 4:68], 24, False),
        (lambda x: torch.cat((x, x[:, :4]), 1)[:, :64], 24, False),
        (lambda x: x[:1].expand(5, 64), 24, False),
    ],
    ids=["contiguous", "inner", "wider", "offset of 16 bytes", "offset of 8 bytes", "stride", "expanded"],
)
def test_rows_that_the_tensor_memory_accelerator_cannot_read_take_another_way(rows, inner, fits, monkeypatch, device):
    tile = fused_tile(True, device)
    monkeypatch.setitem(module.TILES, module._capability(device)[0], tile)
    tensors = mlp_tensors(5, width=64, inner=inner, dtype=torch.float16, device=device)
    tensors["x"] = rows(tensors["x"])
    assert module._tile_for(tensors["x"], tensors["w_gate_up"]) is (tile if fits else None)
    assert_parity(swiglu_mlp, tensors, wrt=())


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "inner"), [(1, 8), (127, 1536), (128 * 133 + 1, 136), (300, 1544)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parity_without_graph_of_sizes_that_tiles_do_not_divide(dtype, tokens, inner, product, device):
    assert_parity(swiglu_mlp, mlp_tensors(tokens, width=512, inner=inner, dtype=dtype, device=device), wrt=())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_at_the_size_of_a_batch(dtype, product, device):
    tensors = mlp_tensors(64, 97, width=512, inner=1536, dtype=dtype, device=device)
    assert_parity(swiglu_mlp, tensors)
    assert_parity(swiglu_mlp, tensors, wrt=())


@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (2, 1, 3)])
@pytest.mark.parametrize("wrt", [NAMES, ()], ids=["training", "inference"])
def test_leading_dimensions(wrt, lead, device):
    assert_parity(swiglu_mlp, mlp_tensors(*lead, device=device), wrt=wrt)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_parity_over_the_size_of_the_inputs(scale, device):
    tensors = mlp_tensors(9, device=device)
    assert_parity(swiglu_mlp, tensors | {"x": tensors["x"] * scale})


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("wrt", [c for n in (1, 2) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_gradients_of_a_subset(wrt, device):
    assert_parity(swiglu_mlp, mlp_tensors(5, device=device), wrt=wrt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute_gives_the_same_numbers_and_keeps_only_its_arguments(dtype, device):
    leaves = [t.requires_grad_() for t in mlp_tensors(9, dtype=dtype, device=device).values()]
    kept, recomputed = (partial(swiglu_mlp, *leaves, recompute=r, backend="triton") for r in (False, True))
    for ours, theirs in zip(
        (recomputed(), *torch.autograd.grad(recomputed().sum(), leaves)),
        (kept(), *torch.autograd.grad(kept().sum(), leaves)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    arguments = sum(t.nbytes for t in leaves)
    assert bytes_saved_for_backward(recomputed) <= arguments
    assert bytes_saved_for_backward(kept) <= arguments + 9 * 48 * leaves[0].element_size()


@pytest.mark.parametrize("layout", ["transposed", "strided last", "expanded rows", "expanded last"])
def test_layout_of_the_cotangent(layout, device):
    tensors = mlp_tensors(4, 6, device=device)
    assert_parity(swiglu_mlp, tensors, cotangent=LAYOUTS[layout](torch.randn_like(tensors["x"])))


def test_no_graph_under_no_grad(device):
    leaves = [t.requires_grad_() for t in mlp_tensors(3, device=device).values()]
    with torch.no_grad():
        assert not swiglu_mlp(*leaves, backend="triton").requires_grad


def test_backward_through_a_retained_graph_twice_gives_the_same(device):
    leaves = [t.requires_grad_() for t in mlp_tensors(5, device=device).values()]
    out = swiglu_mlp(*leaves, backend="triton").square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, leaves), strict=True):
        assert torch.equal(a, b)


def test_backward_fills_no_gradient_of_what_it_keeps(device):
    leaves = [t.requires_grad_() for t in mlp_tensors(5, device=device).values()]
    names = operations_of_backward(swiglu_mlp(*leaves, backend="triton"), leaves)
    assert names and not any("zero" in name for name in names)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number(device):
    leaves = [t.requires_grad_() for t in mlp_tensors(5, device=device).values()]
    out = swiglu_mlp(*leaves, backend="triton")
    gradient = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype, device):
    tensors = mlp_tensors(17, width=64, dtype=dtype, device=device)
    cotangent = torch.randn_like(tensors["x"])

    def run() -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        out = swiglu_mlp(*leaves, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, cotangent), swiglu_mlp(*tensors.values(), backend="triton")]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrt", [NAMES, ()], ids=["training", "inference"])
def test_layouts_of_the_rows(wrt, layout, product, device):
    tensors = mlp_tensors(4, 6, width=64, dtype=torch.float16, device=device)
    tensors["x"] = LAYOUTS[layout](tensors["x"])
    assert_parity(swiglu_mlp, tensors, wrt=wrt)


@pytest.mark.parametrize("layout", ["transposed", "strided rows", "strided last", "columns of a wider tensor"])
@pytest.mark.parametrize("name", ["w_gate_up", "w_down"])
@pytest.mark.parametrize("wrt", [NAMES, ()], ids=["training", "inference"])
def test_layouts_of_the_weights(wrt, name, layout, product, device):
    tensors = mlp_tensors(5, width=64, dtype=torch.float16, device=device)
    tensors[name] = LAYOUTS[layout](tensors[name])
    assert_parity(swiglu_mlp, tensors, wrt=wrt)


def test_inputs_stay_as_they_were(device):
    tensors = mlp_tensors(20, device=device)
    before = {name: t.clone() for name, t in tensors.items()}
    out = swiglu_mlp(*(t.requires_grad_() for t in tensors.values()), backend="triton")
    cotangent = torch.ones_like(out)
    torch.autograd.grad(out, list(tensors.values()), cotangent)
    assert torch.equal(cotangent, torch.ones_like(out))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was changed"


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_batch(backend, recompute, lead, device):
    leaves = [t.requires_grad_() for t in mlp_tensors(*lead, device=device).values()]
    with torch.no_grad():
        assert swiglu_mlp(*leaves, backend=backend).shape == (*lead, 32)
    out = swiglu_mlp(*leaves, recompute=recompute, backend=backend)
    assert out.shape == (*lead, 32)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert all(g.count_nonzero() == 0 for g in gradients)


def test_nan_stays_in_its_row(product, device):
    tensors = mlp_tensors(40, width=64, dtype=torch.float16, device=device)
    tensors["x"][39] = float("nan")
    out = swiglu_mlp(*tensors.values(), backend="triton")
    assert out[39].isnan().all()
    assert out[:39].isfinite().all()


# ---------------------------------------------------------------------------------------------------- PyTorch around it


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_runs_the_whole_operation_in_its_dtype(backend, device):
    tensors = mlp_tensors(9, device=device)
    expected = swiglu_mlp(*(t.half() for t in tensors.values()), backend=backend)
    leaves = [t.requires_grad_() for t in tensors.values()]
    with torch.autocast(device.type, torch.float16):
        out = swiglu_mlp(*leaves, backend=backend)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("wrt", [NAMES, ()], ids=["training", "inference"])
@pytest.mark.parametrize(("backend", "recompute"), [("triton", False), ("triton", True), ("reference", False)])
def test_compiles_into_one_graph(backend, recompute, wrt, device):
    def call(*args):
        return swiglu_mlp(*args, recompute=recompute, backend=backend) * 2

    assert_compiles_into_one_graph(call, mlp_tensors(9, device=device), wrt=wrt)


@pytest.mark.parametrize("recompute", [False, True])
def test_operator_registration(recompute, device):
    leaves = [t.requires_grad_() for t in mlp_tensors(5, device=device).values()]
    torch.library.opcheck(torch.ops.hrm.swiglu_mlp.default, (*leaves, recompute))


def test_inference_and_backward_operator_registration(device):
    tensors = list(mlp_tensors(5, device=device).values())
    torch.library.opcheck(torch.ops.hrm.swiglu_mlp_inference.default, tuple(tensors))
    gate_up = torch.randn(5, 48, device=device)
    arguments = (torch.randn_like(tensors[0]), *tensors, gate_up)
    torch.library.opcheck(torch.ops.hrm.swiglu_mlp_backward.default, arguments)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs(device):
    leaves = mlp_tensors(33, width=512, inner=1536, dtype=torch.bfloat16, device=device)
    leaves = [t.requires_grad_() for t in leaves.values()]

    def step() -> list[torch.Tensor]:
        out = swiglu_mlp(*leaves, backend="triton")
        with torch.no_grad():
            inference = swiglu_mlp(*leaves, backend="triton")
        return [out, inference, *torch.autograd.grad(out.sum(), leaves)]

    assert_cuda_graph_replays(step, changing=leaves[0])


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    rows, width, inner = 2**31 // 512 + 3, 64, 256
    needed = rows * 2 * (2 * width + 5 * inner)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tail, w_gate_up, w_down = mlp_tensors(40, width=width, inner=inner, dtype=torch.bfloat16, device=device).values()
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    x[-40:] = tail
    for t in (x, tail):
        t.requires_grad_()
    out, expected = (swiglu_mlp(t, w_gate_up, w_down, backend="triton") for t in (x, tail))
    close = partial(torch.testing.assert_close, rtol=1e-2, atol=1e-2)  # cuBLAS chooses by shape
    close(out[-40:], expected)
    gradient = torch.autograd.grad(out, x, torch.ones_like(out))[0]
    close(gradient[-40:], torch.autograd.grad(expected, tail, torch.ones_like(expected))[0])
    with torch.no_grad():
        close(swiglu_mlp(x, w_gate_up, w_down, backend="triton")[-40:], expected)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": lambda t: t[0, 0]}, {}, "x.shape is (); it should be (..., d) with d above 0"),
        ({"x": lambda t: t[:, :-1]}, {}, "w_gate_up.shape is (48, 32); it should be (2*I, 31), the width of x"),
        ({"w_gate_up": lambda t: t[:-1]}, {}, "w_gate_up.shape is (47, 32); it should be (2*I, 32), the width of x"),
        ({"w_gate_up": lambda t: t[0]}, {}, "w_gate_up.shape is (32); it should be (2*I, 32), the width of x"),
        ({"w_down": lambda t: t[:, :20]}, {}, "w_down.shape is (32, 20); it should be (32, 24), the width of x and"),
        ({"x": torch.Tensor.double}, {}, "x.dtype is torch.float64; it should be float32, bfloat16 or float16"),
        ({"w_down": torch.Tensor.half}, {}, "w_down.dtype is torch.float16; it should be torch.float32"),
        ({"w_gate_up": lambda t: t.to("meta")}, {}, "w_gate_up.device is meta; it should be {device}"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it should be one of 'auto', 'triton', 'reference'"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_errors_name_the_argument(change, options, message, backend, device):
    tensors = mlp_tensors(5, device=device)
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    message = "swiglu_mlp: " + message.format(device=tensors["x"].device)
    with pytest.raises(ValueError, match=re.escape(message)):
        swiglu_mlp(*tensors.values(), **({"backend": backend} | options))


def test_error_for_what_is_no_tensor():
    tensors = mlp_tensors(5) | {"w_down": [1.0]}
    with pytest.raises(TypeError, match=re.escape("swiglu_mlp: w_down is list; it should be a torch.Tensor")):
        swiglu_mlp(*tensors.values())
