"""A whole segment of the core: prefill, training, decoding, and how its memory grows with its depth."""

import copy

import pytest
import torch
from measurement import DEVICE, DTYPE, ON_GPU, VARIANTS, WIDTH, Case, count, peak_bytes
from parity import assert_as_exact_as_eager

from hrm import HRMConfig, HRMCore
from hrm.attention import SlotCache

PREFILL = (8, 512) if ON_GPU else (2, 32)  # sequences, positions
PAST = 511 if ON_GPU else 31  # positions in the cache while decoding
SETTINGS = {"hidden_size": WIDTH, "d_l": WIDTH, "d_h": 2 * WIDTH, "h_cycles": 4, "l_steps": 8}
MIXERS = ("none", "attention")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("h_mixer", MIXERS)
def test_forward(h_mixer, variant, measure):
    measure(variant, make_case(*PREFILL, h_mixer=h_mixer))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("h_mixer", MIXERS)
@pytest.mark.parametrize(("grad_cycles", "grad_l_steps"), [(1, 1), (1, 8)])
def test_forward_and_backward(grad_cycles, grad_l_steps, h_mixer, variant, measure):
    case = make_case(*PREFILL, h_mixer=h_mixer, grad_cycles=grad_cycles, grad_l_steps=grad_l_steps, backward=True)
    measure(variant, case)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("h_mixer", MIXERS)
@pytest.mark.parametrize("sequences", [64, 1] if ON_GPU else [1])
def test_decoding(sequences, h_mixer, variant, measure):
    measure(variant, make_case(sequences, 1, h_mixer=h_mixer))


@pytest.mark.parametrize(
    ("variant", "gradient"),
    [("fused", "one-step gradient"), ("eager", "one-step gradient"), ("eager", "full backpropagation")],
)
@pytest.mark.parametrize("depth", [1, 8, 64])
def test_peak_memory(depth, variant, gradient, benchmark):
    if not ON_GPU:
        pytest.skip("peak memory is read from the CUDA allocator")
    grads = (depth, depth) if gradient == "full backpropagation" else (1, 1)
    config = HRMConfig(
        **(SETTINGS | {"d_l": 1024, "d_h": 2048, "h_cycles": depth, "l_steps": depth}),
        h_mixer="none",
        grad_cycles=grads[0],
        grad_l_steps=grads[1],
        fused=variant == "fused",
    )
    core = HRMCore(config).to(DEVICE, DTYPE)
    h = torch.randn(1, 256, WIDTH, device=DEVICE, dtype=DTYPE)
    weights = [w for w in core.parameters() if w.requires_grad]

    def step():
        return torch.autograd.grad(core(h, segments=1).z_h.sum(), weights, allow_unused=True)

    benchmark.group = f"segment memory, N = T = {depth}"
    benchmark.extra_info.update(
        operation="segment memory",
        case=f"{depth}",
        variant=f"{variant}, {gradient}",
        peak_bytes=peak_bytes(step),
    )
    benchmark.pedantic(lambda: (step(), torch.cuda.synchronize()), rounds=1)


def make_case(
    sequences: int, positions: int, *, h_mixer: str, backward: bool = False, grad_cycles: int = 1, grad_l_steps: int = 1
) -> Case:
    """One position: decoding behind `PAST` positions, at which the attention mixer looks back through its cache."""
    config = HRMConfig(**SETTINGS, h_mixer=h_mixer, grad_cycles=grad_cycles, grad_l_steps=grad_l_steps)
    core = HRMCore(config).to(DEVICE, DTYPE)
    h = torch.randn(sequences, positions, WIDTH, device=DEVICE, dtype=DTYPE)
    cached = positions == 1
    cache = filled_cache(core, sequences) if cached else None

    def run(model: HRMCore, inputs: torch.Tensor, slots: SlotCache | None) -> torch.Tensor:
        if slots is not None:
            slots.length = PAST  # every call decodes the same position
        return model(inputs, segments=1, cache=slots).z_h

    def call(backend: str):
        core.fused = backend == "triton"
        return lambda: run(core, h, cache)

    @torch.no_grad()
    def check() -> None:
        exact_core = copy.deepcopy(core).float()  # float32 is exact enough beside 16 bits over 36 steps
        exact_core.fused = False
        exact = run(exact_core, h.float(), filled_cache(exact_core, sequences) if cached else None)
        core.fused = True
        fused = run(core, h, cache)
        core.fused = False
        assert_as_exact_as_eager("z_h", fused, run(core, h, cache), exact)

    kind = "decoding" if positions == 1 else "forward"
    if backward:
        kind += f" + backward, {grad_l_steps}/{grad_cycles}"
    tokens = sequences * positions
    counted = not backward and h_mixer == "none"
    return Case(
        "segment",
        f"{count(tokens)}, {kind}, mixer {h_mixer}",
        tokens,
        call,
        check,
        [w for w in core.parameters() if w.requires_grad] if backward else [],
        flops=_flops(config, tokens) if counted else None,
        bytes=_bytes(config, tokens) if counted else None,
    )


@torch.no_grad()
def filled_cache(core: HRMCore, sequences: int) -> SlotCache:
    """A cache that `PAST` positions went into, the same ones for every core."""
    torch.manual_seed(1)
    cache = SlotCache()
    core.fused = False
    past = torch.randn(sequences, PAST, WIDTH, device=DEVICE).to(DTYPE)  # rounded alike for every core
    core(past.to(core.w_x.dtype), segments=1, cache=cache)
    return cache


def _flops(config: HRMConfig, tokens: int) -> float:
    d, d_l, d_h, size = config.hidden_size, config.d_l, config.d_h, config.head_size
    cycle = d_h * 2 * d_l + config.l_steps * 3 * size * d_l + d_l * 3 * d_h + 3 * size * d_h
    return 2 * tokens * (d * 2 * d_l + config.h_cycles * cycle)


def _bytes(config: HRMConfig, tokens: int) -> float:
    """Weights once a cycle (they outgrow the L2 cache), and every operation's rows in and out."""
    d, d_l, d_h, size = config.hidden_size, config.d_l, config.d_h, config.head_size
    weights = d_h * 2 * d_l + d_l * 3 * d_h + 3 * size * (d_l + d_h)
    rows = (d_h + 4 * d_l) + 4 * d_l + (d_l + 3 * d_h) + 5 * d_h
    start = d * 2 * d_l + tokens * (d + 2 * d_l)
    return DTYPE.itemsize * (start + config.h_cycles * (weights + tokens * rows))
