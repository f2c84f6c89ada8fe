"""`hrm plot`: what a training did, drawn from its metrics.jsonl alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrm.runs import METRICS, read_lines
from hrm.settings import UsageError, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[str, Any]
Panel = Callable[["Axes", Sequence[Line]], None]

STATES = {"l": ("$z_L$", "tab:blue"), "h": ("$z_H$", "tab:orange")}


@dataclass
class PlotSettings:
    """Keys of `hrm plot`."""

    run: str | None = None
    """Run folder."""
    output: str | None = None
    """Folder for the PNGs; null: the run folder."""


def plot(settings: Any) -> None:
    """Draws what `settings` (`PlotSettings`) asks for and prints the files' names.

    Raises:
        UsageError: a folder that cannot be used, or without metrics.
    """
    require(settings, "run", lambda value: value is not None, "given: hrm plot FOLDER")
    for path in plot_run(Path(settings.run), None if settings.output is None else Path(settings.output)):
        print(path)


def plot_run(folder: Path, output: Path | None = None) -> list[Path]:
    """Draws the metrics.jsonl of a run's `folder` into `output` (None: `folder`), also while the run goes on.

    Panels without a key in the lines are left out, and so are pictures without a panel.

    Returns:
        The PNGs written: loss, convergence, halting, speed, gradient.

    Raises:
        UsageError: there is no line of a training step, or `output` cannot be written to.
    """
    path = folder / METRICS
    lines = [line for line in read_lines(path) if line.get("event", "step") == "step" and "step" in line]
    if not lines:
        what = "has no line of a training step" if path.is_file() else "is no file"
        raise UsageError(f"{path} {what}; it should be the {METRICS} that a training writes into its run folder")
    output = folder if output is None else output
    try:
        output.mkdir(parents=True, exist_ok=True)
        drawn = [_draw(output / f"{name}.png", panels, lines) for name, panels in PICTURES.items()]
    except OSError as error:
        raise UsageError(f"output is {str(output)!r}, and cannot be written to: {error.strerror}") from error
    return [path for path in drawn if path is not None]


def _draw(path: Path, panels: Mapping[str, Panel], lines: Sequence[Line]) -> Path | None:
    """Writes the panels whose keys (a pattern, all of which) some line has, side by side; None where there is none."""
    known = {key for line in lines for key in line}
    wanted = [panel for keys, panel in panels.items() if any(re.fullmatch(keys, key) for key in known)]
    if not wanted:
        return None
    from matplotlib.figure import Figure  # takes half a second, which `hrm info` need not wait for

    figure = Figure(figsize=(6 * len(wanted), 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True):
        panel(axes, lines)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


# ---------------------------------------------------------------------------------------------------- panels


def _loss(axes: Axes, lines: Sequence[Line]) -> None:
    _curve(axes, lines, "loss")
    axes.set(ylabel="loss, nats", title="Training loss", ylim=_from_zero(lines, "loss"))


def _segment_losses(axes: Axes, lines: Sequence[Line]) -> None:
    numbers = _numbered(lines, "segment_loss_")
    _shaded(axes, lines, {number: f"segment_loss_{number}" for number in numbers})
    axes.set(ylabel="loss, nats a token", title="Loss after each segment")


def _residuals(axes: Axes, lines: Sequence[Line]) -> None:
    for state, (label, colour) in STATES.items():
        _curve(axes, lines, f"residual_{state}", label=label, color=colour)
    axes.set(ylabel="relative change, last segment", title="Convergence of the states")
    _logarithmic(axes, lines, "residual_[lh]")
    axes.legend(frameon=False)


def _residuals_by_segment(axes: Axes, lines: Sequence[Line]) -> None:
    newest = next(line for line in reversed(lines) if any(_number(key, "residual_[lh]_") for key in line))
    for state, (label, colour) in STATES.items():
        numbers = _numbered([newest], f"residual_{state}_")
        values = [float(newest[f"residual_{state}_{number}"]) for number in numbers]
        axes.plot(numbers, values, "o-", label=label, color=colour)
    axes.set(xlabel="segment", ylabel="relative change", title=f"Convergence by segment, step {newest['step']}")
    _whole_numbers(axes)
    _logarithmic(axes, [newest], r"residual_[lh]_\d+")
    axes.legend(frameon=False)


def _q_values(axes: Axes, lines: Sequence[Line]) -> None:
    _curve(axes, lines, "q_halt", label="halt", color="tab:red")
    _curve(axes, lines, "q_continue", label="go on", color="tab:green")
    axes.set(ylabel="Q value, mean", title="Q values")
    axes.legend(frameon=False)


def _segments(axes: Axes, lines: Sequence[Line]) -> None:
    _curve(axes, lines, "segments")
    axes.set(ylabel="segments a row, mean", title="Segments used", ylim=_from_zero(lines, "segments"))


def _speed(axes: Axes, lines: Sequence[Line]) -> None:
    _curve(axes, lines, "tokens_per_second")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(ylabel="tokens/s", title="Speed", ylim=_from_zero(lines, "tokens_per_second"))


def _memory(axes: Axes, lines: Sequence[Line]) -> None:
    _curve(axes, lines, "memory_gb")
    axes.set(ylabel="most memory, GB", title="Memory", ylim=_from_zero(lines, "memory_gb"))


def _gradient(axes: Axes, lines: Sequence[Line]) -> None:
    _curve(axes, lines, "grad_norm", label="norm before clipping")
    _logarithmic(axes, lines, "grad_norm")
    skipped = _skipped(lines)
    if skipped:
        marks, edge = [0.03] * len(skipped), axes.get_xaxis_transform()
        axes.plot(skipped, marks, "x", color="tab:red", transform=edge, label="skipped steps")
        axes.legend(frameon=False)
    axes.set(ylabel="norm of the gradient", title="Gradient")


def _rates(axes: Axes, lines: Sequence[Line]) -> None:
    _curve(axes, lines, "learning_rate", label="core")
    _curve(axes, lines, "adapter_lr", label="adapters")
    axes.set(ylabel="learning rate", title="Learning rates")
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.legend(frameon=False)


PICTURES: dict[str, dict[str, Panel]] = {
    "loss": {"loss": _loss, r"segment_loss_\d+": _segment_losses},
    "convergence": {"residual_[lh]": _residuals, r"residual_[lh]_\d+": _residuals_by_segment},
    "halting": {"q_halt|q_continue": _q_values, "segments": _segments},
    "speed": {"tokens_per_second": _speed, "memory_gb": _memory},
    "gradient": {"grad_norm": _gradient, "learning_rate|adapter_lr": _rates},
}


# ---------------------------------------------------------------------------------------------------- parts of them


def _curve(axes: Axes, lines: Sequence[Line], key: str, **style: Any) -> None:
    """The values of `key` over the steps, where there are any; a single one as a dot."""
    points = [(line["step"], float(line[key])) for line in lines if key in line]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else None, **style)
    axes.set(xlabel="step")
    _whole_numbers(axes)


def _shaded(axes: Axes, lines: Sequence[Line], keys: Mapping[int, str]) -> None:
    """One curve for each segment, from dark (first) to bright."""
    from matplotlib import colormaps

    for place, (number, key) in enumerate(keys.items()):
        shade = 0.9 * place / max(1, len(keys) - 1)  # the brightest tenth is hard to see on white
        _curve(axes, lines, key, label=str(number), color=colormaps["viridis"](shade))
    columns = math.ceil(len(keys) / 8)
    axes.legend(title="segment", frameon=False, fontsize=8, ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))


def _logarithmic(axes: Axes, lines: Sequence[Line], keys: str) -> None:
    """A logarithmic y axis, where the keys (a pattern) have a value that has a place on it."""
    values = [float(line[key]) for line in lines for key in line if re.fullmatch(keys, key)]
    values = [value for value in values if 0 < value < math.inf]
    if not values:
        return
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    wide = max(values) > 1e4 * min(values)  # a narrower axis has room for more than powers of ten, or needs it
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _from_zero(lines: Sequence[Line], key: str) -> tuple[float, float]:
    """Limits of an axis from 0 (or the least value, if it is lower) to a little above the largest finite value."""
    values = [float(line[key]) for line in lines if key in line and math.isfinite(float(line[key]))]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return min(0.0, low), 1.08 * high if high > 0 else 1.0


def _skipped(lines: Sequence[Line]) -> list[int]:
    """Steps whose line counts more skipped steps than the one before."""
    counts = [(line["step"], float(line["skipped_steps"])) for line in lines if "skipped_steps" in line]
    before = [0.0, *(count for _, count in counts)]
    return [step for (step, count), last in zip(counts, before, strict=False) if count > last]


def _numbered(lines: Sequence[Line], prefix: str) -> list[int]:
    """The numbers behind `prefix` in the lines' keys, in order."""
    return sorted({number for line in lines for key in line if (number := _number(key, prefix))})


def _number(key: str, prefix: str) -> int:
    """The number behind `prefix`, a pattern; 0 where the key is another."""
    match = re.fullmatch(rf"{prefix}(\d+)", key)
    return int(match[1]) if match else 0
