"""The H update: the reference against its equation, the kernel against float64, and how the function behaves."""

import itertools
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
    h_tensors,
)

from hrm_kernels import BackendError, h_update, h_update_reference
from hrm_kernels._triton import HOPPER, TABLE, Config, override_config

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("z", "inputs", "w")


# ---------------------------------------------------------------------------------------------------- reference


def test_reference_follows_the_equation_token_by_token():
    tensors = h_tensors(3, heads=2, size=8, dtype=torch.float64)
    z, inputs, w = tensors.values()
    expected = torch.empty_like(z)
    for token, head in itertools.product(range(3), range(2)):
        columns = slice(8 * head, 8 * head + 8)
        a = z[token, columns]
        p, q, r = (inputs[token, 16 * i : 16 * i + 16][columns] + a @ w[i, head] for i in range(3))
        gate = 1 / (1 + torch.exp(-r))
        v = (1 - gate) * a + gate * (p / (1 + torch.exp(-p)) * q)
        expected[token, columns] = v / torch.sqrt((v * v).mean() + 1e-6)
    torch.testing.assert_close(h_update_reference(*tensors.values()), expected)


def test_reference_gradcheck():
    leaves = [t.requires_grad_() for t in h_tensors(2, heads=2, size=3, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(h_update_reference, leaves)


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 64, 129])
def test_parity_over_tokens(tokens, dtype, device):
    assert_parity(h_update, h_tensors(tokens, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (2, 32), (1, 64), (3, 8), (2, 24), (1, 48), (3, 5)])
def test_parity_over_heads(heads, size, dtype, device):
    assert_parity(h_update, h_tensors(19, heads=heads, size=size, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 64, 4096, 5000])
def test_parity_at_full_width(tokens, dtype, device):
    assert_parity(h_update, h_tensors(tokens, heads=64, size=64, dtype=dtype, device=device))


@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (2, 1, 3)])
def test_leading_dimensions(lead, device):
    assert_parity(h_update, h_tensors(*lead, device=device))


@pytest.mark.parametrize("kernel", ["h_forward", "h_backward"])
@pytest.mark.parametrize(
    "config", sorted({c for t in (TABLE, HOPPER) for e in t.values() for c in e.values()}, key=str)
)
def test_every_configuration_of_the_table_gives_the_same_numbers(kernel, config, device):
    with override_config(**{kernel: config}):
        assert_parity(h_update, h_tensors(70, device=device))


def test_one_program_walks_over_all_tiles(device):
    with override_config(h_forward=Config(16, 4, 0), h_backward=Config(16, 4, 0)):
        assert_parity(h_update, h_tensors(75, heads=3, device=device))


@pytest.mark.parametrize("eps", [1e-12, 1e-2, 1.0])
def test_eps(eps, device):
    assert_parity(h_update, h_tensors(5, device=device), eps=eps)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_parity_over_the_size_of_the_inputs(scale, device):
    tensors = h_tensors(9, device=device)
    tensors |= {"z": tensors["z"] * scale, "inputs": tensors["inputs"] * scale}
    assert_parity(h_update, tensors)


