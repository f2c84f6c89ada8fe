"""Compiles every launch configuration for GPUs that are not here and reports what each needs of a block.

`python -m hrm_kernels.compile_table [--output FILE]` writes the table of docs/compile_table.md: shared memory (bytes a
block), registers a thread and spilled bytes a thread, as Triton's compiler and cuobjdump report them. It exits with 1
where a configuration does not fit its GPU.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hrm_kernels._triton import Config, entries, kernel_options, triton
from hrm_kernels.carry_update import (
    CARRY_BLOCKS,
    FINISH_BLOCK,
    FINISH_WARPS,
    _carry_kernel,
    _finish_kernel,
    carry_warps,
)
from hrm_kernels.h_update import _h_backward_kernel, _h_forward_kernel
from hrm_kernels.l_recurrence import _l_backward_kernel, _l_forward_kernel
from hrm_kernels.residual_norm import _norm_backward_kernel, _norm_forward_kernel, norm_options
from hrm_kernels.rope_attention import (
    _attention_backward_kernel,
    _attention_forward_kernel,
    _rotate_kernel,
    attention_options,
    rotate_options,
)
from hrm_kernels.swiglu_mlp import (
    TILES,
    _gate_backward_kernel,
    _gate_forward_kernel,
    _gated_product_kernel,
    _gated_product_tma_kernel,
    gate_options,
    product_options,
)
from hrm_kernels.token_mixer import MIXER_KERNELS, mixer_entries, mixer_options

SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes that one block may have
ARCHITECTURES = tuple(SHARED_LIMIT)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# each kernel with the sets of flags that change its code
_TILED = {
    "l_forward": (_l_forward_kernel, ({"SAVE": False}, {"SAVE": True})),
    "l_backward_one": (_l_backward_kernel, tuple({"MANY": False, "GRAD_Z": grad_z} for grad_z in (False, True))),
    "l_backward_many": (_l_backward_kernel, tuple({"MANY": True, "GRAD_Z": grad_z} for grad_z in (False, True))),
    "h_forward": (_h_forward_kernel, ({},)),
    "h_backward": (_h_backward_kernel, ({},)),
}
_FUNCTIONS = {
    **{name: function for name, (function, _) in _TILED.items()},
    **{name: function for name, (function, _) in MIXER_KERNELS.items()},
    "carry": _carry_kernel,
    "carry_finish": _finish_kernel,
    "norm_forward": _norm_forward_kernel,
    "norm_backward": _norm_backward_kernel,
    "gated_product": _gated_product_kernel,
    "gated_product_tma": _gated_product_tma_kernel,
    "gate_forward": _gate_forward_kernel,
    "gate_backward": _gate_backward_kernel,
    "attention_forward": _attention_forward_kernel,
    "attention_backward": _attention_backward_kernel,
    "rotate": _rotate_kernel,
}
# the blocks that tensor descriptors read and write
_BLOCKS = {
    "x_desc": ("BLOCK_N", "BLOCK_K"),
    "w_desc": ("BLOCK_I", "BLOCK_K"),
    "out_desc": ("BLOCK_N", "BLOCK_I"),
}
# shapes that the transformer block's kernels are compiled for: those of the puzzle models, and the widest row
NORM_WIDTHS = (512, 4096)
ATTENTION_LENGTHS = (64, 96, 128)  # every shorter sequence is padded to one of these
MIXER_LENGTHS, MIXER_WIDTH = {"short": 81, "long": 97}, 512


@dataclass(frozen=True)
class Case:
    """One kernel as it can be launched: its name, element type, what its compile-time constants come from, warps."""

    name: str
    dtype: torch.dtype
    constants: tuple[tuple[str, object], ...]
    warps: int
    build: tuple[tuple[str, object], ...] = (("num_stages", 1),)

    @property
    def rows(self) -> int | None:
        constants = dict(self.constants)
        config = constants.get("config")
        if isinstance(config, Config):
            return config.rows
        return next((constants[key] for key in ("BLOCK_N", "BLOCK_L", "CHANNELS") if key in constants), None)  # type: ignore

    def options(self) -> tuple[dict, dict]:
        """The compile-time constants, and the options of the compiler."""
        constants = dict(self.constants)
        if "config" not in constants:
            return constants, {"num_warps": self.warps, **dict(self.build)}
        options = kernel_options(constants.pop("config"), constants.pop("head_size"), self.dtype)
        build = {key: value for key, value in options.items() if key.islower()}
        return constants | {key: value for key, value in options.items() if key.isupper()}, build


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs: bytes of shared memory a block, registers and spilled bytes a thread."""

    case: Case
    architecture: int
    shared: int
    registers: int
    spilled: int

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.architecture]


def tiled_case(kernel: str, tokens: str, config: Config, dtype: torch.dtype, head_size: int, flags: dict) -> Case:
    """A kernel of the launch table with one configuration; `tokens` ("few" or "many") only names it."""
    name = " ".join((kernel, tokens, *(flag.lower() for flag, on in flags.items() if on and flag != "MANY")))
    return Case(name, dtype, (("config", config), ("head_size", head_size), *flags.items()), config.warps)


def options_case(name: str, dtype: torch.dtype, options: dict[str, Any], **flags: bool) -> Case:
    """A kernel whose launcher takes `options`: compile-time constants in capitals, the compiler's options in small."""
    constants = {key: value for key, value in options.items() if key.isupper()} | flags
    build = {key: value for key, value in options.items() if key.islower() and key != "num_warps"}
    name = " ".join((name, *(flag.lower() for flag, on in flags.items() if on)))
    return Case(name, dtype, tuple(constants.items()), options["num_warps"], tuple(build.items()))


