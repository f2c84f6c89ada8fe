"""Fixtures of the benchmarks, and what their results say of the machine.

`pytest benchmarks --benchmark-only --benchmark-json=results.json`, then `python benchmarks/report.py results.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from measurement import (
    DEVICE,
    FEW,
    ON_GPU,
    Case,
    build_step,
    device_seconds,
    peak_bytes,
    replayed,
    skip_what_means_nothing,
)
from recording import record


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """The same inputs for every variant, and nothing of one left for the next."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture
def measure(benchmark) -> Callable[[str, Case], None]:
    """Measures one variant of a case, a fused one only after its parity; skips what means nothing on this machine."""

    def run(variant: str, case: Case) -> None:
        skip_what_means_nothing(variant, case)
        fused = variant.startswith("fused")
        if fused:
            case.check()
        step = build_step(variant, case)
        benchmark.group = f"{case.operation}, {case.name}"
        benchmark.extra_info.update(
            operation=case.operation,
            case=case.name,
            variant=variant,
            parity="green" if fused else "is the yardstick",
            flops=case.flops,
            bytes=case.bytes,
        )
        if ON_GPU:
            benchmark.extra_info["peak_bytes"] = peak_bytes(step)
            step = record(step)[0].replay if replayed(variant, case) else step
            benchmark.extra_info["seconds"] = device_seconds(step, back_to_back=case.tokens <= FEW)
            benchmark.pedantic(lambda: (step(), torch.cuda.synchronize()), rounds=10, warmup_rounds=2)
        else:
            benchmark.pedantic(step, rounds=10, warmup_rounds=2)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What this device reaches, measured in the same run: the roofs that the report compares with."""
    machine_info["torch"] = torch.__version__
    if not ON_GPU:
        return
    source = torch.randn(2**28, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    machine_info["gpu"] = {
        "name": torch.cuda.get_device_name(),
        "copy_bytes_per_second": 2 * source.nbytes / device_seconds(lambda: target.copy_(source), back_to_back=False),
        "matmul_flops_per_second": 2 * 8192**3 / device_seconds(lambda: matrix @ matrix, back_to_back=False),
        "launch_seconds": device_seconds(torch.empty(1, device=DEVICE).zero_, back_to_back=True),
    }
