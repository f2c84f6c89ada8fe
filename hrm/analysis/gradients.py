"""How well the cheap gradients agree with full backpropagation through a segment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrm.analysis.probe import check_count, overridden, probe, run, untouched
from hrm.config import HRMConfig
from hrm.data import Batch
from hrm.modeling import HRMGemmaForCausalLM

Reach = tuple[int, int]  # grad_l_steps, grad_cycles
Gradients = Mapping[nn.Parameter, Tensor]


class Agreement(NamedTuple):
    """How near a gradient g is to the full one, f; both None where f is 0."""

    cosine: float | None  # of the angle between g and f; 0 where g alone is 0
    relative_error: float | None  # ||g - f|| / ||f||


# ---------------------------------------------------------------------------------------------------- truncation


def default_reaches(config: HRMConfig) -> list[Reach]:
    """1/1, 2/1, 4/1, ... of the last cycle's L steps, then whole cycles: T/1, T/2, ..., T/N."""
    steps = [2**power for power in range(config.l_steps.bit_length()) if 2**power < config.l_steps]
    return [(step, 1) for step in steps] + [(config.l_steps, cycle + 1) for cycle in range(config.h_cycles)]


def compare_gradients(
    model: HRMGemmaForCausalLM, batch: Batch, *, settings: Sequence[Reach] | None = None
) -> dict[str, dict[str, Agreement]]:
    """Gradient of the loss under each setting of `grad_l_steps`/`grad_cycles` against that of T/N.

    All settings see the same forward pass, with the same random draws. The model is left as it was: parameters,
    their `.grad`, config, mode and random generators.

    Source: arXiv 2506.21734, section 2, "Approximate gradient" (1/1); arXiv 2510.04871 (T/1).

    Args:
        batch: on any device.
        settings: (grad_l_steps, grad_cycles) each; None: `default_reaches`.

    Returns:
        "1/1" and so on -> group -> agreement. Groups: each trainable parameter of the core by its name, the parts of
        `trainable_parameters` that are not empty, and "all". T/N is a second run: what it errs by is noise.

    Raises:
        ValueError: a setting beyond T or N, or a batch that does not fit.
    """
    config = model.hrm.config
    reaches = default_reaches(config) if settings is None else settings
    for reach in reaches:
        _check_reach(reach, config)
    groups = parameter_groups(model)
    full = _gradients(model, batch, (config.l_steps, config.h_cycles), groups["all"])
    return {
        f"{steps}/{cycles}": _agreements(_gradients(model, batch, (steps, cycles), groups["all"]), full, groups)
        for steps, cycles in reaches
    }


def parameter_groups(model: HRMGemmaForCausalLM) -> dict[str, list[nn.Parameter]]:
    """What `compare_gradients` tells apart; a parameter is in its own group, in its part's and in "all"."""
    own = {name: [parameter] for name, parameter in model.hrm.named_parameters() if parameter.requires_grad}
    parts = {part: parameters for part, parameters in model.trainable_parameters().items() if parameters}
    return {**own, **parts, "all": [parameter for parameters in parts.values() for parameter in parameters]}


def _gradients(model: HRMGemmaForCausalLM, batch: Batch, reach: Reach, parameters: Sequence[nn.Parameter]) -> Gradients:
    with untouched(model), overridden(model.hrm.config, grad_l_steps=reach[0], grad_cycles=reach[1]):
        return dict(zip(parameters, vjp([run(model, batch)], parameters), strict=True))


def _check_reach(reach: Reach, config: HRMConfig) -> None:
    for name, value, limit in zip(
        ("grad_l_steps", "grad_cycles"), reach, (config.l_steps, config.h_cycles), strict=True
    ):
        check_count(name, value)
        if value > limit:
            raise ValueError(f"settings: {name} is {value}; it should be from 1 to {limit}")


# ---------------------------------------------------------------------------------------------------- Neumann series


def neumann_gradients(model: HRMGemmaForCausalLM, batch: Batch, *, terms: int = 8) -> list[dict[str, Agreement]]:
    """The implicit gradient at the states reached, from 1 to `terms` terms of its Neumann series, against T/N.

    F is one whole cycle as a map of z = (z_L, z_H), J = dF/dz and dF/dp its derivatives at the end of each segment, and
    v the gradient of the loss there. With k terms a parameter p of the recurrence gets

        (dF/dp)^T v_k,    v_k = sum_{i < k} (J^T)^i v    ->    (1 - J^T)^-1 v where J's spectral radius is below 1

    which is the gradient of an infinitely deep segment if the states are at their fixed point. One term is T/1 but
    for how far the next cycle still moves the states. Only products with J^T are taken; what the loss sees of a
    parameter without the recurrence (w_out, the Q head) is added as it is. The model is left as it was.

    Source: arXiv 2506.21734, section 2, "Approximate gradient"; deep equilibrium models, arXiv 1909.01377.

    Returns:
        For each k from 1: group -> agreement, the groups being "core" and the core's parameters by name.

    Raises:
        ValueError: `terms` is no whole number above 0, or a batch that does not fit.
    """
    check_count("terms", terms)
    config, groups = model.hrm.config, parameter_groups(model)
    core = groups["core"]
    names = [name for name, _ in model.hrm.named_parameters() if name in groups]
    groups = {name: groups[name] for name in ["core", *names]}
    full = _gradients(model, batch, (config.l_steps, config.h_cycles), core)
    rows = []
    with untouched(model):
        loss, segments = probe(model, batch)
        ends = [state for segment in segments for state in segment.end]
        found = vjp([loss], [*ends, *core])
        cotangents, total = found[: len(ends)], found[len(ends) :]
        after = [state for segment in segments for state in segment.cycle(*segment.end)]
        for _ in range(terms):
            found = vjp(after, [*ends, *core], cotangents)
            cotangents = found[: len(ends)]
            total = [sum_ + part for sum_, part in zip(total, found[len(ends) :], strict=True)]
            rows.append(_agreements(dict(zip(core, total, strict=True)), full, groups))
    return rows


# ---------------------------------------------------------------------------------------------------- helpers


def vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """J^T `cotangents` (None: 1 each) for J = d outputs / d inputs; 0 where nothing depends on an input.

    Keeps the graph, and leaves every `.grad` alone.
    """
    found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if part is None else part for x, part in zip(inputs, found, strict=True)]


def _agreements(
    gradients: Gradients, full: Gradients, groups: Mapping[str, Iterable[nn.Parameter]]
) -> dict[str, Agreement]:
    return {
        name: agreement([gradients[p] for p in parameters], [full[p] for p in parameters])
        for name, parameters in groups.items()
    }


def agreement(gradient: Sequence[Tensor], full: Sequence[Tensor]) -> Agreement:
    """Of two lists of tensors of the same shapes, each taken as one long vector; sums are in float64."""
    dot = own = norm = error = 0.0
    for g, f in zip(gradient, full, strict=True):
        g, f = g.double(), f.double()
        dot += float((g * f).sum())
        own += float(g.square().sum())
        norm += float(f.square().sum())
        error += float((g - f).square().sum())
    if norm == 0:
        return Agreement(None, None)
    return Agreement(dot / math.sqrt(own * norm) if own else 0.0, math.sqrt(error / norm))
