"""Pictures of a model thinking: what it would answer after each segment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from hrm.puzzle.solver import BOXES
from hrm.puzzle.sudoku import SYMBOLS
from hrm.settings import UsageError

FORMATS = (".png", ".gif")
_GIVEN, _ANSWERED, _WRONG = "#1a1a1a", "#1f5fbf", "#c8102e"
_CHANGED, _CLASH, _LINE = "#ffe08a", "#fbd3d3", "#9a9a9a"
_MAZE = {"padding": "#dddddd", "wall": "#3b3f46", "free": "#ffffff", "start": "#2a9d4a", "goal": "#1f5fbf",
         "path": "#f2a33a"}  # fmt: skip
_ARC = ("#f6f6f6", "#e8e8e8", "#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00", "#aaaaaa", "#f012be", "#ff851b",
        "#7fdbff", "#870c25")  # fmt: skip  # padding, end, then the colours as ARC's own site shows them
_COLOURS = {task: np.array([to_rgb(c) for c in colours]) for task, colours in (("maze", _MAZE.values()), ("arc", _ARC))}
_OUTLINES = {"maze": [("#d100d1", 0.12)], "arc": [("#000000", 0.24), ("#ffffff", 0.1)]}  # colour, share of a cell
_GAP, _TITLE, _LEGEND, _LEGEND_WIDTH = 0.16, 0.52, 0.5, 3.2  # inches


class Panel(NamedTuple):
    """One segment's answer and what to mark in it."""

    title: str
    question: NDArray[np.uint8]  # (rows, columns)
    answer: NDArray[np.uint8]  # (rows, columns)
    changed: NDArray[np.bool_]  # (rows, columns), since the segment before
    wrong: NDArray[np.bool_]  # (rows, columns)


def thought_picture(
    path: str | os.PathLike[str],
    task: str,
    side: tuple[int, int],
    question: NDArray[np.uint8],
    thoughts: NDArray[np.uint8],
    wrong: NDArray[np.bool_],
) -> None:
    """Draws what a model answers after each of M segments, with the cells that changed and those that are wrong.

    Args:
        path: .png: a panel for each segment; .gif: a frame for each.
        task: "sudoku", "maze" or "arc".
        side: rows and columns.
        question: (S,) ids of the puzzle.
        thoughts: (M, S) ids of the answers.
        wrong: (M, S), cells to show as wrong.

    Raises:
        UsageError: `path` has another ending.
    """
    path = Path(path)
    check_format(path)
    panels = _cropped(list(_panels(side, question, thoughts, wrong)))
    if path.suffix.lower() == ".png":
        _figure(task, panels, math.ceil(math.sqrt(len(panels))), 2.5).savefig(
            path, dpi=120, metadata={"Software": None}
        )
        return
    frames = [_image(_figure(task, [panel], 1, 4.2)) for panel in panels]
    pause = [700] * (len(frames) - 1) + [2500]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pause, loop=0)


