"""What a run shows: lines on the console, and plots in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from hrm.data import Example
from hrm.evaluate import Evaluation
from hrm.modeling import HRMGemmaForCausalLM
from hrm.plot import plot_run as plot_metrics


def print_start(
    console: Console,
    model: HRMGemmaForCausalLM,
    core_lr: float,
    backbone: str,
    training: int,
    held_out: int,
    folder: Path,
) -> None:
    """What is about to be trained, and where its results go."""
    sizes = {part: sum(p.numel() for p in group) / 1e6 for part, group in model.trainable_parameters().items()}
    core = model.hrm.config
    console.print(
        f"{backbone} on {model.device}, {sum(p.numel() for p in model.backbone.parameters()) / 1e6:.0f} M parameters; "
        f"training the core ({sizes['core']:.1f} M; N={core.h_cycles}, T={core.l_steps}; learning rate {core_lr:.2g}) "
        f"and adapters ({sizes['lora_low'] + sizes['lora_high']:.1f} M)\n"
        f"{training} problems to train on, {held_out} others held out\nRun folder: {folder}",
        markup=False,
        soft_wrap=True,  # paths stay in one piece
    )


def print_evaluation(console: Console, name: str, evaluation: Evaluation) -> None:
    """How many of the held-out problems are right, also by their depth where it is known."""
    console.print(f"{name:>16}: {evaluation.right} of {len(evaluation.scores)} right ({evaluation.accuracy:.0%})")
    if depths := evaluation.by_depth():
        shares = "  ".join(f"{depth}: {share:.0%}" for depth, share in depths.items())
        console.print(f"{'by depth':>16}  {shares}", highlight=False)


def print_outcome(console: Console, evaluations: Mapping[str, Evaluation], folder: Path) -> None:
    """The gain in numbers, one worked answer, and what to try next."""
    before, after = evaluations["before"], evaluations["after"]
    index = worked_example(before, after)
    example = after.examples[index]
    console.print(Panel(escape(_worked(example, before.answers[index], after.answers[index])), title="One of them"))
    console.print(f"Right answers to held-out problems: {before.accuracy:.0%} before, {after.accuracy:.0%} after.")
    prompt = example.prompt.replace("'", "'\\''")
    console.print("Checkpoint, metrics and plots: " + str(folder), markup=False, soft_wrap=True)
    console.print(f"Try next:\n  hrm generate run={folder} prompt='{prompt}'", markup=False, soft_wrap=True)


def worked_example(before: Evaluation, after: Evaluation) -> int:
    """The first problem that only training got right; else the first that is right; else the first."""
    gains = zip(before.scores, after.scores, strict=True)
    rank = [(new == 1 and old < 1, new == 1) for old, new in gains]
    return rank.index(max(rank))


def _worked(example: Example, before: str, after: str) -> str:
    return f"{example.prompt}\n\nexpected: {example.answer}\nbefore:   {before or '(nothing)'}\nafter:    {after}"


def plot_run(folder: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Writes the plots of `hrm.plot` and accuracy.png into `folder`."""
    from matplotlib.figure import Figure  # takes half a second, which `hrm info` need not wait for

    plot_metrics(folder)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(list(evaluations), [100 * evaluation.accuracy for evaluation in evaluations.values()], width=0.6)
    axes.bar_label(bars, fmt="%.0f %%")
    axes.set(ylabel="right answers, %", title="Held-out problems", ylim=(0, 105))
    figure.savefig(folder / "accuracy.png", dpi=120)
