"""Run by test_distributed.py in two processes: the command line on a disk that fills up once a checkpoint is written.

    full_disk.py FOLDER WHERE WORD...

WHERE is the file that no longer can be written, or the function that fails: `new_place` or `save_pretrained`. Each
process leaves in FOLDER/<rank>.txt how the command ended in it and what it said.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hrm.training_state
from hrm.cli import main
from hrm.modeling import HRMGemmaForCausalLM


def fill_up(where: str) -> None:
    if where == "save_pretrained":
        HRMGemmaForCausalLM.save_pretrained = _failing(HRMGemmaForCausalLM.save_pretrained, 0)  # type: ignore
    elif where == "new_place":
        hrm.training_state.new_place = _failing(hrm.training_state.new_place, 1)
    else:
        hrm.training_state.write_tensors = _failing(hrm.training_state.write_tensors, 1, where)


def _failing(write: Callable[..., Any], times: int, name: str | None = None) -> Callable[..., Any]:
    """`write`, which fails after so many times, of calls whose first argument is a path of this name."""
    calls = [0]

    def written(*args: Any, **kwargs: Any) -> Any:
        if name is None or args[0].name == name:
            calls[0] += 1
            if calls[0] > times:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args, **kwargs)

    return written


if __name__ == "__main__":
    folder, where, *words = sys.argv[1:]
    fill_up(where)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(words)
    assert not torch.distributed.is_initialized()  # the processes have parted
    Path(folder, f"{os.environ['RANK']}.txt").write_text(f"{status} {said.getvalue()}")
