"""Which implementation runs, and why: the one place where a backend is chosen, checked and explained."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache

import torch

logger = logging.getLogger("hrm_kernels")

BACKENDS = ("auto", "triton", "reference")
FUNCTIONS = (
    "l_recurrence",
    "h_update",
    "carry_update",
    "residual_norm",
    "swiglu_mlp",
    "swiglu_block",
    "rope_attention",
    "token_mixer",
)
HEAD_WISE = ("l_recurrence", "h_update")  # kernels that hold whole D x D matrices
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # bfloat16 tensor cores and the 99 KB of shared memory that the tiles are sized for
MAX_HEAD_SIZE = 64  # three D x D matrices and a tile of the state have to fit one block of an sm_86


class BackendError(RuntimeError):
    """`backend="triton"` was asked for where it cannot run; the message names what is missing."""


@dataclass(frozen=True)
class Choice:
    """What one function would use here (`explain`)."""

    function: str
    device: str
    backend: str  # "triton" or "reference"
    reason: str

    def __str__(self) -> str:
        return f"{self.function} on {self.device}: {self.backend} ({self.reason})"


def interpreting() -> bool:
    """True where Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1, read when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def _triton_import_error() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


@cache
def _missing_on(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`; None where it can."""
    if (error := _triton_import_error()) is not None:
        return error
    if device.type == "cpu":
        return None if interpreting() else "the tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if device.type != "cuda":
        return f"the tensors are on {device.type}; the Triton kernels need a CUDA device"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; the kernels are tuned and tested for CUDA only"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return None


def _missing(
    device: torch.device, head_size: int | None, dtype: torch.dtype | None, unfit: str | None = None
) -> str | None:
    missing = _missing_on(device) or unfit
    if missing is None and head_size is not None and head_size > MAX_HEAD_SIZE:
        missing = f"head size {head_size} is above {MAX_HEAD_SIZE}, the largest whose weights fit one block of an sm_86"
    if missing is None and dtype == torch.bfloat16 and device.type == "cpu":
        missing = "Triton's interpreter computes bfloat16 products wrongly; use float32 or float16"
    return missing


@torch.compiler.assume_constant_result
def choose(
    function: str,
    backend: str,
    device: torch.device,
    head_size: int | None = None,
    dtype: torch.dtype | None = None,
    unfit: str | None = None,
) -> str:
    """Resolves `backend` for one call to "triton" or "reference"; the first answer for each case is logged.

    `unfit`: why the kernels of `function` cannot take these arguments, where they cannot.

    Raises:
        ValueError: `backend` is none of `BACKENDS`.
        BackendError: `backend` is "triton" and something is missing.
    """
    return _choose(function, backend, device, head_size, dtype, unfit)


@cache  # not on `choose` itself: torch.compile warns of cached functions that it traces
def _choose(
    function: str,
    backend: str,
    device: torch.device,
    head_size: int | None,
    dtype: torch.dtype | None,
    unfit: str | None,
) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{function}: backend is {backend!r}; it should be one of {', '.join(map(repr, BACKENDS))}")
    missing = None if backend == "reference" else _missing(device, head_size, dtype, unfit)
    if backend == "triton" and missing is not None:
        raise BackendError(f'{function}: backend="triton" cannot run here: {missing}')
    # "auto" never picks the interpreter: it is a debugging aid, thousands of times slower than the reference
    slow = backend == "auto" and device.type == "cpu"
    chosen = "reference" if backend == "reference" or missing is not None or slow else "triton"
    why = "asked for" if backend == chosen else missing or ("the CPU runs the reference" if slow else "available")
    logger.info("%s on %s: %s (%s)", function, device, chosen, why)
    return chosen


def explain(device: torch.device | str | None = None, *, head_size: int = 64) -> list[Choice]:
    """Says which backend `backend="auto"` gives each function on `device` and why.

    Args:
        device: a torch device; None takes CUDA where there is one, else the CPU.
        head_size: D, the size of one head.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type
    choices = []
    for function in FUNCTIONS:
        missing = _missing(device, head_size if function in HEAD_WISE else None, None)
        if missing is None and device.type == "cpu":
            missing = 'TRITON_INTERPRET=1 is set; only backend="triton" uses the interpreter'
        reason = missing or f"Triton {_triton_version()} compiles for this device"
        choices.append(Choice(function, name, "reference" if missing else "triton", reason))
    return choices


def _triton_version() -> str:
    import triton

    return triton.__version__
