"""HRM on a pretrained decoder: a `PreTrainedModel` that trains, saves, loads and generates like any other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from hrm.attention import SlotCache, packed_documents
from hrm.config import AdapterConfig, HRMConfig
from hrm.core import CoreOutput, HRMCarry, HRMCore
from hrm.inputs import check_inputs
from hrm.loading import as_made, check_choices, four_bit_layers, keep_packing, load_backbone, quantization_of
from hrm.lora import add_adapters, merge_adapters
from hrm.loss import (
    IGNORED,
    TokenLoss,
    linear_cross_entropy,
    next_token_targets,
)
from hrm.offload import offload_per_layer_embeddings as offload
from hrm.replay import ReplayBuffer
from hrm.saving import save_atomically
from hrm.segment_losses import SegmentLosses


class HRMGemmaConfig(PreTrainedConfig):
    """Settings of the combined model.

    Args:
        backbone: config of any Hugging Face causal language model, or its dict with a `model_type`.
        hrm: settings of the core, an `HRMConfig` or its dict; None: the defaults at the backbone's width.
        lora: True (two adapters of ranks 32 and 64), False or None (none), or a dict of `AdapterConfig`'s fields.
        offload_per_layer_embeddings: keep Gemma 3n's table of per-layer embeddings in CPU memory.
    """

    model_type = "hrm_gemma"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}
    # what Trainer's evaluation would otherwise gather as predictions
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "carry",
        "segment_losses",
        "q_loss",
        "q",
        "accuracy",
        "segments_used",
        "token_segments",
        "residuals",
        "segment_tokens",
        "residual_tokens",
    ]

    def __init__(
        self,
        backbone: PreTrainedConfig | Mapping[str, Any] | None = None,
        hrm: HRMConfig | Mapping[str, Any] | None = None,
        lora: bool | Mapping[str, Any] | None = True,
        offload_per_layer_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if backbone is None:
            backbone = {"model_type": "gemma3n_text"}
        if not isinstance(backbone, PreTrainedConfig):
            backbone = AutoConfig.for_model(**backbone)
        self.backbone = backbone
        width = self.get_text_config().hidden_size
        settings = hrm.to_dict() if isinstance(hrm, HRMConfig) else dict(hrm or {})
        self.hrm = HRMConfig.from_dict({**settings, "hidden_size": width}).to_dict()
        self.lora = AdapterConfig.resolve(lora)
        self.offload_per_layer_embeddings = offload_per_layer_embeddings
        kwargs.setdefault("tie_word_embeddings", False)  # the backbone ties its own
        # transformers hands this down to the backbone, whose own choice a None would undo, its causal mask with it
        kwargs.setdefault("attn_implementation", backbone._attn_implementation)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; the config of another kind of model is a ValueError, not one full of defaults."""
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"model_type is {kind!r}; it should be {cls.model_type!r}. "
                "HRMGemmaForCausalLM.from_backbone puts a core on a plain language model."
            )
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's: its sizes are what generation and caches ask for."""
        return self.backbone.get_text_config(decoder=decoder, encoder=encoder)


@dataclass
class HRMOutput(ModelOutput):
    """What `HRMGemmaForCausalLM.forward` returns; M segments ran on B rows of S tokens."""

    loss: Tensor | None = None  # () mean over the segments' losses, with the Q head's under ACT
    logits: Tensor | None = None  # (B, kept, vocabulary); None where labels were given and no logits asked for
    past_key_values: Cache | None = None
    carry: HRMCarry | None = None  # None with a cache: decoding hands on slots, not states
    segment_losses: Tensor | None = None  # (M,) float32, detached
    q_loss: Tensor | None = None  # () float32, under ACT with labels; no graph where segments are taken one by one
    q: Tensor | None = None  # (2,) float32, mean q_halt and q_continue over scored tokens; under ACT with labels
    accuracy: Tensor | None = None  # () float32, share of the scored tokens predicted rightly, over all segments
    segments_used: Tensor | None = None  # () float32, mean over real tokens
    token_segments: Tensor | None = None  # (B, S) int32, segments that each token ran; 0 for padding
    residuals: Tensor | None = None  # (M, 2) float32, mean relative change of z_L and z_H; None with a cache
    segment_tokens: Tensor | None = None  # (M,) int64, scored tokens that ran each segment; with labels
    residual_tokens: Tensor | None = None  # (M,) int64, tokens that each of `residuals` is a mean over
    hidden_states: tuple[Tensor, ...] | None = None  # the backbone's
    attentions: tuple[Tensor, ...] | None = None  # the backbone's