@pytest.mark.parametrize(("r", "gate"), [(-200.0, 0.0), (200.0, 1.0)])
def test_saturated_gate_keeps_or_replaces_the_state(r, gate, device):
    tensors = h_tensors(4, heads=2, size=16, device=device)
    tensors["inputs"][:, 64:] = r
    out = h_update(*tensors.values(), backend="triton")
    a, p_and_q = tensors["z"].unflatten(-1, (2, 16)), tensors["inputs"][:, :64].unflatten(-1, (2, 2, 16))
    p, q = (p_and_q[:, i] + torch.einsum("njd,jde->nje", a, tensors["w"][i]) for i in range(2))
    kept = (p * torch.sigmoid(p) * q) if gate else a
    expected = kept * torch.rsqrt(kept.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(out, expected.flatten(-2), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("wrt", [c for n in (1, 2) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_gradients_of_a_subset(wrt, device):
    assert_parity(h_update, h_tensors(5, device=device), wrt=wrt)


@pytest.mark.parametrize("layout", ["transposed", "strided last", "expanded rows", "expanded last"])
def test_layout_of_the_cotangent(layout, device):
    tensors = h_tensors(4, 6, device=device)
    assert_parity(h_update, tensors, cotangent=LAYOUTS[layout](torch.randn_like(tensors["z"])))


def test_no_graph_under_no_grad(device):
    leaves = [t.requires_grad_() for t in h_tensors(3, device=device).values()]
    with torch.no_grad():
        assert not h_update(*leaves, backend="triton").requires_grad


def test_backward_through_a_retained_graph_twice_gives_the_same(device):
    leaves = [t.requires_grad_() for t in h_tensors(5, device=device).values()]
    out = h_update(*leaves, backend="triton").square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, leaves), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number(device):
    leaves = [t.requires_grad_() for t in h_tensors(5, device=device).values()]
    out = h_update(*leaves, backend="triton")
    gradient = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_only_the_inputs_are_saved(device):
    leaves = [t.requires_grad_() for t in h_tensors(9, device=device).values()]
    inputs = sum(t.nbytes for t in leaves)
    assert bytes_saved_for_backward(lambda: h_update(*leaves, backend="triton")) <= inputs


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype, device):
    tensors = h_tensors(77, heads=3, dtype=dtype, device=device)
    cotangent = torch.randn_like(tensors["z"])

    def run() -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        out = h_update(*leaves, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, cotangent)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["z", "inputs"])
def test_layouts_of_the_rows(name, layout, device):
    tensors = h_tensors(4, 6, device=device)
    tensors[name] = LAYOUTS[layout](tensors[name])
    assert_parity(h_update, tensors)


@pytest.mark.parametrize("layout", ["transposed", "strided rows", "strided last", "expanded rows"])
def test_layouts_of_the_weights(layout, device):
    tensors = h_tensors(5, heads=3, device=device)
    tensors["w"] = LAYOUTS[layout](tensors["w"])
    assert_parity(h_update, tensors)


def test_inputs_stay_as_they_were(device):
    tensors = h_tensors(20, device=device)
    before = {name: t.clone() for name, t in tensors.items()}
    out = h_update(*(t.requires_grad_() for t in tensors.values()), backend="triton")
    torch.autograd.grad(out.sum(), list(tensors.values()))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was changed"


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_batch(lead, backend, device):
    leaves = [t.requires_grad_() for t in h_tensors(*lead, device=device).values()]
    out = h_update(*leaves, backend=backend)
    assert out.shape == (*lead, 32)
    grad_z, grad_inputs, grad_w = torch.autograd.grad(out.sum(), leaves)
    assert grad_z.shape == (*lead, 32)
    assert grad_inputs.shape == (*lead, 96)
    assert grad_w.shape == (3, 2, 16, 16)
    assert grad_w.count_nonzero() == 0


def test_nan_stays_in_its_row(device):
    tensors = h_tensors(20, device=device)
    tensors["z"][7] = float("nan")
    out = h_update(*tensors.values(), backend="triton")
    assert out[7].isnan().all()
    assert out[torch.arange(20, device=device) != 7].isfinite().all()


# ---------------------------------------------------------------------------------------------------- PyTorch around it


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_runs_the_whole_operation_in_its_dtype(backend, device):
    tensors = h_tensors(9, device=device)
    expected = h_update(*(t.half() for t in tensors.values()), backend=backend)
    leaves = [t.requires_grad_() for t in tensors.values()]
    with torch.autocast(device.type, torch.float16):
        out = h_update(*leaves, backend=backend)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend, device):
    def call(*args):
        return h_update(*args, backend=backend) * 2

    assert_compiles_into_one_graph(call, h_tensors(9, device=device), wrt=NAMES)


def test_operator_registration(device):
    for requires_grad in (False, True):
        leaves = [t.requires_grad_(requires_grad) for t in h_tensors(5, device=device).values()]
        torch.library.opcheck(torch.ops.hrm.h_update.default, (*leaves, 1e-6))


