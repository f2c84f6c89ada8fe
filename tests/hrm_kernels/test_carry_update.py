"""The carry between segments: the reference against its equation, the kernel against it, in place and out of place."""

import re

import pytest
import torch
from parity import DTYPES, LAYOUTS, assert_as_exact_as_eager, assert_cuda_graph_replays, carry_tensors

from hrm_kernels import carry_update, carry_update_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def assert_carry_parity(tensors: dict[str, torch.Tensor], **options) -> None:
    """State and steps exactly the reference's; the residual by the criterion for rounding."""
    expected = carry_update_reference(*tensors.values(), **options)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    exact = carry_update_reference(*wide.values(), **options)
    state, steps, residual = carry_update(*tensors.values(), **options, backend="triton")
    torch.testing.assert_close(state, expected[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(steps, expected[1], rtol=0, atol=0)
    assert steps.dtype == torch.int32
    assert residual.dtype == torch.float32
    assert_as_exact_as_eager("residual", residual, expected[2], exact[2])


# ---------------------------------------------------------------------------------------------------- reference


def test_reference_follows_the_equation_row_by_row():
    tensors = carry_tensors(7, 3, dtype=torch.float64)
    state, steps, residual = carry_update_reference(*tensors.values())
    halted, old_steps, old, new, init = tensors.values()
    for row in range(7):
        if halted[row]:
            assert torch.equal(state[row], init.expand(3, -1))
            assert (steps[row], residual[row]) == (0, 0)
        else:
            assert torch.equal(state[row], new[row])
            assert steps[row] == old_steps[row] + 1
            expected = (new[row] - old[row]).square().sum().sqrt() / old[row].square().sum().sqrt()
            torch.testing.assert_close(residual[row], expected)


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "lead"), [(1, ()), (3, ()), (17, ()), (64, ()), (129, ()), (2, (5,)), (3, (4, 2))])
def test_parity_over_rows(rows, lead, dtype, device):
    assert_carry_parity(carry_tensors(rows, *lead, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 1000, 1024, 4099])
def test_parity_over_widths(width, dtype, device):
    assert_carry_parity(carry_tensors(5, width=width, dtype=dtype, device=device))


def test_sequence_rows_longer_than_one_block(device):
    assert_carry_parity(carry_tensors(3, 37, width=300, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "lead"), [(4096, ()), (8, (512,)), (1, (4096,)), (3, (1000,))])
def test_parity_at_full_width(rows, lead, dtype, device):
    assert_carry_parity(carry_tensors(rows, *lead, width=2048, dtype=dtype, device=device))


@pytest.mark.parametrize("halted", [False, True])
def test_all_rows_alike(halted, device):
    tensors = carry_tensors(9, device=device)
    tensors["halted"] = torch.full_like(tensors["halted"], halted)
    assert_carry_parity(tensors)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 100.0])
def test_eps_bounds_the_norm_that_the_residual_divides_by(eps, device):
    tensors = carry_tensors(5, device=device)
    tensors["old"][0] = 0
    assert_carry_parity(tensors, eps=eps)


def test_residual_of_an_unchanged_state_is_zero(device):
    tensors = carry_tensors(5, device=device)
    tensors["new"] = tensors["old"].clone()
    assert carry_update(*tensors.values(), backend="triton")[2].count_nonzero() == 0


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_halted_row_leaks_nothing(bad, backend, device):
    tensors = carry_tensors(6, 2, device=device)
    tensors["new"][1] = bad
    tensors["old"][4] = bad
    state, steps, residual = carry_update(*tensors.values(), backend=backend)
    assert torch.equal(state[1], tensors["init"].expand(2, -1))
    assert (steps[1], residual[1]) == (0, 0)
    assert (steps[4], residual[4]) == (0, 0)
    assert state.isfinite().all()
    assert residual.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_running_row_with_nan_shows_it(backend, device):
    tensors = carry_tensors(6, device=device)
    tensors["new"][2, 5] = float("nan")
    state, _, residual = carry_update(*tensors.values(), backend=backend)
    assert state[2, 5].isnan()
    assert residual[2].isnan()
    assert residual[torch.arange(6, device=device) != 2].isfinite().all()


