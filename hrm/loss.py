"""Cross entropy of a language model's head that never holds the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
