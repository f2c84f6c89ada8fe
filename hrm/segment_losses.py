"""What a decoder with a core is trained on: each segment's cross entropy and, with ACT, the Q head's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hrm.config import HRMConfig
from hrm.core import Halting, Segment
from hrm.loss import IGNORED, QLoss, TokenLoss, masked_mean, reward, token_shares
from hrm.replay import Transitions

Score = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], TokenLoss]


class SegmentLosses:
    """The loss of a batch, a segment at a time: `plan` first, then each segment in turn; n tokens are scored.

    Each scored token's loss is its mean over the segments that it runs, and the batch's the mean over the tokens.

    Args:
        config: of the core.
        score: (z_H (n, d_h), h (n, d), targets (n,), W_out (d_h, d) or None for the core's) -> each token's loss.
        targets: (B, S) int64, the token that each position predicts, or `IGNORED`.
        documents: (B, S) int64 of packed rows, numbered in each; None: a row is one sequence.
        items: scored tokens that the mean is over; None: those of `targets`.
    """

    def __init__(
        self, config: HRMConfig, score: Score, targets: Tensor, documents: Tensor | None, items: Tensor | int | None
    ) -> None:
        self._config, self._score = config, score
        self._rows = (targets != IGNORED).flatten().nonzero().squeeze(1)
        self._wanted = self._pick(targets)
        self._items = max(len(self._rows), 1) if items is None else items
        if config.act and config.q_target == "replay":
            self._number_sequences(targets, documents)
        self._losses: list[Tensor] = []  # (n,) of each segment so far
        self._correct: list[Tensor] = []
        self._q_losses: list[Tensor] = []  # ()
        self._states: list[Tensor] = []  # (sequences, d_h), for the replay buffer

    def plan(self, ran: Sequence[Halting], ahead: Halting | None) -> None:
        """Hears who runs each segment; `ahead` is one more, which ran for its Q values alone."""
        config, weights = self._config, self._config.segment_weights
        if weights is not None and 1 < len(ran) > len(weights):
            raise ValueError(f"{len(ran)} segments ran; with hrm.segment_weights it should be at most {len(weights)}")
        seen = ran if ahead is None else [*ran, ahead]
        active = self._stacked("active", seen)
        self._active = active[: len(ran)]
        if weights is None or len(ran) == 1:  # one counts as all there is
            self._shares = token_shares(self._active)
        else:
            self._shares = token_shares(self._active, torch.tensor(weights[: len(ran)], device=self._rows.device))
        if not config.act:
            return
        self._q, self._last = self._stacked("q", seen).detach(), self._stacked("last", seen)
        self._q_loss = QLoss(
            self._q, active, self._last, len(ran),
            price=config.segment_price, go_on=config.q_target == "bootstrap",
        )  # fmt: skip

    def __call__(self, segment: Segment, h: Tensor, w_out: Tensor | None = None) -> Tensor:
        """() the next segment's part of the loss, read out of h (B, S, d).

        With `w_out`, by which whoever takes gradients segment by segment reads out, no graph is kept here.
        """
        index = len(self._losses)
        loss, correct = self._score(self._pick(segment.z_h), self._pick(h), self._wanted, w_out)
        self._losses.append(loss.detach())
        self._correct.append(correct)
        total = (loss * self._shares[index]).sum() / self._items
        if not self._config.act:
            return total
        if self._config.q_target == "replay":
            self._states.append(self._sequence_mean(self._pick(segment.z_h.detach())))
            return total
        assert segment.q is not None
        q_loss = self._q_loss.term(index, self._pick(segment.q), correct).sum() / self._items
        self._q_losses.append(q_loss if w_out is None else q_loss.detach())
        return total + self._config.q_loss_weight * q_loss

    # ------------------------------------------------------------------------------------------------ what is told

    @property
    def share(self) -> Tensor | float:
        """Of the batch's scored tokens, those of these rows."""
        return len(self._rows) / self._items

    def means(self) -> Tensor:
        """(M,) float32, each segment's mean cross entropy over the tokens that ran it."""
        pairs = zip(self._losses, self._active, strict=True)
        return torch.stack([masked_mean(loss, active) for loss, active in pairs])

    def tokens(self) -> Tensor:
        """(M,) int64, scored tokens that ran each segment."""
        return self._active.sum(1)

    def mean_q(self) -> Tensor:
        """(2,) float32, mean q_halt and q_continue over the scored tokens and the segments that they ran."""
        return torch.stack([masked_mean(q, self._active) for q in self._q[: len(self._active)].unbind(-1)])

    def accuracy(self) -> Tensor:
        """() float32, share of predictions that are right."""
        return masked_mean(torch.stack(self._correct).float(), self._active)

    def q_loss(self) -> Tensor | None:
        """() float32, the Q head's part of the loss before it is weighted; None where it learns from replay."""
        return torch.stack(self._q_losses).sum() if self._q_losses else None

    @torch.no_grad()
    def transitions(self, dtype: torch.dtype) -> Transitions:
        """What each sequence (a row, or a document of a packed one) did after each segment; states in `dtype`."""

        def each(values: Sequence[Tensor]) -> Tensor:  # (M, sequences)
            return torch.stack([self._sequence_mean(part) for part in values])

        active, last = each(list(self._active)) > 0.5, each(list(self._last[: len(self._active)])) > 0.5
        earned = [reward(share, index, self._config.segment_price) for index, share in enumerate(each(self._correct))]
        state = torch.stack(self._states).to(dtype)
        went_on = torch.cat((active[1:], torch.zeros_like(active[:1])))
        following = torch.cat((state[1:], state[-1:])), torch.cat((last[1:], last[-1:]))
        valid = active & (self._counts > 0)
        parts = state, torch.stack(earned), went_on, following[0], following[1], valid
        return Transitions(*(part.flatten(0, 1) for part in parts))

    # ------------------------------------------------------------------------------------------------ helpers

    def _number_sequences(self, targets: Tensor, documents: Tensor | None) -> None:
        """Notes which sequence each scored token is of (n,), and how many there are in each (sequences,)."""
        rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
        most = 1 if documents is None else int(documents.max()) + 1
        self._sequence = self._pick(rows if documents is None else rows * most + documents)
        counts = torch.zeros(len(targets) * most, device=targets.device)
        self._counts = counts.index_add_(0, self._sequence, torch.ones_like(self._sequence).float())

    def _pick(self, values: Tensor) -> Tensor:
        """(B, S, ...) -> (n, ...)."""
        return values.flatten(0, 1)[self._rows]

    def _stacked(self, name: str, segments: Sequence[Halting]) -> Tensor:
        """A field at the scored positions: (M, n, ...)."""
        return torch.stack([self._pick(getattr(segment, name)) for segment in segments])

    def _sequence_mean(self, values: Tensor) -> Tensor:
        """(n, ...) -> (sequences, ...) float32, the mean over each sequence's scored tokens."""
        total = values.new_zeros(len(self._counts), *values.shape[1:], dtype=torch.float32)
        total.index_add_(0, self._sequence, values.float())
        return total / self._counts.clamp_min(1).view(-1, *(1,) * (values.dim() - 1))
