"""Fine-tuning from settings to a run folder: load, evaluate, train, save, evaluate again."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hrm import report
from hrm.data import Encoded, Template, batches, encode, first_line, load_problems
from hrm.evaluate import Evaluation, commonest_answer, evaluate
from hrm.modeling import HRMGemmaForCausalLM, HRMOutput
from hrm.settings import UsageError, check_length, check_training, default_backbone, hrm_config, lora_dict

BETAS = (0.9, 0.95)  # of AdamW, as in arXiv 2506.21734


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and which checkpoint is good."""


class Interrupted(Exception):
    """The user stopped the training; the message says where its checkpoint is."""


# ---------------------------------------------------------------------------------------------------- the whole run


def fine_tune(settings: Any, console: Console) -> Path:
    """Trains a core and adapters on a backbone as `settings` (a `TrainingSettings` config) say; returns the run folder.

    Raises:
        UsageError: settings, data or a backbone that cannot be used; nothing has been trained.
        TrainingError: the loss or its gradient is not finite.
        Interrupted: Ctrl-C during training; the checkpoint is in the run folder.
    """
    check_training(settings)
    backbone = settings.hrm.backbone or default_backbone()
    if backbone is None:
        raise UsageError("no backbone; set hrm.backbone=NAME_OR_PATH, or HRM_MODEL_PATH")
    template = Template(settings.data.template)
    problems = load_problems(settings.data, settings.train.seed)
    tokenizer = load_tokenizer(backbone)
    rows = encode(problems.train, template, tokenizer, settings.data.max_length)
    held_out = encode(problems.held_out, template, tokenizer, settings.data.max_length)
    with console.status(f"Loading {backbone}"):
        model = load_model(backbone, settings)
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    check_length("a row of the training data", longest, model, "Lower data.max_length to find it.")
    longest = max(len(row.prompt) for row in held_out) + settings.eval.max_new_tokens
    check_length("a held-out problem with its answer", longest, model, "Lower eval.max_new_tokens.")
    run = Run.create(settings, tokenizer)
    report.print_start(console, model, backbone, len(rows), len(problems.held_out), run.folder)

    def judge(name: str, shots: int = 0) -> Evaluation:
        sizes = {"batch_size": settings.eval.batch_size, "max_new_tokens": settings.eval.max_new_tokens}
        with console.status(f"Evaluating {name} training"):
            return evaluate(model, tokenizer, problems, template, shots=shots, **sizes)

    evaluations: dict[str, Evaluation] = {}

    def note(name: str, evaluation: Evaluation) -> None:
        evaluations[name] = evaluation
        run.log_evaluation(name, evaluation)
        report.print_evaluation(console, name, evaluation)

    note("commonest answer", commonest_answer(problems))
    note("before", judge("before"))
    if settings.eval.shots:
        note(f"before, {settings.eval.shots} shots", judge("before", settings.eval.shots))
    train(model, rows, settings.train, run, console)
    try:
        note("after", judge("after"))
    except KeyboardInterrupt as stop:
        raise Interrupted(f"stopped while evaluating; the checkpoint is {run.checkpoint}") from stop
    report.plot_run(run.folder, run.steps, evaluations)
    report.print_outcome(console, evaluations, run.folder)
    return run.folder


