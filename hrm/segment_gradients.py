"""Gradients of each segment's loss, taken as soon as it has run, so that one segment's activations exist at a time.

What the segments share (the backbone's output, the core's weights) is detached while they run; the gradients of their
losses add up, and go on from there once, in the backward pass of the summed loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class SegmentGradients:
    """Adds up losses, and their gradients with respect to `leaves`.

    Args:
        shared: tensors that several losses depend on, with what graph they have.
    """

    def __init__(self, shared: Sequence[Tensor]) -> None:
        self._shared = list(shared)
        self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in shared]
        self._gradients: list[Tensor | None] = [None] * len(self.leaves)
        self._loss: Tensor | None = None

    def take(self, loss: Tensor) -> None:
        """Adds `loss` (), computed from `leaves`; its graph is gone afterwards."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if not loss.requires_grad:  # nothing trains
            return
        wanted = [index for index, leaf in enumerate(self.leaves) if leaf.requires_grad]
        found = torch.autograd.grad(loss, [self.leaves[index] for index in wanted], allow_unused=True)
        for index, new in zip(wanted, found, strict=True):
            old = self._gradients[index]
            self._gradients[index] = old if new is None else new if old is None else old + new

    def loss(self) -> Tensor:
        """() the sum of all losses, whose backward pass hands on what was taken."""
        assert self._loss is not None
        pairs = [(t, g) for t, g in zip(self._shared, self._gradients, strict=True) if g is not None]
        return _Taken.apply(self._loss, *(part for side in zip(*pairs, strict=True) for part in side))


class _Taken(torch.autograd.Function):
    """A loss whose gradients are known already: (loss, tensors..., their gradients...) -> loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *both: Tensor) -> Tensor:
        ctx.gradients = both[len(both) // 2 :]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [gradient * grad_loss.to(gradient.dtype) for gradient in ctx.gradients]
        return None, *scaled, *(None for _ in scaled)
