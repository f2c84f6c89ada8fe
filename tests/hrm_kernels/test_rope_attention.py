"""Rotary attention: the reference against its equation, the kernels against float64, and how the function behaves."""

import re
import sys

import pytest
import torch
from parity import (
    DTYPES,
    LAYOUTS,
    REFERENCES,
    assert_compiles_into_one_graph,
    assert_cuda_graph_replays,
    assert_parity,
    bytes_saved_for_backward,
)

from hrm_kernels import rope_attention, rope_attention_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

module = sys.modules["hrm_kernels.rope_attention"]  # the package's attribute of that name is the function


def tables(length: int, size: int, dtype=torch.float32, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of angles that all differ, also between the halves."""
    angles = 7 * torch.randn(length, size, device=device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def packed(batch: int, length: int, heads: int, size: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(batch, length, 3 * heads * size, device=device).to(dtype)


def bound(cos, sin, heads: int):
    """`rope_attention` as a function of qkv alone, which the criterion knows."""

    def op(qkv, **options):
        return rope_attention(qkv, cos, sin, heads=heads, **options)

    def reference(qkv):
        wide = (None, None) if cos is None else (cos.double(), sin.double())
        return rope_attention_reference(qkv, *wide, heads=heads)

    REFERENCES[op] = reference
    return op


def assert_attention_parity(qkv, cos, sin, heads: int, **options) -> None:
    batch, length, width = qkv.shape
    options = {"cotangent": torch.randn(batch, length, width // 3, device=qkv.device)} | options
    op = bound(cos, sin, heads)
    assert_parity(op, {"qkv": qkv}, **options)
    assert_parity(op, {"qkv": qkv}, wrt=(), **options)


@pytest.fixture(params=["short", "long"])
def path(request, monkeypatch):
    """Both ways through the function, in float32 too: the fused kernels run it in the interpreter."""
    monkeypatch.setattr(module, "_short", lambda qkv, heads: request.param == "short")
    return request.param


def path_dtype(path: str, device: torch.device) -> torch.dtype:
    """float32 where every path takes it: compiled, the fused kernels are for 16-bit types."""
    return torch.float16 if device.type == "cuda" and path == "short" else torch.float32


# ---------------------------------------------------------------------------------------------------- reference


def test_reference_follows_the_equation_pair_by_pair():
    qkv, (cos, sin) = packed(2, 3, 2, 4, dtype=torch.float64), tables(3, 4, dtype=torch.float64)

    def rotate(x, position):
        return x * cos[position] + torch.stack((-x[2], -x[3], x[0], x[1])) * sin[position]

    expected = torch.empty(2, 3, 8, dtype=torch.float64)
    for sequence in range(2):
        for head in range(2):
            q, k, v = (qkv[sequence, :, 8 * part + 4 * head : 8 * part + 4 * head + 4] for part in range(3))
            for i in range(3):
                weights = torch.stack([torch.exp(rotate(q[i], i) @ rotate(k[j], j) / 2) for j in range(3)])
                expected[sequence, i, 4 * head : 4 * head + 4] = weights @ v / weights.sum()
    torch.testing.assert_close(rope_attention_reference(qkv, cos, sin, heads=2), expected)


def test_reference_gradcheck():
    qkv, (cos, sin) = packed(1, 3, 1, 4, dtype=torch.float64), tables(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope_attention_reference(x, cos, sin, heads=1), qkv.requires_grad_())


def test_rotary_positions_are_relative():
    angles = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).repeat(2)
    qkv = packed(1, 6, 1, 8)
    first, later = (
        rope_attention(qkv, angles[i : i + 6].cos(), angles[i : i + 6].sin(), heads=1, backend="reference")
        for i in (0, 3)
    )
    torch.testing.assert_close(first, later)


# ---------------------------------------------------------------------------------------------------- parity


SHAPES = [(1, 1, 1, 16), (2, 5, 2, 16), (1, 17, 3, 32), (1, 81, 1, 64), (1, 128, 1, 16)]


@pytest.mark.parametrize("rotation", [True, False], ids=["rotated", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_in_both_ways(shape, rotation, path, device):
    _, length, heads, size = shape
    cos, sin = tables(length, size, device=device) if rotation else (None, None)
    assert_attention_parity(packed(*shape, dtype=path_dtype(path, device), device=device), cos, sin, heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 33, 2, 16), (1, 130, 1, 32), (2, 9, 1, 6), (1, 20, 1, 80)], ids=str)
def test_parity_where_the_function_chooses(shape, dtype, device):
    _, length, heads, size = shape
    qkv = packed(*shape, dtype=dtype, device=device)
    assert_attention_parity(qkv, *tables(length, size, device=device), heads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 81, 8, 64), (96, 97, 8, 64), (4, 900, 8, 64)], ids=str)
def test_parity_at_the_sizes_of_the_puzzles(shape, dtype, device):
    _, length, heads, size = shape
    qkv = packed(*shape, dtype=dtype, device=device)
    assert_attention_parity(qkv, *tables(length, size, device=device), heads)


@pytest.mark.parametrize("steps", [(64, 32, None), (128, 32, None), (64, 64, None), (128, 64, None)], ids=str)
@pytest.mark.parametrize("length", [64, 65, 96, 97, 128])
def test_tiles_of_queries_and_parts_of_keys(length, steps, monkeypatch, device):
    table = {key: (steps[0] if key[0] == "forward" else 128, *steps[1:]) for key in module.STEPS}
    monkeypatch.setattr(module, "STEPS", table)
    module.attention_options.cache_clear()
    try:
        qkv = packed(1, length, 1, 16, dtype=torch.float16, device=device)
        assert_attention_parity(qkv, *tables(length, 16, device=device), 1)
    finally:
        module.attention_options.cache_clear()


@pytest.mark.parametrize("scale", [0.0, 1e-2, 6.0])
def test_parity_over_the_size_of_queries_and_keys(scale, device):
    qkv = packed(2, 20, 1, 16, dtype=torch.float16, device=device)
    qkv[..., :-16] *= scale
    assert_attention_parity(qkv, *tables(20, 16, device=device), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tables_in_the_dtype_of_the_input(dtype, device):
    qkv = packed(1, 20, 2, 16, dtype=dtype, device=device)
    assert_attention_parity(qkv, *tables(20, 16, dtype=dtype, device=device), 2)


def test_keys_past_the_end_do_not_leak_where_all_scores_are_far_below_zero(device):
    qkv = torch.ones(1, 5, 48, dtype=torch.float16, device=device)
    qkv[..., :16] = -60.0  # scores of -240 against the 0 of a key that is not there
    qkv[..., 32:] = torch.randn(5, 16, device=device)
    qkv.requires_grad_()
    out = rope_attention(qkv, None, None, heads=1, backend="triton")
    torch.testing.assert_close(out, qkv[..., 32:].mean(1, keepdim=True).expand_as(out), rtol=2e-3, atol=2e-3)
    gradient = torch.autograd.grad(out.sum(), qkv)[0]
    torch.testing.assert_close(gradient[..., 32:], torch.ones_like(out), rtol=2e-3, atol=2e-3)
    assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("layout", ["transposed", "strided last", "expanded rows", "expanded last"])
def test_layout_of_the_cotangent(layout, path, device):
    qkv = packed(2, 6, 1, 16, dtype=torch.float16, device=device)
    cotangent = LAYOUTS[layout](torch.randn(2, 6, 16, device=device))
    assert_attention_parity(qkv, *tables(6, 16, device=device), 1, cotangent=cotangent)


def test_no_graph_under_no_grad(path, device):
    qkv = packed(2, 5, 2, 16, dtype=path_dtype(path, device), device=device).requires_grad_()
    with torch.no_grad():
        out = rope_attention(qkv, *tables(5, 16, device=device), heads=2, backend="triton")
    assert not out.requires_grad


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_tables_get_no_gradient(backend, path, device):
    qkv = packed(2, 5, 2, 16, dtype=path_dtype(path, device), device=device)
    cos, sin = (t.requires_grad_() for t in tables(5, 16, device=device))
    assert not rope_attention(qkv, cos, sin, heads=2, backend=backend).requires_grad


def test_backward_through_a_retained_graph_twice_gives_the_same(path, device):
    qkv = packed(2, 5, 2, 16, dtype=path_dtype(path, device), device=device).requires_grad_()
    out = rope_attention(qkv, *tables(5, 16, device=device), heads=2, backend="triton").square().sum()
    first = torch.autograd.grad(out, qkv, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, qkv)[0])


def test_a_second_derivative_is_an_error_and_not_a_wrong_number(monkeypatch, device):
    monkeypatch.setattr(module, "_short", lambda qkv, heads: True)
    qkv = packed(2, 5, 2, 16, dtype=path_dtype("short", device), device=device).requires_grad_()
    out = rope_attention(qkv, None, None, heads=2, backend="triton")
    gradient = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_short_sequence_saves_its_input_and_a_number_a_row(device):
    qkv = packed(2, 9, 2, 16, dtype=torch.float16, device=device).requires_grad_()
    cos, sin = tables(9, 16, device=device)
    saved = bytes_saved_for_backward(lambda: rope_attention(qkv, cos, sin, heads=2, backend="triton"))
    assert saved <= qkv.nbytes + cos.nbytes + sin.nbytes + 2 * 9 * 2 * 4


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_short_sequences_are_deterministic(dtype, device):
    qkv = packed(2, 20, 2, 32, dtype=dtype, device=device)
    cos, sin = tables(20, 32, device=device)

    def run() -> list[torch.Tensor]:
        leaf = qkv.detach().requires_grad_()
        out = rope_attention(leaf, cos, sin, heads=2, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), leaf)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_numbers_of_a_contiguous_input(layout, path, device):
    qkv = LAYOUTS[layout](packed(2, 6, 1, 16, dtype=path_dtype(path, device), device=device))
    cos, sin = tables(6, 16, device=device)

    def run(leaf: torch.Tensor) -> list[torch.Tensor]:
        out = rope_attention(leaf.requires_grad_(), cos, sin, heads=1, backend="triton")
        without_graph = rope_attention(leaf.detach(), cos, sin, heads=1, backend="triton")
        return [out, without_graph, *torch.autograd.grad(out.square().sum(), leaf)]

    for strided, contiguous in zip(run(qkv.detach()), run(qkv.detach().contiguous()), strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("layout", ["strided rows", "strided last", "expanded rows"])
def test_layouts_of_the_tables(layout, path, device):
    qkv = packed(1, 6, 1, 16, dtype=path_dtype(path, device), device=device)
    assert_attention_parity(qkv, *(LAYOUTS[layout](t) for t in tables(6, 16, device=device)), 1)


def test_inputs_stay_as_they_were(path, device):
    tensors = [packed(2, 6, 2, 16, dtype=path_dtype(path, device), device=device), *tables(6, 16, device=device)]
    before = [t.clone() for t in tensors]
    out = rope_attention(tensors[0].requires_grad_(), *tensors[1:], heads=2, backend="triton")
    torch.autograd.grad(out.sum(), tensors[0])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_batch(backend, shape, path, device):
    qkv = packed(*shape, 2, 16, dtype=path_dtype(path, device), device=device).requires_grad_()
    out = rope_attention(qkv, *tables(shape[1], 16, device=device), heads=2, backend=backend)
    assert out.shape == (*shape, 32)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_nan_stays_in_its_sequence_and_head(device):
    qkv = packed(3, 6, 2, 16, dtype=torch.float16, device=device)
    qkv[1, 2, 16] = float("nan")  # a query of the second head
    out = rope_attention(qkv, *tables(6, 16, device=device), heads=2, backend="triton")
    assert out[1, 2, 16:].isnan().all()
    out[1, 2, 16:] = 0
    assert out.isfinite().all()


# ---------------------------------------------------------------------------------------------------- PyTorch around it


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_runs_the_whole_operation_in_its_dtype(backend, device):
    qkv, (cos, sin) = packed(2, 9, 2, 16, device=device).requires_grad_(), tables(9, 16, device=device)
    expected = rope_attention(qkv.half(), cos, sin, heads=2, backend=backend)
    with torch.autocast(device.type, torch.float16):
        out = rope_attention(qkv, cos, sin, heads=2, backend=backend)
    assert torch.equal(out, expected)
    gradient = torch.autograd.grad(out.sum(), qkv)[0]
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


@pytest.mark.parametrize("wrt", [("qkv",), ()], ids=["training", "inference"])
@pytest.mark.parametrize("rotation", [True, False], ids=["rotated", "plain"])
def test_compiles_into_one_graph(rotation, wrt, path, device):
    cos, sin = tables(9, 16, device=device) if rotation else (None, None)

    def call(qkv):
        return rope_attention(qkv, cos, sin, heads=2, backend="triton").repeat(1, 1, 3)

    qkv = packed(2, 9, 2, 16, dtype=path_dtype(path, device), device=device)
    assert_compiles_into_one_graph(call, {"qkv": qkv}, wrt=wrt)


@pytest.mark.parametrize("save", [True, False])
def test_operator_registration(save, device):
    dtype = path_dtype("short", device)
    qkv = packed(2, 5, 2, 16, dtype=dtype, device=device).requires_grad_(save)
    for cos, sin in (tables(5, 16, device=device), (None, None)):
        torch.library.opcheck(torch.ops.hrm.rope_attention.default, (qkv, cos, sin, 2, save))
    torch.library.opcheck(torch.ops.hrm.rope_rotate.default, (qkv, *tables(5, 16, device=device), 2, save))


def test_backward_operator_registration(device):
    dtype, (cos, sin) = path_dtype("short", device), tables(5, 16, device=device)
    qkv, grad = packed(2, 5, 2, 16, dtype=dtype, device=device), torch.randn(2, 5, 32, device=device).to(dtype)
    arguments = (grad, qkv, cos, sin, torch.randn(2, 2, 5, device=device), 2)
    torch.library.opcheck(torch.ops.hrm.rope_attention_backward.default, arguments)
    parts = (grad.view(2, 5, 2, 16) for _ in range(3))
    torch.library.opcheck(torch.ops.hrm.rope_rotate_backward.default, (*parts, cos, sin))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [81, 200])
def test_cuda_graph_replays_on_new_inputs(length, device):
    qkv = packed(3, length, 2, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    cos, sin = tables(length, 64, device=device)

    def step() -> list[torch.Tensor]:
        out = rope_attention(qkv, cos, sin, heads=2, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), qkv)]

    assert_cuda_graph_replays(step, changing=qkv)


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    batch = 2**31 // (97 * 1536) + 3
    needed = batch * 97 * 1536 * 2 * 4
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tail = packed(2, 97, 8, 64, dtype=torch.bfloat16, device=device).requires_grad_()
    qkv = torch.zeros(batch, 97, 1536, dtype=torch.bfloat16, device=device)
    qkv[-2:] = tail.detach()
    qkv.requires_grad_()
    cos, sin = tables(97, 64, device=device)
    out, expected = (rope_attention(t, cos, sin, heads=8, backend="triton") for t in (qkv, tail))
    assert torch.equal(out[-2:], expected)
    gradient = torch.autograd.grad(out, qkv, torch.ones_like(out))[0]
    assert torch.equal(gradient[-2:], torch.autograd.grad(expected, tail, torch.ones_like(expected))[0])


# ---------------------------------------------------------------------------------------------------- bad input


def _meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"qkv": lambda t: t[0]}, {}, "qkv.shape is (5, 96); it should be (B, L, 3*2*D)"),
        ({"qkv": lambda t: t[..., :-1]}, {}, "qkv.shape is (2, 5, 95); it should be (B, L, 3*2*D)"),
        ({}, {"heads": 5}, "qkv.shape is (2, 5, 96); it should be (B, L, 3*5*D)"),
        ({}, {"heads": 0}, "heads is 0; it should be an integer above 0"),
        ({}, {"heads": 2.0}, "heads is 2.0; it should be an integer above 0"),
        ({}, {"heads": 32}, "cos.shape is (5, 16); it should be (5, 1), the length of qkv and the size of its heads"),
        ({"cos": lambda t: t[:4]}, {}, "cos.shape is (4, 16); it should be (5, 16)"),
        ({"sin": lambda t: t[:, :8]}, {}, "sin.shape is (5, 8); it should be (5, 16)"),
        ({"cos": torch.Tensor.half}, {}, "cos.dtype is torch.float16; it should be torch.float32"),
        ({"sin": _meta}, {}, "sin.device is meta; it should be {device}, the device of qkv"),
        ({"qkv": torch.Tensor.double}, {}, "qkv.dtype is torch.float64; it should be float32, bfloat16 or float16"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it should be one of 'auto', 'triton', 'reference'"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_errors_name_the_argument(change, options, message, backend, device):
    tensors = dict(zip(("qkv", "cos", "sin"), (packed(2, 5, 2, 16), *tables(5, 16)), strict=True))
    tensors = {name: t.to(device) for name, t in tensors.items()}
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    message = "rope_attention: " + message.format(device=tensors["qkv"].device)
    with pytest.raises(ValueError, match=re.escape(message)):
        rope_attention(*tensors.values(), **({"heads": 2, "backend": backend} | options))


def test_error_for_an_odd_head_size_with_rotation():
    with pytest.raises(ValueError, match="rope_attention: the head size is 3; it should be even"):
        rope_attention(torch.ones(1, 2, 9), *torch.ones(2, 2, 3), heads=1)


def test_error_for_what_is_no_tensor():
    with pytest.raises(TypeError, match="rope_attention: sin is NoneType; cos and sin should be two tensors or None"):
        rope_attention(torch.ones(1, 2, 12), torch.ones(2, 4), None, heads=1)
    with pytest.raises(TypeError, match=re.escape("rope_attention: qkv is list; it should be a torch.Tensor")):
        rope_attention([1.0], None, None, heads=1)
