"""Times launch configurations of the tiled kernels on this GPU, each with its parity: what their table was chosen by.

usage: python benchmarks/tune.py [--only l_forward,...] [--output FILE.json]

Prints the ceilings measured first (copy bandwidth, bfloat16 matrix rate), then for each kernel the eager reference,
torch.compile and every configuration: median milliseconds replayed from a CUDA graph and called from Python (L2 flushed
between calls), and relative RMS error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from recording import record
from torch import Tensor
from triton.testing import do_bench

import hrm_kernels as k
from hrm_kernels._triton import TABLE, Config, override_config

TOKENS, HEADS_L, HEADS_H, SIZE, STEPS = 4096, 32, 64, 64, 8
CONFIGS = {
    "l_forward": [(64, 4, 32), (64, 4, 32, 168), (64, 4, 6, 168), (16, 1, 8), (16, 2, 8), (16, 4, 8), (16, 8, 8)],
    "l_backward_one": [(64, 4, 1), (64, 4, 3), (32, 4, 2), (128, 8, 1), (64, 4, 8)],
    "l_backward_many": [(32, 4, 2), (32, 8, 1), (128, 8, 2), (128, 8, 8), (64, 4, 2)],
    "h_forward": [(64, 4, 2), (64, 4, 4), (32, 4, 4)],
    "h_backward": [(64, 4, 2), (128, 8, 1), (32, 8, 1), (32, 4, 3), (32, 4, 8)],
}


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Median milliseconds of one call: replayed from a CUDA graph (the device's time), and called from Python."""
    called = do_bench(run, warmup=10, rep=60, return_mode="median")
    graph, _ = record(run)
    return do_bench(graph.replay, warmup=10, rep=60, return_mode="median"), called


def ceilings() -> dict[str, float]:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timed(lambda: target.copy_(source))[0] / 1e9
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tiny = torch.empty(1, device="cuda")
    return {
        "launch ms": timed(lambda: tiny.zero_())[0],
        "copy TB/s": copy,
        "matmul TFLOP/s": 2 * 8192**3 / timed(lambda: a @ b)[0] / 1e9,
    }


def l_arguments(n: int) -> list[Tensor]:
    width = HEADS_L * SIZE
    weights = [torch.randn(HEADS_L, SIZE, SIZE, device="cuda") * SIZE**-0.5 for _ in range(3)]
    tensors = [torch.randn(n, width, device="cuda"), torch.randn(n, 2 * width, device="cuda"), *weights]
    return [t.bfloat16().requires_grad_() for t in tensors]


def h_arguments(n: int) -> list[Tensor]:
    width = HEADS_H * SIZE
    weights = torch.randn(3, HEADS_H, SIZE, SIZE, device="cuda") * SIZE**-0.5
    tensors = [torch.randn(n, width, device="cuda"), torch.randn(n, 3 * width, device="cuda"), weights]
    return [t.bfloat16().requires_grad_() for t in tensors]


def gradients(function, arguments: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    out = function(*arguments)
    used = [a for a in arguments if a.requires_grad]
    found = torch.autograd.grad(out, used, cotangent.to(out.dtype), allow_unused=True)
    return [out.detach(), *(g for g in found if g is not None)]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))


def step_of(function, arguments: list[Tensor], cotangent: Tensor | None) -> Callable[[], object]:
    if cotangent is None:
        return torch.no_grad()(lambda: function(*arguments))
    return lambda: torch.autograd.grad(
        function(*arguments), [a for a in arguments if a.requires_grad], cotangent, allow_unused=True
    )


def compare(name: str, kernel: str, fused, reference, arguments, backward: bool, rows: list[dict]) -> None:
    cotangent = torch.randn_like(arguments[0].detach())
    wide = [a.detach().double().requires_grad_() for a in arguments]
    few = min(len(arguments[0]), 512)  # float64 of everything would not be cheap, and rows are independent

    def cut(tensors):
        return [t.detach()[:few].requires_grad_() if t.shape[0] == len(arguments[0]) else t for t in tensors]

    want = gradients(reference, cut(wide), cotangent[:few].double())
    eager_error = error(gradients(reference, cut(arguments), cotangent[:few]), want)
    used = cotangent if backward else None
    compiled = torch.compile(reference, fullgraph=True)

    def record(variant: str, function, got_error: float) -> None:
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ms, call_ms = timed(step_of(function, arguments, used))
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as problem:  # a configuration that does not fit is a finding, not the end
            ms, call_ms, peak = float("nan"), float("nan"), float("nan")
            variant += " " + type(problem).__name__
        rows.append(
            {"case": name, "variant": variant, "ms": ms, "call_ms": call_ms, "peak_mib": peak}
            | {"error": got_error, "eager_error": eager_error}
        )
        times = f"{ms:8.4f} ms (called {call_ms:7.3f}) {peak:7.0f} MiB"
        print(f"{name:34s} {variant:14s} {times}  error {got_error:.2e} (eager {eager_error:.2e})", flush=True)

    record("eager", reference, eager_error)
    record("torch.compile", compiled, float("nan"))
    for config in [None, *CONFIGS[kernel]]:
        override = {} if config is None else {kernel: Config(*config)}
        with override_config(**override):
            try:
                got = error(gradients(fused, cut(arguments), cotangent[:few]), want)
            except Exception as problem:
                print(name, config, type(problem).__name__, str(problem)[:100])
                continue
            record("table" if config is None else "x".join(map(str, config)), fused, got)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="l_forward,l_backward,h_forward,h_backward,few")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    only = options.only.split(",")
    torch.manual_seed(0)
    top = ceilings()
    print(torch.cuda.get_device_name(), torch.__version__, {key: round(v, 2) for key, v in top.items()}, TABLE)
    rows: list[dict] = []

    def l_pair(grad_steps: int):
        return tuple(
            lambda *a, f=f: f(*a, steps=STEPS, grad_steps=grad_steps)
            for f in (k.l_recurrence, k.l_recurrence_reference)
        )

    if "l_forward" in only:
        compare("L forward", "l_forward", *l_pair(1), l_arguments(TOKENS), False, rows)
    if "few" in only:
        for n in (1, 64):
            compare(f"L forward, {n} tokens", "l_forward", *l_pair(1), l_arguments(n), False, rows)
    if "l_backward" in only:
        for grad_steps in (1, STEPS):
            name = f"L forward + backward, grad {grad_steps}"
            kernel = "l_backward_one" if grad_steps == 1 else "l_backward_many"
            compare(name, kernel, *l_pair(grad_steps), l_arguments(TOKENS), True, rows)
    if "h_forward" in only:
        compare("H forward", "h_forward", k.h_update, k.h_update_reference, h_arguments(TOKENS), False, rows)
    if "h_backward" in only:
        compare("H forward + backward", "h_backward", k.h_update, k.h_update_reference, h_arguments(TOKENS), True, rows)
    flops = 3 * 2 * TOKENS * HEADS_L * SIZE * SIZE * STEPS
    for row in rows:
        if row["case"] == "L forward":
            rate = flops / row["ms"] / 1e9
            print(f"{row['variant']:14s} {rate:.0f} TFLOP/s, {rate / top['matmul TFLOP/s']:.0%} of the matrix peak")
    if options.output:
        device = torch.cuda.get_device_name()
        record = {"device": device, "torch": torch.__version__, "ceilings": top, "rows": rows}
        options.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
