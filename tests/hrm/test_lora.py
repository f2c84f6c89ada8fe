"""The two adapters: where they sit, that both work, and what merging does."""

import pytest
import torch
from small_models import CORE, backbone_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hrm import HRMGemmaForCausalLM
from hrm.config import AdapterConfig
from hrm.lora import add_adapters


def adapted(model):
    """Adapter name -> names of the linear modules that carry it."""
    found = {"low": set(), "high": set()}
    for name, module in model.get_decoder().named_modules():
        for adapter in getattr(module, "r", {}):
            found[adapter].add(name.rpartition(".")[2])
    return found


def test_low_is_on_attention_and_high_on_the_ffn_and_nowhere_else(make_model, kind):
    assert adapted(make_model(kind)) == {
        "low": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "high": {"gate_proj", "up_proj", "down_proj"},
    }


def test_ranks_and_scales(make_model):
    layer = make_model(lora={"low_rank": 4}).get_decoder().layers[0]
    assert layer.self_attn.q_proj.lora_A["low"].weight.shape == (4, 64)
    assert layer.mlp.up_proj.lora_A["high"].weight.shape == (64, 64)
    assert layer.self_attn.q_proj.scaling["low"] == layer.mlp.up_proj.scaling["high"] == 1.0


def test_both_adapters_change_the_logits(make_model, ids):
    model = make_model()
    with torch.no_grad():
        before = model(ids).logits
        for adapter in ("low", "high"):
            for name, parameter in model.named_parameters():
                if f"lora_B.{adapter}" in name:
                    parameter.mul_(-1)
            after = model(ids).logits
            assert (after - before).abs().max() > 1e-3, adapter
            before = after


def test_merged_model_gives_the_same_logits_and_holds_no_adapter(make_model, kind, ids, tmp_path):
    model = make_model(kind)
    with torch.no_grad():
        before = model(ids).logits
        assert model.merge_adapters() is model
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)
    assert not any("lora_" in name for name in model.state_dict())
    assert model.trainable_parameters()["lora_low"] == []
    model.save_pretrained(tmp_path)
    again = HRMGemmaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("phi3", {"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
        ("phi", {"q_proj", "k_proj", "v_proj", "dense"}, {"fc1", "fc2"}),
        ("gpt_neox", {"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
        ("starcoder2", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"c_fc", "c_proj"}),
    ],
)
def test_projections_of_other_families_are_found(kind, low, high, ids):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=256, pad_token_id=0, num_key_value_heads=4, **sizes)
    model = HRMGemmaForCausalLM.from_backbone(AutoModelForCausalLM.from_config(config), hrm=CORE).train()
    assert adapted(model) == {"low": low, "high": high}
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for group in model.trainable_parameters().values() for p in group)


def test_a_backbone_without_an_ffn_is_an_error_that_lists_its_modules():
    backbone = AutoModelForCausalLM.from_config(backbone_config("qwen3"))
    for layer in backbone.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ValueError) as error:
        HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE)
    assert "no FFN projection found in Qwen3Model" in str(error.value)
    assert "its linear modules are: k_proj, o_proj, q_proj, v_proj" in str(error.value)
    assert "lora=False" in str(error.value)


def test_a_decoder_without_linear_modules_says_so():
    with pytest.raises(ValueError, match="its linear modules are: none"):
        add_adapters(nn.Embedding(4, 4), AdapterConfig())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"low_rank": 0}, "low_rank is 0; it should be a whole number, at least 1"),
        ({"high_rank": 2.5}, "high_rank is 2.5"),
        ({"dropout": 1.0}, "dropout is 1.0; it should be from 0 to below 1"),
        ({"dropout": "a little"}, "dropout is 'a little'; it should be from 0 to below 1"),
        ({"rank": 4}, "no field 'rank'; the nearest is 'low_rank'"),
    ],
)
def test_wrong_adapter_settings_are_named(lora, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig.resolve(lora)
