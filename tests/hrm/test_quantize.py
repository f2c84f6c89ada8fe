"""A backbone in 4 bits: what is in 4 bits, that it trains, decodes, saves and loads; each error."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import CORE, backbone_config, seem_trained
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hrm import HRMGemmaForCausalLM
from hrm.loading import four_bit_layers, load_backbone

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes, which is not installed"
)
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind): folder of a small backbone whose parts all have an effect."""
    folder = tmp_path_factory.mktemp("backbones")

    def save(kind="gemma3n_text"):
        if not (folder / kind).exists():
            torch.manual_seed(0)
            model = HRMGemmaForCausalLM.from_backbone(
                AutoModelForCausalLM.from_config(backbone_config(kind)), hrm=CORE, lora=False
            )
            seem_trained(model)
            model.backbone.save_pretrained(folder / kind)
        return folder / kind

    return save


@pytest.fixture
def make_four_bit(saved):
    """make_four_bit(kind, ..., **hrm settings): a small model on a 4-bit backbone, in evaluation mode."""

    def make(kind="gemma3n_text", lora=True, trained=True, offload=False, **hrm):
        model = HRMGemmaForCausalLM.from_backbone(
            saved(kind), hrm={**CORE, **hrm}, lora=lora, quantize="nf4", offload_per_layer_embeddings=offload
        )
        if trained:
            seem_trained(model)
        return model

    return make


def bytes_of(model):
    """Every tensor of the backbone but the adapters', with what bitsandbytes keeps of its scales."""
    return {name: t.clone() for name, t in model.backbone.state_dict().items() if ".lora_" not in name}


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


# ---------------------------------------------------------------------------------------------------- what it is


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["gemma3n_text", "qwen3"])
def test_projections_are_in_four_bits_and_nothing_else_is(make_four_bit, kind):
    model = make_four_bit(kind)
    assert {name.removesuffix(".base_layer").rpartition(".")[2] for name in four_bit_layers(model)} == PROJECTIONS
    assert all(name.endswith(".base_layer") for name in four_bit_layers(model))  # each carries an adapter
    assert {layer.compute_dtype for layer in four_bit_layers(model).values()} == {torch.float32}
    assert {layer.weight.quant_type for layer in four_bit_layers(model).values()} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in four_bit_layers(model).values())
    assert {p.dtype for group in model.trainable_parameters().values() for p in group} == {torch.float32}


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["gemma3n_text", "qwen3"])
def test_it_computes_with_what_four_bits_hold(make_four_bit, saved, ids, kind):
    model = make_four_bit(kind, trained=False)
    whole = load_backbone(saved(kind), quantize="nf4").dequantize()
    assert four_bit_layers(whole) == {}
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- training


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["gemma3n_text", "qwen3"])
def test_a_step_moves_adapters_and_core_and_leaves_the_backbones_bytes(make_four_bit, ids, kind):
    model = make_four_bit(kind, segments=2).train()
    model.gradient_checkpointing_enable()
    trained = [p for group in model.trainable_parameters().values() for p in group]
    values, backbone = [p.detach().clone() for p in trained], bytes_of(model)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any(torch.equal(p, before) for p, before in zip(trained, values, strict=True))
    assert_same(backbone, bytes_of(model))


@needs_bitsandbytes
def test_gradient_checkpointing_changes_no_gradient(make_four_bit, ids):
    model = make_four_bit().train()
    model(ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


@needs_bitsandbytes
def test_adapters_drop_out_in_training_alone(make_four_bit, ids):
    model = make_four_bit("qwen3", lora={"dropout": 0.5})
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@needs_bitsandbytes
def test_evaluation_repacks_nothing(make_four_bit, saved, ids):
    model = make_four_bit()
    before = bytes_of(model)
    with torch.no_grad():
        logits = model(ids).logits
        assert_same(before, bytes_of(model))
        torch.testing.assert_close(model.train()(ids).logits, logits, rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
def test_a_four_bit_model_that_ran_is_taken_over(saved, ids):
    gradients = []
    for ran in (False, True):
        backbone = load_backbone(saved("qwen3"), quantize="nf4")
        if ran:
            with torch.no_grad():
                backbone(ids)  # bitsandbytes may have packed its weights for this, and such weights pass no gradient
        torch.manual_seed(0)
        model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE).train()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.get_decoder().layers[0].mlp.up_proj.lora_B["high"].weight.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@needs_bitsandbytes
@pytest.mark.parametrize("loaded", [False, True])
def test_trainer_takes_it(make_four_bit, ids, tmp_path, loaded):
    model = make_four_bit("qwen3")
    if loaded:
        model.save_pretrained(tmp_path / "model")
        model = HRMGemmaForCausalLM.from_pretrained(tmp_path / "model")
    before = bytes_of(model)
    w_l = model.hrm.w_l.detach().clone()
    settings = TrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    assert not torch.equal(model.hrm.w_l, w_l)
    assert_same(before, bytes_of(model))


# ---------------------------------------------------------------------------------------------------- decoding


@needs_bitsandbytes
@pytest.mark.parametrize("offload", [False, True])
def test_decoding_with_and_without_cache_gives_the_same_tokens(make_four_bit, ids, offload):
    model = make_four_bit(offload=offload, act=True, max_segments=3)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, use_cache=False))


