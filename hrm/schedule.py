"""The schedule of the two states and the rules of halting, shared by every model (docs/equations.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Cycle = Callable[[int, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def run_cycles(cycle: Cycle, z_l: Tensor, z_h: Tensor, *, cycles: range, graph_from: int) -> tuple[Tensor, Tensor]:
    """A segment, or some `cycles` of it: `cycle(index, z_l, z_h, differentiate) -> (z_l, z_h)` for each.

    Only those from `graph_from` on build a graph, and none where gradients are off; the others save nothing.

    Source: arXiv 2506.21734, section 2, "Approximate gradient"; arXiv 2510.04871 for whole cycles.
    """
    for index in cycles:
        differentiate = torch.is_grad_enabled() and index >= graph_from
        with torch.set_grad_enabled(differentiate):
            z_l, z_h = cycle(index, z_l, z_h, differentiate)
    return z_l, z_h


def run_steps(step: Callable[[Tensor], Tensor], z_l: Tensor, *, steps: int, grad_steps: int) -> Tensor:
    """`steps` L steps, of which the last `grad_steps` build a graph where gradients are on."""
    for index in range(steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= steps - grad_steps):
            z_l = step(z_l)
    return z_l


def least_segments(draw: Tensor, choice: Tensor, max_segments: int, exploration: float) -> Tensor:
    """How many segments each row must run before it may halt: 0, or with probability `exploration` 2..max_segments.

    Args:
        draw, choice: (B,) uniform in [0, 1): whether a row explores, and how far.

    Returns:
        (B,) int32.
    """
    far = 2 + (choice * (max_segments - 1)).to(torch.int32).clamp_max(max_segments - 2)
    return torch.where(draw < exploration, far, 0).to(torch.int32)


def continue_target(next_halt: Tensor, next_continue: Tensor, last: Tensor) -> Tensor:
    """What going on is worth, read off the next segment: its better choice, where the last segment can only halt.

    Source: arXiv 2506.21734, section 2, "Adaptive computation time". All arguments and the result (...,), float32;
    `last` bool.
    """
    return torch.where(last, next_halt, torch.maximum(next_halt, next_continue)).sigmoid()
