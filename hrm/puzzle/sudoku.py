"""Sudoku: reading and checking files, solving and rating, generating, and the symmetries of a board.

A board of side n has boxes of `solver.BOXES[n]`; ids are 0 padding, 1 empty, 1 + d the digit d.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrm.puzzle.data import PuzzleSet, TextRow, sound_first
from hrm.puzzle.solver import BOXES, repeats, solve
from hrm.settings import UsageError

GENERATED = {4: (4, 8), 6: (8, 14), 9: (0, 0)}  # sides that are generated: fewest clues left, drawn from these bounds
SYMBOLS = "123456789ABCDEFG"  # the digits of a board as text; "." or "0" is an empty cell


class Rated(NamedTuple):
    """Puzzles and how hard each is."""

    puzzles: PuzzleSet
    ratings: NDArray[np.int64] | None  # (N,) guesses that a solver needs; None: not known


class SudokuAugmenter:
    """The board's symmetries: digits renamed, bands and rows in them, stacks and columns in them permuted, transposed.

    Source: HRM (arXiv 2506.21734), section on data. Boards whose boxes are not square are not transposed.

    Args:
        side: rows of a board.
        easier: share of the boards that also get some of their empty cells filled in, each such board up to half of
            them; mixing in easier puzzles is from arXiv 2601.10679.
    """

    def __init__(self, side: int, easier: float = 0.0) -> None:
        self._side, self._box, self._easier = side, BOXES[side], easier

    def augment(
        self, inputs: NDArray[np.uint8], labels: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Every row of `inputs` and `labels` (B, side * side) seen through a symmetry of its own."""
        count, side = len(inputs), self._side
        cells = self.cells(count, rng)
        renamed = np.empty((count, side + 2), np.uint8)
        renamed[:, :2] = 0, 1  # padding and empty stay
        renamed[:, 2:] = rng.random((count, side), np.float32).argsort(1) + 2
        digits = renamed.reshape(-1)
        offset = np.arange(count, dtype=np.int32)[:, None]
        places, names = cells + offset * (side * side), offset * (side + 2)
        inputs, labels = (digits[board.reshape(-1)[places] + names] for board in (inputs, labels))
        if self._easier:
            share = 0.5 * rng.random((count, 1)) * (rng.random((count, 1)) < self._easier)
            inputs = np.where((inputs == 1) & (rng.random(inputs.shape) < share), labels, inputs)
        return inputs, labels

    def cells(self, count: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Where each cell of the new board comes from, (count, side * side)."""
        height, width = self._box
        rows = _lines(count, self._side, height, rng)[:, :, None]
        columns = _lines(count, self._side, width, rng)[:, None, :]
        flip = (rng.random((count, 1, 1)) < 0.5) & (height == width)
        cells = np.where(flip, rows + columns * self._side, rows * self._side + columns)
        return cells.reshape(count, self._side**2)


def count_symmetries(side: int) -> int:
    """How many symmetries a board has, that which changes nothing among them."""
    height, width = BOXES[side]
    rows, columns = (math.factorial(side // block) * math.factorial(block) ** (side // block) for block in BOXES[side])
    return math.factorial(side) * rows * columns * (2 if height == width else 1)


def _lines(count: int, side: int, block: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Permutations of `side` lines (count, side) that keep blocks of `block` lines together."""
    blocks = rng.random((count, side // block), np.float32).argsort(1)[:, :, None]
    inner = rng.random((count, side // block, block), np.float32).argsort(2)
    return (blocks * block + inner).reshape(count, side).astype(np.int32)


# ------------------------------------------------------------------------------------------------ text and checks


def from_rows(rows: Sequence[TextRow], *, check_unique: bool = True) -> tuple[Rated, list[str]]:
    """The sound puzzles of a text file and, for each other row, where it stands and why it is refused.

    A row without answer gets the one that is found; one without rating, the guesses made on the way. The search takes
    about 3 ms for a puzzle of Sudoku-Extreme's difficulty, and a tenth of that where no guess is needed.

    Args:
        rows: boards of one size.
        check_unique: whether a puzzle that has an answer is searched for another one.
    """
    side = _side_of(rows)
    flaws: dict[int, str] = {}
    questions, answers = np.zeros((2, len(rows), side * side), np.uint8)
    for index, row in enumerate(rows):
        if row.flaw is not None:
            flaws[index] = row.flaw
            continue
        try:
            questions[index] = _digits(row.question, "puzzle", side)
            if row.answer is not None:
                answers[index] = _digits(row.answer, "answer", side)
        except ValueError as error:
            flaws[index] = str(error)
    given = np.array([row.answer is not None for row in rows])
    guesses = _check(questions, answers, given, flaws, check_unique)
    refused = [f"{rows[index].source}: {flaws[index]}" for index in sorted(flaws)]
    sound = _without(flaws, len(rows))
    ratings = np.array([guesses[i] if rows[i].rating is None else rows[i].rating for i in sound], np.int64)
    known = len(sound) > 0 and ratings.min() >= 0
    return Rated(as_puzzles(questions[sound], answers[sound]), ratings if known else None), refused


def from_set(puzzles: PuzzleSet, path: str | os.PathLike[str], *, check_unique: bool = True) -> tuple[Rated, list[str]]:
    """The sound puzzles of a .npz file; the rest as in `from_rows`.

    Raises:
        UsageError: its vocabulary is not that of its boards; the message names the file.
    """
    side = puzzles.side[0]
    if puzzles.vocab_size != side + 2:
        raise UsageError(f"{path}: vocab_size is {puzzles.vocab_size}; it should be {side + 2} for {side} x {side}")
    padded = np.flatnonzero((puzzles.inputs == 0).any(1)).tolist()
    flaws = dict.fromkeys(padded, "the puzzle has padding; it should have none")
    questions, answers = (np.maximum(ids, 1) - np.uint8(1) for ids in (puzzles.inputs, puzzles.labels))
    given = np.asarray(puzzles.labels.any(1))
    guesses = _check(questions, answers, given, flaws, check_unique)
    sound = _without(flaws, len(puzzles))
    known = len(sound) > 0 and guesses[sound].min() >= 0
    checked = replace(puzzles, labels=answers + np.uint8(1)).subset(sound)
    return Rated(checked, guesses[sound] if known else None), [f"{path}: row {i}: {flaws[i]}" for i in sorted(flaws)]


def _without(flaws: Mapping[int, str], count: int) -> NDArray[np.int64]:
    return np.array([index for index in range(count) if index not in flaws], np.int64)


def _check(
    questions: NDArray[np.uint8],
    answers: NDArray[np.uint8],
    given: NDArray[np.bool_],
    flaws: dict[int, str],
    check_unique: bool,
) -> NDArray[np.int64]:
    """Adds to `flaws`, puts missing answers in, and returns the guesses (N,) made for each puzzle, -1 for none made."""
    twice = "a digit twice in a row, column or box"
    for wrong, why in (
        (repeats(questions), f"the puzzle has {twice}"),
        (given & (answers == 0).any(1), "the answer has empty cells; it should have none"),
        (given & ((questions > 0) & (questions != answers)).any(1), "the answer changes a digit of the puzzle"),
        (given & repeats(answers), f"the answer has {twice}"),
    ):
        for index in np.flatnonzero(wrong).tolist():
            flaws.setdefault(index, why)
    guesses = np.full(len(questions), -1)
    search = np.array([i for i in range(len(given)) if i not in flaws and (check_unique or not given[i])], np.int64)
    found = solve(questions[search])
    guesses[search], answers[search] = found.guesses, found.solution
    for index, count in zip(search.tolist(), found.solutions.tolist(), strict=True):
        if count != 1:
            flaws[index] = f"the puzzle has {'several solutions' if count else 'no solution'}; it should have one"
    return guesses


def _side_of(rows: Sequence[TextRow]) -> int:
    """The side of the first board that has a size at all."""
    for row in sound_first(rows):
        side = math.isqrt(len(row.question.strip()))
        if side in BOXES and side * side == len(row.question.strip()):
            return side
    allowed = ", ".join(f"{side * side} ({side} x {side})" for side in BOXES)
    length = len(rows[0].question.strip())
    raise UsageError(f"{rows[0].source}: the puzzle has {length} characters; it should have one of {allowed}")


def as_puzzles(questions: NDArray[np.uint8], answers: NDArray[np.uint8]) -> PuzzleSet:
    """Boards of digits (N, side * side), 0 for empty, and their solutions as a set."""
    count, cells = questions.shape
    side = math.isqrt(cells)
    return PuzzleSet(
        task="sudoku",
        inputs=questions + np.uint8(1),
        labels=answers + np.uint8(1),
        groups=np.arange(count, dtype=np.int32),
        puzzle_ids=np.zeros(count, np.int32),
        vocab_size=side + 2,
        side=(side, side),
    )


def _digits(text: str, what: str, side: int) -> NDArray[np.uint8]:
    """The digits of a board; raises a ValueError that says what is wrong."""
    text = text.strip()
    if len(text) != side * side:
        raise ValueError(f"the {what} has {len(text)} characters; it should have {side * side}")
    digits = _TABLE[np.frombuffer(text.encode("latin-1", "replace"), np.uint8)]
    if digits.max() > side:
        place = int(np.argmax(digits > side))
        allowed = f"1 to {SYMBOLS[side - 1]}, '.' or 0"
        raise ValueError(f"the {what} has {text[place]!r} at character {place + 1}; it should be {allowed}")
    return digits


def _symbol_table() -> NDArray[np.uint8]:
    table = np.full(256, 255, np.uint8)
    table[[ord("."), ord("0")]] = 0
    for digit, symbol in enumerate(SYMBOLS, start=1):
        table[[ord(symbol), ord(symbol.lower())]] = digit
    return table


_TABLE = _symbol_table()


# ------------------------------------------------------------------------------------------------ generating


def generate(side: int, size: int, held_out: int, seed: int, min_rating: int = 0) -> tuple[Rated, Rated]:
    """`size` different puzzles, and `held_out` more of which none is a symmetric copy of any other or of the former.

    Full boards are drawn by solving the empty one with random guesses; then cells are emptied in random order as long
    as the solution stays the only one, down to a number of clues drawn from `GENERATED` (9 x 9: as far as it goes).

    Args:
        side: 4, 6 or 9.
        size: puzzles to train on.
        held_out: puzzles to evaluate on.
        seed: the same numbers give the same puzzles.
        min_rating: fewest guesses (see `solver.solve`) of a puzzle.

    Raises:
        UsageError: a side that is not generated; or too few such puzzles were found.
    """
    if side not in GENERATED:
        raise UsageError(f"side is {side}; it should be one of {', '.join(map(str, GENERATED))}")
    if size + held_out > _ROUNDS * _DRAWN:
        raise UsageError(f"size is {size} and held_out {held_out}; they should be at most {_ROUNDS * _DRAWN} together")
    rng = np.random.default_rng(seed)
    kept: list[tuple[NDArray[np.uint8], NDArray[np.uint8], int]] = []  # the held-out ones first
    copies: set[bytes] = set()
    seen: set[bytes] = set()
    for _ in range(_ROUNDS):
        for question, answer, rating in _draw(side, min(max(size + held_out - len(kept), 64), _DRAWN), rng):
            shape = signature(question)
            if len(kept) == size + held_out or rating < min_rating or shape in copies or question.tobytes() in seen:
                continue
            if len(kept) < held_out:
                copies.add(shape)
            seen.add(question.tobytes())
            kept.append((question, answer, rating))
        if len(kept) == size + held_out:
            return _rated(kept[held_out:], side), _rated(kept[:held_out], side)
    raise UsageError(
        f"size is {size} and held_out {held_out}; {len(kept)} different puzzles of side {side} with at least "
        f"min_rating = {min_rating} guesses were found. Ask for fewer or easier ones."
    )


_ROUNDS = 40  # of drawing as many puzzles as are missing, but
_DRAWN = 1024  # at most


def _draw(
    side: int, count: int, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], int]]:
    answers = solve(np.zeros((count, side * side), np.uint8), limit=1, rng=rng).solution
    questions = _emptied(answers, rng)
    yield from zip(questions, answers, solve(questions).guesses.tolist(), strict=True)


def _emptied(answers: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Full boards (N, side * side) with cells emptied while they keep one solution."""
    count, cells = answers.shape
    low, high = GENERATED[math.isqrt(cells)]
    fewest = rng.integers(low, high, size=count, endpoint=True)
    questions, every = answers.copy(), np.arange(count)
    for cell in rng.random((count, cells)).argsort(1).T:
        boards = every[(questions > 0).sum(1) > fewest]
        cell = cell[boards]
        trial, without = questions[boards], np.zeros((len(boards), cells), np.uint8)
        row = np.arange(len(boards))
        trial[row, cell], without[row, cell] = 0, answers[boards, cell]
        still_one = solve(trial, limit=1, without=without).solutions == 0  # no solution has another digit there
        questions[boards[still_one], cell[still_one]] = 0
    return questions


def signature(question: NDArray[np.uint8]) -> bytes:
    """The same for every symmetric copy of a board (side * side,); of others almost never.

    Each cell is told by how many clues its row, band, column, stack, box and digit have.
    """
    side = math.isqrt(len(question))
    height, width = BOXES[side]
    clues = (question > 0).reshape(side // height, height, side // width, width).astype(np.int64)
    over = [clues.sum(axes, keepdims=True) for axes in ((2, 3), (1, 2, 3), (0, 1), (0, 1, 3), (1, 3))]
    row, band, column, stack, box = (np.broadcast_to(part, clues.shape).reshape(-1) for part in over)
    across, down = row * 512 + band, column * 512 + stack  # at most 256 clues
    if height == width:  # transposing swaps them
        across, down = np.minimum(across, down), np.maximum(across, down)
    digit = np.where(question > 0, np.bincount(question, minlength=side + 1)[question], 0)
    return np.sort(((across << 20 | down) << 9 | box) << 9 | digit).tobytes()


def _rated(rows: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8], int]], side: int) -> Rated:
    boards = np.array([row[:2] for row in rows], np.uint8).reshape(len(rows), 2, side * side)
    return Rated(as_puzzles(boards[:, 0], boards[:, 1]), np.array([row[2] for row in rows], np.int64))
