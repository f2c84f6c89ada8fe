"""What the model does with input that it cannot use: a clear error, or the right thing."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import ACT, CORE, VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM

from hrm import HRMGemma3N, HRMGemmaConfig, HRMGemmaForCausalLM
from hrm.loss import IGNORED

LONGEST = 64


@pytest.fixture
def model(make_model):
    return make_model("gemma3_text", **ACT)


# ---------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of them should be given"),
        (
            {"input_ids": torch.ones(12, dtype=torch.long)},
            r"input_ids.shape is \(12,\); it should be \(batch, tokens\)",
        ),
        (
            {"input_ids": torch.ones(2, 0, dtype=torch.long)},
            "the batch is 2 rows of 0 tokens; it should be at least one",
        ),
        (
            {"input_ids": torch.ones(0, 5, dtype=torch.long)},
            "the batch is 0 rows of 5 tokens; it should be at least one",
        ),
        ({"input_ids": torch.ones(2, 3)}, "input_ids.dtype is torch.float32; it should be torch.int64"),
        ({"input_ids": torch.tensor([[1, VOCABULARY]])}, f"input_ids holds {VOCABULARY}; it should be from 0 to 255"),
        ({"input_ids": torch.tensor([[1, -2]])}, "input_ids holds -2"),
        ({"input_ids": torch.ones(1, LONGEST + 1, dtype=torch.long)}, "65 tokens long; the backbone allows 64"),
        ({"input_ids": [[1, 2]]}, "input_ids is a list; it should be a tensor"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.long, device="meta")},
            "input_ids.device is meta; it should be cpu",
        ),
        ({"inputs_embeds": torch.zeros(2, 3, 64, device="meta")}, "inputs_embeds.device is meta; it should be cpu"),
        ({"inputs_embeds": torch.zeros(2, 3, 65)}, r"inputs_embeds.shape is \(2, 3, 65\); it should be"),
    ],
)
def test_unusable_tokens_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 11)}, r"attention_mask.shape is \(2, 11\); it should be \(2, 12\)"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, "attention_mask.shape is"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask is a dict"),
        ({"position_ids": torch.arange(11)[None]}, r"position_ids.shape is \(1, 11\)"),
        ({"position_ids": torch.tensor(3)}, r"position_ids.shape is \(\); it should be \(2, 12\)"),
        ({"labels": torch.ones(2, 11, dtype=torch.long)}, r"labels.shape is \(2, 11\); it should be \(2, 12\)"),
        ({"labels": torch.full((2, 12), VOCABULARY)}, f"labels holds {VOCABULARY}"),
        ({"labels": torch.full((2, 12), -1)}, "labels holds -1"),
        ({"attention_mask": torch.ones(2, 12, device="meta")}, "attention_mask.device is meta; it should be cpu"),
        ({"labels": torch.ones(2, 12, device="meta", dtype=torch.long)}, "labels.device is meta; it should be cpu"),
        ({"segments": 0}, "segments is 0; it should be a whole number, at least 1"),
    ],
)
def test_what_does_not_fit_the_tokens_is_named(model, ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(ids, **arguments)


def test_the_cache_counts_towards_the_longest_sequence(model):
    with torch.no_grad():
        cache = model(torch.ones(1, LONGEST, dtype=torch.long), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="65 tokens long; the backbone allows 64"):
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


def test_a_mask_has_to_cover_the_cache(model, ids):
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask.shape is \(2, 1\); it should be \(2, 13\)"):
            model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_embeddings_alone_are_refused_where_the_backbone_needs_token_ids(make_model, ids):
    model = make_model("gemma3n_text")
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="without per_layer_inputs"):
        model(inputs_embeds=embeds)
    per_layer = model.get_decoder().get_per_layer_inputs(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds, per_layer_inputs=per_layer).logits, model(ids).logits)


def test_embeddings_work_elsewhere(model, ids):
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_a_carry_with_nan_is_named(model, ids):
    with torch.no_grad():
        carry = model(ids).carry
    with pytest.raises(ValueError, match=r"carry\.z_h holds NaN or infinite values"):
        model(ids, carry=carry._replace(z_h=torch.full_like(carry.z_h, float("nan"))))


# ---------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("training", [True, False])
def test_rows_of_padding_alone_are_finite_and_count_nowhere(model, ids, training):
    mask = torch.ones_like(ids)
    mask[1] = 0
    model.train(training)
    out = model(ids, attention_mask=mask, labels=ids)
    assert torch.isfinite(out.loss)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    alone = model(ids[:1], labels=ids[:1])
    torch.testing.assert_close(out.segment_losses, alone.segment_losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.segments_used, alone.segments_used)


@pytest.mark.parametrize("training", [True, False])
def test_labels_all_ignored_give_a_loss_of_zero(model, ids, training):
    model.train(training)
    out = model(ids, labels=torch.full_like(ids, IGNORED))
    assert out.loss.item() == 0
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_labels_may_be_int32(model, ids):
    assert torch.equal(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss)


def test_one_token_has_nothing_to_predict(model):
    assert model(torch.ones(1, 1, dtype=torch.long), labels=torch.ones(1, 1, dtype=torch.long)).loss.item() == 0


def test_a_head_that_does_more_to_its_logits_is_refused():
    config = AutoConfig.for_model(
        "granite",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        logits_scaling=4.0,
    )
    backbone = AutoModelForCausalLM.from_config(config).train()
    with pytest.raises(ValueError, match="GraniteForCausalLM, which changes its head's logits"):
        HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE)
    assert backbone.training


def test_a_model_with_a_core_is_no_backbone():
    with pytest.raises(ValueError, match="backbone has a core already"):
        HRMGemmaForCausalLM.from_backbone(HRMGemma3N(), hrm=CORE)


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(ValueError, match="backbone is a Linear; it should be a PreTrainedModel"):
        HRMGemmaForCausalLM.from_backbone(torch.nn.Linear(2, 2))


def test_loading_arguments_are_refused_with_a_model_at_hand(model):
    with pytest.raises(ValueError, match=r"\['revision'\] are for loading"):
        HRMGemmaForCausalLM.from_backbone(model.backbone, revision="main")


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("cls", [HRMGemmaForCausalLM, HRMGemmaConfig])
def test_a_plain_models_checkpoint_is_refused(model, tmp_path, cls):
    model.config.backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type is 'gemma3_text'; it should be 'hrm_gemma'.*from_backbone"):
        cls.from_pretrained(tmp_path)


def test_a_checkpoint_that_lacks_tensors_is_an_error_that_lists_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = [name for name in tensors if name == "hrm.w_x" or "layers.1.self_attn.q_proj.lora_A" in name]
    save_file({name: t for name, t in tensors.items() if name not in gone}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError) as error:
        HRMGemmaForCausalLM.from_pretrained(tmp_path)
    assert "missing: " + ", ".join(sorted(gone)) in str(error.value)


def test_a_checkpoint_with_tensors_too_many_is_an_error_that_lists_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "hrm.w_y": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"not in the model: hrm\.w_y"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_size_is_an_error(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hrm"]["d_l"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"of another size: .*hrm\.w_x \(64, 64\) instead of \(64, 128\)"):
        HRMGemmaForCausalLM.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_old_checkpoint(model, ids, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("kept")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        before = model(ids).logits
        model.hrm.w_out.zero_()

    def interrupted(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    names = ["config.json", "generation_config.json", "model.safetensors", "notes.txt"]
    assert sorted(os.listdir(tmp_path)) == names
    with torch.no_grad():
        assert torch.equal(HRMGemmaForCausalLM.from_pretrained(tmp_path)(ids).logits, before)
    model.save_pretrained(tmp_path)
    assert HRMGemmaForCausalLM.from_pretrained(tmp_path).hrm.w_out.count_nonzero() == 0


def test_saving_again_in_other_pieces_leaves_nothing_stale(model, ids, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / ".saving-killed").mkdir()
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]
    with torch.no_grad():
        model.hrm.w_out.zero_()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert HRMGemmaForCausalLM.from_pretrained(tmp_path).hrm.w_out.count_nonzero() == 0


def test_saving_removes_nobody_elses_weights(model, tmp_path):
    (tmp_path / "model_best.safetensors").write_text("a user's")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = set(os.listdir(tmp_path))
    model.save_pretrained(tmp_path, variant="other")
    assert shards | {"model.other.safetensors"} == set(os.listdir(tmp_path))


def test_a_process_that_writes_nothing_removes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))
    model.save_pretrained(tmp_path, is_main_process=False)
    assert "model.safetensors" in os.listdir(tmp_path)
    assert set(before) <= set(os.listdir(tmp_path))
