"""What autograd saves: counted as it saves, and of a decoder that runs on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from hrm.modeling import HRMGemmaForCausalLM


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


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of the CPU's tensors from when they are made to when they are freed, each storage
    once; the counterpart of `CudaBytes`.

    Args:
        known: tensors that are there already, and are counted from the start.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        self._see(known)

    def forget(self) -> None:
        """`most` is the most from here on."""
        self.most = self.now

    def _see(self, tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._see(part for part in tree_leaves(output) if isinstance(part, Tensor))
        return output


class CudaBytes:
    """The bytes that CUDA's allocator has given out: `now`, and at `most` since `forget`."""

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def most(self) -> int:
        return torch.cuda.max_memory_allocated()

    def forget(self) -> None:
        """`most` is the most from here on."""
        torch.cuda.reset_peak_memory_stats()

    def __enter__(self) -> CudaBytes:
        return self

    def __exit__(self, *error: object) -> None:
        pass


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


def _packed_mask(q_length: int | Tensor, **_: Any) -> Tensor:
    """The mask that keeps documents apart."""
    return torch.empty(1, 1, int(q_length), int(q_length), dtype=torch.bool, device="meta")


ATTENTION, PACKED = "hrm_memory_plan", "hrm_memory_plan_packed"
for _name, _mask in ((ATTENTION, _planned_mask), (PACKED, _packed_mask)):
    AttentionInterface.register(_name, _planned_attention)
    AttentionMaskInterface.register(_name, _mask)
