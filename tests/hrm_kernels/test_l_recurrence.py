"""The L recurrence: the reference against its equation, the kernel against float64, and how the function behaves."""

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
    l_tensors,
)

from hrm_kernels import BackendError, l_recurrence, l_recurrence_reference
from hrm_kernels._triton import HOPPER, TABLE, Config, override_config

pytestmark = pytest.mark.usefixtures("poisoned_memory")

L_KERNELS = ("l_forward", "l_backward_one", "l_backward_many")
NAMES = ("z", "context", "w_gate", "w_up", "w_down")
ALL_STEPS = [(steps, grad_steps) for steps in range(1, 6) for grad_steps in range(1, steps + 1)]


# ---------------------------------------------------------------------------------------------------- reference


def test_reference_follows_the_equation_token_by_token():
    tensors = l_tensors(3, heads=2, size=8, dtype=torch.float64)
    z, context, w_gate, w_up, w_down = tensors.values()
    expected = torch.empty_like(z)
    for token, head in itertools.product(range(3), range(2)):
        columns = slice(8 * head, 8 * head + 8)
        state = z[token, columns]
        c_g, c_u = context[token, :16][columns], context[token, 16:][columns]
        for _ in range(4):
            g = state @ w_gate[head] + c_g
            u = state @ w_up[head] + c_u
            y = state + (g / (1 + torch.exp(-g)) * u) @ w_down[head]
            state = y / torch.sqrt((y * y).mean() + 1e-6)
        expected[token, columns] = state
    torch.testing.assert_close(l_recurrence_reference(*tensors.values(), steps=4), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_reference_gradcheck(steps):
    leaves = [t.requires_grad_() for t in l_tensors(2, heads=2, size=3, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *t: l_recurrence_reference(*t, steps=steps, grad_steps=steps), leaves)


def test_reference_detaches_the_state_before_the_last_grad_steps():
    tensors = l_tensors(3, dtype=torch.float64)
    z, *rest = (t.requires_grad_() for t in tensors.values())
    middle = l_recurrence_reference(z, *rest, steps=3, grad_steps=3).detach()
    cut = l_recurrence_reference(middle, *rest, steps=2, grad_steps=2)
    whole = l_recurrence_reference(z, *rest, steps=5, grad_steps=2)
    cotangent = torch.randn_like(cut)
    expected = torch.autograd.grad(cut, rest, cotangent)
    torch.testing.assert_close(torch.autograd.grad(whole, rest, cotangent), expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("steps", "grad_steps"), ALL_STEPS)
def test_parity_over_steps(steps, grad_steps, dtype, device):
    assert_parity(l_recurrence, l_tensors(17, dtype=dtype, device=device), steps=steps, grad_steps=grad_steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 64, 129])
def test_parity_over_tokens(tokens, dtype, device):
    assert_parity(l_recurrence, l_tensors(tokens, dtype=dtype, device=device), steps=3, grad_steps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (2, 32), (1, 64), (3, 8), (2, 24), (1, 48), (3, 5)])
def test_parity_over_heads(heads, size, dtype, device):
    tensors = l_tensors(19, heads=heads, size=size, dtype=dtype, device=device)
    assert_parity(l_recurrence, tensors, steps=3, grad_steps=3)
    assert_parity(l_recurrence, tensors, steps=2, grad_steps=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 64, 4096, 5000])
@pytest.mark.parametrize(("steps", "grad_steps"), [(8, 1), (8, 8)])
def test_parity_at_full_width(tokens, steps, grad_steps, dtype, device):
    tensors = l_tensors(tokens, heads=32, size=64, dtype=dtype, device=device)
    assert_parity(l_recurrence, tensors, steps=steps, grad_steps=grad_steps)


@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (2, 1, 3)])
def test_leading_dimensions(lead, device):
    assert_parity(l_recurrence, l_tensors(*lead, device=device), steps=2, grad_steps=2)


@pytest.mark.parametrize("kernel", L_KERNELS)
@pytest.mark.parametrize(
    "config", sorted({c for t in (TABLE, HOPPER) for e in t.values() for c in e.values()}, key=str)
)
def test_every_configuration_of_the_table_gives_the_same_numbers(kernel, config, device):
    with override_config(**{kernel: config}):
        assert_parity(l_recurrence, l_tensors(70, device=device), steps=2, grad_steps=1 + (kernel != "l_backward_one"))


