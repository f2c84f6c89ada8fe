"""How a training step runs, and the prediction of what it takes, part by part and at its three peaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from hrm.config import HRMConfig
from hrm.profile.formulas import between_segments, core_activations, loss_bytes
from hrm.profile.skeleton import Skeleton
from hrm.settings import CHOICES

OPTIMIZERS = CHOICES["train.optimizer"]
RESIDENT = ("weights", "per_layer", "adapters", "core", "gradients", "optimizer", "carry")
PEAKS = {
    "loss": ("copies", "backbone_activations", "core_activations", "loss"),
    "backward": ("copies", "backbone_activations", "layer"),
    "step": ("update",),
}


@dataclass(frozen=True)
class Step:
    """How one training step runs.

    Raises:
        ValueError: a value that makes no sense; the message names it.
    """

    tokens: int = 512
    """Tokens in a row, padding included; of packed rows the mean, rounded up."""
    micro_batch: int = 1
    """Rows that go through the model together."""
    batch: int | None = None
    """Rows of a batch on one process; None: no more than those of a micro batch."""
    packed: bool = False
    """The rows of a micro batch stand behind each other in one, without padding."""
    widest: Callable[[int], int] | None = field(default=None, compare=False, repr=False)
    """Rows of a packed micro batch -> the most tokens that they can have together; None: `tokens` each."""
    segments: int | None = None
    """M, segments of one forward pass; None: the core's own number (the most, under ACT)."""
    dtype: torch.dtype = torch.bfloat16
    """Of the backbone and of autocast; float32: no autocast. Core, adapters and their gradients are float32."""
    four_bit: bool = False
    """The backbone's linear layers in nf4, those of `hrm.loading.KEPT_WHOLE` aside."""
    per_layer_on_cpu: bool = False
    """Gemma 3n's per-layer embeddings in the CPU's memory."""
    gradient_checkpointing: bool = False
    """The backbone's layers are computed again in the backward pass."""
    optimizer: str = "adamw"
    """One of `OPTIMIZERS`."""
    fused: bool = True
    """Whether the core runs the Triton kernels, which save less."""
    by_segment: bool = False
    """Whether the training could take an optimizer step a segment, so that one is in memory at a time."""

    def __post_init__(self) -> None:
        for name in ("tokens", "micro_batch", "batch", "segments"):
            value = getattr(self, name)
            if value is None and name in ("batch", "segments"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Step: {name} is {value!r}; it should be a whole number, at least 1")
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"Step: dtype is {self.dtype}; it should be torch.bfloat16 or torch.float32")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"Step: optimizer is {self.optimizer!r}; it should be {' or '.join(OPTIMIZERS)}")

    def of_widest(self) -> Step:
        """This step with the `tokens` that its packed rows have on average where they have the most."""
        if not self.packed or self.widest is None:
            return self
        return replace(self, tokens=-(-self.widest(self.micro_batch) // self.micro_batch))

    @property
    def rows(self) -> int:
        """n, tokens that go through the model together."""
        return self.tokens * self.micro_batch

    @property
    def shape(self) -> tuple[int, int]:
        """Rows that the model sees, and tokens in each."""
        return (1, self.rows) if self.packed else (self.micro_batch, self.tokens)


@dataclass
class MemoryPlan:
    """Predicted bytes of one training step, by part.

    A step has three peaks: "loss" (all activations and one chunk of logits), "backward" (the backbone's activations and
    one layer at work), and "step" (the optimizer's, without activations). `peak` is the highest.
    """

    parts: dict[str, int]  # on the GPU
    host: dict[str, int]  # in the CPU's memory
    step: Step
    skeleton: Skeleton = field(repr=False)

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes at each of the three peaks."""
        return {name: sum(self.parts[part] for part in (*RESIDENT, *own)) for name, own in PEAKS.items()}

    @property
    def peak(self) -> int:
        """The most bytes that the step takes of the GPU."""
        return max(self.peaks.values())

    def changed(self, **fields: Any) -> MemoryPlan:
        """The plan of the same models with other fields of `Step`."""
        return plan_of(self.skeleton, replace(self.step, **fields).of_widest())


def predict_memory(
    backbone: PreTrainedConfig,
    hrm: HRMConfig | None = None,
    lora: bool | dict[str, Any] | None = True,
    step: Step | None = None,
) -> MemoryPlan:
    """What a training step of a core and adapters on `backbone` takes; no weights are needed.

    Args:
        backbone: config of a causal language model.
        hrm: settings of the core; its `hidden_size` is taken from the backbone. None: the defaults.
        lora: as for `HRMGemmaForCausalLM.from_backbone`.
        step: how the step runs.

    Raises:
        ValueError: no model can be made of `backbone`, or it cannot be traced; the message says why.
    """
    return plan_of(Skeleton(backbone, hrm or HRMConfig(), lora), step or Step())


def plan_of(skeleton: Skeleton, step: Step) -> MemoryPlan:
    """The prediction for models that were counted already."""
    width, core = step.dtype.itemsize, skeleton.core
    segments = step.segments or (core.max_segments if core.act else core.segments)
    between = between_segments(core, step.rows, segments, skeleton.core_bytes, width)
    packed = step.packed and step.micro_batch > 1  # one document needs no mask
    backbone, layer = skeleton.backbone_activations(step.dtype, *step.shape, step.gradient_checkpointing, packed)
    states, paged = skeleton.optimizer(step.optimizer)
    per_layer = skeleton.per_layer(width)
    trained = 4 * skeleton.trained
    parts = {
        "weights": skeleton.weights(width, step.four_bit),
        "per_layer": 0 if step.per_layer_on_cpu else per_layer,
        "adapters": skeleton.adapters,
        "core": skeleton.core_bytes,
        "gradients": trained,
        "optimizer": states,
        "carry": 4 * step.rows * (core.d_l + core.d_h),
        "copies": 0 if width == 4 else (skeleton.core_bytes + skeleton.adapters) * width // 4,
        "backbone_activations": backbone,
        "core_activations": between + core_activations(core, step.rows, width, fused=step.fused, packed=packed),
        "loss": loss_bytes(skeleton.text, core, step.rows, width),
        "layer": layer + skeleton.largest_dequantised(width, step.four_bit),
        "update": trained if step.optimizer == "adamw" else 0,  # torch's foreach takes the root of all moments at once
    }
    return MemoryPlan(parts, {"optimizer": paged, "per_layer": per_layer - parts["per_layer"]}, step, skeleton)
