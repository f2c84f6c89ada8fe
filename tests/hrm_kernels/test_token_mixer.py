"""The token mixer: the reference against its equation, the kernels against float64, and how the function behaves."""

import itertools
import re

import pytest
import torch
from parity import (
    DTYPES,
    LAYOUTS,
    REFERENCES,
    assert_as_exact_as_eager,
    assert_compiles_into_one_graph,
    assert_cuda_graph_replays,
    assert_parity,
    bytes_saved_for_backward,
)

from hrm_kernels import BackendError
from hrm_kernels.token_mixer import (
    MIXER_HOPPER,
    MIXER_TABLE,
    MixerConfig,
    override_mixer_config,
    parts,
    token_mixer,
    token_mixer_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("x", "w_gate_up", "w_down")
REFERENCES[token_mixer] = token_mixer_reference


def mixer_tensors(
    batch: int = 2,
    length: int = 9,
    width: int = 12,
    inner: int = 13,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """The tensor arguments of `token_mixer`: states of size 1, weights that keep the size of what they multiply."""
    like = {"dtype": dtype, "device": device}
    return {
        "x": torch.randn(batch, length, width, device=device).to(**like),
        "w_gate_up": (torch.randn(2 * inner, length, device=device) * length**-0.5).to(**like),
        "w_down": (torch.randn(length, inner, device=device) * inner**-0.5).to(**like),
    }


# ---------------------------------------------------------------------------------------------------- reference


def test_reference_follows_the_equation_channel_by_channel():
    x, w_gate_up, w_down = mixer_tensors(2, 5, 3, 4, torch.float64).values()
    expected = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(3)):
        column = x[b, :, c]
        g, u = w_gate_up[:4] @ column, w_gate_up[4:] @ column
        v = column + w_down @ (g / (1 + torch.exp(-g)) * u)
        expected[b, :, c] = v / torch.sqrt((v * v).mean() + 1e-5)
    torch.testing.assert_close(token_mixer_reference(x, w_gate_up, w_down), expected)


def test_reference_gradcheck():
    leaves = [t.requires_grad_() for t in mixer_tensors(2, 4, 3, 5, torch.float64).values()]
    assert torch.autograd.gradcheck(token_mixer_reference, leaves)


# ---------------------------------------------------------------------------------------------------- parity


def test_parts_hold_all_positions_and_no_more_than_they_must():
    for length in range(1, 129):
        first, second = parts(length)
        assert first in (16, 32, 64, 128)
        assert second in (0, 16, 32)
        assert length <= first + second < max(2 * length, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 16, 17, 33, 65, 81, 97, 128])
