"""What a training step takes of a GPU's memory: predicted from configs alone, measured, and what would save some.

Weights, gradients and optimizer states are counted tensor by tensor on a model without data. What autograd keeps of the
backbone is found by running its layers on tensors without data; what it keeps of the core is a formula
(`core_activations`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.quantizers_utils import should_convert_module

from hrm.config import HRMConfig
from hrm.loading import KEPT_WHOLE
from hrm.loss import CHUNK_BYTES
from hrm.modeling import HRMGemmaConfig, HRMGemmaForCausalLM
from hrm.settings import (
    CHOICES,
    HRMSection,
    LoraSection,
    TrainSection,
    UsageError,
    default_backbone,
    hrm_config,
    lora_dict,
    require,
)

OPTIMIZERS = CHOICES["train.optimizer"]
NF4_BLOCK, ADAM8_BLOCK = 64, 256  # values that share one float32 scale
ADAM8_LEAST, PAGED_LEAST = 4096, 100_000  # smaller tensors keep float32 states; smaller ones are not paged
PER_LAYER = "embed_tokens_per_layer.weight"  # Gemma 3n's: read one row a token, so the CPU can keep them
LAYER_GRADIENTS = 4  # tensors as wide as the layer's widest that its backward holds beside what was saved

# ---------------------------------------------------------------------------------------------------- what is planned


@dataclass(frozen=True)
class Step:
    """How one training step runs.

    Raises:
        ValueError: a value that makes no sense; the message names it.
    """

    tokens: int = 512
    """Tokens in a row, padding included."""
    micro_batch: int = 1
    """Rows that go through the model together."""
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

    def __post_init__(self) -> None:
        for name in ("tokens", "micro_batch") if self.segments is None else ("tokens", "micro_batch", "segments"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Step: {name} is {value!r}; it should be a whole number, at least 1")
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"Step: dtype is {self.dtype}; it should be torch.bfloat16 or torch.float32")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"Step: optimizer is {self.optimizer!r}; it should be {' or '.join(OPTIMIZERS)}")

    @property
    def rows(self) -> int:
        """n, tokens that go through the model together."""
        return self.tokens * self.micro_batch


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
        return plan_of(self.skeleton, replace(self.step, **fields))


PARTS = {
    "weights": "backbone weights",
    "per_layer": "per-layer embeddings",
    "adapters": "adapters (float32)",
    "core": "core (float32)",
    "gradients": "gradients (float32)",
    "optimizer": "optimizer states",
    "carry": "carry",
    "copies": "core and adapters in bfloat16",
    "backbone_activations": "backbone activations",
    "core_activations": "core activations",
    "loss": "cross entropy, one chunk",
    "layer": "one layer's backward",
    "update": "optimizer's temporaries",
}
RESIDENT = ("weights", "per_layer", "adapters", "core", "gradients", "optimizer", "carry")
PEAKS = {
    "loss": ("copies", "backbone_activations", "core_activations", "loss"),
    "backward": ("copies", "backbone_activations", "layer"),
    "step": ("update",),
}


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
    backbone, layer = skeleton.backbone_activations(
        step.dtype, step.micro_batch, step.tokens, step.gradient_checkpointing
    )
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
        "core_activations": core_activations(core, step.rows, segments, width, fused=step.fused),
        "loss": loss_bytes(skeleton.text, core, step.rows, segments, width),
        "layer": layer + skeleton.largest_dequantised(width, step.four_bit),
        "update": trained if step.optimizer == "adamw" else 0,  # torch's foreach takes the root of all moments at once
    }
    return MemoryPlan(parts, {"optimizer": paged, "per_layer": per_layer - parts["per_layer"]}, step, skeleton)


# ---------------------------------------------------------------------------------------------------- the core


def core_activations(config: HRMConfig, rows: int, segments: int, width: int, *, fused: bool) -> int:
    """Bytes that autograd saves of the core on `rows` tokens, in values of `width` bytes.

    For n = rows, M = segments, C = grad_cycles, G = grad_l_steps: it grows with M C G, and neither with N nor with T,
    whose other steps run without graph. With the kernels it does not grow with G either:

        once           x, the norm's float32 input, its scales, RoPE's two tables
        L, eager       G (state, g, u, silu, hidden, and y and its scales in float32), new state
        L, fused       state before the G steps, context, new state
        mixer          z_H, [q k v], rotated [q k], its output, logarithms
        H, eager       a, p, silu, q, sigmoid, silu * q, and v and its scales in float32
        H, fused       a, p q r

    At most that: initial states are no tokens' own, so where every cycle of a segment carries gradient the first one's
    are not saved.

    Args:
        config: of the core.
        rows: tokens of a micro batch.
        segments: M.
        width: of a value, 2 or 4.
        fused: whether the Triton kernels run.
    """
    d, d_l, d_h, size = config.hidden_size, config.d_l, config.d_h, config.head_size
    once = d * (4 + width) + 4
    if fused:
        low, high = 4 * d_l * width, 4 * d_h * width
    else:
        low = config.grad_l_steps * (5 * d_l * width + 4 * d_l + 4 * d_l // size) + d_l * width
        high = 6 * d_h * width + 4 * d_h + 4 * d_h // size
    if config.h_mixer == "attention":
        assert config.attn_heads is not None and config.attn_kv_heads is not None  # HRMConfig fills them in
        head = d_h // config.attn_heads
        once += 2 * head * width
        heads = 2 * config.attn_heads + 3 * config.attn_kv_heads
        high += (2 * d_h + heads * head) * width + 4 * config.attn_heads
    act = d_h * width if config.act else 0
    whole = config.grad_l_steps == config.l_steps and config.l_reset == "carry"
    shared = (config.grad_cycles - 1) * d_l * width if whole else 0  # a cycle's new state is the next one's first
    return rows * (once + segments * (config.grad_cycles * (low + high) + act - shared))


def loss_bytes(text: PreTrainedConfig, config: HRMConfig, rows: int, segments: int, width: int) -> int:
    """Bytes at the peak of `hrm.loss.linear_cross_entropy` with a frozen head, every token scored.

    Each segment's z_H twice (as the core returned it and at the scored tokens) and its gradient; the backbone's output
    twice; and of one chunk the logarithms, two gradients in float32, and the soft cap's output.
    """
    chunk = min(rows, max(1, CHUNK_BYTES // (4 * text.vocab_size))) * text.vocab_size
    capped = getattr(text, "final_logit_softcapping", None) is not None
    d = config.hidden_size
    return rows * width * (segments * (2 * config.d_h + d) + 2 * d) + chunk * (12 + width * capped)


# ---------------------------------------------------------------------------------------------------- the models


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
        self._backbone = copy.deepcopy(backbone)
        self._backbone._attn_implementation = ATTENTION
        self._hrm, self._lora = hrm, lora
        self.model = self._made()
        self.core, self.text = self.model.hrm.config, self.model.config.get_text_config()
        groups = self.model.trainable_parameters()
        self._trained = [p.numel() for group in groups.values() for p in group]
        self.trained = sum(self._trained)
        self.adapters = 4 * sum(p.numel() for name, group in groups.items() if name != "core" for p in group)
        self.core_bytes = sum(t.nbytes for t in (*self.model.hrm.parameters(), *self.model.hrm.buffers()))
        self._activations: dict[tuple[torch.dtype, int, int, bool], tuple[int, int]] = {}

    def _made(self) -> HRMGemmaForCausalLM:
        try:
            with init_empty_weights(include_buffers=True):
                return HRMGemmaForCausalLM(HRMGemmaConfig(backbone=self._backbone, hrm=self._hrm, lora=self._lora))
        except (AttributeError, KeyError, TypeError, ImportError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"backbone is a config of model_type {self._backbone.model_type!r}, of which no causal language model "
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

    def backbone_activations(self, dtype: torch.dtype, batch: int, tokens: int, checkpointing: bool) -> tuple[int, int]:
        """Bytes that autograd keeps of the backbone, and that the backward pass of one layer takes beside them."""
        key = (dtype, batch, tokens, checkpointing)
        if key not in self._activations:
            kept, layer = trace(self._traced(dtype), batch, tokens)
            if checkpointing:
                kept, _ = trace(self._traced(dtype), batch, tokens, checkpointing=True)
            widest = max(m.out_features for m in self.model.get_decoder().modules() if type(m) is nn.Linear)
            working = LAYER_GRADIENTS * batch * tokens * widest * dtype.itemsize
            self._activations[key] = kept, working + (layer if checkpointing else 0)
        return self._activations[key]

    def _traced(self, dtype: torch.dtype) -> HRMGemmaForCausalLM:
        """A model of the same kind in one precision; what autocast copies, it copies."""
        model = self._made().train().to(dtype=dtype)  # type: ignore[call-arg]  # as transformers types it
        if dtype != torch.float32:
            for name, module in model.backbone.named_modules():
                if ".lora_A." in name:
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
        return model


def nf4_bytes(size: int) -> int:
    """Bytes of `size` values in bitsandbytes' nf4 with double quantisation.

    Half a byte each; a scale a block, itself in 8 bits with a float32 scale for 256 of them and one offset; the 16 and
    256 values that the codes stand for.
    """
    blocks = -(-size // NF4_BLOCK)
    return -(-size // 2) + blocks + 4 * -(-blocks // 256) + 4 * (1 + 16 + 256)


# ---------------------------------------------------------------------------------------------------- counting


class SavedBytes:
    """While entered, counts what autograd saves: each storage once, those of `excluded` not at all."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._kept: dict[int, torch.UntypedStorage] = {}  # held on to, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """What was saved so far."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._kept.setdefault(storage._cdata, storage)
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def trace(model: HRMGemmaForCausalLM, batch: int, tokens: int, *, checkpointing: bool = False) -> tuple[int, int]:
    """Bytes that autograd saves of a decoder without data on (batch, tokens), and the most of any one layer.

    Raises:
        ValueError: the decoder cannot run without data; the message says why.
    """
    if checkpointing:
        model.gradient_checkpointing_enable()
    layers, before = [0], [0]
    saved = SavedBytes((*model.parameters(), *model.buffers()))
    for module in model.backbone.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(lambda *_: before.append(saved.bytes))
            module.register_forward_hook(lambda *_: layers.append(saved.bytes - before[-1]))
    ids = torch.zeros(batch, tokens, dtype=torch.int64, device="meta")
    try:
        with saved:
            # with a mask, whose values nobody reads: without one transformers looks for packed rows in the data
            output = model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        kind = model.config.get_text_config().model_type
        raise ValueError(f"backbone is a {kind!r}, which cannot be traced without data: {error}") from error
    del output
    return saved.bytes, max(layers)