# ---------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("where", ["old", "new", "another"])
@pytest.mark.parametrize(("rows", "lead", "width"), [(5, (), 48), (3, (4,), 1030)])
def test_writes_where_the_caller_says(where, backend, rows, lead, width, device):
    tensors = carry_tensors(rows, *lead, width=width, device=device)
    expected = carry_update_reference(*tensors.values())
    target = torch.full_like(tensors["old"], float("nan")) if where == "another" else tensors[where]
    untouched = {name: t.clone() for name, t in tensors.items() if name != where}
    state, steps, residual = carry_update(*tensors.values(), out=target, backend=backend)
    assert state.data_ptr() == target.data_ptr()
    assert torch.equal(target, expected[0])
    assert torch.equal(steps, expected[1])
    torch.testing.assert_close(residual, expected[2])
    for name, before in untouched.items():
        assert torch.equal(tensors[name], before), f"{name} was changed"


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_without_out_nothing_is_changed(backend, device):
    tensors = carry_tensors(5, device=device)
    before = {name: t.clone() for name, t in tensors.items()}
    state = carry_update(*tensors.values(), backend=backend)[0]
    assert state.data_ptr() not in {t.data_ptr() for t in tensors.values()}
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was changed"


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_results_carry_no_graph(backend, device):
    tensors = carry_tensors(5, device=device)
    for name in ("old", "new", "init"):
        tensors[name].requires_grad_()
    assert not any(t.requires_grad for t in carry_update(*tensors.values(), backend=backend))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_change_in_place_is_seen_by_autograd(backend, device):
    """A backward that saved the state must refuse to run on what was written over it."""
    tensors = carry_tensors(5, device=device)
    weight = torch.ones_like(tensors["old"], requires_grad=True)
    product = (weight * tensors["old"]).sum()
    carry_update(*tensors.values(), out=tensors["old"], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# ---------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["old", "new"])
def test_layouts_of_the_states(name, layout, device):
    tensors = carry_tensors(4, 6, device=device)
    tensors[name] = LAYOUTS[layout](tensors[name])
    assert_carry_parity(tensors)


def test_layouts_of_the_rest(device):
    tensors = carry_tensors(8, device=device)
    tensors["halted"] = tensors["halted"].repeat_interleave(2)[::2]
    tensors["steps"] = tensors["steps"].repeat_interleave(3)[::3]
    tensors["init"] = tensors["init"].repeat_interleave(2)[::2]
    assert_carry_parity(tensors)
    tensors["steps"] = tensors["steps"][:1].expand(8)
    tensors["halted"] = tensors["halted"][:1].expand(8)
    assert_carry_parity(tensors)


@pytest.mark.parametrize(("rows", "lead"), [(0, ()), (0, (4,)), (3, (0,))])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty(rows, lead, backend, device):
    tensors = carry_tensors(rows, *lead, device=device)
    state, steps, residual = carry_update(*tensors.values(), backend=backend)
    assert state.shape == (rows, *lead, 48)
    assert torch.equal(steps, torch.where(tensors["halted"], 0, tensors["steps"] + 1))
    assert torch.equal(residual, torch.zeros(rows, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype, device):
    tensors = carry_tensors(3, 50, width=200, dtype=dtype, device=device)
    first, second = (carry_update(*tensors.values(), backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------------------------------------- PyTorch around it


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_into_one_graph(in_place, backend, device):
    torch._dynamo.reset()

    def call(halted, steps, old, new, init):
        state, steps, residual = carry_update(
            halted, steps, old, new, init, out=old if in_place else None, backend=backend
        )
        return state * 2, steps, residual

    compiled = torch.compile(call, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    tensors = carry_tensors(6, device=device)
    copies = {name: t.clone() for name, t in tensors.items()}
    for ours, theirs in zip(compiled(*tensors.values()), call(*copies.values()), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(tensors["old"], copies["old"], rtol=0, atol=0)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs(device):
    tensors = carry_tensors(9, 5, width=2048, dtype=torch.bfloat16, device=device)
    assert_cuda_graph_replays(lambda: list(carry_update(*tensors.values(), backend="triton")), changing=tensors["new"])


@pytest.mark.gpu
@pytest.mark.parametrize("by_token", [False, True])
def test_more_than_2_31_elements(by_token, device):
    tokens, width = 2**20 + 3, 2048
    needed = tokens * width * 2 * 4  # old, new, the state, and a temporary while they are made
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    rows, lead = (tokens, ()) if by_token else (1, (tokens,))
    old = torch.zeros(rows, *lead, width, dtype=torch.bfloat16, device=device)
    new = torch.zeros_like(old)
    old.view(tokens, width)[-1] = 1
    new.view(tokens, width)[-1] = 3
    halted = torch.zeros(rows, dtype=torch.bool, device=device)
    steps = torch.zeros(rows, dtype=torch.int32, device=device)
    init = torch.full((width,), 7, dtype=torch.bfloat16, device=device)
    state, _, residual = carry_update(halted, steps, old, new, init, backend="triton")
    assert torch.equal(state, new)
    torch.testing.assert_close(residual[-1].item(), 2.0)
    assert residual[:-1].count_nonzero() == 0


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"old": lambda t: t[:, 0], "new": lambda t: t[:, 0]}, {}, "old.shape is (5); it should be (rows, ..., d)"),
        ({"new": lambda t: t[:4]}, {}, "new.shape is (4, 48); it should be (5, 48)"),
        ({"init": lambda t: t[:-1]}, {}, "init.shape is (47); it should be (48)"),
        ({"halted": lambda t: t[:4]}, {}, "halted.shape is (4); it should be (5)"),
        ({"steps": lambda t: t[:, None]}, {}, "steps.shape is (5, 1); it should be (5)"),
        ({"halted": torch.Tensor.int}, {}, "halted.dtype is torch.int32; it should be torch.bool"),
        ({"steps": torch.Tensor.long}, {}, "steps.dtype is torch.int64; it should be torch.int32"),
        ({"old": torch.Tensor.double}, {}, "old.dtype is torch.float64; it should be float32, bfloat16 or float16"),
        ({"new": torch.Tensor.half}, {}, "new.dtype is torch.float16; it should be torch.float32"),
        ({"init": torch.Tensor.half}, {}, "init.dtype is torch.float16; it should be torch.float32"),
        ({"new": lambda t: t.to("meta")}, {}, "new.device is meta; it should be {device}"),
        ({"halted": lambda t: t.to("meta")}, {}, "halted.device is meta; it should be {device}"),
        ({}, {"out": (4, 48)}, "out.shape is (4, 48); it should be (5, 48)"),
        ({}, {"eps": 0.0}, "eps is 0.0; it should be above 0"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it should be one of 'auto', 'triton', 'reference'"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_errors_name_the_argument(change, options, message, backend, device):
    tensors = carry_tensors(5, device=device)
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    if "out" in options:
        options = {"out": torch.empty(options["out"], device=device)}
    message = "carry_update: " + message.format(device=tensors["old"].device)
    with pytest.raises(ValueError, match=re.escape(message)):
        carry_update(*tensors.values(), **({"backend": backend} | options))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_out_that_is_not_contiguous_is_an_error(backend, device):
    tensors = carry_tensors(4, 6, device=device)
    out = torch.empty(6, 4, 48, device=device).transpose(0, 1)
    with pytest.raises(ValueError, match="carry_update: out"):
        carry_update(*tensors.values(), out=out, backend=backend)


@pytest.mark.parametrize("name", ["old", "new", "init", "halted", "steps"])
def test_error_for_what_is_no_tensor(name):
    tensors = carry_tensors(5) | {name: [1.0]}
    with pytest.raises(TypeError, match=re.escape(f"carry_update: {name} is list; it should be a torch.Tensor")):
        carry_update(*tensors.values())
