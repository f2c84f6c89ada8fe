"""FSDP2: which parts of a model are sharded together, what of accelerate's settings goes with it, and whole weights.

Each decoder layer is a group of its own, gathered while it runs; everything else (embeddings, head, core) is the root's
group, gathered from the start of a forward pass to the end of its backward pass. The core and the head cannot be groups
of their own: the model reads the core's weights outside the core's forward, and takes the head's gradient in its own
forward pass, which FSDP2 would take for the end of the step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from hrm.settings import UsageError

# accelerate's configuration -> what has to be instead, and why; the variable that `accelerate launch` sets is FSDP_...
_REFUSED = {
    "fsdp_cpu_ram_efficient_loading": "false: it knows no buffers, which the core has",
    "fsdp_offload_params": "false: the model asks its weights for the device to run on",
    "fsdp_activation_checkpointing": "false: train.gradient_checkpointing=true does it, and keeps the weights' names",
}


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has cut up the model's parameters."""
    return isinstance(model, FSDPModule)


def check_sharding(settings: Any) -> None:
    """Checks what `accelerate launch` asks for, where it asks for FSDP, before anything is loaded.

    Args:
        settings: of `hrm train`.

    Raises:
        UsageError: FSDP1, a key of accelerate's configuration or one of `settings` that does not go with FSDP2; the
            message names it.
    """
    if not _is_on("ACCELERATE_USE_FSDP"):
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UsageError(f"accelerate's fsdp_version is {version}; it should be 2")
    for key, should in _REFUSED.items():
        if _is_on(key.upper()):
            raise UsageError(f"accelerate's {key} is true; it should be {should}")
    if settings.hrm.quantize is not None:
        raise UsageError(
            f"hrm.quantize is {settings.hrm.quantize!r}; it should be null under FSDP, which leaves weights in 4 bits "
            "whole; without FSDP (torchrun) each process has all of them too"
        )
    if settings.train.optimizer != "adamw":
        raise UsageError(f"train.optimizer is {settings.train.optimizer!r}; it should be adamw under FSDP")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "y", "on", "t")


def set_up_sharding(accelerator: Any, model: Any) -> None:
    """Makes accelerate, which has FSDP2 on, shard `model` into the groups that this module's text says.

    Whatever wrapping the user's configuration asks for is replaced. Gradients are summed over the processes in float32
    and the loss is not rounded, where accelerate's own policy has the precision of the matrix products for both.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    kinds = {type(module).__name__ for module in model.get_decoder().modules()}
    plugin.transformer_cls_names_to_wrap = sorted(kinds & set(model._no_split_modules))
    if plugin.mixed_precision_policy is not None:
        dtype = plugin.mixed_precision_policy.param_dtype
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    prepare = accelerator.prepare

    def prepare_with_head_in_root(*args: Any, **kwargs: Any) -> Any:
        with _without_embeddings(model):
            return prepare(*args, **kwargs)

    accelerator.prepare = prepare_with_head_in_root


@contextmanager
def _without_embeddings(model: Any) -> Iterator[None]:
    """Inside, `model` names no embeddings, of which accelerate would make groups of their own, and of the head with
    them."""
    names = "get_input_embeddings", "get_output_embeddings"
    for name in names:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut up; then every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The model's state with whole tensors, on the CPU; every process takes part, and no more than one tensor is whole
    on its device at a time.

    Args:
        keep: whether this process wants it; one that does not gets an empty dictionary.
    """
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay one tensor, by which they are known when they are saved
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            tensor = whole(value.detach())
            seen[id(value)] = tensor.cpu() if keep else torch.empty(0)
        if keep:
            state[name] = seen[id(value)]
    return state