class _Attention(torch.autograd.Function):
    """Saves what PyTorch's fused attention saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1])
        logarithms = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logarithms, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        raise RuntimeError("a plan has no gradients")


def _planned_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' "sdpa" runs it: rows of several lengths have a mask, which repeats keys and values."""
    batch, heads, tokens, size = query.shape
    bias = None
    if attention_mask is not None or batch > 1:
        bias = query.new_empty(batch, 1, tokens, tokens)
    if bias is not None or size > 256:
        key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    return _Attention.apply(query, key, value, bias), None


def _planned_mask(q_length: int | Tensor, local_size: int | None = None, **_: Any) -> Tensor | None:
    """A mask where a window is shorter than the rows; causality alone needs none."""
    tokens = int(q_length)
    if local_size is None or tokens <= local_size:
        return None
    return torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device="meta")


ATTENTION = "hrm_memory_plan"
AttentionInterface.register(ATTENTION, _planned_attention)
AttentionMaskInterface.register(ATTENTION, _planned_mask)


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
    device, vocabulary = model.device, model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (step.micro_batch, step.tokens), device=device)
    mask = torch.ones_like(ids)
    mask[0, -1] = step.micro_batch == 1  # rows of several lengths have a mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids, "segments": step.segments}
    with torch.autocast(device.type, torch.bfloat16, enabled=step.dtype == torch.bfloat16):
        if device.type != "cuda":
            return _saved_bytes(model, batch)
    return _allocated(model, batch, step, optimizer)


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


