"""Started by torchrun in test_distributed.py: the command line where one process runs out of memory.

    little_memory.py FOLDER ROWS TIMES WORD...

The second process, in the middle of the third step (after its first part) and later, has no memory for more than ROWS
rows at a time, the first TIMES times that it tries. Each process leaves in FOLDER/<rank>.txt how the command ended in
it and what it said.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import torch

from hrm.cli import main
from hrm.modeling import HRMGemmaForCausalLM
from hrm.trainer import HRMTrainer

part, forward = HRMTrainer._forward, HRMGemmaForCausalLM.forward
left = [0]  # times that it still fails


def parted(self: Any, model: Any, rows: Any, segment: int, number: int, items: Any) -> Any:
    assert model is self.core_model  # a wrapper's forward may wait for the other process
    late = (self.state.global_step, number) > (2, 0)
    self.core_model.fails = self.args.process_index == 1 and late
    return part(self, model, rows, segment, number, items)


def forwarded(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = forward(self, *args, **kwargs)  # the numbers that it draws are drawn before it fails
    if getattr(self, "fails", False) and self.training and len(kwargs["input_ids"]) > most and left[0]:
        left[0] -= 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    return output


if __name__ == "__main__":
    folder, rows, times, *words = sys.argv[1:]
    most, left[0] = int(rows), int(times)
    HRMTrainer._forward, HRMGemmaForCausalLM.forward = parted, forwarded  # type: ignore[method-assign]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = main(words)
    assert not torch.distributed.is_initialized()  # the processes have parted
    Path(folder, f"{os.environ['RANK']}.txt").write_text(f"{status} {said.getvalue()}")