@pytest.mark.parametrize("grad_steps", [1, 3])
def test_one_program_walks_over_all_tiles(grad_steps, device):
    with override_config(**dict.fromkeys(L_KERNELS, Config(16, 4, 0))):
        assert_parity(l_recurrence, l_tensors(75, heads=3, device=device), steps=3, grad_steps=grad_steps)


@pytest.mark.parametrize("eps", [1e-12, 1e-2, 1.0])
def test_eps(eps, device):
    assert_parity(l_recurrence, l_tensors(5, device=device), steps=2, grad_steps=2, eps=eps)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_parity_over_the_size_of_the_inputs(scale, device):
    tensors = l_tensors(9, device=device)
    tensors |= {"z": tensors["z"] * scale, "context": tensors["context"] * scale}
    assert_parity(l_recurrence, tensors, steps=2, grad_steps=2)


def test_zero_state_and_context_stay_zero(device):
    tensors = l_tensors(4, device=device)
    zeros = {"z": torch.zeros_like(tensors["z"]), "context": torch.zeros_like(tensors["context"])}
    out = l_recurrence(*(tensors | zeros).values(), steps=3, backend="triton")
    assert torch.equal(out, zeros["z"])


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("wrt", [c for n in (1, 2, 4) for c in itertools.combinations(NAMES, n)], ids="+".join)
@pytest.mark.parametrize("grad_steps", [1, 2])
def test_gradients_of_a_subset(wrt, grad_steps, device):
    if wrt == ("z",) and grad_steps < 2:
        pytest.skip("nothing differentiable: see test_state_before_the_gradient_gets_none")
    assert_parity(l_recurrence, l_tensors(5, device=device), wrt=wrt, steps=2, grad_steps=grad_steps)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_state_before_the_gradient_gets_none(backend, device):
    leaves = [t.requires_grad_() for t in l_tensors(5, device=device).values()]
    out = l_recurrence(*leaves, steps=3, grad_steps=2, backend=backend)
    gradients = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    assert gradients[0] is None or gradients[0].count_nonzero() == 0
    assert all(g.count_nonzero() > 0 for g in gradients[1:])
    whole = l_recurrence(*leaves, steps=3, grad_steps=3, backend=backend)
    assert torch.autograd.grad(whole.square().mul(torch.rand_like(whole)).sum(), leaves[0])[0].count_nonzero() > 0


@pytest.mark.parametrize("layout", ["transposed", "strided last", "expanded rows", "expanded last"])
def test_layout_of_the_cotangent(layout, device):
    tensors = l_tensors(4, 6, device=device)
    cotangent = LAYOUTS[layout](torch.randn_like(tensors["z"]))
    assert_parity(l_recurrence, tensors, cotangent=cotangent, steps=3, grad_steps=2)


def test_no_graph_under_no_grad(device):
    leaves = [t.requires_grad_() for t in l_tensors(3, device=device).values()]
    with torch.no_grad():
        assert not l_recurrence(*leaves, steps=3, backend="triton").requires_grad


def test_same_output_with_and_without_graph(device):
    tensors = l_tensors(33, dtype=torch.float32, device=device)
    with torch.no_grad():
        plain = l_recurrence(*tensors.values(), steps=5, grad_steps=2, backend="triton")
    graph = l_recurrence(*(t.requires_grad_() for t in tensors.values()), steps=5, grad_steps=2, backend="triton")
    torch.testing.assert_close(graph, plain, rtol=0, atol=0)


def test_backward_through_a_retained_graph_twice_gives_the_same(device):
    leaves = [t.requires_grad_() for t in l_tensors(5, device=device).values()]
    out = l_recurrence(*leaves, steps=3, grad_steps=2, backend="triton").square().sum()
    first = torch.autograd.grad(out, leaves[1:], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, leaves[1:]), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number(device):
    leaves = [t.requires_grad_() for t in l_tensors(5, device=device).values()]
    out = l_recurrence(*leaves, steps=2, grad_steps=2, backend="triton")
    gradient = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_what_is_saved_does_not_grow_with_steps(grad_steps, device):
    def saved(steps: int, grad_steps: int) -> int:
        leaves = [t.requires_grad_() for t in l_tensors(9, device=device).values()]
        return bytes_saved_for_backward(
            lambda: l_recurrence(*leaves, steps=steps, grad_steps=grad_steps, backend="triton")
        )

    state = 9 * 32 * 4
    weights = 3 * 2 * 16 * 16 * 4
    assert saved(3, grad_steps) == saved(24, grad_steps) == state + 2 * state + weights
    assert saved(24, 5) == saved(24, grad_steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype, device):
    tensors = l_tensors(77, heads=3, dtype=dtype, device=device)
    cotangent = torch.randn_like(tensors["z"])

    def run() -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        out = l_recurrence(*leaves, steps=4, grad_steps=4, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, cotangent)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["z", "context"])
