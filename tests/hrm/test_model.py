"""Properties of the combined model on three backbones: equality with the base, causality, padding, loss, saving."""

import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F
from small_models import ACT, CORE, VOCABULARY, backbone_config, seem_trained
from transformers import AutoModelForCausalLM

from hrm import HRMConfig, HRMGemma3N, HRMGemmaConfig, HRMGemmaForCausalLM
from hrm.loss import IGNORED

MODES = [{"segments": 2}, ACT]  # a fixed depth, and halting by token
PAD = 3


def real_logits(model, ids, mask, **kwargs):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **kwargs).logits[mask.bool()]


# ---------------------------------------------------------------------------------------------------- the base model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_untrained_model_is_its_backbone_bit_for_bit(kind, ids, dtype, padding):
    backbone = AutoModelForCausalLM.from_config(backbone_config(kind)).to(dtype)
    alone = copy.deepcopy(backbone).eval()
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm={**CORE, **ACT}).eval()
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, slice(PAD) if padding == "left" else slice(-PAD, None)] = 0
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, alone(ids, attention_mask=mask).logits)
        assert torch.equal(model(ids, logits_to_keep=2).logits, alone(ids, logits_to_keep=2).logits)


def test_trained_parts_are_float32_on_a_bfloat16_backbone(ids):
    backbone = AutoModelForCausalLM.from_config(backbone_config("qwen3")).bfloat16()
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE)
    assert {p.dtype for group in model.trainable_parameters().values() for p in group} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad and p.shape != (64, 2)} >= {torch.bfloat16}
    seem_trained(model)
    out = model(ids, logits_to_keep=0, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None for group in model.trainable_parameters().values() for p in group)


def test_no_argument_model_trains_and_generates(ids):
    model = HRMGemma3N()
    model.train()(ids, labels=ids).loss.backward()
    assert model.eval().generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 15)


def test_width_of_the_core_is_the_backbones():
    backbone = AutoModelForCausalLM.from_config(backbone_config("qwen3", hidden_size=48))
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=HRMConfig(**CORE))
    assert model.hrm.config.hidden_size == 48


# ---------------------------------------------------------------------------------------------------- visibility


