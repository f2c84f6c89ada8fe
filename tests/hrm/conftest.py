"""Small random models that behave like trained ones: every part of them has an effect on the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(BACKBONES))
def kind(request: pytest.FixtureRequest) -> str:
    """Each of the three backbones in turn."""
    return request.param


def backbone_config(kind: str, **settings: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **{**BACKBONES[kind], **settings})


@pytest.fixture
def make_model() -> Callable[..., HRMGemmaForCausalLM]:
    """make_model(kind, trained=True, lora=..., **hrm settings): a small model in evaluation mode."""

    def make(kind: str = "gemma3_text", *, trained: bool = True, lora: Any = True, **hrm: Any) -> HRMGemmaForCausalLM:
        backbone = AutoModelForCausalLM.from_config(backbone_config(kind))
        model = HRMGemmaForCausalLM.from_backbone(backbone, hrm={**CORE, **hrm}, lora=lora)
        if trained:
            seem_trained(model)
        return model.eval()

    return make


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


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 12) token ids, none of them the padding's."""
    return torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
