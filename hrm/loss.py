"""What the model is trained on: next-token cross entropy that never holds all logits, and the Q head's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # label of a position that is not scored
CHUNK_BYTES = 256 * 2**20  # float32 logits held at a time


class TokenLoss(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss: Tensor  # (n,) float32, with graph
    correct: Tensor  # (n,) bool, whether the largest logit is the target's


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenLoss:
    """Cross entropy of each token, a chunk of tokens at a time; the backward pass computes each chunk's logits again.

    Differentiable with respect to `hidden` and to the parameters of `head`.

    Args:
        hidden: (n, d) outputs whose next token is scored.
        targets: (n,) int64, from 0 to vocabulary - 1.
        head: maps (m, d) to logits (m, vocabulary), soft cap included.
        vocabulary: size of the head's output, which the chunk is sized by.
        chunk_bytes: the most bytes that one chunk's float32 logits may take.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"targets.shape is {tuple(targets.shape)}; it should be ({hidden.shape[0]},), one a token")
    rows = max(1, chunk_bytes // (4 * vocabulary))

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    parts = [
        checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    losses, correct = zip(*parts, strict=True)
    return TokenLoss(torch.cat(losses), torch.cat(correct))


def q_loss(values: Tensor, correct: Tensor, active: Tensor, last: Tensor) -> Tensor:
    """Binary cross entropy of the Q head: halt where the prediction is right, go on where the next segment is worth it.

    Source: arXiv 2506.21734, section 2, "Adaptive computation time", per scored token. The gradient goes through the
    Q values into the core. What going on is worth is read off the next segment of the same call, so q_continue learns
    only where a row runs at least two.

    Args:
        values: (M, n, 2) q_halt and q_continue of each segment.
        correct: (M, n) bool, whether the segment's prediction is right.
        active: (M, n) bool, whether the token's row ran the segment.
        last: (M, n) bool, whether the row may run no further segment.

    Returns:
        () float32: the mean of both terms over the segments and tokens that have a target.
    """
    bce = F.binary_cross_entropy_with_logits
    halt = bce(values[..., 0], correct.float(), reduction="none")
    with torch.no_grad():  # the better choice in the next segment, where the last can only halt
        worth = torch.where(last[1:], values[1:, :, 0], values[1:].amax(-1)).sigmoid()
    go_on = bce(values[:-1, :, 1], worth, reduction="none")
    return masked_mean(halt, active) + masked_mean(go_on, active[1:])


def masked_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` where `where` (bool, same shape) is True; 0, with graph, where it nowhere is."""
    return (values * where).sum() / where.sum().clamp_min(1)


def next_token_targets(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, S) labels -> the label that each position predicts; -100 at the last one and where either end is padding."""
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    if attention_mask is not None:
        real = attention_mask[:, -labels.shape[1] :].bool()
        targets[:, :-1].masked_fill_(~(real[:, 1:] & real[:, :-1]), IGNORED)
    return targets
