"""The Trainer: what a step is, memory, resume, and how the depth grows."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_backbone import TINY_CORE, save_tiny_backbone

from hrm import HRMGemmaForCausalLM, HRMOutput
from hrm.batching import BatchPlan, micro_batches
from hrm.curriculum import SegmentGrowth
from hrm.data import Template, encode, load_problems
from hrm.loss import IGNORED
from hrm.running import Interrupted, TrainingError, locked
from hrm.saving import checkpoints, put_in_place, replace_folder
from hrm.settings import TrainingSettings, UsageError, load_settings, load_training_settings
from hrm.train import fine_tune, load_model, load_tokenizer
from hrm.trainer import HRMTrainer, Measurements, lr_factor, make_optimizer
from hrm.training_state import check_training

pytestmark = pytest.mark.usefixtures("no_plots")
Load = Callable[..., list[str]]
QUIET = Console(quiet=True)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes, which is not installed"
)
ACT = ["hrm.act=true", "hrm.max_segments=3", "hrm.exploration=0.5"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def settings(backbone: Path, tmp_path: Path) -> Load:
    """settings(*overrides): a training of six steps on rows of different lengths, which ends without an evaluation."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "?" * (1 + n % 7), "answer": "yes " * (1 + n % 3)} for n in range(40)]
    rows += [{"prompt": f"held out {n}", "answer": "no"} for n in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(*overrides: str) -> list[str]:
        own = [f"hrm.backbone={backbone}", *TINY_CORE, f"data.path={path}", f"run.folder={tmp_path / 'runs'}"]
        own += ["train.steps=6", "train.batch_size=4", "train.save_every=1", "eval.max_new_tokens=1"]
        return [*own, "data.held_out=1", "train.core_lr=0.01", "train.adapter_lr=0.01", *overrides]

    return load


def run(arguments: list[str]) -> Path:
    return fine_tune(load_training_settings(arguments), QUIET)


def resume(folder: Path) -> Path:
    return run([f"run.resume={folder}"])


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run has told, without times, speeds and memory."""
    timed = ("tokens_per_second", "memory_gb", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in told]


def steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if line["event"] == "step"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(folder)[-1] / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.double() - other[name]).norm() <= tolerance * tensor.double().norm(), name


def assert_same_lines(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float = 1e-3) -> None:
    """All but the size of a pass, to rounding: weights drift a little apart from step to step."""
    for a, b in zip(one, other, strict=True):
        a, b = ({name: value for name, value in line.items() if name != "micro_batch"} for line in (a, b))
        assert b == {name: pytest.approx(v, rel=tolerance) if isinstance(v, float) else v for name, v in a.items()}


# ---------------------------------------------------------------------------------------------------- what a step is


def by_hand(arguments: list[str], *, per_segment: bool) -> dict[str, torch.Tensor]:
    """The same training as a plain loop over whole batches."""
    config = load_settings(TrainingSettings, arguments)
    tokenizer = load_tokenizer(config.hrm.backbone)
    problems = load_problems(config.data, config.train.seed)
    rows = encode(problems.train, Template(config.data.template), tokenizer, config.data.max_length)
    model = load_model(config.hrm.backbone, config).train()
    optimizer = make_optimizer(model, config.train)
    peaks = [group["lr"] for group in optimizer.param_groups]
    segments = model.hrm.config.segments
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    plan = BatchPlan(lengths, batch_size=config.train.batch_size, steps=6, seed=config.train.seed)
    carry, batches, weights = None, iter(plan), model.hrm.config.segment_weights
    for step in range(config.train.steps):
        if step % (segments if per_segment else 1) == 0:
            chosen, carry = [rows[place.row] for place in next(batches)], None
        (batch,) = micro_batches(chosen, len(chosen), tokenizer.pad_token_id, pack=False)
        out = model(**batch, segments=1 if per_segment else segments, carry=carry)
        carry = out.carry if per_segment else None
        share = weights[step % segments] * segments / sum(weights) if per_segment and weights else 1.0
        (out.loss * share).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.train.clip)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(step, config.train.steps, config.train.warmup)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("micro_batch", [4, 3, 1])
@pytest.mark.parametrize("update", ["batch", "segment"])
def test_steps_and_batches_are_those_of_a_plain_loop(settings: Load, update: str, micro_batch: int) -> None:
    arguments = settings("hrm.segments=2", f"train.update_every={update}", f"train.micro_batch={micro_batch}")
    expected = by_hand(arguments, per_segment=update == "segment")
    found = weights(run(arguments))
    trained = {name: expected[name] for name in found if name in expected}
    assert any("lora_B" in name for name in trained) and "hrm.w_out" in trained
    assert_same(trained, {name: found[name] for name in trained}, tolerance=2e-4)


def test_weights_of_segments_are_shares_with_an_update_a_segment_too(settings: Load) -> None:
    words = "hrm.segments=3", "train.update_every=segment", "train.micro_batch=3"
    arguments = settings(*words, "hrm.segment_weights=[1,4,2.5]")
    expected, found = by_hand(arguments, per_segment=True), weights(run(arguments))
    assert_same({n: expected[n] for n in found if n in expected}, {n: found[n] for n in found if n in expected}, 2e-4)
    told = [line["loss"] for line in steps(run(settings(*words, "hrm.segment_weights=[0,0,2]")))]
    assert [loss > 0 for loss in told] == [False, False, True] * 2


def test_packing_trains_the_same(settings: Load) -> None:
    plain, packed = (run(settings("hrm.segments=2", f"train.pack={pack}", "train.micro_batch=2")) for pack in (0, 1))
    assert_same(weights(plain), weights(packed), tolerance=2e-4)


def test_a_plan_is_a_function_of_seed_and_step() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    plan = BatchPlan(lengths, batch_size=4, steps=5, seed=7)
    seen = [place.row for batch in plan for place in batch]
    assert sorted(seen) == sorted([*range(10), *range(10)])  # two passes, each row once in each
    assert list(plan) == list(BatchPlan(lengths, batch_size=4, steps=9, seed=7))[:5]
    assert list(plan) != list(BatchPlan(lengths, batch_size=4, steps=5, seed=8))
    for batch in plan:
        assert [lengths[place.row] for place in batch] == sorted(lengths[place.row] for place in batch)
    halves = [BatchPlan(lengths, batch_size=4, steps=5, seed=7, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(plan, *halves, strict=True):
        assert sorted(whole) == sorted(parts[0] + parts[1]) and len(parts[0]) == len(parts[1]) == 2
    repeated = list(BatchPlan(lengths, batch_size=4, steps=6, seed=7, segments=3))
    assert [next(place.segment for place in batch) for batch in repeated] == [0, 1, 2, 0, 1, 2]
    assert len({tuple(place.row for place in batch) for batch in repeated}) == 2


def test_halted_rows_are_done_with_one_update_a_segment(settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled: list[int] = []
    forward = HRMGemmaForCausalLM.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training:
            labelled.append(int((kwargs["labels"] != IGNORED).any(1).sum()))
            output.carry.halted.copy_(torch.tensor([True, False, False, False]))  # the first halts after each segment
        return output

    monkeypatch.setattr(HRMGemmaForCausalLM, "forward", watched)
    run(settings("hrm.act=true", "hrm.max_segments=3", "train.update_every=segment"))
    assert labelled == [4, 3, 3, 4, 3, 3]


def test_a_step_with_nothing_left_to_learn_moves_nothing(settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = HRMGemmaForCausalLM.forward, [0]

    def all_halt(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training:
            calls[0] += 1
            output.carry.halted.fill_(True)
        return output

    monkeypatch.setattr(HRMGemmaForCausalLM, "forward", all_halt)
    arguments = settings("hrm.act=true", "hrm.max_segments=3", "train.update_every=segment")
    one, three = run([*arguments, "train.steps=1"]), run([*arguments, "train.steps=3", "train.warmup=0"])
    assert calls[0] == 2  # one pass of each run: the other two steps have nothing to do
    del one
    assert [line["grad_norm"] > 0 for line in steps(three)] == [True, False, False]


def test_segments_are_told_by_their_number_with_one_update_a_segment(settings: Load) -> None:
    lines = steps(run(settings("hrm.segments=3", "train.update_every=segment")))
    assert [line["segments"] for line in lines] == [1, 2, 3, 1, 2, 3]
    for line in lines:
        (key,) = [key for key in line if key.startswith("segment_loss_")]
        assert key == f"segment_loss_{line['segments']:.0f}" and line[key] == pytest.approx(line["loss"], rel=1e-4)


@pytest.mark.parametrize("q_target", ["bootstrap", "replay", "none"])
def test_a_batch_in_parts_learns_as_much(settings: Load, q_target: str) -> None:
    arguments = settings("hrm.act=true", "hrm.max_segments=2", f"hrm.q_target={q_target}", "train.steps=1")
    norms = [steps(run([*arguments, f"train.micro_batch={size}"]))[0] for size in (4, 1)]
    assert norms[1]["loss"] == pytest.approx(norms[0]["loss"], rel=0.02 if q_target == "replay" else 1e-4)
    assert norms[1]["grad_norm"] == pytest.approx(norms[0]["grad_norm"], rel=0.02 if q_target == "replay" else 1e-3)


@pytest.mark.parametrize("words", [("hrm.segments=2",), (*ACT[:2], "hrm.min_segments=2")], ids=["segments", "act"])
def test_lines_are_of_the_whole_batch_however_it_is_cut(settings: Load, words: tuple[str, ...]) -> None:
    arguments = settings(*words, "train.batch_size=8", "train.steps=4", "train.log_every=2")
    whole, cut = (steps(run([*arguments, f"train.micro_batch={size}"])) for size in (8, 3))  # 3, 3 and 2 rows
    assert_same_lines(whole, cut)
    assert "residual_l_1" in whole[0] and ("q_loss" in whole[0]) == (words != ("hrm.segments=2",))


def measured(losses: list[float], scored: list[int], moved: list[int], tokens: int) -> Measurements:
    """A step of one pass of as many segments."""
    output = HRMOutput(
        loss=torch.tensor(1.0), segment_losses=torch.tensor(losses), segment_tokens=torch.tensor(scored),
        segments_used=torch.tensor(sum(scored) / scored[0]), residuals=torch.tensor(losses)[:, None] * torch.ones(2),
        residual_tokens=torch.tensor(moved), q=torch.tensor([losses[0], 0.0]), q_loss=torch.tensor(0.5),
    )  # fmt: skip
    seen = Measurements(4)
    seen.begin_step()
    part = {"input_ids": torch.zeros(1, tokens), "attention_mask": torch.ones(1, tokens)}
    seen.add(torch.tensor(losses[0]), output, part)
    seen.end_step()
    return seen


def test_processes_whose_rows_ran_different_segments_are_measured_as_one() -> None:
    first, other = measured([3.0, 2.0, 1.0], [4, 2, 2], [6, 5, 0], tokens=6), measured([1.0], [12], [0], tokens=18)
    read = first.read(lambda steps: steps + torch.stack(other._steps))
    assert read.pop("tokens_per_second") > 0
    assert read == pytest.approx({
        "loss": 3 + 1, "segments": (2 * 6 + 1 * 18) / 24, "segment_loss_1": (3 * 4 + 1 * 12) / 16, "segment_loss_2": 2,
        "segment_loss_3": 1, "residual_l_1": 3, "residual_h_1": 3, "residual_l_2": 2, "residual_h_2": 2,
        "residual_l": 2, "residual_h": 2, "q_halt": (3 * 8 + 1 * 12) / 20, "q_continue": 0, "q_loss": 1,
    })  # fmt: skip
    assert first.read(lambda steps: steps).keys() == {"tokens_per_second"}


def test_what_was_measured_goes_on_with_any_number_of_processes() -> None:
    both = [measured([3.0, 2.0], [4, 2], [6, 5], tokens=6), measured([1.0], [12], [0], tokens=18)]
    theirs = torch.stack(both[1]._steps)
    state = json.loads(json.dumps(both[0].state(lambda steps: steps + theirs)))
    expected = both[0].read(lambda steps: steps + theirs)
    for count in (1, 2, 3):
        processes = [Measurements(4) for _ in range(count)]
        for rank, seen in enumerate(processes):
            seen.load_state(state, torch.device("cpu"), first=rank == 0)
        others = sum(torch.stack(seen._steps) for seen in processes[1:])
        read = processes[0].read(lambda steps, others=others: steps + others)
        assert read.pop("tokens_per_second") > 0
        assert read == {name: value for name, value in expected.items() if name != "tokens_per_second"}


def test_lines_further_apart_than_the_steps_still_end_with_one(settings: Load) -> None:
    assert [line["step"] for line in steps(run(settings("train.log_every=50")))] == [6]


def test_integrations_are_a_list() -> None:
    assert list(load_settings(TrainingSettings, ["train.report_to=[tensorboard]"]).train.report_to) == ["tensorboard"]


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("update", ["batch", "segment"])
def test_out_of_memory_halves_the_parts_and_changes_nothing_else(
    settings: Load, update: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = settings("hrm.segments=2", f"train.update_every={update}")
    expected = weights(run(arguments))
    forward, passes = HRMGemmaForCausalLM.forward, [0]

    def small(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes[0] += self.training
        if self.training and len(kwargs["input_ids"]) > 1 and passes[0] > 3:  # in the middle of a batch
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(HRMGemmaForCausalLM, "forward", small)
    folder = run(arguments)
    assert_same(expected, weights(folder), tolerance=2e-4)
    assert [line["micro_batch"] for line in steps(folder)] == [4, 4, 4, 1, 1, 1]
    assert [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()] == [
        "out of memory with 4 rows at a time; going on with 2, in the same batches of 4",
        "out of memory with 2 rows at a time; going on with 1, in the same batches of 4",
    ]


def test_too_little_memory_for_one_row_is_said(settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("hrm.trainer.HRMTrainer._forward", never)
    with pytest.raises(
        TrainingError, match=r"at step 1 with one row at a time .*Tried to allocate 2 GiB.*last good checkpoint: none"
    ):
        run(settings())


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "",  # a MemoryError says nothing
    ],
)
def test_out_of_memory_is_known_by_what_cuda_says(settings: Load, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = HRMGemmaForCausalLM.forward

    def small(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and len(kwargs["input_ids"]) > 2:
            raise RuntimeError(text) if text else MemoryError
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(HRMGemmaForCausalLM, "forward", small)
    assert [line["micro_batch"] for line in steps(run(settings("train.steps=1")))] == [2]


def test_out_of_memory_under_fsdp_ends_its_process_alone() -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("why")

    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(world_size=2, process_index=1), state=SimpleNamespace(global_step=3), micro_batch=4,
        is_fsdp_enabled=True, _apart=False, _run_parts=fail, _seen=SimpleNamespace(begin_step=lambda: None),
        _sum_over_processes=torch.as_tensor, _refuse_smaller=lambda why: HRMTrainer._refuse_smaller(trainer, why),
        _out_of_memory=lambda why: pytest.fail("it would wait for processes that wait for it elsewhere"),
    )  # fmt: skip
    with pytest.raises(
        TrainingError, match=r"out of memory on process 1 at step 4, with train.micro_batch=4; under FSDP"
    ) as raised:
        HRMTrainer._gradients(trainer, torch.nn.Linear(1, 1), SimpleNamespace(segment=0, rows=[]))
    assert raised.value.alone


def test_another_error_is_not_taken_for_want_of_memory(settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered", 700)

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("hrm.trainer.HRMTrainer._forward", fail)
    with pytest.raises(RuntimeError) as raised:
        run(settings())
    assert raised.value is error


# ---------------------------------------------------------------------------------------------------- resume


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "overrides",
    [
        ["hrm.segments=2", "lora.dropout=0.2"],
        [*ACT, "train.pack=true"],
        [*ACT, "hrm.q_target=replay", "hrm.replay_size=16"],
        [*ACT, "train.update_every=segment", "train.micro_batch=2"],
        ["hrm.segments=3", "train.segment_growth=plateau", "train.plateau_window=1", "train.plateau_tolerance=0.9"],
        ["hrm.h_cycles=2", "train.depth=[[0.5,1,1]]"],
        pytest.param(["hrm.d_l=128", "hrm.d_h=128", "train.optimizer=adamw_8bit"], marks=needs_bitsandbytes),
    ],
    ids=["dropout", "act-packed", "replay", "segment", "plateau", "depth", "8-bit"],
)
def test_a_resumed_run_goes_on_bit_for_bit(
    settings: Load, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        overrides = [*overrides, "train.deterministic=true"]
    straight = run(settings(*overrides))
    with monkeypatch.context() as patched:
        forward, calls = HRMGemmaForCausalLM.forward, [0]

        def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += self.training
            if calls[0] == (8 if "train.micro_batch=2" in overrides else 5):
                raise Killed
            return forward(self, *args, **kwargs)

        patched.setattr(HRMGemmaForCausalLM, "forward", killed)
        with pytest.raises(Killed):
            run(settings(*overrides, f"run.folder={tmp_path / 'cut'}"))
    (cut,) = (tmp_path / "cut").iterdir()
    assert len(checkpoints(cut)) > 0 and int(checkpoints(cut)[-1].name[-1]) < 6
    torch.manual_seed(123)
    random.seed(123)
    assert resume(cut) == cut
    assert steps(cut) == steps(straight)
    assert_same(weights(straight), weights(cut))
    assert_same(*(load_file(checkpoints(f)[-1] / "optimizer.safetensors") for f in (straight, cut)))


@pytest.mark.parametrize("seed", [0, 3, 5, 7])  # among them all kinds and ends
def test_a_resumed_run_tells_what_an_unbroken_one_does(
    settings: Load, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far lines and checkpoints are apart, and wherever it ends, twice: killed or by a signal."""
    draw = random.Random(seed)
    every = [f"train.log_every={draw.randint(2, 5)}", f"train.save_every={draw.randint(1, 3)}"]
    kind = draw.choice([["hrm.segments=2"], ACT, [*ACT, "train.update_every=segment"]])
    arguments = settings(*kind, *every, "train.steps=12", "train.deterministic=true")
    straight = run(arguments)
    step = HRMTrainer.training_step
    for words in ([*arguments, f"run.folder={tmp_path / 'cut'}"], None):
        last, killed = draw.randint(2, 11), draw.random() < 0.5

        def ended(self: HRMTrainer, *args: Any, last: int = last, killed: bool = killed) -> Any:
            if self.state.global_step >= last:
                if killed:
                    raise Killed
                signal.raise_signal(signal.SIGTERM)
            return step(self, *args)

        with monkeypatch.context() as patched, contextlib.suppress(Killed, Interrupted):
            patched.setattr(HRMTrainer, "training_step", ended)
            run(words or [f"run.resume={next((tmp_path / 'cut').iterdir())}"])
    (cut,) = (tmp_path / "cut").iterdir()
    resume(cut)
    assert lines(cut) == lines(straight)
    assert lines(cut)[-2]["train_loss"] == pytest.approx(
        sum(line["loss"] * count for line, count in zip(steps(cut), _windows(steps(cut)), strict=True)) / 12
    )


@pytest.mark.parametrize("lost", ["all", "the beginning", "the end", "moved"])
def test_a_checkpoint_has_the_lines_that_the_run_folder_has_lost(
    settings: Load, tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = settings("train.save_every=2", "train.deterministic=true")
    straight, step = run(arguments), HRMTrainer.training_step

    def ended(self: HRMTrainer, *args: Any) -> Any:
        if self.state.global_step == 5:
            raise Killed
        return step(self, *args)

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(HRMTrainer, "training_step", ended)
        run([*arguments, f"run.folder={tmp_path / 'cut'}"])
    (cut,) = (tmp_path / "cut").iterdir()
    path = cut / "metrics.jsonl"
    text = path.read_text()
    assert len(steps(cut)) == 5 and checkpoints(cut)[-1].name == "step-00000004"
    if lost == "moved":  # what a run needs to go on, and nothing else
        for name in ("config.yaml", "checkpoints"):
            (tmp_path / "moved").mkdir(exist_ok=True)
            shutil.move(cut / name, tmp_path / "moved" / name)
        cut = tmp_path / "moved"
    elif lost == "all":
        path.unlink()
    else:
        path.write_text(text[len(text) // 2 :] if lost == "the beginning" else text[: len(text) // 2])
    resume(cut)
    assert lines(cut) == lines(straight)


def _windows(told: list[dict[str, Any]]) -> list[int]:
    """How many steps each line is of."""
    numbers = [0, *(line["step"] for line in told)]
    return [after - before for before, after in itertools.pairwise(numbers)]


def test_a_finished_run_is_not_trained_or_judged_again(settings: Load) -> None:
    folder = run(settings())
    before = (folder / "metrics.jsonl").read_text()
    resume(folder)
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_finished_run_has_its_lines_back_the_evaluation_after_it_too(settings: Load) -> None:
    folder = run(settings("train.steps=2"))
    path = folder / "metrics.jsonl"
    before = path.read_text().splitlines()
    path.unlink()
    for _ in range(2):  # and once is enough
        resume(folder)
        found = path.read_text().splitlines()
        assert found[-1] == before[-1] and len(found) == len(before) and '"after"' in found[-1]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "progress.json", "rank-0.safetensors", "metrics.jsonl"]
)
def test_a_damaged_checkpoint_is_refused_by_name(settings: Load, name: str) -> None:
    folder = run(settings("train.steps=2"))
    path = checkpoints(folder)[-1] / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UsageError, match=f"{name} cannot be read: it is not what was written"):
        resume(folder)
    path.write_bytes(bytes(data[:-3]))
    with pytest.raises(UsageError, match=f"{name} cannot be read"):
        resume(folder)
    path.unlink()
    with pytest.raises(UsageError, match=f"{name} is no file"):
        resume(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "rank-1.json", "trainer_state.json", "metrics.jsonl"])
