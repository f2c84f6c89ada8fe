"""The papers' own models on their own puzzles: HRM (arXiv 2506.21734) and TRM (arXiv 2510.04871)."""

from hrm.puzzle.config import PuzzleConfig
from hrm.puzzle.loss import puzzle_loss, softmax_cross_entropy, stablemax_cross_entropy
from hrm.puzzle.model import PuzzleCarry, PuzzleModel, PuzzleOutput
from hrm.puzzle.published import load_published

__all__ = [
    "PuzzleCarry",
    "PuzzleConfig",
    "PuzzleModel",
    "PuzzleOutput",
    "load_published",
    "puzzle_loss",
    "softmax_cross_entropy",
    "stablemax_cross_entropy",
]