def block_cases(architecture: int, head_sizes: Iterable[int], dtype: torch.dtype) -> Iterator[Case]:
    """The kernels of the transformer block: norm, MLP, attention, and the mixer that may take attention's place."""
    major = architecture // 10
    for width in NORM_WIDTHS:
        options = norm_options(width, dtype)
        yield from (options_case(f"norm_forward {width}", dtype, options, SAVE=save) for save in (False, True))
        yield options_case(f"norm_backward {width}", dtype, options)
    tile = TILES.get(major)
    if tile is not None and dtype.itemsize == 2:
        yield options_case("gated_product_tma" if tile.tma else "gated_product", dtype, product_options(tile, dtype))
    yield options_case("gate_forward", dtype, gate_options(dtype))
    yield options_case("gate_backward", dtype, gate_options(dtype))
    for size in head_sizes:
        for inverse, copy_v in ((False, False), (False, True), (True, True)):
            yield options_case("rotate", dtype, rotate_options(size), INVERSE=inverse, COPY_V=copy_v)
        for length, rotate in itertools.product(ATTENTION_LENGTHS if dtype.itemsize == 2 else (), (False, True)):
            options = attention_options("forward", length, size, major)
            for save in (False, True):
                yield options_case(f"attention_forward {length}", dtype, options, ROTATE=rotate, SAVE=save)
            options = attention_options("backward", length, size, major)
            yield options_case(f"attention_backward {length}", dtype, options, ROTATE=rotate)
    for (kernel, (_, variants)), (entry, length) in itertools.product(MIXER_KERNELS.items(), MIXER_LENGTHS.items()):
        config = mixer_entries(kernel, divmod(architecture, 10))[dtype.itemsize, entry]
        options = mixer_options(kernel, config, length, MIXER_WIDTH, dtype)
        yield from (options_case(f"{kernel} {length}", dtype, options, **flags) for flags in variants)


def cases(
    architecture: int, head_sizes: Iterable[int] = (64,), dtypes: Iterable[torch.dtype] = tuple(NAMES)
) -> Iterator[Case]:
    """Every configuration that the launchers can choose on `architecture`, for these head sizes and element types."""
    for dtype in dtypes:
        for kernel, (_, variants) in _TILED.items():
            for (size, tokens), config in entries(kernel, divmod(architecture, 10)).items():
                if size == dtype.itemsize:
                    for flags in variants:
                        yield from (tiled_case(kernel, tokens, config, dtype, d, flags) for d in head_sizes)
        for whole in (True, False):
            for block in CARRY_BLOCKS:
                name = f"carry {block} {'whole' if whole else 'parts'}"
                yield Case(name, dtype, (("WHOLE", whole), ("BLOCK", block)), carry_warps(block))
        yield from block_cases(architecture, head_sizes, dtype)
    yield Case("carry_finish", torch.float32, (("BLOCK", FINISH_BLOCK),), FINISH_WARPS)


def compile_case(case: Case, architecture: int) -> Report:
    """Compiles `case` for compute capability `architecture` (such as 86); needs Triton but no GPU."""
    from triton.backends.compiler import GPUTarget

    function, (constants, options) = _FUNCTIONS[case.name.split()[0]], case.options()
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + _pointee(name, case.dtype)
        elif name.endswith("_desc"):
            rows, columns = (constants[size] for size in _BLOCKS[name])
            signature[name] = f"tensordesc<{NAMES[case.dtype]}[{rows}, {columns}]>"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
        if name.endswith(("_ptr", "_stride")) or name in ("size", "width", "chunk", "inner", "padded_inner"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Report(case, architecture, compiled.metadata.shared, *_resources(compiled.asm["cubin"]))


def _pointee(name: str, dtype: torch.dtype) -> str:
    fixed = dict.fromkeys(("grad_w_ptr", "partial_ptr", "residual_ptr", "scale_ptr", "lse_ptr"), "fp32")
    fixed |= {"cos_ptr": "fp32", "sin_ptr": "fp32"}
    fixed |= {"halted_ptr": "i1", "steps_ptr": "i32", "new_steps_ptr": "i32"}
    return fixed.get(name, NAMES[dtype])


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes a thread, as cuobjdump in Triton's own package prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK"))  # type: ignore
    return registers, stack


def table(reports: Iterable[Report]) -> str:
    """Markdown: a row for each kernel, an entry "shared / registers / spilled" for each architecture."""
    by_case: dict[Case, dict[int, Report]] = {}
    for report in reports:
        by_case.setdefault(report.case, {})[report.architecture] = report
    lines = [
        "| kernel | type | rows | warps | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for case, found in by_case.items():
        cells = [f"{r.shared} / {r.registers} / {r.spilled}" if (r := found.get(a)) else "" for a in ARCHITECTURES]
        head = (case.name, NAMES[case.dtype], str(case.rows or ""), str(case.warps))
        lines.append("| " + " | ".join((*head, *cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table here instead of printing it")
    output = parser.parse_args().output
    reports = [compile_case(case, architecture) for architecture in ARCHITECTURES for case in cases(architecture)]
    header = (
        "# What each launch configuration needs\n\nMade by `python -m hrm_kernels.compile_table` with Triton "
        f"{triton.__version__}, head size 64. Entries: shared memory (bytes a block) / registers a thread / spilled "
        f"bytes a thread.\nLimits of shared memory a block: "
        + ", ".join(f"{limit:,} B on sm_{a}" for a, limit in SHARED_LIMIT.items())
        + ".\n\n"
    )
    text = header + table(reports)
    print(text) if output is None else output.write_text(text)
    return 0 if all(report.fits for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