def check_format(path: Path) -> None:
    """Raises a UsageError where `path` is no picture that can be written."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"picture is {str(path)!r}; it should end with {' or '.join(FORMATS)}")


def _panels(
    side: tuple[int, int], question: NDArray[np.uint8], thoughts: NDArray[np.uint8], wrong: NDArray[np.bool_]
) -> Iterator[Panel]:
    before = thoughts[0]  # nothing has changed in the first segment
    for number, (answer, mistakes) in enumerate(zip(thoughts, wrong, strict=True), 1):
        changed = answer != before
        title = f"segment {number} of {len(thoughts)}\n{mistakes.sum()} wrong"
        title += f", {changed.sum()} changed" if number > 1 else ""
        yield Panel(title, question.reshape(side), answer.reshape(side), changed.reshape(side), mistakes.reshape(side))
        before = answer


def _cropped(panels: list[Panel]) -> list[Panel]:
    """Without the padding that all answers have at the bottom and on the right."""
    used = np.any([panel.answer > 0 for panel in panels] + [panel.question > 0 for panel in panels], 0)
    rows, columns = (int(np.flatnonzero(used.any(axis)).max(initial=0)) + 1 for axis in (1, 0))
    part = np.s_[:rows, :columns]
    return [Panel(p.title, p.question[part], p.answer[part], p.changed[part], p.wrong[part]) for p in panels]


def _figure(task: str, panels: list[Panel], columns: int, inches: float) -> Figure:
    """The panels in rows, `inches` long on their longer side, and a legend below them."""
    rows, (height, width) = -(-len(panels) // columns), panels[0].answer.shape
    scale = inches / max(height, width)
    across, down = scale * width + _GAP, scale * height + _TITLE
    total = max(columns * across + _GAP, _LEGEND_WIDTH), rows * down + _LEGEND
    figure = Figure(figsize=total)
    left = (total[0] - columns * across + _GAP) / 2
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        corner = left + column * across, total[1] - (row + 1) * down
        axes = figure.add_axes((corner[0] / total[0], corner[1] / total[1], scale * width / total[0],
                                scale * height / total[1]))  # fmt: skip
        axes.set_axis_off()
        axes.set_title(panel.title, fontsize=9, linespacing=1.3)
        axes.set(xlim=(0, width), ylim=(height, 0))
        if task == "sudoku":
            _draw_board(axes, panel, 72 * scale)
        else:
            _draw_grid(axes, panel, task, 72 * scale)
    handles = _board_legend() if task == "sudoku" else _grid_legend(task)
    per_row = len(handles) if total[0] > 2 * _LEGEND_WIDTH else -(-len(handles) // 2)
    figure.legend(handles=handles, loc="lower center", ncols=per_row, fontsize=8, frameon=False, handlelength=1.2)
    return figure


def _draw_board(axes: Axes, panel: Panel, cell_points: float) -> None:
    """Digits on a board; cells of 72 points to the inch."""
    side = len(panel.answer)
    colours = np.ones((side, side, 3))
    colours[panel.wrong], colours[panel.changed] = to_rgb(_CLASH), to_rgb(_CHANGED)
    axes.imshow(colours, extent=(0, side, side, 0), interpolation="nearest")
    height, width = BOXES[side]
    for steps, linewidth, colour in (((1, 1), 0.5, _LINE), ((height, width), 1.4, _GIVEN)):
        lines = [[(0, y), (side, y)] for y in range(0, side + 1, steps[0])]
        lines += [[(x, 0), (x, side)] for x in range(0, side + 1, steps[1])]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=linewidth, clip_on=False))
    for (row, column), symbol in np.ndenumerate(panel.answer):
        given = panel.question[row, column] > 1
        colour = _WRONG if panel.wrong[row, column] else _GIVEN if given else _ANSWERED
        axes.text(
            column + 0.5, row + 0.53, SYMBOLS[symbol - 2] if symbol > 1 else "·", color=colour, ha="center",
            va="center", fontsize=0.6 * cell_points, fontweight="bold" if given else "normal",
        )  # fmt: skip


def _draw_grid(axes: Axes, panel: Panel, task: str, cell_points: float) -> None:
    """Coloured cells, with marks on those that changed or are wrong."""
    height, width = panel.answer.shape
    axes.imshow(_COLOURS[task][panel.answer], extent=(0, width, height, 0), interpolation="nearest")
    frame = [[(0, 0), (width, 0), (width, height), (0, height), (0, 0)]]
    axes.add_collection(LineCollection(frame, colors=_LINE, linewidths=0.8, clip_on=False))
    marks = [(panel.changed, "s", "none", colour, 0.8, linewidth) for colour, linewidth in _OUTLINES[task]]
    marks += [(panel.wrong, "o", _WRONG, "#ffffff", 0.5, 0.1)]
    for cells, marker, inner, outer, size, linewidth in marks:
        rows, columns = np.nonzero(cells)
        axes.scatter(
            columns + 0.5, rows + 0.5, (size * cell_points) ** 2, marker=marker, facecolors=inner, edgecolors=outer,
            linewidths=linewidth * cell_points,
        )  # fmt: skip


def _board_legend() -> list[Any]:
    return [
        _letter("1", _GIVEN, "given", "bold"),
        _letter("2", _ANSWERED, "answered", "normal"),
        Patch(facecolor=_CHANGED, edgecolor=_LINE, label="changed in this segment"),
        Patch(facecolor=_CLASH, edgecolor=_WRONG, label="wrong (red digit)"),
    ]


def _letter(text: str, colour: str, label: str, weight: str) -> Line2D:
    marker = rf"$\mathbf{{{text}}}$" if weight == "bold" else rf"$\mathrm{{{text}}}$"
    return Line2D([], [], linestyle="", marker=marker, color=colour, label=label, markersize=7)


def _grid_legend(task: str) -> list[Any]:
    kinds = ("start", "goal", "path") if task == "maze" else ()
    patches = [Patch(facecolor=_MAZE[kind], edgecolor=_LINE, label=kind) for kind in kinds]
    outline = _OUTLINES[task][0][0]
    changed = Line2D([], [], linestyle="", marker="s", markerfacecolor="none", markeredgecolor=outline)
    changed.set_label("changed in this segment")
    wrong = Line2D([], [], linestyle="", marker="o", markerfacecolor=_WRONG, markeredgecolor="#ffffff", label="wrong")
    return [*patches, changed, wrong]


def _image(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(120)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize()
