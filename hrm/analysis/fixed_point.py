"""Whether the states settle: how fast they change, and how strongly the recurrence pulls neighbours together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm.analysis.gradients import vjp
from hrm.analysis.probe import check_count, probe, untouched
from hrm.data import Batch
from hrm.modeling import HRMGemmaForCausalLM


@dataclass(frozen=True)
class SpectralRadius:
    """An estimate of the largest |eigenvalue| of a map's Jacobian."""

    radius: float
    growth: list[float]  # ||J^T u|| / ||u|| of each iteration; `radius` is the last half's geometric mean

    @property
    def iterations(self) -> int:
        """Products with J^T that were taken."""
        return len(self.growth)


@dataclass(frozen=True)
class ResidualCurve:
    """Relative changes ||z' - z|| / ||z||, each the mean over the real tokens."""

    z_l: list[list[float]]  # of each L step, cycle by cycle
    z_h: list[float]  # of each cycle


# ---------------------------------------------------------------------------------------------------- spectral radius


def spectral_radius(
    model: HRMGemmaForCausalLM, batch: Batch, *, iterations: int = 100, seed: int = 0
) -> dict[str, SpectralRadius]:
    """Largest |eigenvalue| of J = dz'/dz where the last segment ends, by power iteration with J^T (same spectrum).

    Below 1 the map pulls nearby states together, and the Neumann series of `neumann_gradients` converges.

    The estimate is the geometric mean of the vector's growth over the last half of the iterations. Under a complex pair
    the vector turns for ever, and a single growth swings around the radius; over m iterations the swing adds up to a
    factor that does not depend on m, so the mean's error falls as 1/m, as it does where eigenvalues of other tokens
    or heads are nearly as large. `growth` shows the swing. Rows and columns of padding are left out of J.

    Args:
        iterations: products with J^T for each map.
        seed: of the first vector, drawn from a generator of its own. The model is left as it was.

    Returns:
        "cycle": one whole cycle as a map of (z_L, z_H); "l_step": one L step as a map of z_L, z_H being fixed.

    Raises:
        ValueError: `iterations` is no whole number above 0, or a batch that does not fit.
    """
    check_count("iterations", iterations)
    with untouched(model):
        last = probe(model, batch)[1][-1]
        real = _real(batch, last.end[0])[:, None]
        maps = {"cycle": (last.cycle(*last.end), last.end), "l_step": (last.step(*last.end)[:1], last.end[:1])}
        return {name: _power_iteration(*ends, real, iterations, seed) for name, ends in maps.items()}


def _power_iteration(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], real: Tensor, iterations: int, seed: int
) -> SpectralRadius:
    generator = torch.Generator().manual_seed(seed)
    # no real token depends on padding, so that what is 0 there stays so
    vectors = [torch.randn(x.shape, generator=generator).to(x) * real for x in inputs]
    growth: list[float] = []
    size = _norm(vectors)
    while len(growth) < iterations and size != 0:  # 0: the map forgets what it starts from
        vectors = vjp(outputs, inputs, [vector / size for vector in vectors])
        size = _norm(vectors)
        growth.append(size)
    settled = growth[len(growth) // 2 :]
    radius = math.exp(sum(map(math.log, settled)) / len(settled)) if size != 0 else 0.0
    return SpectralRadius(radius, growth)


def _norm(vectors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(vector.double().square().sum()) for vector in vectors))


# ---------------------------------------------------------------------------------------------------- residuals


def residual_curve(model: HRMGemmaForCausalLM, batch: Batch, *, timesteps: int, cycles: int) -> ResidualCurve:
    """How much the states still change as one segment goes on from its initial states, as far as asked.

    Source: the residuals of arXiv 2506.21734, section 2, "Hierarchical convergence". With `l_reset` "init" a cycle's
    first change is that from the initial z_L. The model is left as it was.

    Args:
        timesteps: L steps in a cycle, in place of T.
        cycles: in place of N.

    Raises:
        ValueError: `timesteps` or `cycles` is no whole number above 0, or a batch that does not fit.
    """
    check_count("timesteps", timesteps)
    check_count("cycles", cycles)
    core, curve = model.hrm, ResidualCurve([], [])
    with untouched(model):
        segment = probe(model, batch)[1][0]
    z_l, z_h = segment.start
    real = _real(batch, z_l)
    with torch.no_grad():
        for _ in range(cycles):
            if core.config.l_reset == "init":
                z_l = core.z_l_init.to(z_l).expand_as(z_l)
            changes, after = [], z_h
            for _ in range(timesteps):
                old = z_l
                z_l, after = segment.step(z_l, z_h)  # only the last step's z_H is kept
                changes.append(_change(old, z_l, real))
            curve.z_l.append(changes)
            curve.z_h.append(_change(z_h, after, real))
            z_h = after
    return curve


def iterations_to_converge(curve: Sequence[float], threshold: float) -> int | None:
    """How many iterations it takes until one changes a state by less than `threshold`; None if none does."""
    return next((index for index, change in enumerate(curve, start=1) if change < threshold), None)


def _change(old: Tensor, new: Tensor, real: Tensor) -> float:
    """Mean of ||new - old|| / ||old|| over the tokens of `real` (n,) bool."""
    old, new = old[real].double(), new[real].double()
    return float(((new - old).norm(dim=-1) / old.norm(dim=-1)).mean())


def _real(batch: Batch, like: Tensor) -> Tensor:
    """(n,) bool, the tokens that are no padding, on the device of `like`."""
    return batch.attention_mask.flatten().bool().to(like.device)