def test_parity_over_positions(length, dtype, device):
    assert_parity(token_mixer, mixer_tensors(1, length, 16, 16, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_position(dtype, device):
    # y = v / sqrt(v^2 + eps): with a small eps its slope is nothing but rounding, and 32 weights of 16 bits are too few
    # to compare two roundings
    wrt = NAMES if dtype == torch.float32 else ()
    assert_parity(token_mixer, mixer_tensors(3, 1, 16, 16, dtype, device), wrt=wrt, eps=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "inner"), [(1, 1), (7, 16), (16, 17), (33, 40)])
def test_parity_over_widths(width, inner, dtype, device):
    assert_parity(token_mixer, mixer_tensors(2, 20, width, inner, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "inner"), [(81, 256), (97, 512), (64, 256), (128, 512), (16, 64)])
@pytest.mark.parametrize("batch", [3, 96])
def test_parity_at_full_width(batch, length, inner, dtype, device):
    assert_parity(token_mixer, mixer_tensors(batch, length, 512, inner, dtype, device))


CONFIGS = sorted({(name, c) for t in (MIXER_TABLE, MIXER_HOPPER) for name in t for c in t[name].values()}, key=str)


@pytest.mark.parametrize(("kernel", "config"), CONFIGS)
def test_every_configuration_of_the_table_gives_the_same_numbers(kernel, config, device):
    # float32 tiles of the 16-bit entries would not fit a block
    with override_mixer_config(**{kernel: config}):
        assert_parity(token_mixer, mixer_tensors(1, 66, 80, 70, torch.float16, device))


def test_one_program_walks_over_all_tiles(device):
    with override_mixer_config(mixer_backward_w=MixerConfig(16, 16, 8, 1, programs=0)):
        assert_parity(token_mixer, mixer_tensors(3, 20, 40, 40, device=device))


def test_tiles_shared_unevenly_between_programs(device):
    with override_mixer_config(mixer_backward_w=MixerConfig(16, 16, 8, 1, programs=4)):
        assert_parity(token_mixer, mixer_tensors(3, 20, 40, 16, device=device))


@pytest.mark.parametrize("eps", [1e-12, 1e-2, 1.0])
def test_parity_over_eps(eps, device):
    assert_parity(token_mixer, mixer_tensors(device=device), eps=eps)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_parity_over_the_size_of_the_states(scale, device):
    tensors = mixer_tensors(device=device)
    assert_parity(token_mixer, tensors | {"x": tensors["x"] * scale})


def test_more_than_the_most_positions_is_an_error_for_triton_and_works_otherwise(device):
    tensors = mixer_tensors(1, 129, 4, 8, device=device)
    with pytest.raises(
        BackendError, match=r'token_mixer: backend="triton" cannot run here: 129 positions are above 128'
    ):
        token_mixer(*tensors.values(), backend="triton")
    exact = token_mixer_reference(*(t.double() for t in tensors.values()))
    out = token_mixer(*tensors.values(), backend="auto")
    assert_as_exact_as_eager("output", out, token_mixer_reference(*tensors.values()), exact)


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("wrt", [c for n in (1, 2) for c in itertools.combinations(NAMES, n)], ids="+".join)
def test_gradients_of_a_subset(wrt, device):
    assert_parity(token_mixer, mixer_tensors(device=device), wrt=wrt)


@pytest.mark.parametrize("layout", ["transposed", "strided last", "expanded rows", "expanded last"])
def test_layout_of_the_cotangent(layout, device):
    tensors = mixer_tensors(device=device)
    assert_parity(token_mixer, tensors, cotangent=LAYOUTS[layout](torch.randn_like(tensors["x"])))


def test_no_graph_under_no_grad(device):
    leaves = [t.requires_grad_() for t in mixer_tensors(device=device).values()]
    with torch.no_grad():
        assert not token_mixer(*leaves, backend="triton").requires_grad


def test_backward_through_a_retained_graph_twice_gives_the_same(device):
    leaves = [t.requires_grad_() for t in mixer_tensors(device=device).values()]
    out = token_mixer(*leaves, backend="triton").square().sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, leaves), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_an_error_and_not_a_wrong_number(device):
    leaves = [t.requires_grad_() for t in mixer_tensors(device=device).values()]
    out = token_mixer(*leaves, backend="triton")
    gradient = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_only_inputs_output_and_the_scale_of_each_channel_are_saved(device):
    leaves = [t.requires_grad_() for t in mixer_tensors(2, 9, 20, device=device).values()]
    allowed = sum(t.nbytes for t in leaves) + leaves[0].nbytes + 2 * 20 * 4
    assert bytes_saved_for_backward(lambda: token_mixer(*leaves, backend="triton")) <= allowed


def test_an_output_changed_in_place_is_an_error_and_not_a_wrong_gradient(device):
    leaves = [t.requires_grad_() for t in mixer_tensors(device=device).values()]
    out = token_mixer(*leaves, backend="triton")
    loss = out.square().sum()
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic(dtype, device):
    tensors = mixer_tensors(3, 33, 20, 24, dtype, device)
    cotangent = torch.randn_like(tensors["x"])

    def run() -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        out = token_mixer(*leaves, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, cotangent)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name, layout, device):
    tensors = mixer_tensors(inner=16, device=device)
    tensors[name] = LAYOUTS[layout](tensors[name])
    assert_parity(token_mixer, tensors)


def test_inputs_stay_as_they_were(device):
    tensors = mixer_tensors(device=device)
    before = {name: t.clone() for name, t in tensors.items()}
    out = token_mixer(*(t.requires_grad_() for t in tensors.values()), backend="triton")
    torch.autograd.grad(out.sum(), list(tensors.values()))
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was changed"


