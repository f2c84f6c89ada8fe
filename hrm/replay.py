"""A ring of past segments that the Q head learns from (arXiv 2506.21734, section 2; experience replay of 1312.5602)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.loss import masked_mean
from hrm.schedule import continue_target

SAMPLE = 256  # transitions that one step learns from


class Transitions(NamedTuple):
    """n segments that sequences ran; nothing in it carries a graph."""

    state: Tensor  # (n, d_h), mean of z_H over the sequence's scored tokens after the segment
    reward: Tensor  # (n,) float32, what halting there earns
    went_on: Tensor  # (n,) bool, the action: whether the next segment ran
    next_state: Tensor  # (n, d_h), after the next segment; anything where none ran
    next_last: Tensor  # (n,) bool, whether the next segment is one that can only halt
    valid: Tensor  # (n,) bool, whether the sequence ran the segment at all


class ReplayBuffer:
    """The newest `size` transitions, on the device that they come from.

    Args:
        size: transitions kept; memory is that of two states each and never grows after the first `add`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.added = 0  # transitions so far, overwritten ones too
        self._kept: Transitions | None = None

    def add(self, new: Transitions) -> None:
        """Writes over the oldest; of more than `size` the last ones stay.

        Those that are not finite, whose step is skipped, are kept as not valid: a NaN would be drawn again and again.
        """
        new = _without_bad(new)
        if self._kept is None:
            self._kept = Transitions(*(part.new_zeros(self.size, *part.shape[1:]) for part in new))
        count = len(new.reward)
        kept = min(count, self.size)
        places = (torch.arange(kept, device=new.reward.device) + self.added + count - kept) % self.size
        for store, part in zip(self._kept, new, strict=True):
            store[places] = part[count - kept :].to(store.dtype)
        self.added += count

    def sample(self, count: int) -> Transitions:
        """`count` of those kept, drawn with replacement from torch's generator of the device."""
        assert self._kept is not None
        filled = min(self.added, self.size)
        places = torch.randint(filled, (count,), device=self._kept.reward.device)
        return Transitions(*(part[places] for part in self._kept))

    def loss(self, w_q: Tensor, b_q: Tensor) -> Tensor:
        """() float32, of `SAMPLE` transitions; the gradient goes into the head (d_h, 2), (2,) alone.

        q_halt learns the reward, q_continue the better of the next segment's two values.
        """
        drawn, bce = self.sample(SAMPLE), F.binary_cross_entropy_with_logits
        q = drawn.state.float() @ w_q.float() + b_q.float()
        with torch.no_grad():
            following = drawn.next_state.float() @ w_q.float() + b_q.float()
            worth = continue_target(following[:, 0], following[:, 1], drawn.next_last)
        halt = masked_mean(bce(q[:, 0], drawn.reward, reduction="none"), drawn.valid)
        return halt + masked_mean(bce(q[:, 1], worth, reduction="none"), drawn.valid & drawn.went_on)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: `added` (int64) and, once there are any, the transitions' tensors."""
        parts = {} if self._kept is None else self._kept._asdict()
        return {"added": torch.tensor(self.added), **parts}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Puts back what `state` gave.

        Raises:
            ValueError: it is of a buffer of another size.
        """
        self.added = int(state["added"])
        self._kept = None
        if "reward" not in state:
            return
        if len(state["reward"]) != self.size:
            raise ValueError(f"the replay buffer holds {len(state['reward'])} transitions; it should hold {self.size}")
        self._kept = Transitions(*(state[name].to(device, copy=True) for name in Transitions._fields))


def _without_bad(new: Transitions) -> Transitions:
    """`new` with what is not finite at 0 and marked as not valid."""
    finite = torch.stack([part.isfinite().all(1) for part in (new.state, new.next_state)]).all(0)
    state, next_state, reward = (
        torch.nan_to_num(part, nan=0.0, posinf=0.0, neginf=0.0) for part in (new.state, new.next_state, new.reward)
    )
    return new._replace(state=state, next_state=next_state, reward=reward, valid=new.valid & finite)
