"""Every launch configuration compiles for GPUs that are not here, fits a block there, and stands in the docs' table."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from hrm_kernels import compile_table
from hrm_kernels._triton import plan

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "compile_table.md"

# compiling needs Triton without its interpreter, hence another process
COMPILE = """
import json, sys
from hrm_kernels.compile_table import cases, compile_case
reports = [compile_case(case, int(sys.argv[1])) for case in cases()]
print(json.dumps([[r.case.name, str(r.case.dtype), r.shared, r.registers, r.spilled] for r in reports]))
"""


@cache
def compiled(architecture: int) -> dict[tuple[str, str], tuple[int, int, int]]:
    """{(kernel, dtype): (shared bytes a block, registers a thread, spilled bytes a thread)} of every configuration."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(architecture)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {(name, dtype): tuple(numbers) for name, dtype, *numbers in json.loads(result.stdout)}


@pytest.mark.parametrize("architecture", [80, 86, 89, 90])
def test_every_configuration_fits_a_block(architecture):
    reports = compiled(architecture)
    assert len(reports) == len(list(compile_table.cases()))
    limit = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}[architecture]
    too_big = {case: shared for case, (shared, _, _) in reports.items() if shared > limit}
    assert not too_big, f"over sm_{architecture}'s {limit} bytes a block: {too_big}"


@pytest.mark.parametrize("kernel", ["l_forward", "l_backward", "h_forward", "h_backward"])
def test_what_the_default_widths_run_on_an_sm_86_spills_nothing(kernel, monkeypatch):
    monkeypatch.setattr("hrm_kernels._triton.multiprocessors", lambda _: 82)  # an RTX 3090's
    heads = 32 if kernel.startswith("l") else 64  # widths 2048 and 4096 in heads of 64
    launch = plan(kernel, 4096, heads, 64, torch.empty(0, dtype=torch.bfloat16))
    chosen = [
        case
        for case in compile_table.cases(dtypes=[torch.bfloat16])
        if case.name.startswith(kernel)
        and (case.rows, case.warps) == (launch.options["BLOCK_N"], launch.options["num_warps"])
    ]
    assert chosen
    spills = {case.name: compiled(86)[case.name, str(case.dtype)][2] for case in chosen}
    assert not any(spills.values()), f"bytes spilled a thread: {spills}"


def test_the_docs_table_lists_every_configuration():
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in TABLE.read_text().splitlines() if line.startswith("|")]
    listed = {tuple(row[:4]) for row in rows[2:]}
    expected = {
        (case.name, compile_table.NAMES[case.dtype], str(case.rows or ""), str(case.warps))
        for case in compile_table.cases()
    }
    assert listed == expected, "run `python -m hrm_kernels.compile_table --output docs/compile_table.md`"
