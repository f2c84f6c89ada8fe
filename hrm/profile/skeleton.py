"""A model without data: its weights and optimizer states counted tensor by tensor, its backbone's layers traced."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from hrm.config import HRMConfig
from hrm.loading import KEPT_WHOLE
from hrm.modeling import HRMGemmaConfig, HRMGemmaForCausalLM
from hrm.profile.formulas import nf4_bytes
from hrm.profile.tracing import ATTENTION, PACKED, trace

ADAM8_BLOCK = 256  # values that share one float32 scale
ADAM8_LEAST, PAGED_LEAST = 4096, 100_000  # smaller tensors keep float32 states; smaller ones are not paged
PER_LAYER = "embed_tokens_per_layer.weight"  # Gemma 3n's: read one row a token, so the CPU can keep them
WIDENED = ("gemma3n_text",)  # CUDA's autocast takes powers in float32, and with them all that passes between the layers
LAYER_GRADIENTS = 4  # tensors as wide as the layer's widest that its backward holds beside what was saved


class Skeleton:
    """A model without data, whose tensors and activations can be counted.

    Args:
        backbone: config of a causal language model.
        hrm: settings of the core.
        lora: as for `HRMGemmaForCausalLM.from_backbone`.

    Raises:
        ValueError: no model can be made of `backbone`; the message says why.
    """

    def __init__(self, backbone: PreTrainedConfig, hrm: HRMConfig, lora: bool | dict[str, Any] | None) -> None:
        self._backbone = backbone
        self._hrm, self._lora = hrm, lora
        self.model = self._made(ATTENTION)
        self.core, self.text = self.model.hrm.config, self.model.config.get_text_config()
        groups = self.model.trainable_parameters()
        self._trained = [p.numel() for group in groups.values() for p in group]
        self.trained = sum(self._trained)
        self.adapters = 4 * sum(p.numel() for name, group in groups.items() if name != "core" for p in group)
        self.core_bytes = sum(t.nbytes for t in (*self.model.hrm.parameters(), *self.model.hrm.buffers()))
        self._activations: dict[tuple[torch.dtype, int, int, bool, bool], tuple[int, int]] = {}

    def _made(self, attention: str) -> HRMGemmaForCausalLM:
        backbone = copy.deepcopy(self._backbone)
        backbone._attn_implementation = attention
        try:
            with init_empty_weights(include_buffers=True):
                return HRMGemmaForCausalLM(HRMGemmaConfig(backbone=backbone, hrm=self._hrm, lora=self._lora))
        except (AttributeError, KeyError, TypeError, ImportError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"backbone is a config of model_type {backbone.model_type!r}, of which no causal language model "
                f"can be made: {error}"
            ) from error

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """The backbone's own parameters and buffers; tied ones once."""
        named = (*self.model.backbone.named_parameters(), *self.model.backbone.named_buffers())
        return {name: tensor for name, tensor in named if ".lora_" not in name and PER_LAYER not in name}

    @cached_property
    def _quantised(self) -> dict[str, int]:
        """Values of each weight that nf4 takes, by the module's name."""
        modules = self.model.backbone.named_modules()
        whole = KEPT_WHOLE.get(self.text.model_type, ["lm_head"])
        linear = {name.removesuffix(".base_layer"): m for name, m in modules if type(m) is nn.Linear}
        return {
            name: m.weight.numel()
            for name, m in linear.items()
            if ".lora_" not in name and should_convert_module(name, whole)
        }

    def weights(self, width: int, four_bit: bool) -> int:
        """Bytes of the backbone without its per-layer embeddings; values of parameters take `width` bytes."""
        parameters = {name for name, _ in self.model.backbone.named_parameters()}
        plain = sum(t.numel() * (width if name in parameters else t.itemsize) for name, t in self._tensors.items())
        if not four_bit:
            return plain
        return plain + sum(nf4_bytes(size) - size * width for size in self._quantised.values())

    def largest_dequantised(self, width: int, four_bit: bool) -> int:
        """Bytes of the largest 4-bit weight in the precision that it is multiplied in."""
        return max(self._quantised.values(), default=0) * width if four_bit else 0

    def per_layer(self, width: int) -> int:
        """Bytes of Gemma 3n's per-layer embeddings; 0 where there are none."""
        return width * sum(p.numel() for name, p in self.model.backbone.named_parameters() if PER_LAYER in name)

    def optimizer(self, kind: str) -> tuple[int, int]:
        """Bytes of the states that optimizer `kind` keeps, on the GPU and in the CPU's memory."""
        device = host = 0
        for size in self._trained:
            if kind == "adamw":
                device += 8 * size
                continue
            eight = size >= ADAM8_LEAST
            states = 2 * size if eight else 8 * size
            paged = kind == "paged_adamw_8bit" and size >= PAGED_LEAST
            host += states * paged
            device += states * (not paged) + (8 * -(-size // ADAM8_BLOCK) if eight else 0)
        return device, host

    def backbone_activations(
        self, dtype: torch.dtype, batch: int, tokens: int, checkpointing: bool, packed: bool
    ) -> tuple[int, int]:
        """Bytes that autograd keeps of the backbone, and that the backward pass of one layer takes beside them."""
        key = (dtype, batch, tokens, checkpointing, packed)
        if key not in self._activations:
            attention = PACKED if packed else ATTENTION
            kept, layer = trace(self._traced(dtype, attention), batch, tokens)
            passed, _ = trace(self._traced(dtype, attention), batch, tokens, checkpointing=True)
            kept = passed if checkpointing else kept
            if packed and checkpointing:  # a mask for each kind of layer, kept for its second forward pass
                kept += tokens * tokens * len(set(getattr(self.text, "layer_types", None) or [""]))
            if dtype != torch.float32 and self.text.model_type in WIDENED:
                kept += passed * (4 - dtype.itemsize) // dtype.itemsize
            widest = max(m.out_features for m in self.model.get_decoder().modules() if type(m) is nn.Linear)
            working = LAYER_GRADIENTS * batch * tokens * widest * dtype.itemsize
            self._activations[key] = kept, working + (layer if checkpointing else 0)
        return self._activations[key]

    def _traced(self, dtype: torch.dtype, attention: str) -> HRMGemmaForCausalLM:
        """A model of the same kind in one precision; what autocast copies, it copies."""
        model = self._made(attention).train().to(dtype=dtype)  # type: ignore[call-arg]  # as transformers types it
        if dtype != torch.float32:
            for name, module in model.backbone.named_modules():
                if ".lora_A." in name:
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
        return model
