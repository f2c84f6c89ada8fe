"""What a puzzle model is trained on: a cross entropy over the cells and the Q head's two targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.loss import IGNORED
from hrm.puzzle.config import PuzzleConfig
from hrm.puzzle.model import PuzzleOutput


class PuzzleLoss(NamedTuple):
    """Sums over the batch, float32; divide by the batch size for means."""

    loss: Tensor  # () with graph: cells + q_loss_weight * (halt + go_on)
    cells: Tensor  # () each row's mean over its cells, summed over rows
    halt: Tensor  # ()
    go_on: Tensor  # () zero without a target
    correct: Tensor  # (B,) bool, every cell right
    share: Tensor  # (B,) float32, share of cells that are right


def puzzle_loss(output: PuzzleOutput, labels: Tensor, config: PuzzleConfig) -> PuzzleLoss:
    """The published training loss of one segment (sums, as published).

    Args:
        output: of `PuzzleModel.forward`.
        labels: (B, S) int, -100 where a cell is not scored.
        config: `loss` and `q_loss_weight`.
    """
    scored = labels != IGNORED
    count = scored.sum(-1)
    entropy = stablemax_cross_entropy if config.loss == "stablemax" else softmax_cross_entropy
    cells = (entropy(output.logits, labels) / count.clamp_min(1)[:, None]).sum()
    with torch.no_grad():
        right = ((output.logits.argmax(-1) == labels) & scored).sum(-1)
        correct, share = right == count, right / count.clamp_min(1)
    bce = F.binary_cross_entropy_with_logits
    halt = bce(output.q_halt, correct.float(), reduction="sum")
    go_on = torch.zeros_like(halt)
    if output.q_target is not None:
        go_on = bce(output.q_continue, output.q_target, reduction="sum")
    loss = cells + config.q_loss_weight * (halt + go_on)
    return PuzzleLoss(loss, cells.detach(), halt.detach(), go_on.detach(), correct, share)


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(s(x_label) / sum s(x)) with s(x) = x + 1 for x >= 0, else 1 / (1 - x); 0 at labels of -100.

    Source: arXiv 2501.04697. In float32 (float64 logits stay float64) with log1p, which gives the logarithm of s to
    full precision, so nothing needs float64.

    Args:
        logits: (..., V) floating point.
        labels: (...,) int, -100 where a position is not scored.

    Returns:
        (...,) float32.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    positive, negative = x.clamp_min(0), x.clamp_max(0)  # where() alone would send NaN back from the branch not taken
    log_s = torch.where(x < 0, -torch.log1p(-negative), torch.log1p(positive))
    total = torch.where(x < 0, 1 / (1 - negative), 1 + positive).sum(-1).log()
    return _at(total[..., None] - log_s, labels)


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in float32; shapes as in `stablemax_cross_entropy`."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    return _at(-x.log_softmax(-1), labels)


def _at(values: Tensor, labels: Tensor) -> Tensor:
    scored = labels != IGNORED
    chosen = values.gather(-1, torch.where(scored, labels, 0).long()[..., None])[..., 0]
    return torch.where(scored, chosen, 0.0)
