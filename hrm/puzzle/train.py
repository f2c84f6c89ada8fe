"""`hrm train puzzle=...`: trains a puzzle model from scratch, evaluates it, keeps checkpoints and a learning curve."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import Tensor

from hrm.curriculum import set_depth, stages
from hrm.puzzle.config import PuzzleConfig
from hrm.puzzle.curve import learning_curve
from hrm.puzzle.data import BatchStream, PuzzleSet, load_puzzles
from hrm.puzzle.engine import NO_STEP, Engine
from hrm.puzzle.evaluate import Evaluation, check_fit, evaluate
from hrm.puzzle.model import PuzzleModel
from hrm.puzzle.saving import EVALUATIONS, MODEL, load_checkpoint, save_checkpoint, save_model
from hrm.puzzle.settings import check_processes, model_config
from hrm.puzzle.shared import alike
from hrm.room import check_room
from hrm.running import (
    Interrupted,
    StopOnInterrupt,
    TrainingError,
    check_settings,
    check_unchanged,
    joined_processes,
    locked,
    on_first,
    peak_memory,
    progress_bar,
    recorded,
    run_folder,
)
from hrm.runs import METRICS, bring_back, forget_after
from hrm.saving import checkpoints
from hrm.settings import UsageError

EXPLODED = 10.0  # times the loss of a uniform guess


def train_puzzle(settings: Any, console: Console) -> Path:
    """Runs one training from `load_puzzle_settings`, or goes on with one; returns the run's folder.

    Of several processes (`torchrun`) each takes its share of every batch; the first prints and writes.

    Raises:
        UsageError: data or settings that cannot be used.
        TrainingError: the loss is no longer finite or has exploded.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    with joined_processes() as processes:
        check_processes(settings, processes.num_processes)
        training, test = load_data(settings)
        shown = console if processes.is_main_process else Console(quiet=True)
        run = PuzzleRun(settings, training, test, shown, processes)
        with ExitStack() as held:
            on_first(processes, lambda: held.enter_context(locked(run.folder)))
            run.begin()
            try:
                run.train()
            finally:
                run.engine.close()
    return run.folder


def load_data(settings: Any) -> tuple[PuzzleSet, PuzzleSet | None]:
    """The puzzles to train and to evaluate on (None: none are given)."""
    data, task = settings.data, settings.puzzle.split("-")[0]
    if data.path is not None:
        test = None if data.test_path is None else load_puzzles(data.test_path, task, check_unique=False)
        return load_puzzles(data.path, task, check_unique=False), test
    if settings.puzzle != "sudoku-4x4":
        raise UsageError(f"data.path is null; puzzle={settings.puzzle} needs a file, such as `hrm data` makes")
    from hrm.puzzle.sudoku import generate

    made, held_out = generate(4, data.size, data.held_out, settings.train.seed)
    return made.puzzles, held_out.puzzles


