"""What grows while a model trains: the depth of a segment, and the number of segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Stage:
    """One depth of the curriculum and the first step that has it."""

    first: int
    h_cycles: int
    l_steps: int


def stages(depth: Any, steps: int, h_cycles: int, l_steps: int) -> list[Stage]:
    """The stages of `depth`, [share of the steps, h_cycles, l_steps] each, and the full depth last."""
    ends = [0, *(round(share * steps) for share, _, _ in depth)]
    return [Stage(*stage) for stage in zip(ends, [s[1] for s in depth] + [h_cycles], [s[2] for s in depth] + [l_steps],
                                           strict=True)]  # fmt: skip


def set_depth(config: Any, full: Any, stages: Sequence[Stage], step: int) -> None:
    """Gives `config` the depth of the stage that `step` belongs to; gradient as far as `full` lets it, and through the
    whole cycle where it does."""
    stage = next(stage for stage in reversed(stages) if stage.first <= step)
    whole = full.grad_l_steps == full.l_steps
    config.h_cycles, config.l_steps = stage.h_cycles, stage.l_steps
    config.grad_cycles = min(full.grad_cycles, stage.h_cycles)
    config.grad_l_steps = stage.l_steps if whole else min(full.grad_l_steps, stage.l_steps)


def is_depth(stages: Any) -> bool:
    """Whether `stages` is [[share, h_cycles, l_steps], ...] with rising shares below 1."""
    if not all(isinstance(stage, Sequence) and len(stage) == 3 for stage in stages):
        return False
    shares, counts = [stage[0] for stage in stages], [count for stage in stages for count in stage[1:]]
    if not all(isinstance(share, float | int) and 0 < share < 1 for share in shares):
        return False
    return shares == sorted(shares) and all(type(count) is int and count >= 1 for count in counts)


class SegmentGrowth:
    """How many segments may run at a step: fixed, growing with the steps, or each time that the loss stands still.

    Args:
        most: segments at the end.
        growth: "none" (always `most`), "steps" (from 1 to `most` in equal parts of the first half of the steps), or
            "plateau" (from 1, one more whenever the mean loss of `window` steps is not below that of the `window`
            before it by the share `tolerance`).
        steps: of the whole training.
        window: steps that a mean is taken over.
        tolerance: share by which the loss has to fall to count as falling.
    """

    def __init__(self, most: int, growth: str, steps: int, window: int = 100, tolerance: float = 0.01) -> None:
        self._most, self._growth, self._steps = most, growth, steps
        self._window, self._tolerance = window, tolerance
        self._grown, self._losses, self._before = 1, [], None  # type: int, list[float], float | None

    def at(self, step: int) -> int:
        """Segments of step `step`, from 0."""
        if self._growth == "none":
            return self._most
        if self._growth == "plateau":
            return min(self._grown, self._most)
        return min(self._most, 1 + step * 2 * self._most // max(1, self._steps))

    def saw(self, loss: float) -> None:
        """Takes note of a step's loss."""
        if self._growth != "plateau" or self._grown >= self._most:
            return
        self._losses.append(loss)
        if len(self._losses) < self._window:
            return
        mean, self._losses = sum(self._losses) / len(self._losses), []
        if self._before is not None and mean > self._before * (1 - self._tolerance):
            self._grown, self._before = self._grown + 1, None  # a deeper model has its own loss to start from
        else:
            self._before = mean

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        return {"grown": self._grown, "losses": list(self._losses), "before": self._before}

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave."""
        self._grown, self._losses, self._before = state["grown"], list(state["losses"]), state["before"]
