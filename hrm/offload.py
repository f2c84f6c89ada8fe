"""Gemma 3n's per-layer embeddings in CPU memory: a table of 2.3 G parameters of which a batch needs a few rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

TABLE = "embed_tokens_per_layer"


class OffloadedEmbedding(nn.Module):
    """A frozen embedding whose table stays in CPU memory; only the rows that are looked up go to the ids' device.

    The table is neither parameter nor buffer, so that `.to(device)`, Trainer and data-parallel wrappers leave it where
    it is; a cast reaches it. In a `state_dict` it is `weight`, as that of the embedding whose place it takes.

    Args:
        embedding: with or without an `embed_scale`; its table (rows, d) is taken over, not copied, if it is on the CPU.
    """

    embed_scale: Tensor

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight.detach().cpu()
        scale = getattr(embedding, "embed_scale", torch.ones(()))
        self.register_buffer("embed_scale", scale.detach().clone(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 on any device -> (..., d) in the table's dtype, on that device."""
        width, pinned = self.weight.shape[1], ids.device.type == "cuda"
        rows = torch.empty(ids.numel(), width, dtype=self.weight.dtype, pin_memory=pinned)
        torch.index_select(self.weight, 0, ids.flatten().cpu(), out=rows)
        # from pinned memory the copy runs beside what the device does; torch keeps the rows until it is through
        rows = rows.to(ids.device, non_blocking=True).view(*ids.shape, width)
        return rows * self.embed_scale.to(rows)

    def extra_repr(self) -> str:
        return "{}, {}, on the CPU".format(*self.weight.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OffloadedEmbedding:
        super()._apply(fn, recurse)
        self.weight = self.weight.to(fn(self.weight[:0]).dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = f"{prefix}weight"
        if name not in state_dict:
            missing_keys.append(name)
        elif state_dict[name].shape != self.weight.shape:
            error_msgs.append(
                f"{name}.shape is {tuple(state_dict[name].shape)}; it should be {tuple(self.weight.shape)}"
            )
        else:
            self.weight = state_dict[name].detach().to("cpu", self.weight.dtype, copy=True)


def check_per_layer_embeddings(backbone: PreTrainedConfig) -> None:
    """Raises a ValueError where `backbone`, a config, is of no Gemma 3n, and there is nothing to keep in CPU memory."""
    kind = backbone.get_text_config().model_type
    if kind != "gemma3n_text":
        raise ValueError(
            f"offload_per_layer_embeddings is True; it should be False with a {kind} backbone: only Gemma 3n "
            "(gemma3n_text) has per-layer embeddings to keep in CPU memory"
        )


def offload_per_layer_embeddings(backbone: PreTrainedModel) -> None:
    """Puts an `OffloadedEmbedding` in the place of a Gemma 3n's table of per-layer embeddings.

    Raises:
        ValueError: `backbone` is no Gemma 3n.
    """
    check_per_layer_embeddings(backbone.config)
    for name, module in list(backbone.named_modules()):
        if name.rpartition(".")[2] == TABLE and isinstance(module, nn.Embedding):
            backbone.set_submodule(name, OffloadedEmbedding(module))