# ---------------------------------------------------------------------------------------------------- what would save


@dataclass(frozen=True)
class Saving:
    """One way to take less memory."""

    setting: str  # what a user sets, or does
    cost: str
    field: str  # of `Step`
    better: Callable[[Any], Any]  # the field's value -> the one that takes less, or the same where there is none

    def applied(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with this saving; the same object where it changes nothing."""
        now = getattr(plan.step, self.field)
        better = self.better(now)
        return plan if better == now else plan.changed(**{self.field: better})


def _on(_: bool) -> bool:
    return True


SAVINGS = (  # the one that costs least first
    Saving(
        "train.optimizer=adamw_8bit",
        "states in 8 bits",
        "optimizer",
        lambda kind: "adamw_8bit" if kind == "adamw" else kind,
    ),
    Saving("hrm.offload_per_layer_embeddings=true", "each token's rows are copied", "per_layer_on_cpu", _on),
    Saving("train.micro_batch={micro_batch}", "less to do at a time", "micro_batch", lambda rows: -(-rows // 2)),
    Saving("train.gradient_checkpointing=true", "a second forward pass", "gradient_checkpointing", _on),
    Saving("hrm.quantize=nf4", "its weights are rounded", "four_bit", _on),
    Saving("train.optimizer=paged_adamw_8bit", "states come from the host", "optimizer", lambda _: "paged_adamw_8bit"),
)


def check_fits(plan: MemoryPlan, available: int) -> str | None:
    """A warning where `plan` takes more than `available` bytes, with the savings that would make it fit; else None.

    Savings are taken in the order of `SAVINGS` until it fits; those that it fits without are left out again.
    """
    if plan.peak <= available:
        return None
    taken, smallest = _fitting(plan, available)
    text = (
        f"a training step is predicted to take {_gb(plan.peak)} GB of the GPU, {_gb(plan.peak - available)} GB more "
        f"than the {_gb(available)} GB there are; "
    )
    names = ", ".join(saving.setting.format(micro_batch=smallest.step.micro_batch) for saving in taken)
    if smallest.peak <= available:
        return f"{text}it would fit, with {_gb(smallest.peak)} GB, with: {names}"
    if not taken:
        return f"{text}nothing is left to save but a shorter data.max_length or a smaller core"
    return f"{text}even with {names} it takes {_gb(smallest.peak)} GB: lower data.max_length or the core's size"


def _fitting(plan: MemoryPlan, available: int) -> tuple[list[Saving], MemoryPlan]:
    """The savings that make `plan` fit, and the plan with them; all that help where none does."""
    taken: list[Saving] = []
    now = plan
    for saving in SAVINGS:
        while now.peak > available and (smaller := saving.applied(now)).peak < now.peak:
            taken, now = [*(other for other in taken if other.field != saving.field), saving], smaller
    for saving in reversed(taken[:-1]):  # the dearest first
        rest = [other for other in taken if other is not saving]
        without = plan.changed(**{other.field: getattr(now.step, other.field) for other in rest})
        if now.peak <= available and without.peak <= available:
            taken, now = rest, without
    return taken, now


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def available_memory() -> int:
    """Bytes of the current GPU that this process has or can get."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


# ---------------------------------------------------------------------------------------------------- hrm profile


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
    gpu_gb: float | None = None
    """GB of the GPU that is planned for; null: what this machine's has, if there is one."""


def plan_training(
    settings: Any, backbone: PreTrainedConfig, tokens: int | None = None, processes: int = 1
) -> MemoryPlan:
    """The plan of a training on CUDA with `settings`, which have the sections hrm, lora, data and train.

    Args:
        settings: as of `hrm train`.
        backbone: its config.
        tokens: of the longest row; None: data.max_length.
        processes: that share a batch.
    """
    train = settings.train
    rows = train.batch_size // processes
    step = Step(
        tokens=tokens or settings.data.max_length,
        micro_batch=min(train.micro_batch or rows, rows),
        segments=1 if train.update_every == "segment" else None,
        gradient_checkpointing=train.gradient_checkpointing,
        optimizer=train.optimizer,
        fused=settings.hrm.fused is not False,
        four_bit=settings.hrm.quantize is not None,
        per_layer_on_cpu=settings.hrm.offload_per_layer_embeddings,
    )
    lora = lora_dict(settings.lora)
    return predict_memory(backbone, hrm_config(settings.hrm), lora, step)


def profile(settings: Any) -> None:
    """Prints what a training step with `settings` (`ProfileSettings`) takes and what each saving would save.

    `hrm.backbone` needs no weights; where it has them and there is a GPU, one real step is measured too.

    Raises:
        UsageError: a setting or a backbone that cannot be used.
    """
    _check(settings)
    name = settings.hrm.backbone or default_backbone()
    if name is None:
        raise UsageError("no backbone; set hrm.backbone=NAME_OR_PATH, or HRM_MODEL_PATH")
    try:
        plan = plan_training(settings, load_config(name))
    except ValueError as error:
        raise UsageError(f"hrm.backbone is {name!r}, and cannot be planned with: {error}") from error
    measured = {}
    if torch.cuda.is_available() and _has_weights(name):
        measured = _measured(name, settings, plan.step)
    print_plan(plan, measured)
    available = available_memory() if torch.cuda.is_available() else None
    available = available if settings.gpu_gb is None else int(settings.gpu_gb * 1e9)
    if available is not None:
        print(check_fits(plan, available) or f"It fits into {_gb(available)} GB.")


def load_config(name: str) -> PreTrainedConfig:
    """The config of a backbone, by name or from a folder.

    Raises:
        UsageError: there is none, or not one that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"hrm.backbone is {name!r}, and has no config that can be read: {reason}") from error


def print_plan(plan: MemoryPlan, measured: dict[str, int] | None = None) -> None:
    """Prints the parts of `plan`, its peaks beside the measured ones, and what each saving would save."""
    from rich.console import Console
    from rich.table import Table

    step, measured = plan.step, measured or {}
    table = Table(title=f"{step.micro_batch} x {step.tokens} tokens, backbone {plan.skeleton.text.model_type}")
    for heading in ("part", "predicted GB", *["measured GB"] * bool(measured)):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, words in PARTS.items():
        if plan.parts[part]:
            table.add_row(words, _gb(plan.parts[part]))
    table.add_section()
    for peak, phase in (("loss", "forward"), ("backward", "backward"), ("step", "step")):
        cells = [_gb(measured[phase])] if phase in measured else []
        table.add_row(f"peak: {peak}", _gb(plan.peaks[peak]), *cells)
    table.add_row("in the CPU's memory", _gb(sum(plan.host.values())))
    table.add_section()
    for saving in SAVINGS:
        other = saving.applied(plan)
        if other.peak < plan.peak:
            setting = saving.setting.format(micro_batch=other.step.micro_batch)
            table.add_row(f"{setting}: {saving.cost}", f"-{_gb(plan.peak - other.peak)}")
    Console().print(table)


def _check(settings: Any) -> None:
    for name in ("data.max_length", "train.batch_size"):
        require(settings, name, lambda value: value >= 1, "at least 1")
    require(settings, "train.micro_batch", lambda value: value is None or value >= 1, "at least 1, or null")
    require(settings, "gpu_gb", lambda value: value is None or value > 0, "above 0, or null")
    for name in ("train.optimizer", "train.update_every"):
        require(settings, name, lambda value, name=name: value in CHOICES[name], " or ".join(CHOICES[name]))


def _has_weights(name: str) -> bool:
    """Whether `name` is no folder, or one that holds weights."""
    folder = Path(name)
    return not folder.is_dir() or any(folder.glob("*.safetensors"))


def _measured(name: str, settings: Any, step: Step) -> dict[str, int]:
    from hrm.train import load_model
    from hrm.trainer import make_optimizer

    model = load_model(name, settings).train()
    if step.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return measure_memory(model, step, lambda: make_optimizer(model, settings.train))
