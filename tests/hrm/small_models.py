"""Small random models that behave like trained ones: every part of them has an effect on the logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from hrm import HRMGemmaForCausalLM
from hrm.modeling import SMALL_GEMMA3N

VOCABULARY = 256
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {**SMALL_GEMMA3N, **SMALL},
    "gemma3_text": {**SMALL, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
    "qwen3": SMALL,
}
CORE = {"d_l": 32, "d_h": 64, "head_size": 16, "h_cycles": 2, "l_steps": 2, "attn_heads": 4, "attn_kv_heads": 2}
ACT = {"act": True, "max_segments": 4}


def backbone_config(kind: str, **settings: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **{**BACKBONES[kind], **settings})


@torch.no_grad()
def seem_trained(model: HRMGemmaForCausalLM) -> None:
    """Gives every part that starts at zero a value, so that a fault in it shows in the logits."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name == "hrm.w_out":
            parameter.normal_(std=0.1)
        elif name == "hrm.w_q":
            parameter.normal_(std=0.5)
        elif name.endswith("correct_output_scale"):
            parameter.fill_(1.0)
    hidden = model.get_decoder()(torch.randint(1, VOCABULARY, (4, 12))).last_hidden_state
    model.hrm.b_q.zero_()
    q = model.hrm(hidden, segments=2).z_h @ model.hrm.w_q
    model.hrm.b_q[0] -= (q[..., 0] - q[..., 1]).median()  # so that tokens halt at different depths