def test_a_manifest_that_lacks_a_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    def fill(place: Path) -> None:
        ranks = [f"rank-{rank}.{kind}" for rank in (0, 1) for kind in ("safetensors", "json")]
        for file in ("model.safetensors", "optimizer.safetensors", "optimizer.json", "trainer_state.json", *ranks):
            (place / file).write_text(file)
        (place / "metrics.jsonl").write_text("")
        (place / "progress.json").write_text('{"world": 2}')

    folder = tmp_path / "step-00000001"
    replace_folder(folder, fill)
    check_training(folder)
    (folder / name).write_text("changed")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=f"manifest.json does not list {name}, as it should"):
        check_training(folder)


def test_a_run_does_not_go_on_with_a_manifest_cut_short(settings: Load) -> None:
    folder = run(settings("train.steps=1"))
    place = checkpoints(folder)[-1]
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({"progress.json": manifest["progress.json"]}))
    tensors = load_file(place / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, place / "model.safetensors")
    with pytest.raises(UsageError, match=r"manifest.json does not list model.safetensors, as it should"):
        resume(folder)


def test_what_cannot_be_gone_on_with(settings: Load, tmp_path: Path) -> None:
    folder = run(settings("train.steps=1"))
    with pytest.raises(UsageError, match=r"'train.steps=9' is given beside run.resume"):
        run([f"run.resume={folder}", "train.steps=9"])
    with pytest.raises(UsageError, match=r"it should be a run folder"):
        run([f"run.resume={tmp_path}"])
    (folder / "config.yaml").write_text("train: {steps: [")
    with pytest.raises(UsageError, match=r"config.yaml holds no settings of such a run"):
        run([f"run.resume={folder}"])


