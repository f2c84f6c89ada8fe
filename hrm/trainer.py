"""transformers' Trainer with what HRM adds: deep supervision, growing depth, steps that fit the memory, resume."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hrm.batching import BatchPlan, Rows, StepRows, micro_batches, scored_tokens
from hrm.core import HRMCarry
from hrm.curriculum import SegmentGrowth, set_depth, stages
from hrm.data import Encoded
from hrm.loss import IGNORED
from hrm.modeling import HRMGemmaForCausalLM, HRMOutput
from hrm.running import TrainingError, check_unchanged, forget_peak, is_out_of_memory, peak_memory
from hrm.saving import checkpoint_folder, checkpoints, remove_old_checkpoints, step_of
from hrm.settings import UsageError, core_lr
from hrm.sharding import here, set_up_sharding, whole
from hrm.training_state import check_training, load_lines, load_optimizer, load_rank, load_weights, save_training

logger = logging.getLogger("hrm")

BETAS = (0.9, 0.95)  # of AdamW, as in arXiv 2506.21734


class HRMTrainer(Trainer):
    """Trains a core and adapters on rows of prompts and answers.

    An optimizer step sees `settings.batch_size` rows over all processes, in parts of `micro_batch` rows a process. With
    update_every "batch" it is one step for all segments, whose gradients reach the backbone in one backward pass; with
    "segment" each batch is trained on for as many steps as it has segments, and the carry goes from one to the next.

    Args:
        model: in the precision that it trains in.
        rows: what is trained on.
        settings: the `train` section of `TrainingSettings`.
        folder: of the run; checkpoints go into it, with a copy of its metrics.jsonl.
        pad: token id that fills rows up.
        steps: optimizer steps.
        callbacks: see `hrm.monitor`.
        recorded: of the run's settings (`hrm.running.recorded`), which checkpoints keep.
    """

    def __init__(
        self, model: HRMGemmaForCausalLM, rows: Sequence[Encoded], settings: Any, folder: Path, *, pad: int, steps: int,
        callbacks: Iterable[TrainerCallback] = (), recorded: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.core_model, self.rows, self.settings, self.folder, self.pad = model, rows, settings, folder, pad
        self.recorded = dict(recorded or {})
        core = model.hrm.config
        self.full_depth = replace(core)
        self.segments = core.max_segments if core.act else core.segments
        self.repeats = self.segments if settings.update_every == "segment" else 1
        self.depth = stages(settings.depth, steps, core.h_cycles, core.l_steps)
        self.growth = SegmentGrowth(
            self.segments, settings.segment_growth, steps, settings.plateau_window, settings.plateau_tolerance
        )
        self.micro_batch = settings.micro_batch or settings.batch_size
        self.identity = {"rows": digest_rows(rows), "backbone": digest_backbone(model)}
        self.skipped, self.skipped_in_row, self._first_bad, self._why = 0, 0, 0, ""
        self._carries: list[HRMCarry] = []
        self._halted: list[Tensor] = []
        self._passed = False  # whether the step had nothing left to learn
        self._seen = Measurements(self.segments)
        self._limit = self.segments
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        super().__init__(
            model=model, args=self._arguments(settings, steps), train_dataset=Rows(rows), callbacks=list(callbacks)
        )
        self._apart = self.args.world_size > 1 and not self.is_fsdp_enabled
        if self.is_fsdp_enabled:
            set_up_sharding(self.accelerator, model)
        elif self._apart:
            self._leave_out_ddp()
        self.remove_callback(PrinterCallback)
        self.micro_batch = min(self.micro_batch, settings.batch_size // self.args.world_size)

    def _arguments(self, settings: Any, steps: int) -> TrainingArguments:
        cuda = torch.cuda.is_available()
        return TrainingArguments(
            output_dir=str(self.folder),
            max_steps=steps,
            learning_rate=core_lr(settings, self.core_model.hrm.config),
            max_grad_norm=settings.clip,
            bf16=cuda,
            use_cpu=not cuda,
            seed=settings.seed,
            full_determinism=settings.deterministic,
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,  # a loss that is not finite is to be seen
            save_strategy="steps",
            save_steps=-(-settings.save_every // self.repeats) * self.repeats,  # between batches
            report_to=list(settings.report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )

    def _leave_out_ddp(self) -> None:
        """Data parallelism without torch's DistributedDataParallel: it waits for other processes within a step, where
        one may have run out of memory, and has a second buffer of all gradients. What it does at its start is done."""
        prepare = self.accelerator.prepare_model

        def prepare_apart(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
            prepared = prepare(model, device_placement=device_placement, evaluation_mode=True)  # device and precision
            for parameter in prepared.parameters():
                if parameter.requires_grad:
                    torch.distributed.broadcast(parameter.detach(), 0)
            return prepared

        self.accelerator.prepare_model = prepare_apart

    # ------------------------------------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        """Every step's rows on this process; nothing is left for accelerate to deal out."""
        plan = BatchPlan(
            [len(row.tokens) for row in self.rows],
            batch_size=self.settings.batch_size,
            steps=self.args.max_steps,
            seed=self.settings.seed,
            segments=self.repeats,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        return DataLoader(self.train_dataset, batch_sampler=plan, collate_fn=StepRows)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None  # `training_step` counts, over all processes

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate knows no recurrence

    # ------------------------------------------------------------------------------------------------ one step

    def training_step(self, model: nn.Module, inputs: StepRows, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Gradients of one optimizer step; out of memory on any process, all do it again in smaller parts."""
        model.train()
        set_depth(self.core_model.hrm.config, self.full_depth, self.depth, self.state.global_step)
        if inputs.segment == 0:
            self._carries, self._halted = [], []
        self._limit = self.growth.at(self.state.global_step)
        generators, added = _generators(self.args.device), self.core_model.replay.added
        while (loss := self._gradients(model, inputs)) is None:
            model.zero_grad(set_to_none=True)
            _set_generators(generators, self.args.device)
            self.core_model.replay.added = added  # what the failed pass has put in is written over
        if self.settings.segment_growth == "plateau" and math.isfinite(mean := float(self._mean_over_processes(loss))):
            self.growth.saw(mean)
        return loss

    def _gradients(self, model: nn.Module, inputs: StepRows) -> Tensor | None:
        """The step's loss, with its gradients in place; None where it ran out of memory, with the parts made smaller.

        Processes meet before the step's parts and after them, where gradients are averaged, never in between, where one
        may have failed; only under FSDP they do, so that none can start over.
        """
        self._passed = inputs.segment > 0 and self._all_halted()
        if self._passed:  # the optimizer passes over what has no gradient
            self._seen.pass_step(self.args.device)
            return torch.zeros((), device=self.args.device)
        items = self._sum_over_processes(scored_tokens(inputs.rows)).clamp_min(1)
        self._seen.begin_step()
        why = None
        try:
            total, carries, halted = self._run_parts(model, inputs, items)
            gradients = self._all_gradients() if self._apart else []
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = str(error)
        if self.is_fsdp_enabled and self.args.world_size > 1:
            self._refuse_smaller(why)
        elif failed := self._out_of_memory(why):  # outside: the exception holds on to the failed pass
            self._smaller(inputs, failed)
            return None
        if self._apart:
            self._average(gradients, torch.distributed.group.WORLD)
        self._carries, self._halted = carries, halted
        self._seen.end_step()
        return total

    def _run_parts(
        self, model: nn.Module, inputs: StepRows, items: Tensor
    ) -> tuple[Tensor, list[HRMCarry], list[Tensor]]:
        """Forward and backward passes of a step's parts: its loss, and where a batch takes several steps the parts'
        carries and which of their rows, (rows,) bool, have halted."""
        total = torch.zeros((), device=self.args.device)
        parts = self._parts(inputs)
        carries, halted = [], []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                output = self._forward(model, part, inputs.segment, number, items)
                assert output.loss is not None
                loss = self._weighted(output, inputs.segment)
                self.accelerator.backward(loss * self.args.world_size)  # processes' gradients are averaged
            total += loss.detach() * self.args.world_size
            self._seen.add(loss, output, part, inputs.segment)
            if self.repeats > 1:
                carries.append(_lowered(output.carry, self.args.bf16))
                halted.append(carries[-1].halted | (self._halted[number] if inputs.segment else False))
        return total, carries, halted

    def _all_halted(self) -> bool:
        """Whether no row of the batch, on any process, has anything left to learn in its remaining segments."""
        left = sum((~part).sum() for part in self._halted)
        return int(self._sum_over_processes(left)) == 0

    def _parts(self, inputs: StepRows) -> list[dict[str, Tensor]]:
        if self.repeats == 1:
            parts = micro_batches(inputs.rows, self.micro_batch, self.pad, pack=self.settings.pack)
        else:  # all of one width, so that carries can be cut anew where parts become smaller
            (whole,) = micro_batches(inputs.rows, len(inputs.rows), self.pad, pack=False)
            cut = [tensor.split(self.micro_batch) for tensor in whole.values()]
            parts = [dict(zip(whole, tensors, strict=True)) for tensors in zip(*cut, strict=True)]
        return [{name: tensor.to(self.args.device) for name, tensor in part.items()} for part in parts]

    def _forward(
        self, model: nn.Module, part: dict[str, Tensor], segment: int, number: int, items: Tensor
    ) -> HRMOutput:
        if self.repeats == 1:
            return model(**part, segments=self._limit, num_items_in_batch=items)
        carry = None
        if segment:
            carry = self._carries[number]
            part["labels"] = part["labels"].masked_fill(self._halted[number][:, None], IGNORED)  # they are done
        return model(**part, segments=1, carry=carry, num_items_in_batch=items)

    def _weighted(self, output: HRMOutput, segment: int) -> Tensor:
        """A step's loss, its segment's cross entropy weighted; with update_every "batch" the model does that itself.

        The weights' mean is 1, so that they are shares in both ways; the Q head's loss is not weighted in either.
        """
        config = self.core_model.hrm.config
        assert output.loss is not None
        if self.repeats == 1 or config.segment_weights is None:
            return output.loss
        weights = config.segment_weights[: self.repeats]
        q = 0.0 if output.q_loss is None else config.q_loss_weight * output.q_loss
        return (output.loss - q) * (weights[segment] * len(weights) / sum(weights)) + q

    def _out_of_memory(self, why: str | None) -> dict[int, str]:
        """What the processes that ran out of memory in this step said, by their numbers; every process takes part.

        why: what this one said; None: it did not run out of memory.
        """
        if self.args.world_size == 1:
            return {} if why is None else {0: why}
        if not int(self._sum_over_processes(int(why is not None))):
            return {}
        return {number: said for number, said in enumerate(gather_object([why])) if said is not None}

    def _refuse_smaller(self, why: str | None) -> None:
        """Ends this process where it ran out of memory in a step that it cannot do over."""
        if why is not None:
            raise TrainingError(
                f"out of memory on process {self.args.process_index} at step {self.state.global_step + 1}, with "
                f"train.micro_batch={self.micro_batch}; under FSDP, where processes wait for each other inside a step, "
                f"it should be set lower by hand ({why})",
                alone=True,
            )

    def _smaller(self, inputs: StepRows, failed: Mapping[int, str]) -> None:
        """Halves the parts of a step, on all processes alike, or gives up where there is nothing to halve.

        failed: as of `_out_of_memory`.
        """
        size = min(self.micro_batch, len(inputs.rows))
        number, why = next(iter(failed.items()))
        where = f" on process {number}" if self.args.world_size > 1 else ""
        if size == 1:
            raise TrainingError(
                f"out of memory{where} at step {self.state.global_step + 1} with one row at a time ({why}); last good "
                f"checkpoint: {self._last_good(self.state.global_step)}"
            )
        self.micro_batch = -(-size // 2)
        logger.warning(
            "out of memory%s with %d rows at a time; going on with %d, in the same batches of %d",
            where, size, self.micro_batch, self.settings.batch_size,
        )  # fmt: skip
        self._carries = _cut(self._carries, self.micro_batch)
        self._halted = list(torch.cat(self._halted).split(self.micro_batch)) if self._halted else []
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        """Clips; a gradient that is not finite is thrown away, and the step with it."""
        norm = whole(super()._clip_grad_norm(model))  # type: ignore[arg-type]  # the clip is above 0
        value, loss = float(norm), float(self._sum_over_processes(self._seen.loss))
        if math.isfinite(value) and math.isfinite(loss):
            if not self._passed:  # a step with nothing to learn is no good one
                self.skipped_in_row = 0
            return norm
        step = self.state.global_step + 1
        if not self.skipped_in_row:
            self._first_bad = step
            self._why = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {value}"
        self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
        logger.warning("step %d is skipped: %s", step, self._why)
        model.zero_grad(set_to_none=True)  # the optimizer passes over what has no gradient
        self._halted = [torch.ones_like(part) for part in self._halted]  # no later segment goes on from these states
        if self.skipped_in_row >= self.settings.skip_limit:
            raise TrainingError(self._no_way_on())
        return norm

    def _no_way_on(self) -> str:
        rates = self.lr_scheduler.get_last_lr()  # type: ignore[union-attr]
        return (
            f"{self._why} at step {self._first_bad}, with learning rates {rates[0]:.2g} (core) and {rates[-1]:.2g} "
            f"(adapters), and {self.skipped_in_row} steps in a row had to be skipped; last good checkpoint: "
            f"{self._last_good(self._first_bad - 2)}"
        )

    def _last_good(self, step: int) -> str:
        """The newest checkpoint of at most `step` steps."""
        good = [path for path in checkpoints(self.folder) if step_of(path) <= step]
        return f"{good[-1]}, of step {step_of(good[-1])}" if good else "none has been written yet (train.save_every)"

    # ------------------------------------------------------------------------------------------------ optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with the core's and the adapters' own learning rates, in this order; only the core's matrices decay."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.core_model, self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A linear rise, then a cosine down to 0."""
        if self.lr_scheduler is None:
            warmup = self.settings.warmup

            def factor(step: int) -> float:
                return lr_factor(step, num_training_steps, warmup)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.create_optimizer(), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ------------------------------------------------------------------------------------------------ what is told

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the steps since the last log measured."""
        if "loss" in logs:
            logs |= self._seen.read(self._sum_over_processes)  # the loss too: the Trainer's forgets what a resume cuts
            logs["adapter_lr"] = float(self.lr_scheduler.get_last_lr()[-1])  # type: ignore[union-attr]
            logs |= {"memory_gb": peak_memory(self.args.device), "skipped_steps": self.skipped}
            forget_peak(self.args.device)
            logs["micro_batch"] = self.micro_batch
            if self.repeats == 1:
                logs["segment_limit"] = self._limit
        elif "train_loss" in logs:
            logs["train_loss"] = self._seen.total_loss(self._sum_over_processes) / max(1, self.state.global_step)
        super().log(logs, start_time)
        self.state.log_history.clear()  # metrics.jsonl has it, of which every checkpoint holds a copy

    # ------------------------------------------------------------------------------------------------ checkpoints

    def progress(self) -> dict[str, Any]:
        """What of a run is neither the Trainer's nor a tensor; JSON. Every process takes part."""
        return {
            "skipped": self.skipped, "micro_batch": self.micro_batch, "growth": self.growth.state(),
            "identity": self.identity, "measured": self._seen.state(self._sum_over_processes),
            "settings": self.recorded,
        }  # fmt: skip

    def load_progress(self, progress: dict[str, Any]) -> None:
        """Puts back what `progress` gave; a UsageError where it was of other rows or another backbone."""
        names = {"rows": "the training data are", "backbone": "the backbone is"}
        check_unchanged(progress["identity"], self.identity, names, self.folder)
        self.skipped = progress["skipped"]
        self.micro_batch = min(self.micro_batch, progress["micro_batch"])  # the config's may have been lowered by hand
        self.growth.load_state(progress["growth"])
        self._seen.load_state(progress["measured"], self.args.device, first=self.is_world_process_zero())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes one, but not on the way where the last step was skipped: what it would hold may do the harm."""
        if self.skipped_in_row and self.state.global_step >= self.args.max_steps:
            raise TrainingError(self._no_way_on())
        if self.skipped_in_row and not self.control.should_training_stop:
            return
        self._check_weights()
        try:
            save_training(self, checkpoint_folder(self.folder, self.state.global_step))
        except UsageError as error:  # a full disk is no wrong usage
            raise TrainingError(f"{error}; with that mended, go on with run.resume={self.folder}") from error
        if self.is_world_process_zero():
            remove_old_checkpoints(self.folder)

    def _check_weights(self) -> None:
        """No checkpoint of weights that are not finite is ever written; all processes hear of one's."""
        trained = {name: p for name, p in self.core_model.named_parameters() if p.requires_grad}
        bad = torch.stack([~here(p.detach()).isfinite().all() for p in trained.values()])
        found = [
            name for name, count in zip(trained, self._sum_over_processes(bad.int()).tolist(), strict=True) if count
        ]
        if found:
            self._first_bad, self._why = self.state.global_step, f"the weights {found[0]} are not finite"
            raise TrainingError(self._no_way_on())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_training(folder)
        load_weights(folder, self.core_model if model is None else model)
        load_lines(self, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        pass  # bfloat16 needs none

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rank(self, Path(checkpoint))

    # ------------------------------------------------------------------------------------------------ processes

    def _sum_over_processes(self, value: Any) -> Tensor:
        return self.accelerator.reduce(torch.as_tensor(value, device=self.args.device), reduction="sum")

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        return self._sum_over_processes(value.detach().clone()) / self.args.world_size

    def _all_gradients(self) -> list[Tensor]:
        """The gradient of each parameter that trains; one that this process' rows did not reach becomes zeros."""
        trained = [p for p in self.core_model.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    def _average(self, gradients: Sequence[Tensor], group: Any) -> None:
        """Averages each over the processes of `group`, in place: no memory is asked for that one might not have."""
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            torch._foreach_div_(alike, self.args.world_size)
            group.allreduce_coalesced(alike).wait()  # one message for all


# ---------------------------------------------------------------------------------------------------- parts


_WHOLE, _EACH = 7, 5  # numbers of a step: of all of it, and of each segment


class Measurements:
    """What each step measures, on the device until it is read.

    A step is one vector of sums and of what they are sums over, as long on all processes, whatever segments their rows
    ran: so parts of a batch, on any process, add up to the batch. One that had nothing left to learn is zeros.

    Args:
        segments: the most that a batch runs.
    """

    def __init__(self, segments: int) -> None:
        self._segments = segments
        self._steps: list[Tensor] = []  # since the last reading
        self._since = time.perf_counter()
        self._read = 0.0  # the losses of all steps before
        self._parts: list[Tensor] = []

    def begin_step(self) -> None:
        """What an attempt that ran out of memory has noted is forgotten."""
        self._parts = []

    def end_step(self) -> None:
        """Keeps what the step has noted."""
        self._steps.append(torch.stack(self._parts).sum(0))

    def pass_step(self, device: torch.device) -> None:
        """Keeps a step that had nothing left to learn."""
        self._parts = [torch.zeros(_WHOLE + _EACH * self._segments, device=device)]
        self.end_step()

    @property
    def loss(self) -> float:
        """This process's part of the loss of the current step."""
        return float(sum(part[0] for part in self._parts))

    def add(self, loss: Tensor, output: HRMOutput, part: dict[str, Tensor], before: int = 0) -> None:
        """Takes note of one forward pass and its part of the batch's loss; its first segment is the batch's segment
        `before` + 1."""
        assert output.segment_losses is not None and output.segment_tokens is not None
        assert output.segments_used is not None
        scored, zero = output.segment_tokens, torch.zeros_like(output.segment_losses[0])
        tokens = zero + (part["input_ids"].numel() if "attention_mask" not in part else part["attention_mask"].sum())
        q = torch.zeros(2, device=zero.device) if output.q is None else output.q
        q_tokens = zero if output.q is None else scored.sum()
        q_loss = zero if output.q_loss is None else output.q_loss.detach()
        whole = [loss.detach(), (output.segments_used + before) * tokens, tokens, *(q * q_tokens), q_tokens, q_loss]
        moved, moved_tokens = output.residuals, output.residual_tokens
        if moved is None or moved_tokens is None:
            moved, moved_tokens = torch.zeros(len(scored), 2, device=zero.device), torch.zeros_like(scored)
        each = [output.segment_losses * scored, scored, *(moved * moved_tokens[:, None]).unbind(1), moved_tokens]
        after = self._segments - before - len(scored)
        table = F.pad(torch.stack([row.float() for row in each]), (before, after))
        self._parts.append(torch.cat((torch.stack([value.float() for value in whole]), table.flatten())).detach())

    def read(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the steps since the last reading, and tokens a second; of all processes, which read together.

        over_processes: the sum of a tensor over them.
        """
        now = time.perf_counter()
        steps = [self._means(step) for step in self._summed(over_processes)]
        tokens = sum(step.pop("tokens") for step in steps)
        speed = tokens / (now - self._since)
        self._read += sum(step["loss"] for step in steps)
        self._steps, self._since = [], now
        found: dict[str, list[float]] = {}
        for step in steps:
            for name, value in step.items():
                found.setdefault(name, []).append(value)
        return {**{name: sum(values) / len(values) for name, values in found.items()}, "tokens_per_second": speed}

    def total_loss(self, over_processes: Callable[[Tensor], Tensor]) -> float:
        """The sum of the losses of all steps so far, read or not; of all processes, as `read`."""
        return self._read + sum(step[0] for step in self._summed(over_processes))

    def state(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What the next reading depends on, for `load_state`; JSON. Of all processes, as `read`."""
        seconds = time.perf_counter() - self._since
        return {"steps": self._summed(over_processes), "seconds": seconds, "read": self._read}

    def load_state(self, state: dict[str, Any], device: torch.device, first: bool) -> None:
        """Goes on from `state`, whose sums over all processes become those of the `first` one."""
        steps = [torch.tensor(step, device=device) for step in state["steps"]]
        self._steps = steps if first else [torch.zeros_like(step) for step in steps]
        self._since, self._read = time.perf_counter() - state["seconds"], state["read"]

    def _summed(self, over_processes: Callable[[Tensor], Tensor]) -> list[list[float]]:
        """The steps since the last reading, of all processes."""
        return over_processes(torch.stack(self._steps)).tolist() if self._steps else []  # all processes have some

    def _means(self, step: list[float]) -> dict[str, float]:
        """A step's values by name; one that is a mean over nothing is left out."""
        loss, segments, tokens, q_halt, q_continue, q_tokens, q_loss = step[:_WHOLE]
        values = {"loss": loss, "tokens": tokens}
        if tokens:
            values["segments"] = segments / tokens
        columns = [step[_WHOLE:][m :: self._segments] for m in range(self._segments)]
        for m, (segment_loss, scored, moved_l, moved_h, moved) in enumerate(columns, 1):
            if scored:
                values[f"segment_loss_{m}"] = segment_loss / scored
            if moved:
                last = {"residual_l": moved_l / moved, "residual_h": moved_h / moved}
                values |= last | {f"{name}_{m}": value for name, value in last.items()}
        if q_tokens:
            values |= {"q_halt": q_halt / q_tokens, "q_continue": q_continue / q_tokens, "q_loss": q_loss}
        return values


def digest_rows(rows: Sequence[Encoded]) -> str:
    """SHA-256 of rows and their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.prompt}{row.answer}{row.beside or ''}".encode())
    return digest.hexdigest()


def digest_backbone(model: HRMGemmaForCausalLM) -> str:
    """SHA-256 of what of a model does not train: names, shapes and the first values of each tensor."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.startswith("hrm."):
            first = parameter.detach().flatten()[:64].float().cpu()
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + first.numpy().tobytes())
    return digest.hexdigest()


def make_optimizer(model: HRMGemmaForCausalLM, settings: Any) -> torch.optim.Optimizer:
    """AdamW with the core's and the adapters' own learning rates, in this order; only the core's matrices decay."""
    groups, rate = model.trainable_parameters(), core_lr(settings, model.hrm.config)
    matrices = [p for p in groups["core"] if p.ndim > 1]
    biases = [p for p in groups["core"] if p.ndim == 1]
    adapters = groups["lora_low"] + groups["lora_high"]
    parts: list[dict[str, Any]] = [
        {"params": matrices, "lr": rate, "weight_decay": settings.weight_decay},
        {"params": biases, "lr": rate, "weight_decay": 0.0},
        {"params": adapters, "lr": settings.adapter_lr, "weight_decay": 0.0},
    ]
    parts = [part for part in parts if part["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parts, betas=BETAS)
    import bitsandbytes

    kind = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kind[settings.optimizer](parts, betas=BETAS)


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate in step `step` (from 0) of `total`: a linear rise, then a cosine down to 0."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _lowered(carry: HRMCarry | None, bf16: bool) -> HRMCarry:
    """A carry as the core made it: accelerate's wrapper turns what a forward pass returns into float32."""
    assert carry is not None
    dtype = torch.bfloat16 if bf16 else carry.z_l.dtype
    return HRMCarry(carry.z_l.to(dtype), carry.z_h.to(dtype), carry.steps, carry.halted)


def _cut(carries: Sequence[HRMCarry], rows: int) -> list[HRMCarry]:
    """The same rows in parts of `rows`."""
    if not carries:
        return []
    whole = [torch.cat(parts).split(rows) for parts in zip(*carries, strict=True)]
    return [HRMCarry(*parts) for parts in zip(*whole, strict=True)]


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generators(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