def test_backward_operator_registration(device):
    tensors = list(h_tensors(5, device=device).values())
    torch.library.opcheck(torch.ops.hrm.h_update_backward.default, (torch.randn_like(tensors[0]), *tensors, 1e-6))


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs(device):
    tensors = list(h_tensors(33, heads=4, size=64, dtype=torch.bfloat16, device=device).values())
    for t in tensors:
        t.requires_grad_()

    def step() -> list[torch.Tensor]:
        out = h_update(*tensors, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    assert_cuda_graph_replays(step, changing=tensors[0])


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    rows = 2**31 // 64 + 3
    needed = rows * 64 * 2 * 11  # z, inputs, out, their gradients, and what autograd holds meanwhile
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tail = h_tensors(40, heads=1, size=64, dtype=torch.bfloat16, device=device)
    tensors = dict(tail)
    for name in ("z", "inputs"):
        tensors[name] = torch.zeros(rows, tail[name].shape[1], dtype=torch.bfloat16, device=device)
        tensors[name][-40:] = tail[name]
    leaves = [t.requires_grad_() for t in tensors.values()]
    small = [t.requires_grad_() for t in tail.values()]
    # one configuration for both: bits may differ between tile shapes
    with override_config(**{name: TABLE[name][2, "many"] for name in ("h_forward", "h_backward")}):
        out = h_update(*leaves, backend="triton")
        expected = h_update(*small, backend="triton")
        assert torch.equal(out[-40:], expected)
        cotangent = torch.zeros_like(out)
        cotangent[-40:] = 1
        grad_z, grad_inputs = torch.autograd.grad(out, leaves[:2], cotangent)
        expected_z, expected_inputs = torch.autograd.grad(expected, small[:2], torch.ones_like(expected))
        assert torch.equal(grad_z[-40:], expected_z)
        assert torch.equal(grad_inputs[-40:], expected_inputs)


# ---------------------------------------------------------------------------------------------------- bad input


def _meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"z": lambda t: t[:, :-1]}, {}, "z.shape is (5, 31); it should be (..., 32)"),
        ({"z": lambda t: t[0, 0]}, {}, "z.shape is (); it should be (..., 32)"),
        ({"inputs": lambda t: t[:4]}, {}, "inputs.shape is (4, 96); it should be (5, 96)"),
        ({"inputs": lambda t: t[:, :64]}, {}, "inputs.shape is (5, 64); it should be (5, 96)"),
        ({"w": lambda t: t[0]}, {}, "w.shape is (2, 16, 16); it should be (3, J, D, D)"),
        ({"w": lambda t: t[:2]}, {}, "w.shape is (2, 2, 16, 16); it should be (3, J, D, D)"),
        ({"w": lambda t: t[..., :8]}, {}, "w.shape is (3, 2, 16, 8); it should be (3, J, D, D)"),
        ({"z": torch.Tensor.double}, {}, "z.dtype is torch.float64; it should be float32, bfloat16 or float16"),
        ({"z": torch.Tensor.int}, {}, "z.dtype is torch.int32; it should be float32, bfloat16 or float16"),
        ({"w": torch.Tensor.half}, {}, "w.dtype is torch.float16; it should be torch.float32"),
        ({"inputs": _meta}, {}, "inputs.device is meta; it should be {device}"),
        ({}, {"eps": -1.0}, "eps is -1.0; it should be above 0"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it should be one of 'auto', 'triton', 'reference'"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_errors_name_the_argument(change, options, message, backend, device):
    tensors = h_tensors(5, device=device)
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    message = "h_update: " + message.format(device=tensors["z"].device)
    with pytest.raises(ValueError, match=re.escape(message)):
        h_update(*tensors.values(), **({"backend": backend} | options))


def test_error_for_what_is_no_tensor():
    tensors = h_tensors(5) | {"inputs": [1.0]}
    with pytest.raises(TypeError, match=re.escape("h_update: inputs is list; it should be a torch.Tensor")):
        h_update(*tensors.values())


def test_head_size_above_the_limit_is_an_error_for_triton_and_works_otherwise(device):
    tensors = h_tensors(3, heads=1, size=80, device=device)
    with pytest.raises(BackendError, match=r'h_update: backend="triton" cannot run here: head size 80 is above 64'):
        h_update(*tensors.values(), backend="triton")
    out = h_update(*tensors.values(), backend="auto")
    exact = h_update_reference(*(t.double() for t in tensors.values()))
    assert_as_exact_as_eager("output", out, h_update_reference(*tensors.values()), exact)
