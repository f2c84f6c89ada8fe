"""Mazes of 30 x 30 cells: reading and checking, generating, and the symmetries of the square.

The symbols "# SGo" (wall, free, start, goal, path) have the ids 1 to 5; 0 is padding. A label is its input with "o" on
the free cells of a shortest path from S to G, steps going up, down, left and right.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class MazeAugmenter:
    """The eight symmetries of the square; those that keep the shape alone where rows and columns differ in number.

    Source: HRM's published data set of mazes.
    """

    def __init__(self, side: tuple[int, int]) -> None:
        cells = np.arange(side[0] * side[1]).reshape(side)
        flips = [cells, cells[::-1], cells[:, ::-1], cells[::-1, ::-1]]
        turned = [flip.T for flip in flips] if side[0] == side[1] else []
        self.symmetries = np.stack([symmetry.reshape(-1) for symmetry in flips + turned])  # (8 or 4, S)

    def augment(
        self, inputs: NDArray[np.uint8], labels: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Every row of `inputs` and `labels` (B, S) seen through a symmetry of its own."""
        places = self.symmetries[rng.integers(len(self.symmetries), size=len(inputs))]
        return np.take_along_axis(inputs, places, 1), np.take_along_axis(labels, places, 1)
