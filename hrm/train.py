"""Fine-tuning from settings to a run folder: load, evaluate, train, evaluate again; or go on with a run."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.logging import RichHandler
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, set_seed

from hrm import report
from hrm.data import Encoded, Example, Problems, Template, bad_row_of, encode, first_line, load_problems
from hrm.evaluate import Evaluation, commonest_answer, evaluate
from hrm.modeling import HRMGemmaForCausalLM
from hrm.monitor import JsonlCallback, ProgressCallback, PrometheusCallback, check_integrations
from hrm.profile.advice import available_memory, check_fits
from hrm.profile.command import load_config, plan_training
from hrm.running import (
    Interrupted,
    StopOnInterrupt,
    TrainingError,
    joined_processes,
    locked,
    on_each,
    on_first,
    recorded,
    run_folder,
)
from hrm.runs import METRICS, append_line, read_lines
from hrm.saving import checkpoints, unwritable
from hrm.settings import (
    UsageError,
    check_length,
    check_training,
    core_lr,
    default_backbone,
    hrm_config,
    lora_dict,
)
from hrm.sharding import check_sharding, is_sharded, whole_state
from hrm.trainer import HRMTrainer
from hrm.training_state import check_record

MODEL = "checkpoint"  # folder of a run: the trained model with its tokenizer

# ---------------------------------------------------------------------------------------------------- the whole run


def fine_tune(settings: Any, console: Console) -> Path:
    """Trains a core and adapters on a backbone as `settings` (a `TrainingSettings` config) say; returns the run folder.

    Raises:
        UsageError: settings, data or a backbone that cannot be used; nothing has been trained.
        TrainingError: the loss or its gradient was not finite too often, or there is too little memory for one row.
        Interrupted: Ctrl-C or SIGTERM during training; a checkpoint to go on from is in the run folder.
    """
    with joined_processes() as processes:
        if not processes.is_main_process:
            console = Console(quiet=True)
        on_each(processes, lambda: _check(settings, processes.num_processes))
        settings.train.core_lr = core_lr(settings.train, settings.hrm)  # so that the run's config.yaml says it
        with _exporter(settings.train.prometheus_port, processes, console) as exporter:
            return _fine_tune(settings, processes, console, exporter)


def _check(settings: Any, processes: int) -> None:
    check_training(settings, processes)
    check_sharding(settings)
    check_integrations(settings.train.report_to)
    _check_record(settings)


def _check_record(settings: Any) -> None:
    """That a run to go on with has its settings still, before anything is loaded or written."""
    if settings.run.resume is None:
        return
    run = Path(settings.run.resume)
    if saved := checkpoints(run):
        check_record(saved[-1], recorded(settings), run)


def _fine_tune(settings: Any, processes: PartialState, console: Console, exporter: list[TrainerCallback]) -> Path:
    job = on_each(processes, lambda: Job.load(settings, console))
    folder = on_first(processes, lambda: run_folder(settings, settings.run.name))
    rate = settings.train.core_lr
    report.print_start(console, job.model, rate, job.backbone, len(job.rows), len(job.problems.held_out), folder)
    run = Run(folder, job, console, processes)
    with ExitStack() as held:
        on_first(processes, lambda: held.enter_context(locked(folder)))
        run.evaluate_before(settings.eval.shots)
        train(job, run, console, exporter)
        try:
            run.evaluate_after()
        except KeyboardInterrupt as stop:
            message = f"stopped while evaluating; the checkpoint is {run.model_folder}"
            raise Interrupted(message, alone=True) from stop
        if processes.is_main_process:
            report.print_outcome(console, run.evaluations, folder)
            report.plot_run(folder, run.evaluations)
    return folder


@contextmanager
def _exporter(port: int | None, processes: PartialState, console: Console) -> Iterator[list[TrainerCallback]]:
    """What serves metrics, if anything does: from the start of the `with` block, so that a port in use is told before
    anything is loaded, to the end of training."""
    if port is None:
        yield []
        return
    exporter = on_each(processes, lambda: PrometheusCallback(port, name="train.prometheus_port"))
    try:
        with _shown_warnings(console):
            on_first(processes, exporter.serve)
        yield [exporter]
    finally:
        exporter.close()


@dataclass
class Job:
    """What is trained, and on what."""

    settings: Any
    backbone: str
    model: HRMGemmaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    template: Template
    problems: Problems
    rows: list[Encoded]

    @classmethod
    def load(cls, settings: Any, console: Console) -> Job:
        """Reads data and backbone; a UsageError where one of them cannot be used."""
        backbone = backbone_of(settings)
        template = Template(settings.data.template)
        bad_row = bad_row_of(settings.data)
        problems = load_problems(settings.data, settings.train.seed, bad_row)
        tokenizer = load_tokenizer(backbone)
        rows = encode(problems.train, template, tokenizer, settings.data.max_length, bad_row)
        problems = replace(problems, held_out=_usable(problems.held_out, template, tokenizer, settings))
        held_out = encode(problems.held_out, template, tokenizer, settings.data.max_length)
        lengths = [len(row.tokens) for row in rows]
        warn_of_memory(settings, backbone, lengths, console)  # before the weights, which alone may not fit
        with console.status(f"Loading {backbone}"):
            model = load_model(backbone, settings)
        check_length("a row of the training data", max(lengths), model, "Lower data.max_length to find it.")
        longest = max(len(row.prompt) for row in held_out) + settings.eval.max_new_tokens
        check_length("a held-out problem with its answer", longest, model, "Lower eval.max_new_tokens.")
        return cls(settings, backbone, model, tokenizer, template, problems, rows)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        train, core = self.settings.train, self.model.hrm.config
        if train.steps is not None:
            return train.steps
        batches = max(1, math.ceil(train.epochs * len(self.rows) / train.batch_size))
        return batches * ((core.max_segments if core.act else core.segments) if train.update_every == "segment" else 1)


def _usable(
    examples: list[Example], template: Template, tokenizer: PreTrainedTokenizerBase, settings: Any
) -> list[Example]:
    """Those that are not too long; data.bad_rows says what becomes of the others."""
    bad_row, kept = bad_row_of(settings.data), []
    for example in examples:
        problems: list[str] = []
        try:
            encode([example], template, tokenizer, settings.data.max_length, problems.append)
        except UsageError:
            if not problems:
                raise
        if problems:
            bad_row(problems[0])
        else:
            kept.append(example)
    if not kept:
        raise UsageError("none of the held-out rows can be used")
    return kept


def backbone_of(settings: Any) -> str:
    """Name or path of the backbone that `settings` or the environment name; a UsageError where neither does."""
    backbone = settings.hrm.backbone or default_backbone()
    if backbone is None:
        raise UsageError("no backbone; set hrm.backbone=NAME_OR_PATH, or HRM_MODEL_PATH")
    return backbone


def load_tokenizer(backbone: str) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer; one without a padding token pads with its end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise UsageError(f"hrm.backbone is {backbone!r}, and has no tokenizer to load: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def warn_of_memory(settings: Any, backbone: str, lengths: Sequence[int], console: Console) -> None:
    """Says where a step with the longest of rows of `lengths` tokens is predicted not to fit the GPU, and what would
    make it fit."""
    if not torch.cuda.is_available():
        return
    try:
        plan = plan_training(settings, load_config(backbone), lengths, PartialState().num_processes)
    except ValueError:  # what is wrong with the backbone, if anything is, loading it says
        return
    if (warning := check_fits(plan, available_memory())) is not None:
        console.print(warning)


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
            device_map=PartialState().device if cuda else None,
            quantize=settings.hrm.quantize,
            loader=settings.hrm.loader,
            offload_per_layer_embeddings=settings.hrm.offload_per_layer_embeddings,
        )
    except UsageError:
        raise
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"hrm.backbone is {backbone!r}, and cannot be used: {first_line(error)}") from error


# ---------------------------------------------------------------------------------------------------- the run folder


class Run:
    """A folder that holds what a training leaves: config.yaml, metrics.jsonl, checkpoints/ (to go on from),
    checkpoint/ (the trained model), answers and plots."""

    def __init__(self, folder: Path, job: Job, console: Console, processes: PartialState) -> None:
        self.folder, self.job, self.console, self._processes = folder, job, console, processes
        self.evaluations: dict[str, Evaluation] = {}

    @property
    def model_folder(self) -> Path:
        """Folder of the model and its tokenizer, for `from_pretrained`."""
        return self.folder / MODEL

    def save_model(self) -> None:
        """Writes the model and its tokenizer, in place of an earlier one; every process takes part, for where each has
        but a part of the weights, and hears of what the first cannot write."""
        model, main = self.job.model, self._processes.is_main_process
        state = whole_state(model, keep=main) if is_sharded(model) else None

        def write() -> None:
            with unwritable(self.model_folder):
                model.save_pretrained(self.model_folder, state_dict=state)
                self.job.tokenizer.save_pretrained(self.model_folder)

        try:
            on_first(self._processes, write)
        except UsageError as error:  # a full disk is no wrong usage
            raise TrainingError(f"{error}; with that mended, go on with run.resume={self.folder}") from error

    def evaluate_before(self, shots: int) -> None:
        """Judges the untrained model; a run that goes on remembers how it was judged."""
        self._note("commonest answer", 0, lambda: commonest_answer(self.job.problems))
        self._note("before", 0, lambda: self._judge("before"))
        if shots:
            self._note(f"before, {shots} shots", 0, lambda: self._judge("before", shots))

    def evaluate_after(self) -> None:
        """Judges the trained model."""
        self._note("after", self.job.steps, lambda: self._judge("after"))

    def _judge(self, name: str, shots: int = 0) -> Evaluation:
        job, settings = self.job, self.job.settings.eval
        sizes = {"batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
        with self.console.status(f"Evaluating {name} training"):
            return evaluate(job.model, job.tokenizer, job.problems, job.template, shots=shots, **sizes)

    def _note(self, name: str, step: int, judge: Callable[[], Evaluation]) -> None:
        path = self.folder / f"answers-{re.sub('[^a-z0-9]+', '-', name)}.jsonl"
        known = Evaluation.read(path, self.job.problems.held_out)
        evaluation = self.evaluations[name] = known or judge()
        report.print_evaluation(self.console, name, evaluation)
        if not self._processes.is_main_process:
            return
        values = {"event": "evaluation", "when": name, "step": step}
        line = {**values, "right": evaluation.right, "of": len(evaluation.scores)}
        if line not in read_lines(self.folder / METRICS):  # which the run folder may have lost
            append_line(self.folder / METRICS, line)
        if known is None:
            evaluation.write(path)


# ---------------------------------------------------------------------------------------------------- training


def train(job: Job, run: Run, console: Console, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Trains in place, from the run's newest checkpoint where it has one, and leaves the trained model.

    callbacks: of the Trainer, beside those that write lines and draw the bar.

    Raises:
        UsageError: a checkpoint that is damaged or of another model; the message names the file.
        TrainingError, Interrupted: as `fine_tune`.
    """
    train = job.settings.train
    bar = ProgressCallback(console)
    with StopOnInterrupt() as stop, _shown_warnings(console):
        try:
            trainer = HRMTrainer(
                job.model, job.rows, train, run.folder, pad=job.tokenizer.pad_token_id, steps=job.steps,
                callbacks=[JsonlCallback(run.folder / METRICS), bar, *callbacks], recorded=recorded(job.settings),
            )  # fmt: skip
            trainer.add_callback(StopWhenAsked(stop, trainer.repeats))
            saved = checkpoints(run.folder)
            trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
        finally:
            bar.close()
    done = trainer.state.global_step
    job.model.hrm.config = trainer.full_depth
    run.save_model()
    if done < job.steps or stop.asked:
        raise Interrupted(f"stopped after step {done} of {job.steps}; go on with run.resume={run.folder}")


class StopWhenAsked(TrainerCallback):
    """Ends training with a checkpoint once any process was asked to stop: after the step that ran, or, where a batch
    takes `repeats` steps, after the batch."""

    def __init__(self, stop: StopOnInterrupt, repeats: int) -> None:
        self._stop, self._repeats = stop, repeats

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = self._stop.asked
        if args.world_size > 1:  # signals do not reach all processes at the same step
            told = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(told)
            asked = bool(told)
        if state.global_step >= state.max_steps:
            control.should_log = True  # however many steps lie between two lines
        if asked and state.global_step % self._repeats == 0:
            control.should_save = control.should_training_stop = True


@contextmanager
def _shown_warnings(console: Console) -> Iterator[None]:
    """Inside, what the package warns of goes to the console, above the progress bar."""
    log, handler = logging.getLogger("hrm"), RichHandler(console=console, show_path=False, show_time=False)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
