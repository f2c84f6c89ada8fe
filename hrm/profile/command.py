"""`hrm profile`: a training's settings turned into a plan, which is printed, beside a measured step where there is one.

What plans and measures is imported where it is used: the command line's start needs the settings alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hrm.settings import (
    HRMSection,
    LoraSection,
    TrainSection,
    UsageError,
    check_packages,
    check_step,
    default_backbone,
    hrm_config,
    lora_dict,
    require,
    segment_conflict,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hrm.profile.measure import Measurement
    from hrm.profile.plan import MemoryPlan, Step


@dataclass
class PlannedData:
    max_length: int = 512
    """Most tokens of prompt and answer together."""


@dataclass
class ProfileSettings:
    """Keys of `hrm profile`."""

    hrm: HRMSection = field(default_factory=HRMSection)  # type: ignore[valid-type]
    lora: LoraSection = field(default_factory=LoraSection)  # type: ignore[valid-type]
    data: PlannedData = field(default_factory=PlannedData)
    train: TrainSection = field(default_factory=TrainSection)
    preset: str | None = None
    """Settings to start from, as of `hrm train`: the name of a preset (depth, gsm8k), or a YAML file of sections."""
    gpu_gb: float | None = None
    """GB of the GPU that is planned for; null: what this machine's has, if there is one."""


def plan_training(
    settings: Any, backbone: PreTrainedConfig, lengths: Sequence[int] | None = None, processes: int = 1
) -> MemoryPlan:
    """The plan of a training on CUDA with `settings`, which have the sections hrm, lora, data and train.

    Args:
        settings: as of `hrm train`.
        backbone: its config.
        lengths: tokens of each row that is trained on; None: all have data.max_length.
        processes: that share a batch.
    """
    from hrm.batching import widest_part
    from hrm.profile.plan import Step, predict_memory

    train, lengths = settings.train, lengths or [settings.data.max_length]
    rows = train.batch_size // processes
    step = Step(
        tokens=max(lengths),
        micro_batch=min(train.micro_batch or rows, rows),
        batch=rows,
        packed=train.pack,
        widest=lambda size: widest_part(lengths, size, train.batch_size),
        segments=1 if train.update_every == "segment" else None,
        by_segment=segment_conflict(settings) is None,
        gradient_checkpointing=train.gradient_checkpointing,
        optimizer=train.optimizer,
        fused=settings.hrm.fused is not False,
        four_bit=settings.hrm.quantize is not None,
        per_layer_on_cpu=settings.hrm.offload_per_layer_embeddings,
    ).of_widest()
    lora = lora_dict(settings.lora)
    return predict_memory(backbone, hrm_config(settings.hrm), lora, step)


def profile(settings: Any) -> None:
    """Prints what a training step with `settings` (`ProfileSettings`) takes and what each saving would save.

    `hrm.backbone` needs no weights; where it has them and there is a GPU, one real step is measured too.

    Raises:
        UsageError: a setting or a backbone that cannot be used.
    """
    from hrm.offload import check_per_layer_embeddings
    from hrm.profile.advice import available_memory, check_fits, in_gb
    from hrm.profile.report import print_plan
    from hrm.running import is_out_of_memory

    _check(settings)
    name = settings.hrm.backbone or default_backbone()
    if name is None:
        raise UsageError("no backbone; set hrm.backbone=NAME_OR_PATH, or HRM_MODEL_PATH")
    backbone = load_config(name)
    asked, allowed = settings.data.max_length, getattr(backbone.get_text_config(), "max_position_embeddings", None)
    try:
        if settings.hrm.offload_per_layer_embeddings:
            check_per_layer_embeddings(backbone)
        plan = plan_training(settings, backbone, [min(asked, allowed or asked)])
    except ValueError as error:
        raise UsageError(f"hrm.backbone is {name!r}, and cannot be planned with: {error}") from error
    measured = why = None
    if torch.cuda.is_available() and _has_weights(name):
        check_packages(settings)
        try:
            measured = _measured(name, settings, plan.step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = str(error).splitlines()[0]
    print_plan(plan, measured)
    if why is not None:
        print(f"A real step was tried and ran out of memory, so nothing is measured: {why}")
    if plan.step.tokens < asked:
        print(f"data.max_length is {asked}; the backbone allows {allowed} tokens, and hrm train refuses a longer row.")
    available = available_memory() if torch.cuda.is_available() else None
    available = available if settings.gpu_gb is None else int(settings.gpu_gb * 1e9)
    if available is not None:
        print(check_fits(plan, available) or f"It fits into {in_gb(available)} GB.")


def load_config(name: str) -> PreTrainedConfig:
    """The config of a backbone, by name or from a folder.

    Raises:
        UsageError: there is none, or not one that transformers knows.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"hrm.backbone is {name!r}, and has no config that can be read: {reason}") from error


def _check(settings: Any) -> None:
    check_step(settings)  # without the packages: what is planned for may be another machine
    finite = "a finite number above 0, or null"
    require(settings, "gpu_gb", lambda value: value is None or 0 < value < math.inf, finite)


def _has_weights(name: str) -> bool:
    """Whether `name` is no folder, or one that holds weights."""
    folder = Path(name)
    return not folder.is_dir() or any(folder.glob("*.safetensors"))


def _measured(name: str, settings: Any, step: Step) -> Measurement:
    from hrm.profile.measure import measure_memory
    from hrm.train import load_model
    from hrm.trainer import make_optimizer

    model = load_model(name, settings).train()
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return measure_memory(model, step, lambda: make_optimizer(model, settings.train))
