"""What one real training step takes, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hrm.core import CoreOutput, EachSegment, Segment
from hrm.modeling import HRMGemmaForCausalLM, HRMOutput
from hrm.offload import OffloadedEmbedding
from hrm.profile.plan import Step
from hrm.profile.skeleton import PER_LAYER
from hrm.profile.tracing import CudaBytes, LiveBytes


@dataclass(frozen=True)
class Measurement:
    """Bytes that one real training step took, named as in `MemoryPlan`."""

    parts: dict[str, int]  # on the device
    host: int  # in the CPU's memory
    peaks: dict[str, int]  # "forward", "backward" and "step"


def measure_memory(
    model: HRMGemmaForCausalLM, step: Step, optimizer: Callable[[], torch.optim.Optimizer] | None = None
) -> Measurement:
    """Bytes of one real training step on random tokens; the model is left with neither gradients nor changed weights.

    What stays is counted tensor by tensor; of the rest, what is allocated where one part of the step ends and the next
    begins. A part's end is where `MemoryPlan` draws it: the last hidden state and the segments' z_H are the loss's.

    Another step runs before. So this one finds what later steps of a training find: the optimizer's states, gradients
    of the micro batch before, and the room that CUDA's libraries take when they are first called.

    Args:
        model: in training mode, as it trains.
        step: rows, tokens, segments and autocast; the rest is as the model is.
        optimizer: makes the optimizer; None: no step is taken, and what is the optimizer's is left out.
    """
    batch = _batch(model, step)
    made = None if optimizer is None else _still(optimizer())
    try:
        _forward(model, batch, step).loss.backward()  # type: ignore[union-attr]  # there are labels
        if made is not None:
            made.step()
        stays, host = resident_tensors(model, made)
        known = [tensor for tensors in stays.values() for tensor in tensors]
        with CudaBytes() if model.device.type == "cuda" else LiveBytes(known) as live:
            parts, peaks = _measured(model, batch, step, made, live)
    finally:
        model.zero_grad(set_to_none=True)
    return Measurement({part: stored_bytes(t) for part, t in stays.items()} | parts, stored_bytes(host), peaks)


def text_vocabulary(config: PreTrainedConfig) -> int:
    """How many of a decoder's token ids stand for text: Gemma 3n's last ids, which stand for images and sounds, have no
    per-layer embedding."""
    text = config.get_text_config()
    return min(text.vocab_size, getattr(text, "vocab_size_per_layer_input", text.vocab_size))


# ---------------------------------------------------------------------------------------------------- what stays


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what `tensors` are stored in, each storage once."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def resident_tensors(
    model: HRMGemmaForCausalLM, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """What stays between steps: on the device, by the parts of `MemoryPlan`, and in the CPU's memory."""
    parts: dict[str, list[Tensor]] = {part: [] for part in ("weights", "per_layer", "adapters", "gradients")}
    for name, tensor in (*model.backbone.named_parameters(), *model.backbone.named_buffers()):
        part = "adapters" if ".lora_" in name else "per_layer" if PER_LAYER in name else "weights"
        parts[part] += [tensor, *_tensors_of(getattr(tensor, "quant_state", None))]
    parts["core"] = [*model.hrm.parameters(), *model.hrm.buffers()]
    parts["gradients"] = [p.grad for p in model.parameters() if p.grad is not None]
    host = [module.weight for module in model.modules() if isinstance(module, OffloadedEmbedding)]
    if optimizer is not None:
        # numbers of steps, which AdamW keeps on the CPU, have no dimension
        states = [tensor for state in optimizer.state.values() for tensor in _tensors_of(state) if tensor.dim()]
        host += [tensor for tensor in states if getattr(tensor, "is_paged", False)]
        parts["optimizer"] = [tensor for tensor in states if not getattr(tensor, "is_paged", False)]
    return parts, host


def _tensors_of(state: Any) -> list[Tensor]:
    """The tensors of an optimizer's state, or of bitsandbytes' description of a 4-bit weight."""
    values = state.values() if isinstance(state, dict) else vars(state).values() if state is not None else ()
    found = [value for value in values if isinstance(value, Tensor)]
    nested = getattr(state, "state2", None)  # double quantisation: the scales' own scales
    return [*found, *_tensors_of(nested)] if nested is not None else found


# ---------------------------------------------------------------------------------------------------- what passes


def _batch(model: HRMGemmaForCausalLM, step: Step) -> dict[str, Any]:
    ids = torch.randint(text_vocabulary(model.config), step.shape, device=model.device)
    if step.packed:
        positions = torch.arange(step.tokens, device=model.device).repeat(step.micro_batch)[None]
        return {"input_ids": ids, "position_ids": positions, "labels": ids, "segments": step.segments}
    mask = torch.ones_like(ids)
    mask[0, -1] = step.micro_batch == 1  # rows of several lengths have a mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "segments": step.segments}


