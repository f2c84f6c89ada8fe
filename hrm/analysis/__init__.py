"""Gradient and fixed point of a trained core, measured: what the recurrence's approximations cost."""

from hrm.analysis.fixed_point import (
    ResidualCurve,
    SpectralRadius,
    iterations_to_converge,
    residual_curve,
    spectral_radius,
)
from hrm.analysis.gradients import Agreement, compare_gradients, neumann_gradients
from hrm.analysis.report import Analysis, analyse

__all__ = [
    "Agreement",
    "Analysis",
    "ResidualCurve",
    "SpectralRadius",
    "analyse",
    "compare_gradients",
    "iterations_to_converge",
    "neumann_gradients",
    "residual_curve",
    "spectral_radius",
]