def test_other_data_or_another_backbone_are_refused(settings: Load, tmp_path: Path, backbone: Path) -> None:
    copied = shutil.copytree(backbone, tmp_path / "backbone")
    folder = run(settings("train.steps=1", f"hrm.backbone={copied}"))
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("yes", "yea", 1))
    with pytest.raises(UsageError, match=r"training data are not what the run .* was started with"):
        resume(folder)
    (tmp_path / "rows.jsonl").write_text(rows)
    weights = load_file(copied / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"backbone is not what the run"):
        resume(folder)


def test_a_run_that_says_what_is_passed_over_goes_on(settings: Load) -> None:
    """As those of versions that did not mind."""
    folder = run(settings("train.steps=1"))
    for path in (folder / "config.yaml", *folder.rglob("progress.json")):
        text = path.read_text()
        path.write_text(text.replace("exploration: 0.0", "exploration: 0.2").replace('ion": 0.0', 'ion": 0.2'))
        assert path.read_text() != text
    place, newest = folder / "place", checkpoints(folder)[-1]
    newest.rename(place)
    (place / "manifest.json").unlink()
    put_in_place(place, newest)
    resume(folder)


def test_settings_that_were_edited_are_refused_by_name(settings: Load) -> None:
    folder = run(settings("train.steps=1"))
    config = (folder / "config.yaml").read_text()
    for old, new, message in (
        ("  seed: 0\n", "  seed: 5\n", r"^train.seed is 5 in .*config.yaml; it should be 0, as the run was started"),
        ("  d_l: 32\n", "  d_l: 64\n", r"^hrm.d_l is 64 in .*config.yaml; it should be 32"),
        ("task_options: {}", "task_options: {max_depth: 2}", r'^data.task_options is {"max_depth": 2} in .*be {}'),
    ):
        (folder / "config.yaml").write_text(config.replace(old, new))
        assert config.count(old) == 1
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(UsageError, match=message):
            resume(folder)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for old, new in (("prometheus_port: null", "prometheus_port: 0"), ("micro_batch: null", "micro_batch: 1")):
        assert config.count(old) == 1
        config = config.replace(old, new)
    (folder / "config.yaml").write_text(config)
    resume(folder)


