"""Loading through Unsloth: its arguments, its errors, and the same losses as through transformers."""

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from small_models import CORE, backbone_config
from tiny_backbone import save_tiny_backbone
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hrm import HRMGemmaForCausalLM
from hrm.loading import four_bit_layers

ROOT = Path(__file__).parents[2]
needs_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="needs the package unsloth, which is not installed"
)


@pytest.fixture
def backbone(tmp_path):
    return save_tiny_backbone(tmp_path / "backbone")


@pytest.fixture
def fake_unsloth(monkeypatch):
    """A module `unsloth` without a FastModel."""
    module = types.ModuleType("unsloth")
    module.__spec__ = importlib.machinery.ModuleSpec("unsloth", None)
    monkeypatch.setitem(sys.modules, "unsloth", module)
    return module


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_unsloth_is_asked_for(backbone, fake_unsloth, dtype):
    torch.manual_seed(0)
    asked = {}

    def load(name, **arguments):
        asked.update(arguments, name=name)
        torch.manual_seed(3407)  # as it does
        return AutoModelForCausalLM.from_pretrained(name, dtype=arguments["dtype"]).train(), "tokenizer"

    fake_unsloth.FastModel = types.SimpleNamespace(from_pretrained=load)
    wanted = HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE).hrm.w_l
    torch.manual_seed(0)
    model = HRMGemmaForCausalLM.from_backbone(
        backbone, hrm=CORE, loader="unsloth", dtype=dtype, max_seq_length=512, device_map="cpu"
    )
    assert torch.equal(model.hrm.w_l, wanted)  # drawn from the seed, whatever Unsloth sets
    assert asked == {
        "name": str(backbone),
        "dtype": dtype or torch.float32,  # as it is stored
        "load_in_4bit": False,
        "full_finetuning": False,
        "use_gradient_checkpointing": False,
        "use_exact_model_name": True,
        "max_seq_length": 512,
        "device_map": "cpu",
    }
    assert not model.training
    assert {name: bool(group) for name, group in model.trainable_parameters().items()} == {
        "core": True,
        "lora_low": True,
        "lora_high": True,
    }


def test_four_bits_are_asked_for_with_our_settings(backbone, fake_unsloth):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes, which is not installed")
    asked = {}

    def load(name, *, dtype, quantization_config, load_in_4bit, **arguments):
        asked.update(quantization_config.to_dict(), four=load_in_4bit)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, quantization_config=quantization_config), None

    fake_unsloth.FastModel = types.SimpleNamespace(from_pretrained=load)
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE, loader="unsloth", quantize="nf4")
    assert asked["four"] is True
    assert asked["bnb_4bit_quant_type"] == "nf4"
    assert asked["bnb_4bit_use_double_quant"] is True
    assert len(four_bit_layers(model)) == 14


def test_without_unsloth_the_message_says_how_to_get_it(backbone, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "hrm-kernels\[unsloth\]"'):
        HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE, loader="unsloth")


@pytest.mark.parametrize("kind", [NotImplementedError, ImportError, RuntimeError])
def test_an_unsloth_that_does_not_run_here_is_one_line(backbone, fake_unsloth, kind):
    def refuse(name):
        raise kind("Unsloth cannot find any torch accelerator? You need a GPU.\nSee ...")

    fake_unsloth.__getattr__ = refuse
    with pytest.raises(ValueError) as error:
        HRMGemmaForCausalLM.from_backbone(backbone, hrm=CORE, loader="unsloth")
    assert str(error.value) == (
        f"loader is 'unsloth', which does not run here ({kind.__name__}: Unsloth cannot find any torch accelerator? "
        "You need a GPU.); it should be 'transformers'"
    )


@pytest.mark.parametrize(
    ("skipped", "what"), [(["lm_head"], "put model.layers.0.altup."), (None, "put nothing in 4 bits")]
)
def test_four_bits_other_than_asked_for_are_an_error(fake_unsloth, tmp_path, skipped, what):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes, which is not installed")
    AutoModelForCausalLM.from_config(backbone_config("gemma3n_text")).save_pretrained(tmp_path)

    def load(name, *, quantization_config, **arguments):
        quantization_config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped) if skipped else None
        return AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization_config), None

    fake_unsloth.FastModel = types.SimpleNamespace(from_pretrained=load)
    with pytest.raises(ValueError, match=f"loader is 'unsloth', which {what}.* it should be 'transformers'"):
        HRMGemmaForCausalLM.from_backbone(tmp_path, hrm=CORE, loader="unsloth", quantize="nf4")


# Unsloth patches torch and transformers for good, so what it loads is looked at in a process of its own.
LOSSES = """
import faulthandler, json, sys
import torch
from small_models import CORE, seem_trained
from hrm import HRMGemmaForCausalLM

device, folder = torch.device(sys.argv[1]), sys.argv[2]  # as accelerate names it
ids = torch.randint(2, 258, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
losses = {}
faulthandler.dump_traceback_later(60, repeat=True)
for loader in ("transformers", "unsloth"):  # which patches the former
    for quantize in (None, "nf4"):
        torch.manual_seed(0)
        model = HRMGemmaForCausalLM.from_backbone(
            folder, hrm={**CORE, "segments": 2}, dtype=torch.float32, quantize=quantize, loader=loader,
            device_map=device,
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or name == "hrm.w_out":
                    parameter.copy_(torch.randn(parameter.shape) * 0.05)
        model.train().gradient_checkpointing_enable()
        trained = [p for group in model.trainable_parameters().values() for p in group]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        steps = []
        for _ in range(3):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        model.eval()
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(ids, **settings)
        assert torch.equal(tokens, model.generate(ids, **settings, use_cache=False))
        model.save_pretrained(f"saved-{loader}-{quantize}")
        again = HRMGemmaForCausalLM.from_pretrained(f"saved-{loader}-{quantize}", device_map=device)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        losses[f"{loader} {quantize}"] = steps
print("RESULT", json.dumps(losses))
"""


def check_losses(device, backbone, folder):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "hrm"), *os.environ.get("PYTHONPATH", "").split(":")]
        ),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_DISABLE": "1",  # minutes of compiling, for models of two layers
        "UNSLOTH_ENABLE_FLEX_ATTENTION": "0",  # whose masks are compiled for each length all the same
    }
    with (folder / "output.txt").open("w+") as output:
        run = subprocess.Popen(
            [sys.executable, "-c", LOSSES, device, str(backbone)],
            cwd=folder,  # where Unsloth leaves what it compiles
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(400)
        run.kill()
        output.seek(0)
        text = output.read()
    assert run.wait() == 0, text[-6000:]
    losses = json.loads(text.rpartition("RESULT ")[2].splitlines()[0])
    for quantize in (None, "nf4"):
        wanted = torch.tensor(losses[f"transformers {quantize}"])
        assert wanted[2] < wanted[0]
        torch.testing.assert_close(torch.tensor(losses[f"unsloth {quantize}"]), wanted, rtol=1e-4, atol=1e-4)


@needs_unsloth
def test_both_loaders_give_the_same_losses(backbone, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes, which is not installed")
    check_losses("cpu", backbone, tmp_path)


@pytest.mark.gpu
@needs_unsloth
def test_on_a_gpu_both_loaders_give_the_same_losses(backbone, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes, which is not installed")
    check_losses("cuda:0", backbone, tmp_path)
