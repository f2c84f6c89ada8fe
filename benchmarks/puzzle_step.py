"""Times one training step of the puzzle models on this GPU: `python benchmarks/puzzle_step.py [CASE ...] [options]`.

One line of JSON for each case: milliseconds a step (median of the steps after the CUDA graph was captured), peak memory
in GiB, seconds from start to the end of the first step, loss. Batches are random: a step's time does not depend on
them. `--profile FILE` writes which kernels the time goes to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from hrm.puzzle import PuzzleConfig, PuzzleModel
from hrm.puzzle.engine import Engine

TRM = {"vocab_size": 11, "seq_len": 81, "puzzle_tokens": 16}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "hrm": ("hrm", 768, {}),
    "hrm-none": ("hrm", 768, {"q_target": "none"}),
    "hrm-900": ("hrm", 64, {"seq_len": 900, "vocab_size": 6}),
    "trm-mlp": ("trm-mlp", 768, TRM),
    "trm": ("trm", 768, TRM),
    "trm-mlp-81": ("trm-mlp", 768, {"puzzle_tokens": 0, "puzzle_emb_size": 0}),
    "trm-900": ("trm", 128, {"seq_len": 900, "vocab_size": 6, "l_steps": 4}),
}


class Steps:
    """A model of one case with the steps that it takes."""

    def __init__(self, case: str, **values: Any) -> None:
        model, self.rows, fixed = CASES[case]
        torch.manual_seed(0)
        self.config = PuzzleConfig.of(model, **fixed | values)
        self.engine = Engine(PuzzleModel(self.config).cuda().train(), ema=0.999)
        shape = (self.rows, self.config.seq_len)
        ids = np.random.default_rng(0).integers(1, self.config.vocab_size, (2, *shape)).astype(np.int32)
        self.batch = {"inputs": ids[0], "labels": ids[1], "puzzle_identifiers": np.zeros(self.rows, np.int32)}
        self.number = 0

    def take(self) -> None:
        self.engine.step(self.number, self.batch, 1e-4, 1e-4)
        self.number += 1

    def times(self, count: int) -> list[float]:
        """Milliseconds of `count` steps, each from event to event."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            self.take()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def measure(case: str, steps: int, values: dict[str, Any], profile: str | None) -> dict[str, Any]:
    started = time.perf_counter()
    run = Steps(case, **values)
    run.take()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    run.take()
    run.times(3)
    times = run.times(steps)
    memory = torch.cuda.max_memory_allocated() / 2**30
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run.take()
            torch.cuda.synchronize()
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
        with open(profile, "a") as file:
            file.write(f"== {case} {values}\n{table}\n")
    loss = run.engine.read_metrics(run.number)["loss"]
    return {"case": case, **values, "ms": round(statistics.median(times), 2), "min_ms": round(min(times), 2),
            "gib": round(memory, 2), "first_step_s": round(first, 1), "loss": round(loss, 4)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", help="file to append the kernels' times to")
    parser.add_argument("--set", action="append", default=[], help="field=value of PuzzleConfig, for every case")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("puzzle_step: needs a CUDA device", file=sys.stderr)
        return 2
    values = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.set)}
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for case in arguments.cases:
        print(json.dumps(measure(case, arguments.steps, values, arguments.profile)), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
