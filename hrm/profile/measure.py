"""What one real training step takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from hrm.modeling import HRMGemmaForCausalLM
from hrm.profile.plan import Step
from hrm.profile.tracing import SavedBytes


def measure_memory(
    model: HRMGemmaForCausalLM, step: Step, optimizer: Callable[[], torch.optim.Optimizer] | None = None
) -> dict[str, int]:
    """Bytes of one real training step on random tokens; the model is left with neither gradients nor changed weights.

    On CUDA: the most that was allocated in "forward", "backward" and "step"; elsewhere what autograd saved, as
    "backbone_activations", "core_activations" and "loss".

    Args:
        model: in training mode, as it trains.
        step: rows, tokens, segments and autocast; the rest is as the model is.
        optimizer: makes the optimizer; None: no step is taken.
    """
    device = model.device
    ids = torch.randint(text_vocabulary(model.config), (step.micro_batch, step.tokens), device=device)
    mask = torch.ones_like(ids)
    mask[0, -1] = step.micro_batch == 1  # rows of several lengths have a mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "segments": step.segments}
    with torch.autocast(device.type, torch.bfloat16, enabled=step.dtype == torch.bfloat16):
        if device.type != "cuda":
            return _saved_bytes(model, batch)
    return _allocated(model, batch, step, optimizer)


def text_vocabulary(config: PreTrainedConfig) -> int:
    """How many of a decoder's token ids stand for text: Gemma 3n's last ids, which stand for images and sounds, have no
    per-layer embedding."""
    text = config.get_text_config()
    return min(text.vocab_size, getattr(text, "vocab_size_per_layer_input", text.vocab_size))


def _saved_bytes(model: HRMGemmaForCausalLM, batch: dict[str, Any]) -> dict[str, int]:
    saved, marks = SavedBytes((*model.parameters(), *model.buffers())), []
    parts = (model.get_decoder(), model.hrm)
    hooks = [part.register_forward_hook(lambda *_: marks.append(saved.bytes)) for part in parts]
    try:
        with saved:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    backbone, core = marks
    return {"backbone_activations": backbone, "core_activations": core - backbone, "loss": saved.bytes - core}


def _allocated(
    model: HRMGemmaForCausalLM, batch: dict[str, Any], step: Step, make: Callable[[], torch.optim.Optimizer] | None
) -> dict[str, int]:
    found: dict[str, int] = {}

    def end(phase: str) -> None:
        torch.cuda.synchronize()
        found[phase] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16, enabled=step.dtype == torch.bfloat16):
        output = model(**batch)
    end("forward")
    output.loss.backward()
    end("backward")
    del output
    if make is not None:
        optimizer = make()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        end("step")
    model.zero_grad(set_to_none=True)
    return found