@pytest.mark.parametrize("mode", MODES, ids=["fixed", "act"])
@pytest.mark.parametrize("position", [0, 5, 11])
def test_no_token_sees_a_later_one(make_model, kind, ids, mode, position):
    model = make_model(kind, **mode)
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after.logits[:, :position], before.logits[:, :position], rtol=0, atol=1e-5)
    assert torch.equal(after.token_segments[:, :position], before.token_segments[:, :position])
    assert (after.logits[:, position:] - before.logits[:, position:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("mode", MODES, ids=["fixed", "act"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(make_model, kind, ids, mode, side):
    model = make_model(kind, **mode)
    filler = torch.full((2, PAD), 7)
    padded = torch.cat((filler, ids) if side == "left" else (ids, filler), dim=1)
    mask = torch.zeros_like(padded)
    mask[:, slice(PAD, None) if side == "left" else slice(-PAD)] = 1
    with torch.no_grad():
        plain, out = model(ids), model(padded, attention_mask=mask)
    torch.testing.assert_close(out.logits[mask.bool()], plain.logits.flatten(0, 1), rtol=1e-3, atol=1e-4)
    assert torch.equal(out.token_segments[mask.bool()], plain.token_segments.flatten())
    assert not out.token_segments[~mask.bool()].any()
    torch.testing.assert_close(out.residuals, plain.residuals, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.segments_used, plain.segments_used)


@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_no_loss_and_no_gradient(make_model, ids, training):
    model = make_model(**ACT).train(training)
    padded = F.pad(ids, (0, PAD), value=7)  # labelled like any other token: only the mask says that it is padding
    mask = F.pad(torch.ones_like(ids), (0, PAD))
    plain = model(ids, labels=ids)
    plain.loss.backward()
    gradient = model.hrm.w_l.grad.clone()
    model.zero_grad()
    out = model(padded, attention_mask=mask, labels=padded)
    out.loss.backward()
    torch.testing.assert_close(out.segment_losses, plain.segment_losses)
    torch.testing.assert_close(out.q_loss, plain.q_loss)
    torch.testing.assert_close(model.hrm.w_l.grad, gradient, rtol=1e-3, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(make_model, ids):
    model = make_model(**ACT)
    with torch.no_grad():
        together = model(ids)
        alone = [model(row[None]) for row in ids]
    torch.testing.assert_close(together.logits, torch.cat([out.logits for out in alone]), rtol=1e-3, atol=1e-4)
    assert torch.equal(together.token_segments, torch.cat([out.token_segments for out in alone]))


# ---------------------------------------------------------------------------------------------------- training


def test_loss_is_the_mean_of_the_segments_cross_entropies(make_model, kind, ids):
    model = make_model(kind, segments=3)
    labels = ids.clone()
    labels[:, :4] = IGNORED
    out = model(ids, labels=labels)
    expected = []
    for depth in (1, 2, 3):
        logits = model(ids, segments=depth).logits
        expected.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED))
    torch.testing.assert_close(out.segment_losses, torch.stack(expected).detach())
    torch.testing.assert_close(out.loss, torch.stack(expected).mean())
    assert out.logits is None
    assert model(ids, labels=labels, logits_to_keep=1).logits.shape == (2, 1, VOCABULARY)


def test_act_training_masks_halted_rows_out_of_the_loss(make_model, ids):
    model = make_model(**ACT).train()
    with torch.no_grad():  # between the two rows' means: one halts after the first segment, the other goes on
        q = model.hrm(model.get_decoder()(ids).last_hidden_state, segments=1).segments[0].q
        model.hrm.b_q[0] -= (q[..., 0] - q[..., 1])[:, :-1].mean()
    out = model(ids, labels=ids)
    used = out.token_segments[:, 0]
    assert used.min() == 1
    assert used.max() > 1
    goes_on = ids[used > 1]
    alone = model(goes_on, labels=goes_on)
    torch.testing.assert_close(out.segment_losses[1:], alone.segment_losses[1:], rtol=1e-4, atol=1e-5)
    apart = [model(row[None], labels=row[None]) for row in ids]  # each row's loss is the mean over its own segments
    torch.testing.assert_close(out.loss, torch.stack([row.loss for row in apart]).mean())
    own = [row.segment_losses.mean() + 0.5 * row.q_loss for row in apart]
    torch.testing.assert_close(out.loss, torch.stack(own).mean())


def test_several_segments_send_one_gradient_through_the_backbone(make_model, kind, ids):
    model = make_model(kind, segments=3).train()
    passes = []
    layer = model.get_decoder().layers[1]
    layer.register_full_backward_hook(lambda *_: passes.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(passes) == 1


def test_a_step_changes_both_adapters_and_the_core_and_nothing_else(make_model, kind, ids):
    model = make_model(kind, **ACT).train()
    groups = model.trainable_parameters()
    assert set(groups) == {"core", "lora_low", "lora_high"}
    trained = {id(p) for group in groups.values() for p in group}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for group in groups.values() for p in group], lr=0.1)
    model(ids, labels=ids, segments=2).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in trained), name


def test_without_adapters_only_the_core_trains(make_model, ids):
    model = make_model(lora=False)
    groups = model.trainable_parameters()
    assert groups["lora_low"] == groups["lora_high"] == []
    assert all(name.startswith("hrm.") for name, p in model.named_parameters() if p.requires_grad)
    model(ids, labels=ids).loss.backward()
    assert model.hrm.w_x.grad is not None


def test_what_the_caller_unfreezes_is_a_part_of_its_own(make_model, ids):
    model = make_model("qwen3")
    weight = model.get_output_embeddings().weight.requires_grad_(True)
    groups = model.trainable_parameters()
    assert [p is weight for p in groups.pop("backbone")] == [True]
    assert {id(weight)}.isdisjoint(id(p) for group in groups.values() for p in group)
    model(ids, labels=ids).loss.backward()
    assert weight.grad.any()


def test_saved_activations_do_not_grow_with_cycles_or_steps(make_model, ids):
    def saved(**hrm):
        torch.manual_seed(0)
        model, sizes = make_model(**hrm).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(ids, labels=ids)
        return sum(sizes)

    assert saved(h_cycles=2, l_steps=2) == saved(h_cycles=6, l_steps=2) == saved(h_cycles=2, l_steps=9)


def test_gradient_checkpointing_changes_no_gradient(make_model, kind, ids):
    model = make_model(kind).train()
    model(ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model(ids, labels=ids).loss.backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="use_reentrant is True; it should be False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_carry_goes_on_where_the_last_call_stopped(make_model, ids):
    model = make_model(max_segments=3)
    with torch.no_grad():
        first = model(ids, segments=2)
        second = model(ids, segments=1, carry=first.carry)
        assert torch.equal(second.logits, model(ids, segments=3).logits)
    assert second.carry.steps.tolist() == [3, 3]


def test_switching_fused_changes_no_logit(make_model, ids, device):
    model = make_model(**ACT).to(device)
    results = []
    for model.hrm.fused in (False, True):  # Triton's interpreter on the CPU
        with torch.no_grad():
            results.append(model(ids[:1, :6].to(device), segments=2).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_the_whole_model_compiles_into_one_graph(make_model, kind, ids):
    model = make_model(kind, segments=2, fused=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


# ---------------------------------------------------------------------------------------------------- saving


def test_save_and_load_round_trip(make_model, kind, ids, tmp_path):
    model = make_model(kind, **ACT)
    model.save_pretrained(tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "generation_config.json", "model.safetensors"]
    for cls in (HRMGemmaForCausalLM, AutoModelForCausalLM):
        again = cls.from_pretrained(tmp_path / "model")
        assert type(again) is HRMGemmaForCausalLM
        assert again.hrm.config == model.hrm.config
        assert again.config.to_dict()["lora"] == model.config.to_dict()["lora"]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        assert {n for n, p in again.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }


def test_loading_in_bfloat16_keeps_the_trained_parts_in_float32(make_model, ids, tmp_path):
    make_model("gemma3n_text").save_pretrained(tmp_path)
    model = HRMGemmaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for n, t in model.state_dict().items() if n.startswith("hrm.") or "lora_" in n} == {torch.float32}
    assert model.get_decoder().layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    assert model.bfloat16()(ids).logits.dtype == torch.bfloat16


def test_from_backbone_takes_a_path(make_model, ids, tmp_path):
    backbone = AutoModelForCausalLM.from_config(backbone_config("qwen3")).eval()
    backbone.save_pretrained(tmp_path)
    model = HRMGemmaForCausalLM.from_backbone(tmp_path, hrm=CORE, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, backbone(ids).logits)


def test_a_switched_setting_is_saved(make_model, tmp_path):
    model = make_model()
    model.hrm.fused = False
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hrm"]["fused"] is False
    assert HRMGemmaForCausalLM.from_pretrained(tmp_path).hrm.fused is False


def test_config_round_trip():
    config = HRMGemmaConfig(backbone=backbone_config("gemma3n_text"), hrm=CORE, lora={"low_rank": 4})
    again = HRMGemmaConfig.from_dict(config.to_dict())
    assert again.backbone.to_dict() == config.backbone.to_dict()
    assert again.hrm == config.hrm
    assert again.lora == {"low_rank": 4, "high_rank": 64, "dropout": 0.0}