class HRMCache(DynamicCache):
    """The backbone's cache together with the core's slots, so that both are reordered and cropped as one."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.slots = SlotCache()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.slots.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.slots.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.slots.repeat(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.slots.crop(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.slots.clear()


class HRMGemmaForCausalLM(PreTrainedModel, GenerationMixin):
    """A frozen causal language model whose last hidden state an HRM core refines before the head reads it.

    `backbone` is the language model, with LoRA layers where `config.lora` says so; `hrm` is the `HRMCore`. Until it is
    trained the model equals its backbone bit for bit.
    """

    config_class = HRMGemmaConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch: any Trainer's accumulation is exact
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # the parts that train stay in float32 whatever the backbone is loaded in; `model.to(dtype)` casts them too
    _keep_in_fp32_modules_strict = {"hrm", "lora_A", "lora_B"}  # noqa: RUF012
    _no_split_modules = {"HRMCore"}  # noqa: RUF012
    is_loaded_in_4bit: bool = False  # Trainer and accelerate look at it; not so the marks that `as_made` takes off

    def __init__(self, config: HRMGemmaConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone) if backbone is None else backbone
        if config.lora is not None:
            add_adapters(self.backbone.get_decoder(), AdapterConfig(**config.lora))
        self.hrm = HRMCore(HRMConfig.from_dict(config.hrm))
        self.replay = ReplayBuffer(self.hrm.config.replay_size)  # filled in training with q_target "replay" alone
        self.post_init()
        self._freeze_backbone()
        if self.backbone.device.type != "meta":  # there `from_pretrained` is at work, which fills in weights first
            self._offload()

    # ------------------------------------------------------------------------------------------------ making one

    @classmethod
    def from_backbone(
        cls,
        model_or_path: PreTrainedModel | str | os.PathLike,
        *,
        hrm: HRMConfig | Mapping[str, Any] | None = None,
        lora: bool | Mapping[str, Any] | None = True,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        loader: str = "transformers",
        offload_per_layer_embeddings: bool = False,
        **from_pretrained_kwargs: Any,
    ) -> HRMGemmaForCausalLM:
        """Puts a fresh core, and adapters, on a pretrained language model, whose own weights are frozen.

        Args:
            model_or_path: a causal language model (taken over, not copied), or a path or name to load one from.
            hrm: settings of the core; its `hidden_size` is taken from the backbone.
            lora: True, False, or a dict of `AdapterConfig`'s fields.
            dtype: of the backbone; None leaves it as it is stored. The core and the adapters are float32.
            quantize: "nf4": the backbone's projections in 4 bits, which needs bitsandbytes; None: as they are.
            loader: what loads a path, "transformers" or "unsloth".
            offload_per_layer_embeddings: keep Gemma 3n's table of per-layer embeddings in CPU memory, and send the
                device the rows that a batch looks up. The table passes through the device once, when it is loaded.
            from_pretrained_kwargs: passed to the loader's `from_pretrained` with a path.

        Raises:
            ImportError: bitsandbytes or Unsloth is asked for and not installed.
            ValueError: an argument is not as above; the backbone is no plain causal language model, changes its head's
                logits, or has no projections that the adapters can find.
        """
        check_choices(quantize, loader)
        if isinstance(model_or_path, nn.Module):
            if not isinstance(model_or_path, PreTrainedModel):
                raise ValueError(f"backbone is a {type(model_or_path).__name__}; it should be a PreTrainedModel")
            asked = {*from_pretrained_kwargs}
            asked |= {"quantize"} if quantize is not None else set()
            asked |= {"loader"} if loader != "transformers" else set()
            if asked:
                raise ValueError(f"from_backbone: {sorted(asked)} are for loading; a model was given")
            backbone = model_or_path if dtype is None else model_or_path.to(dtype=dtype)  # type: ignore[call-arg]
        else:
            backbone = load_backbone(
                model_or_path, dtype=dtype, quantize=quantize, loader=loader, **from_pretrained_kwargs
            )
        if isinstance(backbone, HRMGemmaForCausalLM):
            raise ValueError("backbone has a core already; it should be a plain language model")
        keep_packing(backbone)
        _check_head(backbone)
        config = HRMGemmaConfig(
            backbone=backbone.config, hrm=hrm, lora=lora, offload_per_layer_embeddings=offload_per_layer_embeddings
        )
        model = cls(config, backbone=backbone)
        model.hrm.to(backbone.device)
        if quantization := quantization_of(model, backbone):
            config.quantization_config = quantization
            model.is_loaded_in_4bit = True
        model.generation_config = backbone.generation_config
        return model.train(backbone.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Loads what `save_pretrained` wrote; unlike transformers' default, every tensor has to be there and fit.

        Raises:
            RuntimeError: the checkpoint lacks tensors of the model, holds others or of other sizes; the message lists
                them.
        """
        settings = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}  # told below, with names
        model: Any
        info: dict[str, Any]
        model, info = super().from_pretrained(*args, **settings)  # type: ignore[misc]
        if problems := _loading_problems(info):
            raise RuntimeError(f"{cls.__name__}: the checkpoint does not fit the model; {problems}")
        model._freeze_backbone()  # loading replaces parameters by trainable ones
        if four_bit_layers(model):
            as_made(model)
        model._offload()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes config and safetensors; what an interruption leaves is said at `save_atomically`."""
        self.config.hrm = self.hrm.config.to_dict()
        save_atomically(super().save_pretrained, Path(save_directory), *args, **kwargs)

    def merge_adapters(self) -> HRMGemmaForCausalLM:
        """Adds both adapters to the backbone's weights and takes them out; returns self.

        Raises:
            ValueError: the backbone is in 4 bits.
        """
        merge_adapters(self.backbone.get_decoder())
        self.config.lora = None
        return self

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by part: "core", "lora_low" and "lora_high" (empty without adapters).

        What the caller has unfrozen of the backbone is in a fourth part, "backbone".
        """
        groups: dict[str, list[nn.Parameter]] = {"core": [], "lora_low": [], "lora_high": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(_part(name), []).append(parameter)
        return groups

    def _freeze_backbone(self) -> None:
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        for name in ("w_q", "b_q"):
            getattr(self.hrm, name).requires_grad_(self.hrm.config.act)

    def _offload(self) -> None:
        if self.config.offload_per_layer_embeddings:
            offload(self.backbone)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: the core, the adapters and the backbone each draw their weights when they are made."""

    # ------------------------------------------------------------------------------------------------ embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.backbone.get_decoder(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, without re-entrant checkpoints: with Gemma 3n those give wrong gradients."""
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"]:
            raise ValueError("use_reentrant is True; it should be False: re-entrant checkpoints give wrong gradients")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a new name, which the oldest supported version lacks
            super().gradient_checkpointing_enable(settings, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------ forward

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        carry: HRMCarry | None = None,
        segments: int | None = None,
        past_key_values: HRMCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **backbone_kwargs: Any,
    ) -> HRMOutput:
        """Runs the backbone once and the core's segments on its output.

        The loss: each scored token's mean over the segments that it ran (weighted by `segment_weights`), the Q head's
        in the same way, and the mean of that over the tokens; so it does not depend on which rows stand in one batch.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, past + S), nonzero for real tokens; None: all are.
            position_ids: (B, S); None: the backbone's own default. Without `attention_mask` and cache, positions that
                start anew start another document, and no document sees the others.
            labels: (B, S) int64, the inputs themselves or -100 where not scored; shifted by one here. With labels the
                logits are not built unless `logits_to_keep` asks for them. All ignored: the loss is 0.
            carry: the `carry` of an earlier output of the same shape; None: fresh states.
            segments: None: `config.hrm["segments"]`, or with ACT as many as halting asks for. In evaluation a number
                runs exactly that many, without halting; in training with ACT it is the most that may run.
            past_key_values: an `HRMCache` of the tokens before.
            use_cache: True: return an `HRMCache` (no gradients); None: only where one was passed.
            logits_to_keep: how many of the last positions, or which; 0: all. None: all without labels, none with.
            inputs_embeds: (B, S, d) in place of `input_ids`.
            num_items_in_batch: how many scored tokens the loss is a mean over, where these rows are only a part of the
                batch (gradient accumulation, several processes); None: those of these rows.
            backbone_kwargs: passed to the backbone's decoder.

        Raises:
            ValueError: an argument is not as above; the message names it.
        """
        past_key_values = self._cache(past_key_values, use_cache)
        check_inputs(
            self.config.get_text_config(),
            next(self.get_input_embeddings().parameters()).device,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            labels,
            past=0 if past_key_values is None else past_key_values.get_seq_length(),
            per_layer_inputs=backbone_kwargs.get("per_layer_inputs"),
        )
        inputs = self.backbone.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=past_key_values is not None,
            **backbone_kwargs,
        )
        h = inputs.last_hidden_state
        targets = losses = None
        if labels is not None:
            documents = packed_documents(attention_mask, position_ids, past_key_values is not None)
            targets = next_token_targets(labels, attention_mask, documents)
            losses = SegmentLosses(self.hrm.config, self._score, targets, documents, num_items_in_batch)
        apart = losses is not None and past_key_values is None and logits_to_keep is None
        one_by_one = apart and self._one_by_one(segments)
        core = self.hrm(
            h,
            attention_mask=attention_mask,
            position_ids=position_ids,
            carry=carry,
            segments=segments,
            counted=None if targets is None else targets != IGNORED,
            cache=None if past_key_values is None else past_key_values.slots,
            look_ahead=self._looks_ahead(targets),
            each=losses if one_by_one else None,
        )
        output = HRMOutput(
            past_key_values=past_key_values,
            carry=core.carry,
            segments_used=core.segments_used.sum() / (core.segments_used > 0).sum().clamp_min(1),
            token_segments=core.segments_used,
            residuals=core.residuals,
            residual_tokens=core.residual_tokens,
            hidden_states=inputs.hidden_states,
            attentions=inputs.attentions,
        )
        if losses is not None:
            if not one_by_one:
                losses.plan(core.segments, core.ahead)
                core = core._replace(loss=torch.stack([losses(segment, h) for segment in core.segments]).sum())
            self._add_loss(output, core, losses)
        if targets is None or logits_to_keep is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            kept = slice(None) if kept is None else kept
            output.logits = self._logits(self.hrm.read_out(h[:, kept], core.z_h[:, kept]))
        return output

    def _looks_ahead(self, targets: Tensor | None) -> bool:
        """Whether one more segment is run for what q_continue is to learn."""
        config = self.hrm.config
        return targets is not None and self.training and config.act and config.q_target == "bootstrap"

    def _one_by_one(self, segments: int | None) -> bool:
        """Whether several segments' gradients are taken one by one, where the loss alone is asked for: not where tokens
        halt by themselves (evaluation), where the head wants a gradient too, or where there is nothing to save."""
        config, training = self.hrm.config, self.hrm.training
        count = segments or (config.max_segments if config.act else config.segments)
        if not torch.is_grad_enabled() or count == 1 or ((config.act or config.stop_residual) and not training):
            return False
        return self._head_is_frozen()

    def _head_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.get_output_embeddings().parameters())

    def _logits(self, hidden: Tensor) -> Tensor:
        return _head(self.backbone, hidden)

    def _add_loss(self, output: HRMOutput, core: CoreOutput, losses: SegmentLosses) -> None:
        """The losses of `forward`, once all segments have been taken."""
        config = self.hrm.config
        assert core.loss is not None
        output.loss = core.loss
        output.segment_losses, output.segment_tokens = losses.means(), losses.tokens()
        if not config.act:
            return
        output.q, output.accuracy, output.q_loss = losses.mean_q(), losses.accuracy(), losses.q_loss()
        if config.q_target != "replay":
            return
        if self.training:
            self.replay.add(losses.transitions(core.z_h.dtype))
        if self.replay.added:  # the rows' share of a batch's: parts of a batch add up to one
            output.q_loss = self.replay.loss(self.hrm.w_q, self.hrm.b_q) * losses.share
            output.loss = core.loss + config.q_loss_weight * output.q_loss

    def _score(self, z_h: Tensor, h: Tensor, targets: Tensor, w_out: Tensor | None = None) -> TokenLoss:
        vocabulary, hidden = self.config.get_text_config().vocab_size, self.hrm.read_out(h, z_h, w_out)
        return linear_cross_entropy(hidden, targets, self._logits, vocabulary, frozen=self._head_is_frozen())

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> HRMCache | None:
        if cache is None:
            return HRMCache(self.config) if use_cache else None
        if not isinstance(cache, HRMCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; it should be an HRMCache(model.config)")
        return cache

    # ------------------------------------------------------------------------------------------------ generation

    def _prepare_cache_for_generation(  # type: ignore[override]  # transformers says bool there and returns None
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Hands an `HRMCache` to `generate` where it would make a cache for the backbone alone."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}; it should be None or 'dynamic'")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HRMCache(self.config)


def _part(parameter: str) -> str:
    """The group of `trainable_parameters` that a parameter belongs to, by its name."""
    if parameter.startswith("hrm."):
        return "core"
    return f"lora_{parameter.split('.')[-2]}" if ".lora_" in parameter else "backbone"


def _loading_problems(info: dict[str, Any]) -> str:
    """What transformers' loading report counts as wrong, by kind and name; empty where nothing is."""
    sizes = [f"{name} {tuple(was)} instead of {tuple(should)}" for name, was, should in info["mismatched_keys"]]
    kinds = {"missing": info["missing_keys"], "not in the model": info["unexpected_keys"], "of another size": sizes}
    return "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names)


def _head(backbone: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The backbone's head and soft cap: (..., d) -> (..., vocabulary)."""
    logits = backbone.get_output_embeddings()(hidden)
    cap = getattr(backbone.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def _check_head(backbone: PreTrainedModel) -> None:
    """Runs two tokens: a head that does more to its logits than `_head` is an error, not a silently other model."""
    training = backbone.training
    backbone.eval()
    tokens = torch.zeros(1, 2, dtype=torch.long, device=backbone.device)
    own = backbone(input_ids=tokens, use_cache=False).logits
    ours = _head(backbone, backbone.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state)
    backbone.train(training)
    if not torch.allclose(own.float(), ours.float(), rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise ValueError(
            f"backbone is a {type(backbone).__name__}, which changes its head's logits; it should be a model whose "
            "logits are its head's on its decoder's last hidden state, with final_logit_softcapping at most"
        )


def HRMGemma3N(
    hrm: HRMConfig | Mapping[str, Any] | None = None,
    lora: bool | Mapping[str, Any] | None = True,
    **text_config: Any,
) -> HRMGemmaForCausalLM:
    """A small random Gemma 3n with a small core: a model to try things on, drawn from torch's generator.

    Args:
        hrm: settings of the core in place of the small ones.
        lora: as for `HRMGemmaForCausalLM.from_backbone`.
        text_config: fields of `Gemma3nTextConfig` in place of the small ones.
    """
    config = AutoConfig.for_model("gemma3n_text", **{**SMALL_GEMMA3N, **text_config})
    return HRMGemmaForCausalLM(HRMGemmaConfig(backbone=config, hrm=SMALL_HRM if hrm is None else hrm, lora=lora))


SMALL_HRM = {"d_l": 64, "d_h": 128, "head_size": 16, "h_cycles": 2, "l_steps": 2, "attn_heads": 4, "attn_kv_heads": 2}
SMALL_GEMMA3N = {
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2,
    "laurel_rank": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
}

AutoConfig.register("hrm_gemma", HRMGemmaConfig)
AutoModelForCausalLM.register(HRMGemmaConfig, HRMGemmaForCausalLM)
