"""The per-layer embeddings in CPU memory: the same numbers, and the table goes nowhere."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from small_models import ACT, CORE, backbone_config, seem_trained
from torch import nn
from transformers import AutoModelForCausalLM

from hrm import HRMGemmaForCausalLM
from hrm.offload import OffloadedEmbedding

NAME = "backbone.model.embed_tokens_per_layer.weight"


@pytest.fixture
def pair(make_model):
    """pair(**hrm settings): two equal models, the second with its table offloaded."""

    def make(**hrm):
        plain = make_model("gemma3n_text", **hrm)
        offloaded = copy.deepcopy(plain)
        offloaded.config.offload_per_layer_embeddings = True
        offloaded._offload()
        return plain, offloaded

    return make


def table(model):
    return model.get_decoder().embed_tokens_per_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_the_same(pair, ids, dtype):
    plain, offloaded = pair(**ACT)
    assert type(table(offloaded)) is OffloadedEmbedding
    with torch.no_grad():
        assert torch.equal(offloaded.to(dtype)(ids).logits, plain.to(dtype)(ids).logits)
        table(plain).weight.zero_()
        assert not torch.equal(offloaded(ids).logits, plain(ids).logits)  # the table has an effect, and is its own


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_and_the_table_has_none(pair, ids, checkpointing):
    models = pair()
    for model in models:
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(ids, labels=ids).loss.backward()
    plain, offloaded = models
    assert NAME not in dict(offloaded.named_parameters())
    assert not table(offloaded).weight.requires_grad
    for name, parameter in offloaded.named_parameters():
        wanted = plain.get_parameter(name).grad
        assert (wanted is None) == (parameter.grad is None), name
        assert wanted is None or torch.equal(parameter.grad, wanted), name


def test_decoding_gives_the_same_tokens(pair, ids):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain, offloaded = pair()
    tokens = plain.generate(ids, **settings)
    assert torch.equal(offloaded.generate(ids, **settings), tokens)
    assert torch.equal(offloaded.generate(ids, **settings, use_cache=False), tokens)


def test_it_compiles_into_one_graph(pair, ids):
    decoder = pair()[1].get_decoder()
    torch._dynamo.reset()
    compiled = torch.compile(decoder.get_per_layer_inputs, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), decoder.get_per_layer_inputs(ids))


# ---------------------------------------------------------------------------------------------------- the module


def test_a_move_leaves_the_table_and_a_cast_does_not():
    embedding = nn.Embedding(10, 4)
    offloaded = OffloadedEmbedding(embedding)
    assert offloaded.weight.data_ptr() == embedding.weight.data_ptr()  # taken over, not copied
    holder = nn.Sequential(offloaded, nn.Linear(4, 4)).to("meta")
    assert holder[1].weight.device.type == "meta"
    assert offloaded.weight.device.type == "cpu"
    assert torch.equal(offloaded.weight, embedding.weight)
    assert offloaded.bfloat16().weight.dtype == torch.bfloat16


def test_rows_keep_the_shape_of_the_ids():
    embedding = nn.Embedding(10, 4)
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(OffloadedEmbedding(embedding)(ids), embedding(ids))
    assert OffloadedEmbedding(embedding)(ids[:, :0]).shape == (2, 0, 4)


def test_its_state_is_that_of_the_embedding():
    first, second = nn.Embedding(10, 4), nn.Embedding(10, 4)
    offloaded = OffloadedEmbedding(first)
    assert list(offloaded.state_dict()) == ["weight"]
    offloaded.load_state_dict(second.state_dict())
    assert torch.equal(offloaded.weight, second.weight)
    assert not torch.equal(offloaded.weight, first.weight)
    second.load_state_dict(OffloadedEmbedding(first).state_dict())
    assert torch.equal(second.weight, first.weight)
    assert offloaded.load_state_dict({}, strict=False).missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match='Missing key\\(s\\) in state_dict: "weight"'):
        offloaded.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"weight.shape is \(10, 3\); it should be \(10, 4\)"):
        offloaded.load_state_dict({"weight": torch.zeros(10, 3)})


# ---------------------------------------------------------------------------------------------------- saving


def test_its_checkpoint_is_that_of_the_plain_model(pair, ids, tmp_path):
    plain, offloaded = pair()
    plain.save_pretrained(tmp_path / "plain")
    offloaded.save_pretrained(tmp_path / "offloaded")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "offloaded")]
    assert files[0].keys() == files[1].keys() >= {NAME}
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    with torch.no_grad():
        logits = plain(ids).logits
        for folder, settings, kind in (
            ("offloaded", {}, OffloadedEmbedding),
            ("plain", {"offload_per_layer_embeddings": True}, OffloadedEmbedding),
            ("offloaded", {"offload_per_layer_embeddings": False}, type(table(plain))),
        ):
            again = HRMGemmaForCausalLM.from_pretrained(tmp_path / folder, **settings)
            assert type(table(again)) is kind
            assert torch.equal(again(ids).logits, logits)


def test_from_backbone_and_from_a_config(ids):
    backbone = AutoModelForCausalLM.from_config(backbone_config("gemma3n_text"))
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE, offload_per_layer_embeddings=True)
    assert type(table(model)) is OffloadedEmbedding
    assert model.config.offload_per_layer_embeddings is True
    assert type(table(HRMGemmaForCausalLM(model.config))) is OffloadedEmbedding


def test_another_backbone_is_an_error():
    backbone = AutoModelForCausalLM.from_config(backbone_config("gemma3_text"))
    message = "offload_per_layer_embeddings is True; it should be False with a gemma3_text backbone"
    with pytest.raises(ValueError, match=message):
        HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE, offload_per_layer_embeddings=True)


# ---------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
def test_on_a_gpu_memory_does_not_hold_the_table(ids):
    big = {"vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 32}  # 128 MiB
    results, used = [], []
    for offload in (False, True):
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated()
        model = HRMGemmaForCausalLM.from_backbone(
            AutoModelForCausalLM.from_config(backbone_config("gemma3n_text", **big)),
            hrm=CORE,
            offload_per_layer_embeddings=offload,
        )
        seem_trained(model)
        model.cuda().train()
        used.append(torch.cuda.memory_allocated() - before)
        out = model(ids.cuda(), labels=ids.cuda())
        out.loss.backward()
        results.append((out.loss.detach(), model.hrm.w_l.grad.clone()))
        del model, out
    assert used[0] - used[1] == 262144 * 32 * 4 * 4
    for plain, offloaded in zip(*results, strict=True):
        torch.testing.assert_close(offloaded, plain)