def load_tokenizer(backbone: str) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer; one without a padding token pads with its end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise UsageError(f"hrm.backbone is {backbone!r}, and has no tokenizer to load: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(backbone: str, settings: Any) -> HRMGemmaForCausalLM:
    """A fresh core and adapters, drawn from the seed, on the backbone: bfloat16 on CUDA, float32 elsewhere."""
    set_seed(settings.train.seed)
    cuda = torch.cuda.is_available()
    hrm, lora = hrm_config(settings.hrm), lora_dict(settings.lora)
    try:
        return HRMGemmaForCausalLM.from_backbone(
            backbone,
            hrm=hrm,
            lora=lora,
            dtype=torch.bfloat16 if cuda else torch.float32,
            device_map="cuda" if cuda else None,
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"hrm.backbone is {backbone!r}, and cannot be used: {first_line(error)}") from error


def new_run_folder(settings: Any, name: str) -> Path:
    """Makes `run.folder`/<name>-<time> and writes its config.yaml; a UsageError where there is no making it."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    folder = next(path for name in names if not (path := Path(settings.run.folder) / name).exists())
    try:
        folder.mkdir(parents=True)
        OmegaConf.save(settings, folder / "config.yaml")
    except OSError as error:
        raise UsageError(f"run.folder is {settings.run.folder!r}, and cannot be written to: {error}") from error
    return folder


@dataclass
class Run:
    """A folder that holds what a training run leaves: config.yaml, metrics.jsonl, checkpoint/, answers and plots."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    steps: list[dict[str, float]] = field(default_factory=list)
    """What was logged of each training step."""
    saved_at: int | None = None
    """The step after which the checkpoint was written."""

    @classmethod
    def create(cls, settings: Any, tokenizer: PreTrainedTokenizerBase) -> Run:
        """Makes runs/<name>-<time> and writes its config.yaml; a UsageError where there is no making it."""
        return cls(new_run_folder(settings, settings.run.name), tokenizer)

    @property
    def checkpoint(self) -> Path:
        """Folder of the model and its tokenizer, for `from_pretrained`."""
        return self.folder / "checkpoint"

    def log(self, **values: Any) -> None:
        """Adds a line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def log_step(self, **values: float) -> None:
        """Adds a training step's line to metrics.jsonl."""
        self.steps.append(values)
        self.log(event="step", **values)

    def log_evaluation(self, name: str, evaluation: Evaluation) -> None:
        """Adds an evaluation's line to metrics.jsonl, and writes its answers."""
        self.log(event="evaluation", when=name, right=evaluation.right, of=len(evaluation.scores))
        evaluation.write(self.folder / f"answers-{re.sub('[^a-z0-9]+', '-', name)}.jsonl")

    def save(self, model: HRMGemmaForCausalLM, step: int) -> None:
        """Writes the checkpoint, in place of an earlier one."""
        model.save_pretrained(self.checkpoint)
        self.tokenizer.save_pretrained(self.checkpoint)
        self.saved_at = step


# ---------------------------------------------------------------------------------------------------- the loop


def train(model: HRMGemmaForCausalLM, rows: Sequence[Encoded], settings: Any, run: Run, console: Console) -> None:
    """Trains in place for the steps that the `train` section asks for, logs each and leaves a checkpoint.

    Raises:
        TrainingError: the loss or its gradient is not finite; the step is not taken.
        Interrupted: Ctrl-C; the step that ran is finished and the checkpoint written. A second Ctrl-C does not wait.
    """
    total = settings.steps or max(1, math.ceil(settings.epochs * len(rows) / settings.batch_size))
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    if accelerator.num_processes > 1:
        raise UsageError(f"{accelerator.num_processes} processes were started; training here runs in one")
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total, settings.warmup))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    feed = batches(rows, settings.batch_size, run.tokenizer.pad_token_id, settings.seed)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    wrapped.train()
    with StopOnInterrupt() as stop, progress_bar(console) as progress:
        bar = progress.add_task("Training", total=total, text="")
        for step in range(1, total + 1):
            started = time.perf_counter()
            batch = next(feed)
            output = wrapped(**{name: t.to(accelerator.device) for name, t in batch._asdict().items()})
            accelerator.backward(output.loss)
            norm = float(accelerator.clip_grad_norm_(parameters, settings.clip))
            rates = [float(rate) for rate in schedule.get_last_lr()]
            _check_finite(output.loss.item(), norm, step, rates, run)
            if step > 1 and (step - 1) % settings.save_every == 0:
                run.save(model, step - 1)  # only now: this loss shows that the last step did no harm
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            speed = int(batch.attention_mask.sum()) / (time.perf_counter() - started)
            run.log_step(**_metrics(step, output, norm, rates, speed, accelerator.device))
            progress.update(bar, advance=1, text=report.step_text(run.steps[-1]))
            if stop.asked or step == total:
                run.save(model, step)
            if stop.asked:
                raise Interrupted(f"stopped after step {step} of {total}; the checkpoint is {run.checkpoint}")


def make_optimizer(model: HRMGemmaForCausalLM, settings: Any) -> torch.optim.AdamW:
    """AdamW with the core's and the adapters' own learning rates, in this order; only the core's matrices decay."""
    groups = model.trainable_parameters()
    matrices = [p for p in groups["core"] if p.ndim > 1]
    biases = [p for p in groups["core"] if p.ndim == 1]
    adapters = groups["lora_low"] + groups["lora_high"]
    parts: list[dict[str, Any]] = [
        {"params": matrices, "lr": settings.core_lr, "weight_decay": settings.weight_decay},
        {"params": biases, "lr": settings.core_lr, "weight_decay": 0.0},
        {"params": adapters, "lr": settings.adapter_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(parts, betas=BETAS)


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate in step `step` (from 0) of `total`: a linear rise, then a cosine down to 0."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


class StopOnInterrupt:
    """While entered, the first Ctrl-C or SIGTERM only sets `asked`; the next one is Python's own again."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopOnInterrupt:
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()


def progress_bar(console: Console) -> Progress:
    """Steps done, time left and the latest metrics."""
    text = TextColumn("{task.fields[text]}")
    return Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), text,
                    console=console)  # fmt: skip


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in GB: the GPU's allocations, or the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _metrics(
    step: int, output: HRMOutput, norm: float, rates: Sequence[float], speed: float, device: torch.device
) -> dict[str, float]:
    assert output.loss is not None and output.segments_used is not None
    return {
        "step": step,
        "loss": output.loss.item(),
        "segments": float(output.segments_used),
        "gradient_norm": norm,
        "core_lr": rates[0],
        "adapter_lr": rates[-1],
        "tokens_per_second": speed,
        "memory_gb": peak_memory(device),
    }


def _check_finite(loss: float, norm: float, step: int, rates: Sequence[float], run: Run) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    good = "none has been written yet (train.save_every)"
    if run.saved_at is not None:
        good = f"{run.checkpoint}, of step {run.saved_at}"
    raise TrainingError(
        f"{what} at step {step}, with learning rates {rates[0]:.2g} (core) and {rates[-1]:.2g} (adapters); "
        f"last good checkpoint: {good}"
    )