def _still(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer`, whose steps change nothing."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def _forward(model: HRMGemmaForCausalLM, batch: dict[str, Any], step: Step) -> HRMOutput:
    """A forward pass as in the Trainer, which turns what it returns into float32."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=step.dtype == torch.bfloat16):
        return convert_to_fp32(model(**batch))


def _measured(
    model: HRMGemmaForCausalLM,
    batch: dict[str, Any],
    step: Step,
    optimizer: torch.optim.Optimizer | None,
    live: CudaBytes | LiveBytes,
) -> tuple[dict[str, int], dict[str, int]]:
    """Parts that do not stay, and peaks, of a step while `live` counts."""
    marks, peaks = _Marks(model, live, step.dtype), {}
    hooks = [
        model.hrm.register_forward_pre_hook(marks.before_core, with_kwargs=True),
        model.hrm.register_forward_hook(marks.after_core, with_kwargs=True),
    ]
    try:
        output = _forward(model, batch, step)
    finally:
        for hook in hooks:
            hook.remove()
    marks.scored()
    peaks["forward"] = marks.end()
    assert output.carry is not None and output.loss is not None
    marks.parts["carry"] = stored_bytes(output.carry)
    output.loss.backward()
    marks.after_backward()
    peaks["backward"] = marks.end()
    del output
    if optimizer is not None:
        optimizer.step()
        marks.parts["update"] = live.most - live.now
        peaks["step"] = marks.end()
    return marks.parts, peaks


class _Marks:
    """What `live` counts where one part of a step ends and the next begins."""

    def __init__(self, model: HRMGemmaForCausalLM, live: CudaBytes | LiveBytes, dtype: torch.dtype) -> None:
        self._live = live
        self.parts = {"core_activations": 0, "loss": 0}
        adapters = [p for name, p in model.backbone.named_parameters() if ".lora_" in name]
        self._adapters = self._copied(adapters, dtype)
        self.parts["copies"] = self._adapters + self._copied([*model.hrm.parameters(), *model.hrm.buffers()], dtype)
        self._highest = 0  # of the phase, up to where the counter last forgot
        self._hidden = self._core_done = 0
        self._scoring: int | None = None  # what there was when the loss began, while it is computed
        live.forget()
        self._start = live.now

    def _copied(self, tensors: list[Tensor], dtype: torch.dtype) -> int:
        before = self._live.now
        copies = [tensor.detach().to(dtype) for tensor in tensors]
        size = self._live.now - before
        del copies
        return size

    def before_core(self, core: nn.Module, inputs: tuple[Tensor], settings: dict[str, Any]) -> tuple[Any, Any]:
        """The core's forward pre-hook."""
        (h,), each = inputs, settings.get("each")
        self._hidden = 0 if h.dtype == torch.float32 else h.nbytes  # in float32 the core keeps it
        self.parts["backbone_activations"] = self._live.now - self._start - self._adapters - h.nbytes
        if h.requires_grad:
            h.register_hook(self._before_backbone)
        return inputs, settings if each is None else {**settings, "each": _Scored(each, self)}

    def after_core(self, core: nn.Module, inputs: Any, settings: dict[str, Any], output: CoreOutput) -> None:
        """The core's forward hook."""
        if settings.get("each") is None:
            self.score(output.segments, stored_bytes(output.carry or ()))

    def score(self, segments: list[Segment], carry: int = 0) -> None:
        """The loss of `segments` begins, while there are `carry` bytes of a carry."""
        self._forget()
        others = self.parts["copies"] + self.parts["backbone_activations"] + carry
        outputs = self._hidden + sum(segment.z_h.nbytes for segment in segments)
        kept = self._live.now - self._start - others - outputs
        self.parts["core_activations"] = max(kept, self.parts["core_activations"])
        self._scoring = self._start + others + kept

    def scored(self) -> None:
        """The loss of what was last begun ends, if it has not yet."""
        if self._scoring is not None:
            self.parts["loss"] = max(self._live.most - self._scoring, self.parts["loss"])
            self._scoring = None

    def _before_backbone(self, _: Tensor) -> None:
        self._forget()
        self._core_done = self._live.now

    def after_backward(self) -> None:
        """The backward pass ends."""
        if self._core_done:
            self.parts["layer"] = self._live.most - self._core_done

    def _forget(self) -> None:
        self._highest = max(self._highest, self._live.most)
        self._live.forget()

    def end(self) -> int:
        """The most bytes of a phase, which ends here."""
        self._forget()
        highest, self._highest = self._highest, 0
        return highest


class _Scored:
    """A core's `each` between whose calls `marks` looks."""

    def __init__(self, each: EachSegment, marks: _Marks) -> None:
        self._each, self._marks, self.plan = each, marks, each.plan

    def __call__(self, segment: Segment, h: Tensor, w_out: Tensor) -> Tensor:
        self._marks.score([segment])
        loss = self._each(segment, h, w_out)
        self._marks.scored()
        return loss