def test_a_folder_is_trained_into_by_one_process(settings: Load) -> None:
    folder = run(settings("train.steps=1"))
    with locked(folder), pytest.raises(UsageError, match="is being trained into by another process"):
        resume(folder)
    resume(folder)


def test_a_finished_run_of_part_of_a_batch_is_left_alone(settings: Load) -> None:
    folder = run(settings("hrm.segments=2", "train.update_every=segment", "train.steps=5"))
    resume(folder)
    assert len(steps(folder)) == 5


def test_nothing_in_a_checkpoint_is_pickled(settings: Load) -> None:
    (newest,) = checkpoints(run(settings("train.steps=1")))
    kinds = {path.suffix for path in newest.iterdir()}
    assert kinds == {".safetensors", ".json", ".jsonl"}
    assert len(checkpoints(run(settings("train.steps=5")))) == 2  # older ones are gone


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.update_every=epoch", "it should be batch or segment"),
        ("train.segment_growth=fast", "it should be none or steps or plateau"),
        ("train.depth=[[2,1,1]]", "train.depth"),
        ("train.depth=[1]", "train.depth"),
        ("train.depth=[[a,1,2]]", "train.depth"),
        ("train.depth=[[0.5,true,2]]", "train.depth"),
        ("train.depth=5", "a list"),
        ("train.epochs=.inf", "train.epochs"),
        ("train.core_lr=.inf", "train.core_lr"),
        ("train.adapter_lr=inf", "train.adapter_lr is inf; it should be a finite number above 0"),
        ("train.clip=.nan", "train.clip is nan; it should be a finite number above 0"),
        ("train.plateau_tolerance=inf", "train.plateau_tolerance is inf; it should be a finite number, at least 0"),
        ("train.seed=-1", "train.seed"),
        ("train.prometheus_port=99999", "train.prometheus_port is 99999"),
        ("train.optimizer=sgd", "adamw or adamw_8bit"),
        ("train.micro_batch=0", "at least 1, or null"),
        ("data.bad_rows=keep", "error or skip"),
        ("hrm.segment_weights=[0.5]", None),
        ("hrm.act=true", "hrm.max_segments is 1; it should be at least 2 with hrm.act=true"),
        ("hrm.segment_weights=[0]", "hrm.segment_weights"),
        (
            "hrm.exploration=0.2",
            "hrm.exploration is 0.2; it should be 0.0, its default, without hrm.act=true; set",
        ),
        ("hrm.min_segments=1", None),
        ("hrm.max_segments=4", r"hrm.max_segments is 4; .* without hrm.act=true; set that, or hrm.segments=4"),
        ("hrm.segment_price=0.1", "without hrm.act=true"),
        ("hrm.q_target=none", "without hrm.act=true"),
        ("hrm.q_gradient=head", "without hrm.act=true"),
        ("hrm.q_loss_weight=1", "without hrm.act=true"),
        ("hrm.h_mixer=none hrm.attn_heads=4", "hrm.attn_heads is 4; it should be null, .* hrm.h_mixer=attention"),
        ("lora.enabled=false lora.dropout=0.1", r"lora.dropout is 0.1; .* without lora.enabled=true"),
        ("hrm.replay_size=16", "hrm.replay_size is 16; it should be 4096, its default, without hrm.q_target=replay"),
        ("train.plateau_window=5", "train.plateau_window is 5; it should be 100, .* train.segment_growth=plateau"),
    ],
)
def test_settings_that_make_no_sense(settings: Load, override: str, message: str | None) -> None:
    if message is None:
        run(settings(override, "train.steps=1"))
        return
    with pytest.raises(UsageError, match=message):
        run(settings(*override.split(" ")))


