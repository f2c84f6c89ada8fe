"""Run by test_distributed.py in two processes: the command line under accelerate's FSDP2, which on a CPU is DDP to
accelerate unless it is told otherwise, as here.

With "bf16" in front in the precision of a GPU's training, with "bf16-whole" in that under DDP.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import hrm.train
import hrm.trainer
from hrm.cli import main
from hrm.modeling import HRMGemmaForCausalLM
from hrm.sharding import is_sharded

LAUNCH = {  # what `accelerate launch` sets by docs/training.md's configuration
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def allow_fsdp() -> None:
    make = AcceleratorState.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = made  # type: ignore[method-assign]


def in_bfloat16() -> None:
    arguments, make = hrm.trainer.TrainingArguments, HRMGemmaForCausalLM.from_backbone
    hrm.trainer.TrainingArguments = lambda **kwargs: arguments(**{**kwargs, "bf16": True})  # type: ignore
    HRMGemmaForCausalLM.from_backbone = (  # type: ignore[method-assign]
        lambda *args, **kwargs: make(*args, **{**kwargs, "dtype": torch.bfloat16})
    )


def expect_shards() -> None:
    save = hrm.train.Run.save_model

    def saved(self: Any) -> None:
        assert is_sharded(self.job.model)
        save(self)

    hrm.train.Run.save_model = saved  # type: ignore[method-assign]


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0] in ("bf16", "bf16-whole"):
        in_bfloat16()
    if words[0] != "bf16-whole":
        os.environ |= LAUNCH
        allow_fsdp()
        expect_shards()
    sys.exit(main([word for word in words if not word.startswith("bf16")]))
