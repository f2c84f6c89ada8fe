"""Checks of what a caller hands to the model; every message names the argument, what it is, what it should be."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hrm.attention import packed_documents
from hrm.loss import IGNORED


def check_inputs(
    config: PreTrainedConfig,
    device: torch.device,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
    *,
    past: int,
    per_layer_inputs: Tensor | None,
) -> None:
    """Raises a ValueError where the arguments of a forward pass do not fit each other or the backbone.

    Args:
        config: the backbone's text config.
        device: where the backbone's embeddings are; meta (weights that accelerate loads for each call): not compared.
        past: tokens that the cache holds already.
        per_layer_inputs: what Gemma 3n needs beside `inputs_embeds`.
        input_ids, inputs_embeds, attention_mask, position_ids, labels: as for `HRMGemmaForCausalLM.forward`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids and inputs_embeds: exactly one of them should be given")
    if input_ids is not None:
        _check_rank("input_ids", input_ids)
        _check_ids("input_ids", input_ids, config.vocab_size)
        lead = input_ids
    else:
        assert inputs_embeds is not None
        _check_embeds(config, inputs_embeds, per_layer_inputs)
        lead = inputs_embeds
    if lead.device != device and device.type != "meta":
        name = "inputs_embeds" if input_ids is None else "input_ids"
        raise ValueError(f"{name}.device is {lead.device}; it should be {device}, the device of the model")
    batch, tokens = lead.shape[:2]
    if batch == 0 or tokens == 0:
        raise ValueError(f"the batch is {batch} rows of {tokens} tokens; it should be at least one of each")
    check_places(lead, attention_mask, position_ids, past)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and past + tokens > longest and not _is_packed(attention_mask, position_ids, past):
        raise ValueError(f"the sequence is {past + tokens} tokens long; the backbone allows {longest}")
    if labels is not None:
        check_beside(lead, "labels", labels, (batch, tokens), "(batch, tokens)")
        _check_ids("labels", labels.masked_fill(labels == IGNORED, 0), config.vocab_size)


def check_places(lead: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int) -> None:
    """Raises a ValueError where mask or positions do not fit `lead` (B, S, ...), the tokens after `past` others."""
    batch, tokens = lead.shape[:2]
    if attention_mask is not None:
        check_beside(lead, "attention_mask", attention_mask, (batch, past + tokens), "(batch, past + tokens)")
    if position_ids is not None:
        rows = 1 if position_ids.shape[:1] == (1,) else batch  # one row serves all
        check_beside(lead, "position_ids", position_ids, (rows, tokens), "(batch, tokens)")


def check_beside(lead: Tensor, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raises a ValueError unless `tensor` is a tensor of `shape` on the device of `lead`, the tokens."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; it should be a tensor {meaning}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}.shape is {_size(tensor)}; it should be {shape}, {meaning}")
    if tensor.device != lead.device:
        raise ValueError(f"{name}.device is {tensor.device}; it should be {lead.device}, the device of the tokens")


def _check_embeds(config: PreTrainedConfig, inputs_embeds: Tensor, per_layer_inputs: Tensor | None) -> None:
    width = config.hidden_size
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
        raise ValueError(f"inputs_embeds.shape is {_size(inputs_embeds)}; it should be (batch, tokens, {width})")
    if per_layer_inputs is None and getattr(config, "hidden_size_per_layer_input", None):
        raise ValueError(
            "inputs_embeds is given without per_layer_inputs, which this backbone computes from token ids; "
            "pass input_ids, or per_layer_inputs too"
        )


def _check_rank(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; it should be a tensor (batch, tokens)")
    if tensor.dim() != 2:
        raise ValueError(f"{name}.shape is {_size(tensor)}; it should be (batch, tokens)")


def _is_packed(attention_mask: Tensor | None, position_ids: Tensor | None, past: int) -> bool:
    """Whether rows hold several documents, each of which alone has to fit the backbone."""
    return isinstance(position_ids, Tensor) and packed_documents(attention_mask, position_ids, past > 0) is not None


def _check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    """Types everywhere, ranges on the CPU in eager mode only: else they cost a synchronisation or a graph break."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}.dtype is {ids.dtype}; it should be torch.int64 or torch.int32")
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = map(int, ids.aminmax())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds {wrong}; it should be from 0 to {vocabulary - 1}, the backbone's vocabulary")


def _size(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
