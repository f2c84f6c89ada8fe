"""What the model is trained on: next-token cross entropy that never holds all logits, and the Q head's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hrm.schedule import continue_target

IGNORED = -100  # label of a position that is not scored
CHUNK_BYTES = 256 * 2**20  # float32 logits held at a time


Head = Callable[[Tensor], Tensor]


class TokenLoss(NamedTuple):
    """What `linear_cross_entropy` returns."""

    loss: Tensor  # (n,) float32, with graph
    correct: Tensor  # (n,) bool, whether the largest logit is the target's


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    vocabulary: int,
    *,
    frozen: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenLoss:
    """Cross entropy of each token, a chunk of tokens at a time, so that only one chunk's logits exist at once.

    Differentiable with respect to `hidden` and, unless `frozen`, to the parameters of `head`. A frozen head costs two
    products a token: the gradient of a token's loss needs its own logits alone, so it is taken while they are there.
    Any other costs a third, for the backward pass computes the logits again.

    Args:
        hidden: (n, d) outputs whose next token is scored.
        targets: (n,) int64, from 0 to vocabulary - 1.
        head: maps (m, d) to logits (m, vocabulary), soft cap included.
        vocabulary: size of the head's output, which the chunk is sized by.
        frozen: no parameter of `head` wants a gradient.
        chunk_bytes: the most bytes that one chunk's float32 logits may take.

    Raises:
        ValueError: `targets` are not as many as `hidden`.
    """
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"targets.shape is {tuple(targets.shape)}; it should be ({hidden.shape[0]},), one a token")
    rows = max(1, chunk_bytes // (4 * vocabulary))
    if frozen:
        return TokenLoss(*_FrozenHeadLoss.apply(hidden, targets, head, rows))
    parts = [
        checkpoint(_score, *part, head, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    losses, correct = zip(*parts, strict=True)
    return TokenLoss(torch.cat(losses), torch.cat(correct))


def _score(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


class _FrozenHeadLoss(torch.autograd.Function):
    """Takes the gradient of each token's loss in the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int) -> tuple[Tensor, Tensor]:
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        correct = torch.empty(targets.shape, dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kind = hidden.device.type
        # autocast's cache would keep every chunk's inputs, which are leaves here, and their copy until autocast ends
        uncached = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(gradient is not None), uncached:
                inputs = hidden[part].detach().requires_grad_(gradient is not None)
                loss, correct[part] = _score(inputs, targets[part], head)
            losses[part] = loss.detach()
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(loss, inputs, torch.ones_like(loss))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None]).to(gradient.dtype), None, None, None


class QLoss:
    """Binary cross entropy of the Q head, a segment at a time: halt where the prediction is right, go on where the next
    segment is worth it.

    Source: arXiv 2506.21734, section 2, "Adaptive computation time", per scored token. What going on is worth is read
    off the next segment's values, and is no part of the graph. M segments ran; K = M, or M + 1 where one more was run
    for its values alone.

    Args:
        values: (K, n, 2) q_halt and q_continue after each segment.
        active: (K, n) bool, whether the token's row ran the segment.
        last: (K, n) bool, whether the row may run no further segment.
        ran: M.
        price: taken off the reward of halting for each segment after the first.
        go_on: whether q_continue learns at all.
    """

    def __init__(
        self, values: Tensor, active: Tensor, last: Tensor, ran: int, *, price: float = 0.0, go_on: bool = True
    ) -> None:
        self._price = price
        self._halt = token_shares(active[:ran])
        self._go_on = token_shares(active[1:]) if go_on else active[:0]
        following = values.detach()[1:]
        self._worth = continue_target(following[..., 0], following[..., 1], last[1:])

    def term(self, index: int, q: Tensor, correct: Tensor) -> Tensor:
        """(n,) float32, what segment `index` adds to each token's loss.

        The token's loss is the mean of the first term over the segments that it ran, and of the second over those after
        which a next one ran.

        Args:
            q: (n, 2) the segment's own of `values`, with graph.
            correct: (n,) bool, whether the segment's prediction is right.
        """
        bce = F.binary_cross_entropy_with_logits
        loss = self._halt[index] * bce(q[:, 0], reward(correct, index, self._price), reduction="none")
        if index >= len(self._go_on):
            return loss
        return loss + self._go_on[index] * bce(q[:, 1], self._worth[index], reduction="none")


def q_loss(
    values: Tensor, correct: Tensor, active: Tensor, last: Tensor, *, price: float = 0.0, go_on: bool = True
) -> Tensor:
    """All terms of `QLoss` at once: `values` with graph, correct (M, n) bool -> (n,) float32."""
    loss = QLoss(values, active, last, len(correct), price=price, go_on=go_on)
    return torch.stack([loss.term(index, values[index], right) for index, right in enumerate(correct)]).sum(0)


def reward(correct: Tensor, index: int, price: float) -> Tensor:
    """What halting after segment `index` earns: (...,) bool or share that is right -> float32, from 0 to 1."""
    return (correct.float() - price * index).clamp(0, 1)


def token_shares(where: Tensor, weights: Tensor | None = None) -> Tensor:
    """What each segment counts in each token's mean over the segments of `where`: (M, n) bool, weights (M,) -> (M, n)
    float32, whose sum over the segments is 1, or 0 where there is none.

    A mean of its own for each token, so that a batch's loss does not depend on which rows stand beside each other.
    """
    share = where.float() if weights is None else where * weights[:, None]
    total = share.sum(0)
    return share / torch.where(total > 0, total, 1)


def token_mean(values: Tensor, where: Tensor, weights: Tensor | None = None) -> Tensor:
    """Each token's mean over the segments of `where`: (M, n) float32, the rest as of `token_shares` -> (n,)."""
    return (values * token_shares(where, weights)).sum(0)


def masked_mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` where `where` (bool, same shape) is True; 0, with graph, where it nowhere is."""
    return (values * where).sum() / where.sum().clamp_min(1)


def next_token_targets(labels: Tensor, attention_mask: Tensor | None, documents: Tensor | None = None) -> Tensor:
    """(B, S) labels -> the one that each position predicts, int64; -100 at the last and where either end is padding.

    documents: (B, S) int, which of a row's packed documents a token belongs to; no token predicts the next one's first.
    """
    targets = torch.full_like(labels, IGNORED, dtype=torch.int64)
    targets[:, :-1] = labels[:, 1:]
    if attention_mask is not None:
        real = attention_mask[:, -labels.shape[1] :].bool()
        targets[:, :-1].masked_fill_(~(real[:, 1:] & real[:, :-1]), IGNORED)
    if documents is not None:
        targets[:, :-1].masked_fill_(documents[:, 1:] != documents[:, :-1], IGNORED)
    return targets