@pytest.mark.parametrize(
    "other", ["train.pack=true", "train.segment_growth=steps", "hrm.q_target=replay", "hrm.stop_residual=0.1"]
)
def test_what_does_not_go_with_one_update_a_segment(settings: Load, other: str) -> None:
    with pytest.raises(UsageError, match=r'with train\.update_every="segment"'):
        run(settings("train.update_every=segment", other))


def test_rows_that_cannot_be_used_are_named_and_passed_over(
    settings: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = settings("data.bad_rows=skip", "train.steps=1", "data.max_length=30")
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + '{"prompt": "x"}\nnonsense\n' + json.dumps({"prompt": "?" * 40, "answer": "y"}))
    run(arguments)
    lines = [record.getMessage() for record in caplog.records if "row passed over" in record.getMessage()]
    assert [line.partition("rows.jsonl:")[2][:3] for line in lines] == ["43:", "44:", "45:"]
    with pytest.raises(UsageError, match=r"rows\.jsonl:43: no 'answer'"):
        run([*arguments, "data.bad_rows=error"])


# ---------------------------------------------------------------------------------------------------- curricula


def test_segments_grow_with_the_steps() -> None:
    growth = SegmentGrowth(4, "steps", 80)
    assert [growth.at(step) for step in (0, 9, 10, 20, 30, 39, 79)] == [1, 1, 2, 3, 4, 4, 4]
    assert SegmentGrowth(4, "none", 80).at(0) == 4


