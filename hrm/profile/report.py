"""The table of a plan: its parts and peaks beside the measured ones, and what each saving saves or would save."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hrm.profile.advice import SAVINGS, in_gb
from hrm.profile.measure import Measurement
from hrm.profile.plan import MemoryPlan

PARTS = {
    "weights": "backbone weights",
    "per_layer": "per-layer embeddings",
    "adapters": "adapters (float32)",
    "core": "core (float32)",
    "gradients": "gradients (float32)",
    "optimizer": "optimizer states",
    "carry": "carry",
    "copies": "core and adapters in bfloat16",
    "backbone_activations": "backbone activations",
    "core_activations": "core activations",
    "loss": "cross entropy, one chunk",
    "layer": "one layer's backward",
    "update": "optimizer's temporaries",
}


def print_plan(plan: MemoryPlan, measured: Measurement | None = None) -> None:
    """Prints the parts of `plan` and its peaks beside the measured ones, and what each saving saves or would save."""
    step, parts, peaks = plan.step, *((measured.parts, measured.peaks) if measured else ({}, {}))
    packed = ", packed" * step.packed
    table = Table(title=f"{step.micro_batch} x {step.tokens} tokens{packed}, backbone {plan.skeleton.text.model_type}")
    for heading in ("part", "predicted GB", *["measured GB"] * bool(measured)):
        table.add_column(heading, justify="left" if heading == "part" else "right")

    def row(words: str, predicted: int, seen: int | None) -> None:
        table.add_row(words, in_gb(predicted), *([] if seen is None else [in_gb(seen)]))

    for part, words in PARTS.items():
        if plan.parts[part] or parts.get(part):
            row(words, plan.parts[part], parts.get(part))
    table.add_section()
    for peak, phase in (("loss", "forward"), ("backward", "backward"), ("step", "step")):
        row(f"peak: {peak}", plan.peaks[peak], peaks.get(phase))
    row("in the CPU's memory", sum(plan.host.values()), measured.host if measured else None)
    table.add_section()
    for saving in SAVINGS:
        other = saving.undone(plan)
        if other.peak > plan.peak:
            setting = saving.setting.format(micro_batch=step.micro_batch)
            table.add_row(f"{setting} (on)", f"-{in_gb(other.peak - plan.peak)}")
    for saving in SAVINGS:
        other = saving.applied(plan)
        if other.peak < plan.peak:
            setting = saving.setting.format(micro_batch=other.step.micro_batch)
            table.add_row(f"{setting}: {saving.cost}", f"-{in_gb(plan.peak - other.peak)}")
    Console().print(table)
