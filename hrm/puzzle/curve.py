"""The learning curve of a run: loss and accuracy against seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def learning_curve(folder: Path, output: Path) -> None:
    """Draws metrics.jsonl and evaluations.jsonl of a run's `folder` (or a copy of them) as one PNG."""
    from matplotlib.figure import Figure

    steps, tests = (_lines(folder / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([line["seconds"] for line in steps], [line["cells"] for line in steps], color="tab:blue")
    left.set(xlabel="seconds from the start", ylabel="loss of the cells, all segments", ylim=(0, None))
    train = [line for line in steps if line["exact"] > 0]
    right.plot([line["seconds"] for line in train], [100 * line["exact"] for line in train], color="tab:gray",
               label="training puzzles, when they halt")  # fmt: skip
    for share, label, colour in ((-1, "unseen, all segments", "tab:blue"), (0, "unseen, first segment", "tab:orange")):
        values = [100 * line["by_segment"][share] for line in tests]
        right.plot([line["seconds"] for line in tests], values, "o-", color=colour, label=label)
    right.set(xlabel="seconds from the start", ylabel="puzzles with every cell right, %", ylim=(0, 100))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=110)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []
