"""Loading a backbone: whole or in 4 bits (bitsandbytes), through transformers or through Unsloth."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

QUANTIZE = (None, "nf4")
LOADERS = ("transformers", "unsloth")

# Patterns of the linear modules that stay whole, by the text model's type; transformers' own choice (the head) for any
# other. Gemma 3n clamps AltUp's weights in training, which 4-bit ones do not let it; the rest is small. Each pattern
# runs to the end of a name: since 5.23 transformers matches no part of one.
KEPT_WHOLE = {"gemma3n_text": ["lm_head", ".*altup.*", ".*laurel.*", ".*per_layer.*"]}

# what AutoConfig needs of what `from_pretrained` is given
_FINDING = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def check_choices(quantize: str | None, loader: str) -> None:
    """Raises a ValueError that names what is not one of `QUANTIZE` or `LOADERS`."""
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize is {quantize!r}; it should be 'nf4' or None")
    if loader not in LOADERS:
        raise ValueError(f"loader is {loader!r}; it should be 'transformers' or 'unsloth'")


def load_backbone(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    loader: str = "transformers",
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Args:
        path: path or name.
        dtype: of what is not in 4 bits; None: as it is stored.
        quantize: "nf4" (double quantisation; bfloat16 products on CUDA, float32 elsewhere) or None.
        loader: "transformers" or "unsloth".
        kwargs: passed to the loader's `from_pretrained`.

    Raises:
        ImportError: a package that `quantize` or `loader` needs is not installed; the message says how to get it.
        ValueError: `quantize` or `loader` is unknown, or Unsloth does not run on this machine.
    """
    check_choices(quantize, loader)
    if quantize is None and loader == "transformers":
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", **kwargs)
    config = AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in _FINDING if name in kwargs})
    if quantize is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                f"quantize is {quantize!r}, which needs the package bitsandbytes; "
                'pip install "hrm-kernels[bnb]", or pass quantize=None'
            )
        kwargs["quantization_config"] = _nf4(config)
    if loader == "unsloth":
        model = _load_with_unsloth(path, config, dtype=dtype, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", **kwargs)
    choose_compute_dtype(model)
    return model


def _nf4(config: PreTrainedConfig) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        llm_int8_skip_modules=KEPT_WHOLE.get(config.get_text_config().model_type),
    )


# ------------------------------------------------------------------------------------------------ Unsloth


def _load_with_unsloth(
    path: str | os.PathLike, config: PreTrainedConfig, *, dtype: torch.dtype | None, **kwargs: Any
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # it seeds torch's generator, which the core is drawn from
        model, _ = _unsloth().from_pretrained(
            os.fspath(path),
            dtype=dtype or config.get_text_config().dtype,  # its None is not "as stored"
            load_in_4bit="quantization_config" in kwargs,
            full_finetuning=False,
            use_gradient_checkpointing=False,  # its own is re-entrant; the model's is turned on as ever
            use_exact_model_name=True,  # or it loads another repository's weights in place of some names'
            **kwargs,
        )
    if "quantization_config" in kwargs:
        _check_four_bits(model, kwargs["quantization_config"].llm_int8_skip_modules or [])
    return model.eval()


def _check_four_bits(model: nn.Module, whole: list[str]) -> None:
    """On a CPU Unsloth goes by settings of its own, and by none where they do not work."""
    packed = four_bit_layers(model)
    wrong = [name for name in packed if any(re.fullmatch(pattern, name) for pattern in whole)]
    if wrong or not packed:
        what = f"put {wrong[0]} in 4 bits" if wrong else "put nothing in 4 bits"
        raise ValueError(f"loader is 'unsloth', which {what} on this machine; it should be 'transformers'")


def _unsloth() -> Any:
    """Unsloth's FastModel. Importing it patches torch and transformers, so only who asks for it gets it."""
    if importlib.util.find_spec("unsloth") is None:
        raise ImportError(
            "loader is 'unsloth', which needs the package unsloth; "
            "pip install \"hrm-kernels[unsloth]\", or pass loader='transformers'"
        )
    try:
        from unsloth import FastModel
    except Exception as error:  # without a GPU NotImplementedError; ImportErrors of what it is made of; and others
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"loader is 'unsloth', which does not run here ({type(error).__name__}: {reason}); "
            "it should be 'transformers'"
        ) from error
    return FastModel


# ------------------------------------------------------------------------------------------------ 4-bit layers


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> bitsandbytes' Linear4bit, for each of `model`."""
    bitsandbytes = sys.modules.get("bitsandbytes")  # whoever has such layers has imported it
    if bitsandbytes is None:
        return {}
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}


def choose_compute_dtype(model: nn.Module) -> None:
    """4-bit layers multiply in bfloat16 on CUDA and in float32 elsewhere, wherever they were saved."""
    for layer in four_bit_layers(model).values():
        layer.compute_dtype = torch.bfloat16 if layer.weight.is_cuda else torch.float32


def keep_packing(model: nn.Module) -> None:
    """Turns off what bitsandbytes does in evaluation on CPUs with AVX512-BF16: it packs weights anew and rounds their
    scales to bfloat16, so that what is saved is not what was loaded, and what is trained then gets no gradient."""
    for layer in four_bit_layers(model).values():
        layer.state_dict()  # undoes it where it was done
        layer.support_avx512bf16_for_cpu = False


def as_made(model: PreTrainedModel) -> None:
    """Turns what transformers loaded from a checkpoint with 4-bit layers into what `from_backbone` makes."""
    keep_packing(model)
    choose_compute_dtype(model)
    for name in (
        "is_quantized",  # with these two Trainer takes no model but PEFT's own, nor moves it
        "quantization_method",
        "_weight_conversions",  # how it was loaded; saving would run that backwards, which 4-bit layers cannot
    ):
        vars(model).pop(name, None)


def quantization_of(model: nn.Module, backbone: PreTrainedModel) -> dict[str, Any] | None:
    """What the config of `model`, which holds `backbone`, says of 4-bit layers, to load them by; None without any.

    The modules to keep whole are read off the model, so that they are right whatever chose them; layers' numbers stand
    as `\\d+` where all layers agree.
    """
    packed = four_bit_layers(model)
    if not packed:
        return None
    whole = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    general = {name: re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) + "$" for name in whole}
    wrong = {pattern for pattern in set(general.values()) if any(re.match(pattern, name) for name in packed)}
    patterns = {re.escape(name) + "$" if pattern in wrong else pattern for name, pattern in general.items()}
    settings = backbone.config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    return {**settings, "llm_int8_skip_modules": sorted(patterns)}
