"""Started by torchrun in test_distributed.py: `hrm train` that writes down how often a step sums gradients over the
processes, whose weights begin apart, what one of them adds up to, and how many segments this process ran in it, as
`sums-<rank>.json` in the working folder."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from hrm.cli import main
from hrm.modeling import HRMGemmaForCausalLM
from hrm.trainer import HRMTrainer

steps: list[dict[str, Any]] = []
make, average, step, forward = (
    HRMTrainer.__init__, HRMTrainer._average, HRMTrainer.training_step, HRMGemmaForCausalLM.forward,
)  # fmt: skip


class Counted:
    """A process group that counts what sums gradients."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        assert not name.startswith(("all", "reduce", "broadcast")), name  # nothing else may go over the gradients
        return getattr(self._group, name)

    def allreduce_coalesced(self, tensors: Any) -> Any:
        steps[-1]["sums"] += 1
        return self._group.allreduce_coalesced(tensors)


def averaged(self: Any, gradients: Any, group: Any) -> None:
    average(self, gradients, Counted(group))
    assert steps[-1]["sums"]


def made(self: Any, *args: Any, **kwargs: Any) -> None:
    make(self, *args, **kwargs)
    self.core_model.hrm.w_x.data += self.args.process_index  # which the first process's weights are to replace


def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
    steps.append({"sums": 0, "segments": 0, "w_x": float(self.core_model.hrm.w_x.detach().double().sum())})
    return step(self, *args, **kwargs)


def forwarded(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = forward(self, *args, **kwargs)
    if self.training:
        steps[-1]["segments"] = len(output.segment_losses)
    return output


if __name__ == "__main__":
    HRMTrainer.training_step, HRMGemmaForCausalLM.forward = stepped, forwarded  # type: ignore[method-assign]
    HRMTrainer.__init__, HRMTrainer._average = made, averaged  # type: ignore[method-assign]
    status = main(sys.argv[1:])
    Path(f"sums-{os.environ['RANK']}.json").write_text(json.dumps(steps))
    sys.exit(status)
