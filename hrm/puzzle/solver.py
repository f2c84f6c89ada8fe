"""Solving many sudokus at once: constraint propagation and guesses over arrays of boards.

A board is (side, side) uint16, bit d of a cell set where digit d + 1 is still possible there. Digits that only one
cell of a row, column or box can take, and cells with one digit left, are settled without guessing; a guess splits a
cell with the fewest digits left into one digit and the others. All boards advance together, so that numpy does the
work: 10,000 puzzles of Sudoku-Extreme's difficulty take seconds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3), 16: (4, 4)}  # rows and columns of a box, by the board's side
_AXES = ((2, 3), (0, 1), (1, 3))  # row, column and box as axes of (bands, rows, stacks, columns, K)
_AT_ONCE = 256, 4096  # boards: fewer cost as much time, more do not fit the processor's cache

Boards = NDArray[np.uint16]  # (side, side, K): boards last, so that each step is one pass over memory


class Solved(NamedTuple):
    """What the search found for each puzzle."""

    solution: NDArray[np.uint8]  # (N, side * side) digits; 0 where there is none
    solutions: NDArray[np.int64]  # (N,) how many were found, at most as many as were asked for
    guesses: NDArray[np.int64]  # (N,) cells split until then


def solve(
    questions: NDArray[np.uint8],
    *,
    limit: int = 2,
    without: NDArray[np.uint8] | None = None,
    rng: np.random.Generator | None = None,
) -> Solved:
    """Searches for up to `limit` solutions of every puzzle.

    Args:
        questions: digits (N, side * side), 0 for an empty cell.
        limit: solutions after which the search for a puzzle ends; 2 tells whether the first is the only one, and then
            `guesses` is the puzzle's rating.
        without: digits (N, side * side) that a cell shall not have; 0 for none.
        rng: draws the digit that is tried first; None: the lowest.
    """
    count, cells = questions.shape
    found = Solved(np.zeros((count, cells), np.uint8), np.zeros(count, np.int64), np.zeros(count, np.int64))
    pool = [(_candidates(questions, without), np.arange(count))]
    at_once = min(max(count, _AT_ONCE[0]), _AT_ONCE[1])
    while pool:
        boards, owners = _take(pool, at_once)
        boards, owners = _kept(boards, owners, found.solutions[owners] < limit)
        alive = _propagate(boards)
        boards, owners = _kept(boards, owners, alive)
        open_cells: NDArray[np.bool_] = _anywhere(_SIZE[boards] > 1)
        _record(found, boards, owners, ~open_cells)
        boards, owners = _kept(boards, owners, open_cells)
        if len(owners):
            np.add.at(found.guesses, owners, 1)
            pool.append(_split(boards, owners, rng))
    np.minimum(found.solutions, limit, out=found.solutions)
    return found


def repeats(digits: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which boards (N,) have a digit twice in a row, a column or a box; `digits` (N, side * side), 0 for empty."""
    side = int(digits.shape[1] ** 0.5)
    height, width = BOXES[side]
    bits = np.array([0, *(1 << digit for digit in range(side))], np.uint16)[digits]
    cells = bits.T.reshape(side // height, height, side // width, width, -1)
    return np.any([_anywhere(_occurrences(cells, axes)[1]) for axes in _AXES], 0)


def _candidates(questions: NDArray[np.uint8], without: NDArray[np.uint8] | None) -> Boards:
    side = int(questions.shape[1] ** 0.5)
    bit = np.array([(1 << side) - 1, *(1 << digit for digit in range(side))], np.uint16)
    boards = bit[questions]
    if without is not None:
        boards &= ~np.where(without > 0, bit[without], np.uint16(0))
    return np.ascontiguousarray(boards.T).reshape(side, side, -1)


def _take(pool: list[tuple[Boards, NDArray[np.int64]]], at_once: int) -> tuple[Boards, NDArray[np.int64]]:
    """The newest boards of the pool: depth first, so that it stays small."""
    boards, owners = pool.pop()
    while pool and len(owners) < at_once:
        older, theirs = pool.pop()
        boards, owners = np.concatenate([older, boards], 2), np.concatenate([theirs, owners])
    if len(owners) > at_once:
        pool.append((boards[:, :, :-at_once], owners[:-at_once]))
        boards, owners = boards[:, :, -at_once:], owners[-at_once:]
    return boards, owners


def _kept(boards: Boards, owners: NDArray[np.int64], keep: NDArray[np.bool_]) -> tuple[Boards, NDArray[np.int64]]:
    return boards[:, :, keep], owners[keep]


def _record(found: Solved, boards: Boards, owners: NDArray[np.int64], done: NDArray[np.bool_]) -> None:
    solved, theirs = _kept(boards, owners, done)
    found.solution[theirs] = np.log2(solved).astype(np.uint8).reshape(found.solution.shape[1], -1).T + 1
    np.add.at(found.solutions, theirs, 1)


def _split(
    boards: Boards, owners: NDArray[np.int64], rng: np.random.Generator | None
) -> tuple[Boards, NDArray[np.int64]]:
    """Two boards for each: one digit of one open cell, put last so that it is taken up first, and the others."""
    side, _, count = boards.shape
    flat = boards.reshape(side * side, count)
    cell = _cell_to_split(boards).reshape(side * side, count).argmax(0)
    every = np.arange(count)
    digits = flat[cell, every]
    if rng is None:
        first = digits & -digits
    else:
        bits = (1 << np.arange(side, dtype=np.uint16)).astype(np.uint16)[:, None]
        first = bits[np.where(digits & bits, rng.random((side, count)), -1).argmax(0), 0]
    others = flat.copy()
    others[cell, every] = digits & ~first
    flat[cell, every] = first
    return np.concatenate([others, flat], 1).reshape(side, side, -1), np.concatenate([owners, owners])


def _cell_to_split(boards: Boards) -> NDArray[np.int16]:
    """Highest where a cell has fewest digits and, among these, most cells of two digits in its units."""
    side, _, count = boards.shape
    height, width = BOXES[side]
    size = _SIZE[boards]
    pairs = (size == 2).astype(np.int16).reshape(side // height, height, side // width, width, count)
    near = sum(pairs.sum(axes, dtype=np.int16, keepdims=True) for axes in _AXES)
    near = np.broadcast_to(near, pairs.shape).reshape(boards.shape)
    return np.where(size > 1, near - size.astype(np.int16) * np.int16(4 * side), np.int16(-(1 << 14)))


def _propagate(boards: Boards) -> NDArray[np.bool_]:
    """Settles in place what follows without a guess; which boards (K,) are free of contradictions so far."""
    alive = np.ones(boards.shape[2], bool)
    active = np.arange(len(alive))
    while len(active):
        before = boards[:, :, active]
        after, sound = _step(before)
        boards[:, :, active] = after
        alive[active] = sound
        active = active[sound & _anywhere(after != before)]
    return alive


def _step(boards: Boards) -> tuple[Boards, NDArray[np.bool_]]:
    """One round of elimination, and which boards show no contradiction."""
    side, _, count = boards.shape
    height, width = BOXES[side]
    cells = boards.reshape(side // height, height, side // width, width, count)
    settled = np.where(cells & (cells - np.uint16(1)), np.uint16(0), cells)
    taken = _confined(cells, 3, 1, 2) | _confined(cells, 1, 3, 0)
    wrong = np.zeros(count, bool)
    for axes in _AXES:
        once, twice = _occurrences(settled, axes)
        taken = taken | once
        wrong |= _anywhere(twice)
    cells = np.where(settled, cells, cells & ~taken)
    only = np.zeros_like(cells)
    for axes in _AXES:
        once, twice = _occurrences(cells, axes)
        only |= once & ~twice
        wrong |= _anywhere(once != np.uint16((1 << side) - 1))
    only &= cells
    cells = np.where(only, only, cells)
    wrong |= _anywhere((cells == 0) | (only & (only - np.uint16(1)) != 0))
    return cells.reshape(boards.shape), ~wrong


def _confined(cells: Boards, along: int, other_lines: int, other_boxes: int) -> Boards:
    """Digits that a line's cells in one box cannot have, because its other boxes or the box's other lines need them.

    A digit that a box has in one line only is that line's; one that a line has in one box only is that box's.
    """
    segments, _ = _occurrences(cells, (along,))
    excluded = np.zeros_like(segments)
    for within, across in ((other_lines, other_boxes), (other_boxes, other_lines)):
        once, twice = _occurrences(segments, (within,))
        needed = segments & once & ~twice
        excluded |= np.bitwise_or.reduce(needed, axis=across, keepdims=True) & ~needed
    return excluded


def _anywhere(true: NDArray) -> NDArray[np.bool_]:
    """For which boards (K,), the last axis, anything is true."""
    return np.logical_or.reduce(true.reshape(math.prod(true.shape[:-1]), -1), axis=0)


def _occurrences(cells: Boards, axes: tuple[int, ...]) -> tuple[Boards, Boards]:
    """The bits that occur in a unit at least once and at least twice, with length 1 along the unit's `axes`."""
    lines = np.moveaxis(cells, axes, tuple(range(len(axes))))
    once, twice = np.zeros_like(lines[(0,) * len(axes)]), np.zeros_like(lines[(0,) * len(axes)])
    for place in np.ndindex(lines.shape[: len(axes)]):
        cell = lines[place]
        twice |= once & cell
        once |= cell
    return np.expand_dims(once, axes), np.expand_dims(twice, axes)


_SIZE = np.array([bin(mask).count("1") for mask in range(1 << 16)], np.uint8)