def test_segments_grow_when_the_loss_stands_still() -> None:
    growth = SegmentGrowth(3, "plateau", 100, window=2, tolerance=0.1)
    seen = []
    for loss in [4, 4, 3, 3, 2.9, 2.9, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0]:  # falls, stands, falls anew, stands
        growth.saw(loss)
        seen.append(growth.at(0))
    assert seen == [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    other = SegmentGrowth(3, "plateau", 100, window=2, tolerance=0.1)
    other.load_state(json.loads(json.dumps(growth.state())))
    assert other.at(0) == 3


def test_growth_and_depth_are_told(settings: Load) -> None:
    lines = steps(run(settings("hrm.segments=2", "train.segment_growth=steps", "train.depth=[[0.5,1,1]]")))
    assert [line["segment_limit"] for line in lines] == [1, 1, 2, 2, 2, 2]
    assert [line["segments"] for line in lines] == [1, 1, 2, 2, 2, 2]
    assert all(("segment_loss_2" in line) == (line["segments"] == 2) for line in lines)


def test_residuals_are_of_segments_that_were_gone_on_from(settings: Load) -> None:
    (line,) = steps(run(settings("hrm.act=true", "hrm.max_segments=3", "hrm.min_segments=3", "train.steps=1")))
    assert line["residual_l"] == line["residual_l_2"] > 0 and line["residual_h"] == line["residual_h_2"] > 0
    assert "residual_l_3" not in line and line["segments"] == 3


# ---------------------------------------------------------------------------------------------------- kill -9


def test_kill_at_any_moment(settings: Load, tmp_path: Path) -> None:
    arguments = settings("train.steps=60", "train.deterministic=true", *ACT)
    straight = run(arguments)
    command = [sys.executable, "-m", "hrm", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*arguments, f"run.folder={tmp_path / 'killed'}"]
    for wait in (0.3, 1.1):
        process = subprocess.Popen([*command, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        _wait_for_a_step(tmp_path / "killed", process)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (folder,) = (tmp_path / "killed").iterdir()
        words = [f"run.resume={folder}"]
    resume(folder)
    assert_same(weights(straight), weights(folder))
    assert steps(straight) == steps(folder)


def _wait_for_a_step(folder: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    seen = lambda: sum(path.read_text().count('"event": "step"') for path in folder.glob("*/metrics.jsonl"))  # noqa: E731
    start, end = seen(), time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if seen() > start:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step in {seconds} s; status {process.poll()}: {process.communicate()}")


def test_a_checkpoint_of_another_version_is_told(settings: Load) -> None:
    folder = run(settings("train.steps=1"))
    newest = checkpoints(folder)[-1]
    place = newest.rename(newest.with_name("place"))
    (place / "manifest.json").unlink()
    progress = json.loads((place / "progress.json").read_text())
    del progress["measured"]
    (place / "progress.json").write_text(json.dumps(progress))
    put_in_place(place, newest)
    with pytest.raises(UsageError, match=r"progress.json has no 'measured'; another version of hrm wrote it"):
        resume(folder)
