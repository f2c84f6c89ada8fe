"""Looking into a model without leaving a trace: the segments of a forward pass, replayed as maps of their states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hrm.attention import Mixing
from hrm.config import HRMConfig
from hrm.core import HRMCore, Weights
from hrm.data import Batch
from hrm.modeling import HRMGemmaForCausalLM

States = tuple[Tensor, Tensor]  # z_L (n, d_l), z_H (n, d_h) of n = B * S tokens


@dataclass(frozen=True)
class ProbedSegment:
    """One segment that a forward pass ran, and its core's maps at that input, which can be run again.

    The maps differentiate through all that they do: with respect to the states, the core's parameters and, through
    `context`, the backbone's adapters.
    """

    core: HRMCore
    context: Tensor  # (n, 2 d_l), with graph
    weights: Weights
    mixing: Mixing | None
    start: States  # what it started from
    end: States  # where it arrived: leaves that want a gradient, in which the graph of the loss ends

    def cycle(self, z_l: Tensor, z_h: Tensor) -> States:
        """One whole cycle: T L steps and one H step."""
        steps = self.core.config.l_steps
        return self._run(z_l, z_h, l_steps=steps, grad_l_steps=steps)

    def step(self, z_l: Tensor, z_h: Tensor) -> States:
        """One L step, and what an H step makes of it; z_L is not reset in front."""
        return self._run(z_l, z_h, l_steps=1, grad_l_steps=1, l_reset="carry")

    def _run(self, z_l: Tensor, z_h: Tensor, **schedule: int | str) -> States:
        # a token that halted in evaluation, too, is taken to go on
        mixing = None if self.mixing is None else replace(self.mixing, active=None)
        with (
            overridden(self.core.config, h_cycles=1, grad_cycles=1, **schedule),
            torch.autocast(z_l.device.type, enabled=False),
        ):
            return self.core.segment(self.context, z_l, z_h, self.weights, mixing)


@contextmanager
def overridden(config: HRMConfig, **values: int | str) -> Iterator[None]:
    """Sets fields of `config` while entered."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def untouched(model: HRMGemmaForCausalLM) -> Iterator[None]:
    """While entered, gradients are on, and what is drawn or put into the replay buffer is forgotten at the end.

    So forward passes that each stand in their own `with` draw the same: dropout, halting and replay do not tell them
    apart.
    """
    replay = model.replay
    try:
        model.replay = copy.deepcopy(replay)
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        model.replay = replay


def run(model: HRMGemmaForCausalLM, batch: Batch) -> Tensor:
    """The loss, with graph, in the mode that the model is in.

    Raises:
        ValueError: `batch` does not fit the model or is padding alone; the message names what should be otherwise.
    """
    if not batch.attention_mask.any():
        raise ValueError("attention_mask is 0 everywhere; it should be nonzero for at least one token")
    return model(**{name: tensor.to(model.device) for name, tensor in batch._asdict().items()}).loss


def probe(model: HRMGemmaForCausalLM, batch: Batch) -> tuple[Tensor, list[ProbedSegment]]:
    """The loss and the segments that it is made of, to be called within `untouched`.

    The loss' graph ends in the segments' `end`: the core's parameters in the recurrence are reached through the maps.
    """
    core, probed = model.hrm, []
    segment = core.segment

    def tap(context: Tensor, z_l: Tensor, z_h: Tensor, weights: Weights, mixing: Mixing | None) -> States:
        reached = segment(context, z_l, z_h, weights, mixing)
        if not torch.is_grad_enabled():  # a look ahead, which the loss has no gradient of
            return reached
        end = reached[0].detach().requires_grad_(), reached[1].detach().requires_grad_()
        here = None if mixing is None else replace(mixing)  # the core drops rows from its own as they halt
        probed.append(ProbedSegment(core, context, weights, here, (z_l, z_h), end))
        return end

    try:
        core.segment = tap  # type: ignore[method-assign,assignment]
        model._one_by_one = lambda *_: False  # type: ignore[method-assign]  # else no graph reaches the segments' ends
        return run(model, batch), probed
    finally:
        del core.segment, model._one_by_one  # the class' own again


def check_count(name: str, value: object) -> None:
    """Raises a ValueError where `value` is no whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it should be a whole number, at least 1")
