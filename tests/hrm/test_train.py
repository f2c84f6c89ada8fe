"""The training loop: learning rates, the run folder, Ctrl-C, and numbers that are not finite."""

import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from omegaconf import OmegaConf
from rich.console import Console
from tiny_backbone import TINY_CORE, save_tiny_backbone
from transformers import AutoConfig, AutoModelForCausalLM

from hrm import HRMCore, HRMGemmaForCausalLM
from hrm.cli import main
from hrm.evaluate import evaluate
from hrm.running import Interrupted, TrainingError
from hrm.settings import UsageError, load_training_settings
from hrm.train import Job, fine_tune, load_tokenizer, warn_of_memory
from hrm.trainer import lr_factor, make_optimizer

pytestmark = pytest.mark.usefixtures("no_plots")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def settings(backbone, tmp_path):
    """settings(*overrides): a small training run on a file that one answer fits all of."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": "yes"}) + "\n" for n in range(40)))

    def load(*overrides):
        own = [f"hrm.backbone={backbone}", *TINY_CORE, f"data.path={path}", f"run.folder={tmp_path / 'runs'}"]
        own += ["train.steps=3", "train.batch_size=4", "eval.max_new_tokens=4"]
        return [*own, *overrides]

    return load


def run(arguments):
    return fine_tune(load_training_settings(arguments), QUIET)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in metrics(folder) if row["event"] == "step"]


def test_learning_rate_rises_then_falls_to_zero():
    factors = [lr_factor(step, 10, 0.2) for step in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all(a > b for a, b in itertools.pairwise(factors[2:]))
    assert factors[10] == pytest.approx(0)
    assert lr_factor(0, 1, 0) == 1


def test_core_and_adapters_have_their_own_learning_rates_and_only_matrices_decay(backbone):
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm={"d_l": 32, "d_h": 32, "head_size": 16, "attn_heads": 2})
    options = SimpleNamespace(core_lr=1.0, adapter_lr=2.0, weight_decay=0.5, optimizer="adamw")
    groups = make_optimizer(model, options).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1, 0.5), (1, 0), (2, 0)]
    placed = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in placed} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(placed) == len({id(p) for p in placed})
    options.core_lr = None
    assert make_optimizer(model, options).param_groups[0]["lr"] == 0.08 / 32


@pytest.mark.parametrize(("overrides", "rate"), [((), 0.08 / 48), (("train.core_lr=0.01",), 0.01)])
def test_the_wider_the_core_the_lower_its_learning_rate_unless_one_is_given(settings, overrides, rate):
    folder = run(settings("train.steps=1", "hrm.d_l=32", "hrm.d_h=48", *overrides))
    assert OmegaConf.load(folder / "config.yaml").train.core_lr == pytest.approx(rate)


def test_same_seed_same_losses(settings):
    first, again, other = (losses(run(settings(f"train.seed={seed}"))) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_epochs_count_passes_over_the_data(settings):
    folder = run(settings("train.steps=null", "train.epochs=0.5", "data.held_out=4"))
    assert len(losses(folder)) == 5  # 36 rows, half of them, 4 at a time


def test_the_checkpoint_is_the_trained_model(settings):
    folder = run(settings("train.core_lr=0.01"))
    model = HRMGemmaForCausalLM.from_pretrained(folder / "checkpoint")
    assert model.hrm.w_out.abs().max() > 0
    assert load_tokenizer(str(folder / "checkpoint")).eos_token == "<eos>"


def test_act_is_trained_and_its_depth_logged(settings):
    folder = run(settings("hrm.act=true", "hrm.max_segments=3"))
    assert all(1 <= row["segments"] <= 3 for row in metrics(folder) if row["event"] == "step")


def test_without_adapters_only_the_core_trains(settings):
    model = HRMGemmaForCausalLM.from_pretrained(run(settings("lora.enabled=false")) / "checkpoint")
    assert {name for name, group in model.trainable_parameters().items() if group} == {"core"}
    assert model.hrm.w_out.abs().max() > 0


def test_ctrl_c_during_the_last_evaluation_names_the_checkpoint(settings, monkeypatch):
    calls = []

    def interrupted_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("hrm.train.evaluate", interrupted_at_second)
    with pytest.raises(Interrupted, match="while evaluating; the checkpoint is ") as stopped:
        run(settings())
    HRMGemmaForCausalLM.from_pretrained(str(stopped.value).rpartition("checkpoint is ")[2])


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(settings):
    with pytest.raises(TrainingError) as error:
        run(settings("train.core_lr=1e30", "train.warmup=0"))
    message = str(error.value)
    assert "at step 2" in message
    assert "core" in message and "1e+30" not in message.partition("(core)")[2]
    assert "none has been written yet" in message


def broken_from(step, monkeypatch, until=10**6):
    """Makes the loss NaN in training steps `step` to `until`."""
    forward, calls = HRMGemmaForCausalLM.forward, []

    def break_some(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            if step <= len(calls) <= until:
                output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(HRMGemmaForCausalLM, "forward", break_some)


def test_a_bad_step_is_skipped_and_counted(settings, monkeypatch):
    broken_from(2, monkeypatch, until=2)
    folder = run(settings("train.save_every=1", "train.steps=4"))
    steps = [row for row in metrics(folder) if row["event"] == "step"]
    assert [row["skipped_steps"] for row in steps] == [0, 1, 1, 1]
    assert [math.isfinite(float(row["loss"])) for row in steps] == [True, False, True, True]
    assert all(p.isfinite().all() for p in HRMGemmaForCausalLM.from_pretrained(folder / "checkpoint").parameters())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(settings, monkeypatch, bad):
    forward, calls = HRMGemmaForCausalLM.forward, []

    def break_second(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            output.loss = output.loss + (bad if len(calls) == 2 else 0.0)
        return output

    monkeypatch.setattr(HRMGemmaForCausalLM, "forward", break_second)
    steps = [row for row in metrics(run(settings("train.steps=4"))) if row["event"] == "step"]
    assert [row["skipped_steps"] for row in steps] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("words", "skipped"),
    [
        (["hrm.segments=3", "train.update_every=segment"], [0, 0, 0, 1, 1, 1, 1, 1, 1]),
        (["hrm.act=true", "hrm.max_segments=2", "hrm.q_target=replay"], [0, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_states_that_are_not_finite_cost_one_step(settings, monkeypatch, words, skipped):
    forward, calls = HRMCore.forward, []

    def break_one(self, h, **kwargs):
        calls.append(self.training)
        bad = self.training and sum(calls) == skipped.index(1) + 1
        return forward(self, h * float("nan") if bad else h, **kwargs)

    monkeypatch.setattr(HRMCore, "forward", break_one)
    folder = run(settings("train.steps=9", "train.micro_batch=null", *words))
    assert [row["skipped_steps"] for row in metrics(folder) if row["event"] == "step"] == skipped


def test_batches_that_go_bad_stop_training_with_an_update_a_segment_too(settings, monkeypatch):
    forward = HRMCore.forward
    monkeypatch.setattr(
        HRMCore, "forward", lambda self, h, **kwargs: forward(self, h * float("nan") if self.training else h, **kwargs)
    )
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1, .* and 3 steps in a row"):
        run(settings("train.steps=30", "hrm.segments=3", "train.update_every=segment", "train.skip_limit=3"))


def test_too_many_bad_steps_stop_training_and_name_the_last_good_checkpoint(settings, monkeypatch):
    broken_from(4, monkeypatch)
    message = r"the loss is nan at step 4, .* and 3 steps in a row .*last good checkpoint: .*step-00000002, of step 2"
    with pytest.raises(TrainingError, match=message):
        run(settings("train.save_every=1", "train.steps=50", "train.skip_limit=3"))


def test_failures_are_one_line_and_status_1(settings, capsys):
    assert main(["train", *settings("train.core_lr=1e30", "train.warmup=0")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hrm.backbone=no/such/model/anywhere", "hrm.backbone is 'no/such/model/anywhere'"),
        ("data.max_length=3", r"rows.jsonl:\d+: prompt and answer have"),
        ("eval.max_new_tokens=512", "a held-out problem with its answer may take 515 tokens; the backbone allows 512"),
    ],
)
def test_what_cannot_be_trained_is_said_before_a_run_folder_is_made(settings, tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        run(settings(override))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "package", "extra", "way_out"),
    [
        ("hrm.loader=unsloth", "unsloth", "unsloth", "hrm.loader=transformers"),
        ("hrm.quantize=nf4", "bitsandbytes", "bnb", "hrm.quantize=null"),
        ("train.optimizer=adamw_8bit", "bitsandbytes", "bnb", "train.optimizer=adamw"),
    ],
)
def test_a_package_that_is_not_installed_is_said_first(settings, monkeypatch, override, package, extra, way_out):
    name, _, value = override.partition("=")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *_: None if wanted == package else find(wanted))
    with pytest.raises(UsageError) as error:
        run(settings(override, "data.path=missing.jsonl"))
    assert str(error.value) == (
        f'{name} is {value!r}, which needs the package {package}; pip install "hrm-kernels[{extra}]", or set {way_out}'
    )


def test_a_run_folder_that_cannot_be_made_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"run.folder is '.*file', and cannot be written to"):
        run(settings(f"run.folder={tmp_path / 'file'}"))


def test_a_backbone_that_the_adapters_do_not_fit_is_one_line_and_status_2(settings, backbone, tmp_path, capsys):
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(str(backbone)).save_pretrained(tmp_path / "gpt2")
    assert main(["train", *settings(f"hrm.backbone={tmp_path / 'gpt2'}")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hrm: hrm.backbone is '{tmp_path / 'gpt2'}', and cannot be used: lora: no attention")


@pytest.mark.parametrize(("there", "told"), [(1000, 1), (10**12, 0)])
def test_too_little_memory_is_said_before_the_weights_are_loaded(settings, monkeypatch, there, told):
    said, console = [], Console(quiet=True)
    PartialState()  # made before there seems to be a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hrm.train.available_memory", lambda: there)
    monkeypatch.setattr(console, "print", said.append)
    monkeypatch.setattr("hrm.train.load_model", lambda *_: pytest.fail(f"loaded after {len(said)}"))
    with pytest.raises(pytest.fail.Exception, match=f"loaded after {told}"):
        Job.load(load_training_settings(settings()), console)
    assert all(text.startswith("a training step is predicted to take") for text in said)


@pytest.mark.parametrize("kind", ["gpt2", "hrm_gemma"])
def test_a_backbone_that_cannot_be_planned_is_left_to_loading(settings, backbone, tmp_path, monkeypatch, kind):
    made = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2)
    if kind == "hrm_gemma":
        made = HRMGemmaForCausalLM.from_backbone(backbone, hrm={"d_l": 32, "d_h": 32, "head_size": 16}).config
    made.save_pretrained(tmp_path)
    said, console = [], Console(quiet=True)
    PartialState()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hrm.train.available_memory", lambda: 0)  # any plan would be warned of
    monkeypatch.setattr(console, "print", said.append)
    warn_of_memory(load_training_settings(settings()), str(tmp_path), [8], console)
    assert said == []


def test_rows_longer_than_the_backbone_allows_are_refused(settings):
    with pytest.raises(UsageError, match=r"a row of the training data may take 51\d tokens; the backbone allows 512"):
        run(settings("data.template={prompt}" + 512 * "." + "{answer}", "data.max_length=600"))


def test_kernels_that_cannot_run_are_one_line_and_status_2(settings, capsys):
    core = ["hrm.d_l=128", "hrm.d_h=128", "hrm.head_size=128", "hrm.fused=true"]
    assert main(["train", *settings(*core)]) == 2
    assert capsys.readouterr().err.startswith(
        'hrm: hrm.fused=true: l_recurrence: backend="triton" cannot run here: head'
    )


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(settings, capsys):
    folder = run(settings())
    assert main(["generate", f"run={folder}", "prompt=1?", "max_new_tokens=512"]) == 2
    message = "the prompt with its answer may take 514 tokens; the backbone allows 512"
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_trained_checkpoint_is_no_backbone(settings):
    checkpoint = run(settings()) / "checkpoint"
    with pytest.raises(UsageError, match="has a core already"):
        run(settings(f"hrm.backbone={checkpoint}"))


def test_ctrl_c_leaves_a_checkpoint_that_loads_and_says_where(settings, tmp_path):
    command = [sys.executable, "-m", "hrm", "train", *settings("train.steps=100000")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        _wait_for_steps(tmp_path / "runs", process)
        process.send_signal(signal.SIGINT)
        _, notes = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, notes
    (checkpoint,) = (tmp_path / "runs").glob("*/checkpoint")
    assert notes.strip().endswith(f"go on with run.resume={checkpoint.parent}")
    assert HRMGemmaForCausalLM.from_pretrained(checkpoint).hrm.w_out.abs().max() > 0
    assert torch.isfinite(torch.tensor(losses(checkpoint.parent))).all()


def _wait_for_steps(folder, process, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if any('"event": "step"' in path.read_text() for path in folder.glob("*/metrics.jsonl")):
            return
        time.sleep(0.1)
    raise AssertionError(f"no step was trained in {seconds} s; status {process.poll()}: {process.stderr.read()}")
