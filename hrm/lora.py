"""Two LoRA adapters on a frozen decoder: "low" on its attention projections, "high" on its FFN projections."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from hrm.config import AdapterConfig
from hrm.loading import four_bit_layers
from hrm.room import check_room

# Names that decoders in transformers give their projections; two parts where one alone would be ambiguous.
ATTENTION = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "query_key_value",
    "attention.dense",
    "self_attention.dense",
)
FFN = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "fc1",
    "fc2",
    "mlp.c_fc",
    "mlp.c_proj",
    "dense_h_to_4h",
    "dense_4h_to_h",
)


def add_adapters(decoder: nn.Module, config: AdapterConfig) -> None:
    """Injects both adapters into `decoder` in place; both are active and trainable.

    Args:
        decoder: the part of a language model that holds its layers, without its head.
        config: ranks and dropout.

    Raises:
        ValueError: `decoder` has no attention or no FFN projection that can be found; the message lists what it has.
            Or the machine could not hold adapters of such a rank.
    """
    targets = {
        "low": (config.low_rank, _find(decoder, ATTENTION, "attention")),
        "high": (config.high_rank, _find(decoder, FFN, "FFN")),
    }
    for name, (rank, modules) in targets.items():
        _check_room(decoder, name, rank, modules)
        lora = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=config.dropout, target_modules=modules)
        inject_adapter_in_model(lora, decoder, adapter_name=name)
        del decoder.peft_config  # PEFT's note to itself; it takes the next adapter for a mistake
    for layer in _adapted(decoder).values():
        layer.set_adapter(list(layer.r))  # injecting an adapter deactivates the ones before it
        for part in (layer.lora_A, layer.lora_B):
            part.float()  # trained weights stay in float32 whatever the backbone is in
            for linear in part.values():
                linear._is_hf_initialized = True  # PEFT has drawn it; transformers must not draw it again


def merge_adapters(decoder: nn.Module) -> None:
    """Adds both adapters to the weights they adapt and takes their layers out, in place.

    Raises:
        ValueError: `decoder` has 4-bit layers; nothing has changed.
    """
    if four_bit_layers(decoder):
        raise ValueError(
            "merge_adapters: the backbone is in 4 bits, and a merged weight would be rounded to 4 bits anew, the "
            "adapter's part of it most of all. Keep the adapters; or make the model on the whole backbone "
            "(quantize=None), hand it this one's trained tensors (load_state_dict(..., strict=False)) and merge there"
        )
    for name, layer in _adapted(decoder).items():
        layer.merge(safe_merge=True)
        decoder.set_submodule(name, layer.get_base_layer())


def _adapted(decoder: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in decoder.named_modules() if isinstance(layer, LoraLayer)}


def _check_room(decoder: nn.Module, name: str, rank: int, endings: list[str]) -> None:
    linear = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    if any(module.weight.is_meta for module in linear.values()):  # counted, not made
        return
    adapted = [module for path, module in linear.items() if f".{path}".endswith(tuple(f".{e}" for e in endings))]
    width = sum(module.in_features + module.out_features for module in adapted)
    check_room(f"lora.{name}_rank is {rank}", "the adapters' weights", 4 * rank * width)


def _find(decoder: nn.Module, names: tuple[str, ...], kind: str) -> list[str]:
    """The endings among `names` that linear modules of `decoder` have."""
    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    found = [ending for ending in names if any(f".{name}".endswith(f".{ending}") for name in linear)]
    if not found:
        endings = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
        raise ValueError(
            f"lora: no {kind} projection found in {type(decoder).__name__}; looked for {', '.join(names)}; "
            f"its linear modules are: {endings}. Pass lora=False to go without adapters."
        )
    return found
