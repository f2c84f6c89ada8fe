"""What every benchmark measures and how: cases, variants, time and peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOKENS = (4096, 64, 1) if ON_GPU else (64, 1)
WIDTH = 2048 if ON_GPU else 256  # of the fast state; the slow one is twice as wide
HEAD_SIZE = 64
FEW = 64  # up to here a call is bound by its launches: calls are timed back to back, and CUDA graphs are tried too

VARIANTS = {
    "eager": "plain PyTorch",
    "compile": "torch.compile of the same",
    "compile-graph": 'torch.compile(mode="reduce-overhead"), which replays CUDA graphs',
    "fused": "the Triton kernels",
    "fused-graph": "the Triton kernels, replayed from a CUDA graph",
}


@dataclass(frozen=True)
class Case:
    """One thing to measure: a call, what is differentiated, and what it must do at least."""

    operation: str
    name: str
    tokens: int
    call: Callable[[str], Callable[[], Tensor]]
    """Takes a backend of `hrm_kernels`, returns the call to measure."""
    check: Callable[[], None]
    """Raises where the fused path is not as exact as eager on these very inputs."""
    wrt: list[Tensor] = field(default_factory=list)
    """Tensors whose gradients the call computes too; none: forward only, without graph."""
    flops: float | None = None
    bytes: float | None = None


def count(tokens: int) -> str:
    """The number of tokens as the cases' names write it."""
    return f"{tokens} token" + ("s" if tokens != 1 else "")


def skip_what_means_nothing(variant: str, case: Case) -> None:
    if not ON_GPU and variant != "eager":
        pytest.skip(f"{variant} is measured against the Triton kernels, which need a CUDA device")
    if variant.endswith("-graph") and case.tokens > FEW:
        pytest.skip("CUDA graphs save launches, which do not show at this size")


def build_step(variant: str, case: Case) -> Callable[[], object]:
    call = case.call("triton" if variant.startswith("fused") else "reference")
    if variant.startswith("compile"):
        call = torch.compile(call, dynamic=False, mode="reduce-overhead" if variant == "compile-graph" else None)
    cotangent = torch.randn_like(call().detach()) if case.wrt else None

    def step() -> object:
        if not case.wrt:
            with torch.no_grad():
                return call()
        return torch.autograd.grad(call(), case.wrt, cotangent, allow_unused=True)

    return step


def replayed(variant: str, case: Case) -> bool:
    """Whether a CUDA graph replays the call while it is timed: where kernels, not launches, are what is compared.

    Of few tokens users launch every call from Python, and that is measured too, so only "fused-graph" is replayed.
    """
    return ON_GPU and (case.tokens > FEW or variant == "fused-graph")


def peak_bytes(step: Callable[[], object]) -> int:
    """What one call allocates at most, above what lives before it."""
    for _ in range(3):
        step()  # compiles, warms up, fills caches
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_seconds(step: Callable[[], object], *, back_to_back: bool, samples: int = 30) -> float:
    """Median time of one call between two CUDA events.

    `back_to_back`: the mean of 50 calls without a gap, which launches bound; else single calls with a cold L2 cache.
    """
    calls = 50 if back_to_back else 1
    flush = None if back_to_back else torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush is not None:
            flush.zero_()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / calls)
    return statistics.median(times)
