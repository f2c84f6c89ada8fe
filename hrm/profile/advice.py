"""Whether a training step fits into a GPU, and the settings that would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hrm.profile.plan import MemoryPlan, Step


@dataclass(frozen=True)
class Saving:
    """One way to take less memory."""

    setting: str  # what a user sets, or does
    cost: str
    field: str  # of `Step`
    better: Callable[[Step], Any]  # the step -> the field's value that takes less, or the same where there is none
    worse: Callable[[Step], Any]  # the step -> the field's value without this saving, or the same where it is not on
    changes_training: bool = False  # which is then said with the setting

    def applied(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with this saving; the same object where it changes nothing."""
        return self._with(plan, self.better(plan.step))

    def undone(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan without this saving; the same object where it is not on."""
        return self._with(plan, self.worse(plan.step))

    def _with(self, plan: MemoryPlan, value: Any) -> MemoryPlan:
        return plan if value == getattr(plan.step, self.field) else plan.changed(**{self.field: value})

    def named(self, step: Step) -> str:
        """What a user sets to train as `step` says."""
        setting = self.setting.format(micro_batch=step.micro_batch)
        return f"{setting} ({self.cost})" if self.changes_training else setting


def _on(_: Step) -> bool:
    return True


def _off(_: Step) -> bool:
    return False


def _adamw(kind: str) -> Callable[[Step], str]:
    """Plain AdamW where the optimizer is `kind`."""
    return lambda step: "adamw" if step.optimizer == kind else step.optimizer


SAVINGS = (  # the one that costs least first, the one that trains otherwise last
    Saving(
        "train.optimizer=adamw_8bit",
        "states in 8 bits",
        "optimizer",
        lambda step: "adamw_8bit" if step.optimizer == "adamw" else step.optimizer,
        _adamw("adamw_8bit"),
    ),
    Saving("hrm.offload_per_layer_embeddings=true", "each token's rows are copied", "per_layer_on_cpu", _on, _off),
    Saving(
        "train.micro_batch={micro_batch}",
        "less to do at a time",
        "micro_batch",
        lambda step: -(-step.micro_batch // 2),
        lambda step: step.batch or step.micro_batch,
    ),
    Saving("train.gradient_checkpointing=true", "a second forward pass", "gradient_checkpointing", _on, _off),
    Saving("hrm.quantize=nf4", "its weights are rounded", "four_bit", _on, _off),
    Saving(
        "train.optimizer=paged_adamw_8bit",
        "states come from the host",
        "optimizer",
        lambda _: "paged_adamw_8bit",
        _adamw("paged_adamw_8bit"),
    ),
    Saving(
        "train.update_every=segment",
        "changes the training: one optimizer step a segment",
        "segments",
        lambda step: 1 if step.by_segment else step.segments,
        lambda step: None if step.by_segment else step.segments,
        changes_training=True,
    ),
)


def check_fits(plan: MemoryPlan, available: int) -> str | None:
    """A warning where `plan` takes more than `available` bytes, with the savings that would make it fit; else None.

    Savings are taken in the order of `SAVINGS` until it fits; those that it fits without are left out again.
    """
    if plan.peak <= available:
        return None
    taken, smallest = _fitting(plan, available)
    text = (
        f"a training step is predicted to take {in_gb(plan.peak)} GB of the GPU, {in_gb(plan.peak - available)} GB "
        f"more than the {in_gb(available)} GB there are; "
    )
    names = ", ".join(saving.named(smallest.step) for saving in taken)
    if smallest.peak <= available:
        return f"{text}it would fit, with {in_gb(smallest.peak)} GB, with: {names}"
    if not taken:
        return f"{text}nothing is left to save but a shorter data.max_length or a smaller core"
    return f"{text}even with {names} it takes {in_gb(smallest.peak)} GB: lower data.max_length or the core's size"


def _fitting(plan: MemoryPlan, available: int) -> tuple[list[Saving], MemoryPlan]:
    """The savings that make `plan` fit, and the plan with them; all that help where none does."""
    taken: list[Saving] = []
    now = plan
    for saving in SAVINGS:
        while now.peak > available and (smaller := saving.applied(now)).peak < now.peak:
            taken, now = [*(other for other in taken if other.field != saving.field), saving], smaller
    for saving in reversed(taken[:-1]):  # the dearest first
        rest = [other for other in taken if other is not saving]
        without = plan.changed(**{other.field: getattr(now.step, other.field) for other in rest})
        if now.peak <= available and without.peak <= available:
            taken, now = rest, without
    return taken, now


def in_gb(size: int) -> str:
    """`size` bytes in GB, as users read it."""
    return f"{size / 1e9:.2f}"


def available_memory() -> int:
    """Bytes of the current GPU that this process has or can get."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
