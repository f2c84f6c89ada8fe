"""The table of a plan: its parts, its peaks beside the measured ones, and what each saving would save."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from hrm.profile.advice import SAVINGS, in_gb
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


def print_plan(plan: MemoryPlan, measured: dict[str, int] | None = None) -> None:
    """Prints the parts of `plan`, its peaks beside the measured ones, and what each saving would save."""
    step, measured = plan.step, measured or {}
    table = Table(title=f"{step.micro_batch} x {step.tokens} tokens, backbone {plan.skeleton.text.model_type}")
    for heading in ("part", "predicted GB", *["measured GB"] * bool(measured)):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, words in PARTS.items():
        if plan.parts[part]:
            table.add_row(words, in_gb(plan.parts[part]))
    table.add_section()
    for peak, phase in (("loss", "forward"), ("backward", "backward"), ("step", "step")):
        cells = [in_gb(measured[phase])] if phase in measured else []
        table.add_row(f"peak: {peak}", in_gb(plan.peaks[peak]), *cells)
    table.add_row("in the CPU's memory", in_gb(sum(plan.host.values())))
    table.add_section()
    for saving in SAVINGS:
        other = saving.applied(plan)
        if other.peak < plan.peak:
            setting = saving.setting.format(micro_batch=other.step.micro_batch)
            table.add_row(f"{setting}: {saving.cost}", f"-{in_gb(plan.peak - other.peak)}")
    Console().print(table)
