"""All measurements on some batches, and what they leave in a folder: JSON, a table and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hrm.analysis.fixed_point import (
    ResidualCurve,
    SpectralRadius,
    iterations_to_converge,
    residual_curve,
    spectral_radius,
)
from hrm.analysis.gradients import Agreement, compare_gradients, neumann_gradients
from hrm.analysis.probe import check_count
from hrm.data import Batch
from hrm.modeling import HRMGemmaForCausalLM

FURTHER = 4  # times as many cycles, and as many L steps, as the model trains with
THRESHOLDS = (1e-1, 1e-2, 1e-3)  # of relative change
PARTS = ("core", "lora_low", "lora_high", "all")  # the groups of a table's first part
# what is drawn: w_out's gradient, which no depth reaches, would hide all others in a sum over the core
DRAWN = {"w_x": ":", "w_c": ":", "r_gate": "-", "r_up": "-", "r_down": "-", "w_l": "--", "r_h": "--", "w_o": "--",
         "lora_low": "-.", "lora_high": "-."}  # fmt: skip
MAPS = {"cycle": "one cycle", "l_step": "one L step"}


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found: means over the batches, of the spectral radii the largest."""

    h_cycles: int  # N, as trained
    l_steps: int  # T, as trained
    gradients: dict[str, dict[str, Agreement]]  # "1/1" ... -> group
    neumann: list[dict[str, Agreement]]  # one for each number of terms
    radii: dict[str, SpectralRadius]  # "cycle", "l_step"
    more_cycles: ResidualCurve  # T L steps, FURTHER * N cycles
    more_steps: ResidualCurve  # FURTHER * T L steps, N cycles

    def converged(self) -> dict[str, dict[float, int | None]]:
        """State -> threshold -> iterations until it changes by less; z_L within the first and the last cycle."""
        curves = {
            "z_H, cycles": self.more_cycles.z_h,
            "z_L, steps of the first cycle": self.more_steps.z_l[0],
            "z_L, steps of the last cycle": self.more_steps.z_l[-1],
        }
        return {name: {t: iterations_to_converge(curve, t) for t in THRESHOLDS} for name, curve in curves.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-serialisable."""
        values = asdict(self)
        values["gradients"] = {reach: _plain(row) for reach, row in self.gradients.items()}
        values["neumann"] = [_plain(row) for row in self.neumann]
        return {**values, "converged": self.converged()}

    def table(self) -> str:
        """The numbers as Markdown."""
        every = next(iter(self.gradients.values()))
        terms = {str(index): row for index, row in enumerate(self.neumann, start=1)}
        return "\n".join(
            [
                f"# Gradient and fixed point at N = {self.h_cycles}, T = {self.l_steps}",
                "\nGradients against full backpropagation (T/N): cosine, relative error.\n",
                *_agreement_table("L steps/cycles", self.gradients, [part for part in PARTS if part in every]),
                "\nThe same for each parameter of the core.\n",
                *_agreement_table("L steps/cycles", self.gradients, [name for name in every if name not in PARTS]),
                "\nImplicit gradient from terms of its Neumann series, against T/N: cosine, relative error.\n",
                *_agreement_table("terms", terms, list(self.neumann[0])),
                "\nLargest eigenvalue of the map's Jacobian where the last segment ends.\n",
                *_markdown(
                    ["map", "spectral radius", "iterations", "growth in the last half"],
                    [[MAPS[name], *_radius_cells(found)] for name, found in self.radii.items()],
                ),
                "\nIterations until a state changes by less, relative to itself.\n",
                *_markdown(
                    ["state", *map(str, THRESHOLDS), "runs for"],
                    [
                        [name, *map(_or_never, row.values()), self._length(name)]
                        for name, row in self.converged().items()
                    ],
                ),
                "",
            ]
        )

    def write(self, folder: Path) -> None:
        """Writes analysis.json, analysis.md, gradients.png, neumann.png and residuals.png into `folder`; makes it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "analysis.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "analysis.md").write_text(self.table(), encoding="utf-8")
        _plot_agreement(folder / "gradients.png", "L steps/cycles that carry gradient", self.gradients)
        terms = {str(index): row for index, row in enumerate(self.neumann, start=1)}
        _plot_agreement(folder / "neumann.png", "terms of the Neumann series", terms)
        self._plot_residuals(folder / "residuals.png")

    def _length(self, name: str) -> str:
        return str(len(self.more_cycles.z_h) if name.startswith("z_H") else len(self.more_steps.z_l[0]))

    def _plot_residuals(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        panels = (
            ("z_L, more L steps in a cycle", "L step", _joined(self.more_steps), self.l_steps),
            ("z_L, more cycles", "L step", _joined(self.more_cycles), self.l_steps * self.h_cycles),
            ("z_H, more cycles", "cycle", self.more_cycles.z_h, self.h_cycles),
        )
        for axes, (title, label, curve, trained) in zip(figure.subplots(1, 3), panels, strict=True):
            axes.plot(range(1, len(curve) + 1), curve, ".-")
            axes.axvline(trained, color="tab:gray", linestyle="--", label="as trained")
            for threshold in THRESHOLDS:
                axes.axhline(threshold, color="tab:red", linestyle=":", linewidth=1)
            axes.set(xlabel=label, ylabel="relative change", title=title, yscale="log")
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=120)


def analyse(model: HRMGemmaForCausalLM, batches: Sequence[Batch], folder: Path, *, terms: int = 8) -> Analysis:
    """Measures gradient, Neumann series (of `terms` terms), spectral radii and residuals on `batches`, and writes them
    into `folder`.

    The model is left as it was, at any step of its training, and measured in the mode that it is in.

    Raises:
        ValueError: `batches` is empty, or one of them does not fit the model; `terms` is no whole number above 0.
    """
    check_count("terms", terms)  # before the gradients, which take a while
    if not batches:
        raise ValueError("batches is empty; it should hold at least one batch")
    config = model.hrm.config
    steps, cycles = config.l_steps, config.h_cycles

    def each(measure: Callable[..., Any], **settings: int) -> list[Any]:
        return [measure(model, batch, **settings) for batch in batches]

    gradients, neumann = each(compare_gradients), each(neumann_gradients, terms=terms)
    radii = each(spectral_radius)
    analysis = Analysis(
        h_cycles=cycles,
        l_steps=steps,
        gradients={reach: _mean_agreement([found[reach] for found in gradients]) for reach in gradients[0]},
        neumann=[_mean_agreement(rows) for rows in zip(*neumann, strict=True)],
        radii={name: max((found[name] for found in radii), key=lambda found: found.radius) for name in MAPS},
        more_cycles=_mean_curve(each(residual_curve, timesteps=steps, cycles=FURTHER * cycles)),
        more_steps=_mean_curve(each(residual_curve, timesteps=FURTHER * steps, cycles=cycles)),
    )
    analysis.write(folder)
    return analysis


# ---------------------------------------------------------------------------------------------------- means


def _mean_agreement(found: Sequence[Mapping[str, Agreement]]) -> dict[str, Agreement]:
    """Over the batches in which the full gradient is not 0."""
    means = {}
    for name in found[0]:
        known = [row[name] for row in found if row[name].cosine is not None]
        means[name] = Agreement(*map(_mean, zip(*known, strict=True))) if known else Agreement(None, None)
    return means


def _mean_curve(curves: Sequence[ResidualCurve]) -> ResidualCurve:
    cycles = zip(*(curve.z_l for curve in curves), strict=True)  # of one cycle, each batch's
    z_l = [[_mean(changes) for changes in zip(*cycle, strict=True)] for cycle in cycles]
    return ResidualCurve(z_l, [_mean(changes) for changes in zip(*(curve.z_h for curve in curves), strict=True)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------------- text, plots


def _agreement_table(title: str, rows: Mapping[str, Mapping[str, Agreement]], groups: Sequence[str]) -> list[str]:
    return _markdown(
        [title, *groups], [[name, *(_agreement_cell(row[g]) for g in groups)] for name, row in rows.items()]
    )


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _agreement_cell(found: Agreement) -> str:
    return "no gradient" if found.cosine is None else f"{found.cosine:.4f}, {found.relative_error:.3g}"


def _radius_cells(found: SpectralRadius) -> list[str]:
    last = found.growth[found.iterations // 2 :]
    return [f"{found.radius:.4g}", str(found.iterations), f"{min(last):.4g} to {max(last):.4g}"]


def _or_never(iterations: int | None) -> str:
    return "never" if iterations is None else str(iterations)


def _plain(row: Mapping[str, Agreement]) -> dict[str, dict[str, float | None]]:
    return {name: found._asdict() for name, found in row.items()}


def _joined(curve: ResidualCurve) -> list[float]:
    return [change for cycle in curve.z_l for change in cycle]


def _plot_agreement(path: Path, label: str, rows: Mapping[str, Mapping[str, Agreement]]) -> None:
    """Cosine and relative error of each group of `DRAWN`, over the rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    figure.suptitle("Gradients against full backpropagation")
    left, right = figure.subplots(1, 2)
    for axes, field, text in ((left, "cosine", "cosine"), (right, "relative_error", "relative error")):
        for part, style in DRAWN.items():
            if part in next(iter(rows.values())):
                values = [getattr(row[part], field) for row in rows.values()]
                axes.plot(list(rows), values, style, marker=".", label=part)
        axes.set(xlabel=label, ylabel=text)
        axes.grid(alpha=0.3)
    left.ticklabel_format(axis="y", useOffset=False)
    left.set_ylim(top=1.02)
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