def learning_rate(step: int, settings: Any) -> float:
    """Share of the peak at `step` (from 0): a linear rise, then a cosine down to `lr_min_ratio`."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr_min_ratio + (1 - settings.lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _check_test(config: PuzzleConfig, test: PuzzleSet) -> None:
    """Now and not at the first evaluation, which may be hours away."""
    try:
        check_fit(config, test, scored=True)
    except UsageError as error:
        raise UsageError(f"data.test_path: {error}") from error


SIZES = ("hidden_size", "expansion", "l_layers", "h_layers", "puzzle_tokens", "puzzle_emb_size")


def _check_room(config: PuzzleConfig, batch_size: int, processes: int) -> None:
    """Raises a UsageError that names sizes which no such machine could hold."""
    sizes = ", ".join(f"hrm.{name} is {getattr(config, name)}" for name in SIZES)
    check_room(sizes, "the model's weights", 4 * config.weights)
    states = 2 * config.tokens * config.hidden_size * 2  # of a row, in bfloat16 at the least
    what = f"the states of its rows of {config.tokens} tokens"
    check_room(f"train.batch_size is {batch_size}", what, batch_size // processes * states)


def _called(part: str, path: str | None) -> str:
    """What messages call the puzzles of a file, or those that were generated."""
    return f"the {part} puzzles {f'of {path} ' if path else ''}are"


def _name(settings: Any) -> str:
    return settings.run.name or f"{settings.puzzle}-{settings.model}"


class PuzzleRun:
    """One training run and its folder: config.yaml, metrics.jsonl, evaluations.jsonl, checkpoints/, model/, at the
    end curve.png. All processes have one; the first one's writes. `begin`, then `train`."""

    def __init__(
        self, settings: Any, training: PuzzleSet, test: PuzzleSet | None, console: Console, processes: PartialState
    ) -> None:
        self.settings, self.training, self.test = settings, training, test
        self.recorded = recorded(settings)
        self.console, self.processes = console, processes
        share = {"rank": processes.process_index, "world": processes.num_processes}
        self.identity = {"training": training.digest(), "test": "" if test is None else test.digest()}
        self.about = {"task": training.task, "side": list(training.side), "vocab_size": training.vocab_size}
        sizes = {"vocab_size": training.vocab_size, "seq_len": training.side[0] * training.side[1],
                 "num_puzzle_ids": training.num_puzzle_ids}  # fmt: skip
        config, train = model_config(settings, **sizes), settings.train
        if test is not None:
            _check_test(config, test)
        _check_room(config, train.batch_size, processes.num_processes)
        torch.manual_seed(train.seed)
        if torch.cuda.is_available():  # or cuBLAS may add the parts of a weight gradient's long sums in bfloat16
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        model = PuzzleModel(config).to("cuda" if torch.cuda.is_available() else "cpu").train()
        self.engine = Engine(
            model, optimizer=train.optimizer, weight_decay=train.weight_decay, clip=train.clip, ema=train.ema,
            embedding_weight_decay=train.embedding_weight_decay, seed=train.seed,
            stagger=train.stagger, **share,
        )  # fmt: skip
        data = settings.data
        try:
            self.stream = BatchStream(training, train.batch_size, train.seed, data.augment, data.easier, **share)
        except ValueError as error:
            raise UsageError(f"data.path: {error}") from error
        self.stages = stages(train.depth, train.steps, config.h_cycles, config.l_steps)
        self.config = config
        self.step, self.logged, self.seconds = 0, 0, 0.0
        self.folder = on_first(processes, lambda: run_folder(settings, _name(settings)))

    def begin(self) -> None:
        """Puts the newest checkpoint back where there is one, and says what is trained.

        Raises:
            UsageError: the checkpoint is damaged, or of other settings, another model or other puzzles.
            TrainingError: the processes have different weights.
        """
        if self.settings.run.resume is not None:
            self._resume()
        model = self.engine.model
        if self.processes.num_processes > 1 and not alike(list(model.state_dict().values())):
            raise TrainingError(
                "the processes start from different weights; they should see the same settings and run folder"
            )
        self._started = time.perf_counter() - self.seconds
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        self.console.print(
            f"{self.settings.model} on {model.device} ({model.dtype}), {parameters:.1f} M parameters; "
            f"{len(self.training)} puzzles to train on, {0 if self.test is None else len(self.test)} others to test on"
            f"\nRun folder: {self.folder}", markup=False, soft_wrap=True,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Steps until the end, with evaluations and checkpoints on the way."""
        total = self.settings.train.steps
        if self.step:
            self._catch_up()
        with ThreadPoolExecutor(1) as ahead, StopOnInterrupt() as stop, progress_bar(self.console) as progress:
            bar = progress.add_task("Training", total=total, completed=self.step, text="")
            batch = ahead.submit(self.stream.batch, self.step)
            while self.step < total:
                rows = batch.result()
                batch = ahead.submit(self.stream.batch, self.step + 1)
                self._take_step(rows)
                looked = self.step % self.settings.train.log_every == 0 or self.step == total
                asked = self._asked(stop, looked)
                if looked or asked:
                    progress.update(bar, completed=self.step, text=self._log())
                if self.step % self.settings.train.save_every == 0 or self.step == total or asked:
                    self._save()
                if asked:
                    raise Interrupted(f"stopped after step {self.step} of {total}; go on with run.resume={self.folder}")
                if self._due():
                    self._evaluate(self.settings.eval.limit)
        self._evaluate(None)
        if self.processes.is_main_process:
            learning_curve(self.folder, self.folder / "curve.png")

    def _catch_up(self) -> None:
        """What a kill right after the checkpoint may have taken: the model of that step, and its evaluation."""
        set_depth(self.engine.model.config, self.config, self.stages, self.step - 1)
        on_first(self.processes, self._write_model)
        if self._due() and not on_first(self.processes, self._evaluated):
            self._evaluate(self.settings.eval.limit)

    def _asked(self, stop: StopOnInterrupt, looked: bool) -> bool:
        """Whether to stop. Several processes, which signals do not reach at the same step, agree where they look at the
        metrics and so wait for the device anyway."""
        if self.processes.num_processes == 1:
            return stop.asked
        if not looked:
            return False
        told = torch.tensor(int(stop.asked), device=self.processes.device)
        torch.distributed.all_reduce(told)
        return bool(told)

    def _due(self) -> bool:
        every = self.settings.eval.every
        return bool(every and self.step and self.step % every == 0 and self.step < self.settings.train.steps)

    def _evaluated(self) -> bool:
        path = self.folder / EVALUATIONS
        return path.is_file() and any(json.loads(line)["step"] == self.step for line in path.read_text().splitlines())

    def _take_step(self, rows: Any) -> None:
        train = self.settings.train
        set_depth(self.engine.model.config, self.config, self.stages, self.step)
        factor = learning_rate(self.step, train)
        self.engine.step(self.step, rows, factor * train.lr, factor * train.embedding_lr)
        self.step += 1

    # ------------------------------------------------------------------------------------------------ what is kept

    def _log(self) -> str:
        """Writes the metrics since the last line, after a look at whether they make sense; text for the bar."""
        steps, self.logged = self.step - self.logged, self.step
        values = self.engine.read_metrics(steps)
        before, self.seconds = self.seconds, time.perf_counter() - self._started
        self._check(values)
        speed = steps * self.settings.train.batch_size / max(self.seconds - before, 1e-9)
        line = {"step": self.step, "seconds": round(self.seconds, 3), "lr": self._lr(self.step - 1)}
        line |= {k: v for k, v in values.items() if k not in ("rows", "worst_loss", "worst_norm", "bad_step")}
        line |= {"examples_per_second": speed, "memory_gb": peak_memory(self.engine.model.device)}
        self._append(METRICS, line)
        return f"loss {values['loss']:.3f}  exact {values['exact']:.1%}  {speed:,.0f} examples/s"

    def _lr(self, step: int) -> float:
        return learning_rate(step, self.settings.train) * self.settings.train.lr

    def _check(self, values: dict[str, float]) -> None:
        limit = EXPLODED * math.log(self.engine.model.config.vocab_size)
        if values["bad_step"] == NO_STEP and values["worst_loss"] < limit:
            return
        if values["bad_step"] < NO_STEP:
            at, what = int(values["bad_step"]), "the loss or its gradient is not finite"
        else:
            at, what = self.step, f"the loss has exploded to {values['worst_loss']:.3g}"
        saved = checkpoints(self.folder)
        good = saved[-1] if saved else "none has been written yet (train.save_every)"
        raise TrainingError(f"{what} at step {at}, with learning rate {self._lr(at):.3g}; last good checkpoint: {good}")

    def _save(self) -> None:
        """A checkpoint to resume from, and the model as it is evaluated. The metrics have just been looked at or are
        looked at now, so that no checkpoint holds weights that are not finite."""
        if self.logged < self.step:
            self._log()
        self.seconds = time.perf_counter() - self._started
        state = self.engine.state()  # of all processes
        on_first(self.processes, lambda: self._write(state))

    def _write(self, state: Mapping[str, Tensor]) -> None:
        progress = {"seconds": self.seconds, "identity": self.identity, "settings": self.recorded}
        save_checkpoint(self.folder, self.step, state, progress)
        self._write_model()

    def _write_model(self) -> None:
        with self.engine.averaged_weights():
            save_model(self.engine.model, self.folder / MODEL, self.about)

    def _evaluate(self, limit: int | None) -> Evaluation | None:
        if self.test is None:
            return None
        with self.engine.averaged_weights():
            found = evaluate(
                self.engine.model, self.test, batch_size=self.settings.eval.batch_size, limit=limit,
                rank=self.processes.process_index, world=self.processes.num_processes,
            )  # fmt: skip
        self.seconds = time.perf_counter() - self._started
        line = {"step": self.step, "seconds": round(self.seconds, 3), "exact": found.exact, "cells": found.cells,
                "count": found.count, "by_segment": found.by_segment, "took": round(found.seconds, 3)}  # fmt: skip
        self._append(EVALUATIONS, line)
        self.console.print(
            f"step {self.step:6}, {self.seconds:7.1f} s: {found.exact:.1%} of {found.count} puzzles right, "
            f"{found.cells:.1%} of the cells", highlight=False,
        )  # fmt: skip
        return found

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if not self.processes.is_main_process:
            return
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    # ------------------------------------------------------------------------------------------------ begin, resume

    def _resume(self) -> None:
        saved = checkpoints(self.folder)
        if not saved:
            self.console.print(f"{self.folder} has no checkpoint yet; starting at step 0", markup=False)
            self._forget_after(0)
            return
        state, progress = load_checkpoint(saved[-1])
        check_settings(progress["settings"], self.recorded, self.folder)
        data = self.settings.data
        names = {"training": _called("training", data.path), "test": _called("test", data.test_path)}
        check_unchanged(progress["identity"], self.identity, names, self.folder)
        try:
            self.engine.load_state(state)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"{saved[-1]} does not fit this run: {error}") from error
        self.step = self.logged = progress["step"]
        self.seconds = progress["seconds"]
        on_first(self.processes, lambda: self._bring_back(saved[-1]))
        self._forget_after(self.step)

    def _bring_back(self, checkpoint: Path) -> None:
        """Puts back what the run's files have lost of their lines up to the checkpoint."""
        for name in (METRICS, EVALUATIONS):
            bring_back(self.folder / name, checkpoint, self.step)

    def _forget_after(self, step: int) -> None:
        """Drops lines of steps that the checkpoint does not know, and a line cut short by a kill; they come again."""
        if not self.processes.is_main_process:
            return
        forget_after(self.folder / METRICS, step)
        # the last evaluation is made again also where training was over
        forget_after(self.folder / EVALUATIONS, min(step, self.settings.train.steps - 1))
