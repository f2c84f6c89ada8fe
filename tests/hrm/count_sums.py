"""Started by torchrun in test_distributed.py: `hrm train` that writes down how often a step sums gradients over the
processes, and how many segments this process ran in it, as `sums-<rank>.json` in the working folder."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from hrm.cli import main
from hrm.modeling import HRMGemmaForCausalLM
from hrm.trainer import HRMTrainer

steps: list[dict[str, int]] = []
make, step, forward = DistributedDataParallel.__init__, HRMTrainer.training_step, HRMGemmaForCausalLM.forward
average = HRMTrainer._average


def counted(state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    steps[-1]["sums"] += bucket.is_last()  # the buckets of one pass over the gradients are one sum
    return allreduce_hook(state, bucket)


def made(self: Any, *args: Any, **kwargs: Any) -> None:
    make(self, *args, **kwargs)
    self.register_comm_hook(None, counted)


def averaged(self: Any, gradients: Any) -> None:
    steps[-1]["sums"] += len({gradient.dtype for gradient in gradients})
    average(self, gradients)


def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
    steps.append({"sums": 0, "segments": 0})
    return step(self, *args, **kwargs)


def forwarded(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = forward(self, *args, **kwargs)
    if self.training:
        steps[-1]["segments"] = len(output.segment_losses)
    return output


if __name__ == "__main__":
    DistributedDataParallel.__init__ = made  # type: ignore[method-assign]
    HRMTrainer.training_step, HRMGemmaForCausalLM.forward = stepped, forwarded  # type: ignore[method-assign]
    HRMTrainer._average = averaged  # type: ignore[method-assign]
    status = main(sys.argv[1:])
    Path(f"sums-{os.environ['RANK']}.json").write_text(json.dumps(steps))
    sys.exit(status)
