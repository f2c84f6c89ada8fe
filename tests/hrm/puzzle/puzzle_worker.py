"""Runs command lines of `hrm` one after the other, in each of several processes; test_puzzle_distributed.py starts it.

The only argument is a JSON file with a list of jobs; what each process found goes beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from hrm.cli import main
from hrm.puzzle.engine import Engine


@contextlib.contextmanager
def watched(gradients: Path | None, signal_at: int | None) -> Iterator[None]:
    """Gives the model opinions on when to halt, keeps the gradients of the first step in a file, and sends this process
    a SIGTERM after step `signal_at`."""
    step = Engine.step

    def stepped(self: Engine, number: int, *rest: Any) -> None:
        if number == 0:
            draws = torch.Generator().manual_seed(0)
            with torch.no_grad():
                self.model.q_head.copy_(torch.randn(self.model.q_head.shape, generator=draws))
        step(self, number, *rest)
        if gradients is not None and number == 0:
            named = self.model.named_parameters()
            save_file({name: p.grad.clone() for name, p in named if p.grad is not None}, gradients)
        if number == signal_at:
            signal.raise_signal(signal.SIGTERM)

    Engine.step = stepped  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.step = step  # type: ignore[method-assign]


def run(words: list[str], gradients: Path | None = None, signal_at: int | None = None) -> dict[str, Any]:
    """Exit status of `hrm` and what it said on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as said, watched(gradients, signal_at):
        status = main(words)
    return {"status": status, "said": said.getvalue()}


@contextlib.contextmanager
def staying_together() -> Iterator[None]:
    """Inside, processes do not part at the end of a job: joining again under one launch can hang in gloo."""
    part = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda self, group=None: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        PartialState.destroy_process_group = part  # type: ignore[method-assign]


if __name__ == "__main__":
    path, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    jobs, found = json.loads(path.read_text()), []
    for number, job in enumerate(jobs):
        gradients = path.with_name(f"gradients-{number}-{rank}.safetensors")
        with staying_together() if number < len(jobs) - 1 else contextlib.nullcontext():
            found.append(run(job["words"], gradients, job["signal_at"] if rank == 1 else None))
    path.with_name(f"found-{rank}.json").write_text(json.dumps(found))
