"""The report of the benchmarks: its numbers follow from the run, and no fused time passes without parity."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def benchmark(variant: str, seconds: float, **extra) -> dict:
    info = {"operation": "l_recurrence", "case": "64 tokens, forward", "variant": variant, "seconds": seconds}
    counts = {"parity": "green", "flops": 1e9, "bytes": 936e3, "peak_bytes": 2**20}
    return {"name": variant, "stats": {"median": 1.0}, "extra_info": info | counts | extra}


def report(tmp_path: Path, benchmarks: list[dict]) -> subprocess.CompletedProcess:
    results = tmp_path / "results.json"
    gpu = {"name": "A GPU", "copy_bytes_per_second": 3e12, "matmul_flops_per_second": 1e14, "launch_seconds": 2e-6}
    results.write_text(json.dumps({"machine_info": {"torch": "2.13", "gpu": gpu}, "benchmarks": benchmarks}))
    command = [sys.executable, "benchmarks/report.py", str(results), "--output", str(tmp_path / "images")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_table_and_plots(tmp_path):
    times = {"eager": 1e-3, "compile": 4e-4, "compile-graph": 2e-4, "fused": 5e-5, "fused-graph": 4e-5}
    depths = [
        benchmark("fused, one-step gradient", 1.0, operation="segment memory", case=depth) for depth in ("1", "64")
    ]
    large = [benchmark(variant, 1e-3, case="4096 tokens, forward") for variant in ("eager", "fused")]
    result = report(tmp_path, [benchmark(*item) for item in times.items()] + large + depths)
    assert result.returncode == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "64 tokens" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["1 ms", "0.4 ms", "0.2 ms", "50 µs", "40 µs"]
    assert cells[6:8] == ["25.0", "5.0"]  # the best fused against eager and against the best of torch.compile
    assert cells[8] == "25 TFLOP/s, 25%"  # the matrix peak bounds it, not the copy bandwidth
    assert cells[10] == "14.1 µs"  # 1e9 operations at 71 TFLOP/s
    assert "A GPU" in result.stdout
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"speed.png", "memory.png"}


def test_a_fused_time_without_parity_is_an_error(tmp_path):
    result = report(tmp_path, [benchmark("eager", 1e-3), benchmark("fused", 1e-6, parity="red")])
    assert result.returncode == 1
    assert "fused has no green parity" in result.stderr


def test_results_of_another_suite_are_an_error(tmp_path):
    result = report(tmp_path, [{"name": "x", "stats": {"median": 1.0}, "extra_info": {}}])
    assert result.returncode == 1
    assert "holds no benchmark of this suite" in result.stderr
