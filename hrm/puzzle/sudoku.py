"""Sudoku: reading and checking files, solving and rating, generating, and the symmetries of a board.

A board of side n has boxes of `BOXES[n]`; ids are 0 padding, 1 empty, 1 + d the digit d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrm.puzzle.data import PuzzleSet, TextRow
from hrm.settings import UsageError

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3), 16: (4, 4)}  # rows and columns of a box
SYMBOLS = "123456789ABCDEFG"  # the digits of a board as text; "." or "0" is an empty cell


class SudokuRows(NamedTuple):
    """What a text file holds."""

    puzzles: PuzzleSet
    ratings: NDArray[np.int64] | None  # (N,) guesses, where every row has a rating


class SudokuAugmenter:
    """The board's symmetries: digits renamed, bands and rows in them, stacks and columns in them permuted, transposed.

    Source: HRM (arXiv 2506.21734), section on data. Boards whose boxes are not square are not transposed.
    """

    def __init__(self, side: int) -> None:
        self._side, self._box = side, BOXES[side]

    def augment(
        self, inputs: NDArray[np.uint8], labels: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Every row of `inputs` and `labels` (B, side * side) seen through a symmetry of its own."""
        count, side = len(inputs), self._side
        cells = self._cells(count, rng)
        digits = np.empty((count, side + 2), np.uint8)
        digits[:, :2] = 0, 1  # padding and empty stay
        digits[:, 2:] = rng.random((count, side), np.float32).argsort(1) + 2
        digits = digits.reshape(-1)
        offset = np.arange(count, dtype=np.int32)[:, None]
        places, names = cells + offset * (side * side), offset * (side + 2)
        return digits[inputs.reshape(-1)[places] + names], digits[labels.reshape(-1)[places] + names]

    def _cells(self, count: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Where each cell of the new board comes from, (count, side * side)."""
        height, width = self._box
        rows = _lines(count, self._side, height, rng)[:, :, None]
        columns = _lines(count, self._side, width, rng)[:, None, :]
        if height == width:
            flip = (rng.random((count, 1, 1)) < 0.5).astype(np.int32)
            row_step, column_step = np.where(flip, 1, self._side), np.where(flip, self._side, 1)
        else:
            row_step, column_step = self._side, 1
        cells = rows * np.asarray(row_step, np.int32) + columns * np.asarray(column_step, np.int32)
        return cells.reshape(count, -1)


def _lines(count: int, side: int, block: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Permutations of `side` lines (count, side) that keep blocks of `block` lines together."""
    blocks = rng.random((count, side // block), np.float32).argsort(1)[:, :, None]
    inner = rng.random((count, side // block, block), np.float32).argsort(2)
    return (blocks * block + inner).reshape(count, side).astype(np.int32)


# ------------------------------------------------------------------------------------------------ text and checks


def from_rows(rows: Sequence[TextRow], *, check_unique: bool = True) -> SudokuRows:
    """The puzzles of a text file.

    Raises:
        UsageError: a puzzle that is not as it should be, or of another size than the first; with file and line number.
    """
    side = side_of(rows[0])
    questions = np.stack([_digits(row.question, "puzzle", side, row.source) for row in rows])
    answers = np.stack([_digits(row.answer or "", "answer", side, row.source) for row in rows])
    ratings = [row.rating for row in rows]
    known = np.asarray(ratings, np.int64) if None not in ratings else None
    return SudokuRows(as_puzzles(questions, answers), known)


def side_of(row: TextRow) -> int:
    """The side of a board of as many cells as the row's question has."""
    cells = len(row.question.strip())
    for side in BOXES:
        if side * side == cells:
            return side
    allowed = ", ".join(f"{side * side} ({side} x {side})" for side in BOXES)
    raise UsageError(f"{row.source}: the puzzle has {cells} characters; it should have one of {allowed}")


def as_puzzles(questions: NDArray[np.uint8], answers: NDArray[np.uint8]) -> PuzzleSet:
    """Boards of digits, (N, side * side) with 0 for empty, as a set; an answer of 0 everywhere is ignored."""
    count, cells = questions.shape
    side = int(cells**0.5)
    return PuzzleSet(
        task="sudoku",
        inputs=questions + np.uint8(1),
        labels=np.where(answers > 0, answers + 1, 0).astype(np.uint8),
        groups=np.arange(count, dtype=np.int32),
        puzzle_ids=np.zeros(count, np.int32),
        vocab_size=side + 2,
        side=(side, side),
    )


def _digits(text: str, what: str, side: int, source: str) -> NDArray[np.uint8]:
    text = text.strip()
    if len(text) != side * side:
        raise UsageError(f"{source}: the {what} has {len(text)} characters; it should have {side * side}")
    symbols = np.frombuffer(text.encode("latin-1", "replace"), np.uint8)
    digits = _TABLE[symbols]
    if digits.max() > side:
        place = int(np.argmax(digits > side))
        raise UsageError(
            f"{source}: the {what} has {text[place]!r} at character {place + 1}; "
            f"it should be {SYMBOLS[0]} to {SYMBOLS[side - 1]}, '.' or 0"
        )
    return digits


def _symbol_table() -> NDArray[np.uint8]:
    table = np.full(256, 255, np.uint8)
    table[[ord("."), ord("0")]] = 0
    for digit, symbol in enumerate(SYMBOLS, start=1):
        table[[ord(symbol), ord(symbol.lower())]] = digit
    return table


_TABLE = _symbol_table()
