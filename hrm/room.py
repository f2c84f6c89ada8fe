"""Sizes that cannot be: what they take at the very least is held against all the memory that the machine has.

Far from a prediction of what a training takes (`hrm.profile`): it refuses what would otherwise run until memory ends.
"""

from __future__ import annotations

import psutil
import torch

from hrm.settings import UsageError


def machine_memory() -> int:
    """Bytes that this machine can hold at most: memory, swap, and the memory of all its GPUs."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    on_gpus = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    return psutil.virtual_memory().total + psutil.swap_memory().total + on_gpus


def check_room(sizes: str, what: str, least: int) -> None:
    """Raises a UsageError where `what` takes more than the machine has.

    Args:
        sizes: the settings that ask for it, with their values: "hrm.d_l is 64".
        what: takes the memory.
        least: bytes that it takes at the least.
    """
    if least > (has := machine_memory()):
        raise UsageError(f"{sizes}: {what} would take {least / 1e9:,.0f} GB, and this machine has {has / 1e9:,.0f} GB")
