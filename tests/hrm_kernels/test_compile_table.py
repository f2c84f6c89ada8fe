"""Every launch configuration fits a block of GPUs that are not here, and stands in the docs' table.

All of them, in every element type, are in docs/compile_table.md, whose numbers are held to the limits here; compiling
them takes minutes. Compiled afresh is what bfloat16 runs on an sm_86, and what it runs on an sm_90 alone.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from hrm_kernels import compile_table

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "compile_table.md"
LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes of shared memory that one block may have

# compiling needs Triton without its interpreter, hence another process
COMPILE = """
import json, sys
from hrm_kernels.compile_table import compile_case
from test_compile_table import compiled_here
reports = [compile_case(case, int(sys.argv[1])) for case in compiled_here(int(sys.argv[1]))]
print(json.dumps([[r.case.name, r.shared, r.spilled] for r in reports]))
"""

# Bytes a thread that kernels spill in bf16; those that are not named spill none. How much ptxas keeps in registers
# depends on Triton's version: these are bounds for the one that docs/compile_table.md was made with. They may only
# fall. docs/kernels.md says more.
SPILLED: dict[int, dict[str, int]] = {
    86: {"l_backward_one": 104, "l_backward_many": 8, "h_backward": 160, "attention_backward": 624},
    90: {
        "l_forward": 24,
        "l_backward_one": 440,
        "l_backward_many": 544,
        "attention_forward": 32,
        "attention_backward": 504,
    },
}


def compiled_here(architecture: int) -> list[compile_table.Case]:
    """What bfloat16 is launched with on an sm_86; on others what is not launched there in the same way."""
    cases = compile_table.cases(architecture, dtypes=[torch.bfloat16])
    on_86 = set() if architecture == 86 else set(compile_table.cases(86, dtypes=[torch.bfloat16]))
    return [case for case in cases if case not in on_86]


def test_an_sm_80_and_an_sm_89_launch_what_an_sm_86_does():
    assert not compiled_here(80)
    assert not compiled_here(89)


@pytest.mark.parametrize("architecture", [86, 90])
def test_what_bfloat16_launches_fits_a_block_and_spills_no_more_than_documented(architecture):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    command = [sys.executable, "-c", COMPILE, str(architecture)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    reports = json.loads(result.stdout)
    assert [name for name, _, _ in reports] == [case.name for case in compiled_here(architecture)]
    too_big = {name: shared for name, shared, _ in reports if shared > LIMIT[architecture]}
    assert not too_big, f"over sm_{architecture}'s {LIMIT[architecture]} bytes a block: {too_big}"
    documented = re.search(r"Triton (\d+\.\d+)", TABLE.read_text()).group(1)
    if triton.__version__.startswith(documented + "."):
        bounds = SPILLED[architecture]
        spills = {name: spilled for name, _, spilled in reports if spilled > bounds.get(name.split()[0], 0)}
        assert not spills, f"bytes spilled a thread on an sm_{architecture}, over {bounds}: {spills}"


def rows_of_the_docs_table() -> list[list[str]]:
    rows = [re.split(r"\s*\|\s*", line.strip()[1:-1].strip()) for line in TABLE.read_text().splitlines() if "|" in line]
    return rows[2:]


def test_the_docs_table_lists_every_configuration():
    expected = {
        (case.name, compile_table.NAMES[case.dtype], str(case.rows or ""), str(case.warps))
        for architecture in compile_table.ARCHITECTURES
        for case in compile_table.cases(architecture)
    }
    listed = {tuple(row[:4]) for row in rows_of_the_docs_table()}
    assert listed == expected, "run `python -m hrm_kernels.compile_table --output docs/compile_table.md`"


def test_every_configuration_of_the_docs_table_fits_a_block():
    too_big = [
        (*row[:4], f"sm_{architecture}", cell)
        for row in rows_of_the_docs_table()
        for (architecture, limit), cell in zip(LIMIT.items(), row[4:], strict=True)
        if cell and int(cell.split(" / ")[0]) > limit
    ]
    assert not too_big