# ---------------------------------------------------------------------------------------------------- saving


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "offload"), [("gemma3n_text", False), ("gemma3n_text", True), ("qwen3", False)])
def test_save_and_load_round_trip(make_four_bit, ids, tmp_path, kind, offload):
    model = make_four_bit(kind, offload=offload)
    with torch.no_grad():
        logits = model(ids).logits
    for times in (1, 2):  # what was loaded saves like what was made
        model.save_pretrained(tmp_path / str(times))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(times))
        assert type(model) is HRMGemmaForCausalLM
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("1", "2")))
    assert (tmp_path / "1" / "config.json").read_text() == (tmp_path / "2" / "config.json").read_text()
    assert set(model.trainable_parameters()) == {"core", "lora_low", "lora_high"}
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for group in model.trainable_parameters().values() for p in group)


@needs_bitsandbytes
def test_layers_of_which_only_some_are_in_four_bits_load_again(make_four_bit, ids, tmp_path):
    model = make_four_bit("qwen3", lora=False)
    whole = model.get_decoder().layers[1].mlp.up_proj
    model.get_decoder().layers[1].mlp.up_proj = torch.nn.Linear(64, 128, bias=False).requires_grad_(False)
    model = HRMGemmaForCausalLM.from_backbone(model.backbone, hrm=CORE)
    model.save_pretrained(tmp_path)
    again = HRMGemmaForCausalLM.from_pretrained(tmp_path)
    assert len(four_bit_layers(again)) == len(four_bit_layers(model)) == 27
    assert type(whole) is not type(again.get_decoder().layers[1].mlp.up_proj.base_layer)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@needs_bitsandbytes
def test_a_backbone_that_is_stored_in_four_bits_needs_no_setting(saved, ids, tmp_path):
    backbone = load_backbone(saved("qwen3"), quantize="nf4")
    backbone.save_pretrained(tmp_path)
    model = HRMGemmaForCausalLM.from_backbone(tmp_path, hrm=CORE)
    assert len(four_bit_layers(model)) == 28
    with torch.no_grad():
        assert torch.equal(model(ids).logits, HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE)(ids).logits)


# ---------------------------------------------------------------------------------------------------- merging


@needs_bitsandbytes
def test_merging_is_an_error_and_what_it_advises_works(make_four_bit, saved, ids):
    model = make_four_bit("qwen3")
    with torch.no_grad():
        logits = model(ids).logits
        with pytest.raises(ValueError, match="merge_adapters: the backbone is in 4 bits") as error:
            model.merge_adapters()
        assert "quantize=None" in str(error.value)
        assert torch.equal(model(ids).logits, logits)
    whole = HRMGemmaForCausalLM.from_backbone(saved("qwen3"), hrm=CORE)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert whole.load_state_dict(trained, strict=False).unexpected_keys == []
    with torch.no_grad():
        logits = whole(ids).logits
        torch.testing.assert_close(whole.merge_adapters()(ids).logits, logits, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "int8"}, "quantize is 'int8'; it should be 'nf4' or None"),
        ({"loader": "vllm"}, "loader is 'vllm'; it should be 'transformers' or 'unsloth'"),
        ({"quantize": "nf4"}, r"\['quantize'\] are for loading; a model was given"),
        ({"loader": "unsloth", "revision": "main"}, r"\['loader', 'revision'\] are for loading; a model was given"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    backbone = AutoModelForCausalLM.from_config(backbone_config("qwen3"))
    with pytest.raises(ValueError, match=message):
        HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE, **arguments)


def test_without_bitsandbytes_the_message_says_how_to_get_it(saved, monkeypatch):
    path: Path = saved("qwen3")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "hrm-kernels\[bnb\]"'):
        HRMGemmaForCausalLM.from_backbone(path, hrm=CORE, quantize="nf4")


# ---------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@needs_bitsandbytes
@pytest.mark.parametrize("offload", [False, True])
def test_on_a_gpu_it_multiplies_in_bfloat16_and_comes_back(saved, ids, tmp_path, offload):
    model = HRMGemmaForCausalLM.from_backbone(
        saved(), hrm=CORE, quantize="nf4", dtype=torch.bfloat16, offload_per_layer_embeddings=offload
    )
    assert model.device.type == "cuda"
    assert {layer.compute_dtype for layer in four_bit_layers(model).values()} == {torch.bfloat16}
    ids = ids.cuda()
    before = bytes_of(model)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for group in model.trainable_parameters().values() for p in group)
    assert_same(before, bytes_of(model))
    model.eval().save_pretrained(tmp_path)
    again = HRMGemmaForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    on_cpu = HRMGemmaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert {layer.compute_dtype for layer in four_bit_layers(on_cpu).values()} == {torch.float32}