@pytest.mark.parametrize(("batch", "width"), [(0, 20), (2, 0)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_batch(batch, width, backend, device):
    leaves = [t.requires_grad_() for t in mixer_tensors(batch, 9, width, device=device).values()]
    out = token_mixer(*leaves, backend=backend)
    assert out.shape == (batch, 9, width)
    gradients = torch.autograd.grad(out.sum(), leaves)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.count_nonzero() == 0


def test_nan_stays_in_its_channel(device):
    tensors = mixer_tensors(2, 9, 20, device=device)
    tensors["x"][1, 3, 7] = float("nan")
    out = token_mixer(*tensors.values(), backend="triton")
    assert out[1, :, 7].isnan().all()
    assert out.isnan().sum() == 9


# ---------------------------------------------------------------------------------------------------- PyTorch around it


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_runs_the_whole_operation_in_its_dtype(backend, device):
    tensors = mixer_tensors(device=device)
    expected = token_mixer(*(t.half() for t in tensors.values()), backend=backend)
    leaves = [t.requires_grad_() for t in tensors.values()]
    with torch.autocast(device.type, torch.float16):
        out = token_mixer(*leaves, backend=backend)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend, device):
    def call(*args):
        return token_mixer(*args, backend=backend) * 2

    assert_compiles_into_one_graph(call, mixer_tensors(device=device), wrt=NAMES)


def test_operator_registration(device):
    for requires_grad in (False, True):
        leaves = [t.requires_grad_(requires_grad) for t in mixer_tensors(device=device).values()]
        torch.library.opcheck(torch.ops.hrm.token_mixer.default, (*leaves, 1e-5, requires_grad))


@pytest.mark.parametrize("grad_w", [False, True])
def test_backward_operator_registration(grad_w, device):
    tensors = list(mixer_tensors(device=device).values())
    out, scale = torch.ops.hrm.token_mixer(*tensors, 1e-5, True)
    arguments = (torch.randn_like(out), *tensors, out, scale, 1e-5, grad_w)
    torch.library.opcheck(torch.ops.hrm.token_mixer_backward.default, arguments)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_inputs(device):
    tensors = list(mixer_tensors(4, 81, 512, 256, torch.bfloat16, device).values())
    for t in tensors:
        t.requires_grad_()

    def step() -> list[torch.Tensor]:
        out = token_mixer(*tensors, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    assert_cuda_graph_replays(step, changing=tensors[0])


@pytest.mark.gpu
def test_more_than_2_31_elements(device):
    length, width = 16, 512
    batch = 2**31 // (length * width) + 3
    needed = batch * length * width * 2 * 6  # x, y, their gradients, that of v, and what autograd holds meanwhile
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    tail = mixer_tensors(3, length, width, 64, torch.bfloat16, device)
    x = torch.zeros(batch, length, width, dtype=torch.bfloat16, device=device)
    x[-3:] = tail["x"]
    out = token_mixer(x.requires_grad_(), tail["w_gate_up"], tail["w_down"], backend="triton")
    small = token_mixer(tail["x"].requires_grad_(), tail["w_gate_up"], tail["w_down"], backend="triton")
    assert torch.equal(out[-3:], small)
    cotangent = torch.zeros_like(out)
    cotangent[-3:] = 1
    gradient = torch.autograd.grad(out, x, cotangent)[0]
    assert torch.equal(gradient[-3:], torch.autograd.grad(small, tail["x"], torch.ones_like(small))[0])


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": lambda t: t[0]}, {}, "x.shape is (9, 12); it should be (B, L, d)"),
        ({"x": lambda t: t[:, :-1]}, {}, "w_gate_up.shape is (26, 9); it should be (2*I, 8)"),
        ({"w_gate_up": lambda t: t[:-1]}, {}, "w_gate_up.shape is (25, 9); it should be (2*I, 9)"),
        ({"w_gate_up": lambda t: t[:0]}, {}, "w_gate_up.shape is (0, 9); it should be (2*I, 9), I >= 1"),
        ({"w_gate_up": lambda t: t[0]}, {}, "w_gate_up.shape is (9); it should be (2*I, 9)"),
        ({"w_down": lambda t: t.t()}, {}, "w_down.shape is (13, 9); it should be (9, 13)"),
        ({"x": torch.Tensor.double}, {}, "x.dtype is torch.float64; it should be float32, bfloat16 or float16"),
        ({"w_down": torch.Tensor.half}, {}, "w_down.dtype is torch.float16; it should be torch.float32"),
        ({"w_gate_up": lambda t: t.to("meta")}, {}, "w_gate_up.device is meta; it should be {device}"),
        ({}, {"eps": -1.0}, "eps is -1.0; it should be above 0"),
        ({}, {"backend": "cuda"}, "backend is 'cuda'; it should be one of 'auto', 'triton', 'reference'"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_errors_name_the_argument(change, options, message, backend, device):
    tensors = mixer_tensors(device=device)
    for name, function in change.items():
        tensors[name] = function(tensors[name])
    message = "token_mixer: " + message.format(device=tensors["x"].device)
    with pytest.raises(ValueError, match=re.escape(message)):
        token_mixer(*tensors.values(), **({"backend": backend} | options))


def test_error_for_what_is_no_tensor():
    tensors = mixer_tensors() | {"w_down": [1.0]}
    with pytest.raises(TypeError, match=re.escape("token_mixer: w_down is list; it should be a torch.Tensor")):
        token_mixer(*tensors.values())


def test_override_of_no_kernel():
    with (
        pytest.raises(ValueError, match="'mixer' is no kernel; it should be one of mixer_forward"),
        override_mixer_config(mixer=MixerConfig(16, 16, 4)),
    ):
        pass