def test_layouts_of_the_rows(name, layout, device):
    tensors = l_tensors(4, 6, device=device)
    tensors[name] = LAYOUTS[layout](tensors[name])
    assert_parity(l_recurrence, tensors, steps=3, grad_steps=3)
    assert_parity(l_recurrence, tensors, steps=3, grad_steps=1)


@pytest.mark.parametrize("layout", ["transposed", "strided rows", "strided last", "expanded rows"])
@pytest.mark.parametrize("name", ["w_gate", "w_up", "w_down"])
def test_layouts_of_the_weights(name, layout, device):
    tensors = l_tensors(5, heads=3, device=device)
    tensors[name] = LAYOUTS[layout](tensors[name])
    assert_parity(l_recurrence, tensors, steps=2, grad_steps=2)


def test_inputs_stay_as_they_were(device):
    tensors = l_tensors(20, device=device)
    before = {name: t.clone() for name, t in tensors.items()}
    out = l_recurrence(*(t.requires_grad_() for t in tensors.values()), steps=3, grad_steps=3, backend="triton")
    torch.autograd.grad(out.sum(), list(tensors.values()))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was changed"


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("grad_steps", [1, 3])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_batch(lead, grad_steps, backend, device):
    leaves = [t.requires_grad_() for t in l_tensors(*lead, device=device).values()]
    out = l_recurrence(*leaves, steps=3, grad_steps=grad_steps, backend=backend)
    assert out.shape == (*lead, 32)
    gradients = torch.autograd.grad(out.sum(), leaves[1:])
    assert gradients[0].shape == (*lead, 64)
    for gradient in gradients[1:]:
        assert gradient.shape == (2, 16, 16)
        assert gradient.count_nonzero() == 0


def test_nan_stays_in_its_row(device):
    tensors = l_tensors(20, device=device)
    tensors["z"][7] = float("nan")
    out = l_recurrence(*tensors.values(), steps=3, backend="triton")
    assert out[7].isnan().all()
    assert out[torch.arange(20, device=device) != 7].isfinite().all()


# ---------------------------------------------------------------------------------------------------- PyTorch around it


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_runs_the_whole_operation_in_its_dtype(backend, device):
    tensors = l_tensors(9, device=device)
    low = {name: t.half() for name, t in tensors.items()}
    leaves = [t.requires_grad_() for t in tensors.values()]
    expected = l_recurrence(*low.values(), steps=3, backend=backend)
    with torch.autocast(device.type, torch.float16):
        out = l_recurrence(*leaves, steps=3, backend=backend)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.sum(), leaves[1:])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("grad_steps", [1, 3])
def test_compiles_into_one_graph(backend, grad_steps, device):
    def call(*args):
        return l_recurrence(*args, steps=3, grad_steps=grad_steps, backend=backend) * 2

    assert_compiles_into_one_graph(call, l_tensors(9, device=device), wrt=NAMES[1:])


@pytest.mark.parametrize("save", [False, True])
def test_operator_registration(save, device):
    grad_steps = 1 if save else 3
    for requires_grad in (False, True):
        leaves = [t.requires_grad_(requires_grad) for t in l_tensors(5, device=device).values()]
        torch.library.opcheck(torch.ops.hrm.l_recurrence.default, (*leaves, 3, grad_steps, 1e-6, save))


@pytest.mark.parametrize("grad_z", [False, True])
def test_backward_operator_registration(grad_z, device):
    tensors = list(l_tensors(5, device=device).values())
    grad = torch.randn_like(tensors[0])
    torch.library.opcheck(torch.ops.hrm.l_recurrence_backward.default, (grad, *tensors, 2, 1e-6, grad_z))


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs(device):
    tensors = list(l_tensors(33, heads=4, size=64, dtype=torch.bfloat16, device=device).values())
    for t in tensors:
        t.requires_grad_()

    def step() -> list[torch.Tensor]:
        out = l_recurrence(*tensors, steps=4, grad_steps=2, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), tensors[1:])]

    assert_cuda_graph_replays(step, changing=tensors[0])


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    rows = 2**31 // 64 + 3
    needed = rows * 64 * 2 * 11  # z, context, out, saved state, their gradients, and what autograd holds meanwhile
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tail = l_tensors(40, heads=1, size=64, dtype=torch.bfloat16, device=device)
    tensors = dict(tail)
    for name in ("z", "context"):
        tensors[name] = torch.zeros(rows, tail[name].shape[1], dtype=torch.bfloat16, device=device)
        tensors[name][-40:] = tail[name]
    leaves = [t.requires_grad_() for t in tensors.values()]
    small = [t.requires_grad_() for t in tail.values()]
    # one configuration for both: bits may differ between tile shapes
    with override_config(**{name: TABLE[name][2, "many"] for name in L_KERNELS}):
        out = l_recurrence(*leaves, steps=2, grad_steps=2, backend="triton")
        expected = l_recurrence(*small, steps=2, grad_steps=2, backend="triton")
        assert torch.equal(out[-40:], expected)
        cotangent = torch.zeros_like(out)
        cotangent[-40:] = 1
        grad_z, grad_context = torch.autograd.grad(out, leaves[:2], cotangent)
        expected_z, expected_context = torch.autograd.grad(expected, small[:2], torch.ones_like(expected))
        assert torch.equal(grad_z[-40:], expected_z)
        assert torch.equal(grad_context[-40:], expected_context)


# ---------------------------------------------------------------------------------------------------- bad input


def _meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"z": lambda t: t[:, :-1]}, {}, "z.shape is (5, 31); it should be (..., 32)"),
        ({"z": lambda t: t[0, 0]}, {}, "z.shape is (); it should be (..., 32)"),
        ({"context": lambda t: t[:4]}, {}, "context.shape is (4, 64); it should be (5, 64)"),
        ({"context": lambda t: t[:, :32]}, {}, "context.shape is (5, 32); it should be (5, 64)"),
        ({"w_gate": lambda t: t[0]}, {}, "w_gate.shape is (16, 16); it should be (J, D, D)"),
        ({"w_gate": lambda t: t[:, :8]}, {}, "w_gate.shape is (2, 8, 16); it should be (J, D, D)"),
        ({"w_up": lambda t: t[:1]}, {}, "w_up.shape is (1, 16, 16); it should be (2, 16, 16)"),
        ({"w_down": lambda t: t[:, :8]}, {}, "w_down.shape is (2, 8, 16); it should be (2, 16, 16)"),
        ({"z": torch.Tensor.double}, {}, "z.dtype is torch.float64; it should be float32, bfloat16 or float16"),
        ({"z": torch.Tensor.int}, {}, "z.dtype is torch.int32; it should be float32, bfloat16 or float16"),
        ({"w_up": torch.Tensor.half}, {}, "w_up.dtype is torch.float16; it should be torch.float32"),
        ({"w_down": _meta}, {}, "w_down.device is meta; it should be {device}"),
        ({}, {"steps": 0}, "steps is 0; it should be at least 1"),
        ({}, {"steps": 3, "grad_steps": 4}, "grad_steps is 4; it should be from 1 to steps = 3"),
        ({}, {"steps": 3, "grad_steps": 0}, "grad_steps is 0; it should be from 1 to steps = 3"),
        ({}, {"eps": 0.0}, "eps is 0.0; it should be above 0"),
        ({}, {"eps": float("nan")}, "eps is nan; it should be above 0"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it should be one of 'auto', 'triton', 'reference'"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_errors_name_the_argument(change, options, message, backend, device):
    tensors = l_tensors(5, device=device)
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    message = "l_recurrence: " + message.format(device=tensors["z"].device)
    with pytest.raises(ValueError, match=re.escape(message)):
        l_recurrence(*tensors.values(), **({"steps": 2, "backend": backend} | options))


def test_error_for_what_is_no_tensor():
    tensors = l_tensors(5) | {"context": [1.0]}
    with pytest.raises(TypeError, match=re.escape("l_recurrence: context is list; it should be a torch.Tensor")):
        l_recurrence(*tensors.values(), steps=2)


def test_head_size_above_the_limit_is_an_error_for_triton_and_works_otherwise(device):
    tensors = l_tensors(3, heads=1, size=80, device=device)
    with pytest.raises(BackendError, match=r'l_recurrence: backend="triton" cannot run here: head size 80 is above 64'):
        l_recurrence(*tensors.values(), steps=2, backend="triton")
    out = l_recurrence(*tensors.values(), steps=2, backend="auto")
    exact = l_recurrence_reference(*(t.double() for t in tensors.values()), steps=2)
    assert_as_exact_as_eager("output", out, l_recurrence_reference(*tensors.values(), steps=2), exact)
