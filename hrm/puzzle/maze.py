"""Mazes: reading and checking, generating, and the symmetries of the square.

The symbols "# SGo" (wall, free, start, goal, path) have the ids 1 to 5; 0 is padding. A label is its input with "o" on
the free cells of a shortest way from S to G, steps going up, down, left and right. Published mazes (HRM's
maze-30x30-hard) have 30 x 30 cells and many ways that are shortest; their labels show the one that takes, from S on,
the first of down, left, right and up, a rule that a symmetric copy does not keep. The mazes generated here have one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hrm.puzzle.data import PuzzleSet, TextRow, sound_first
from hrm.room import check_room
from hrm.settings import UsageError

SYMBOLS = "# SGo"
WALL, FREE, START, GOAL, PATH = range(1, 6)
_KNOWN_MAZES = 2**16  # labels kept, 2 kB each
_ROUNDS = 400  # of drawing _DRAWN mazes, before generating gives up
_DRAWN = 512
_WALLS = 0.33, 0.41  # share of walls that is drawn from; the closing of other ways adds a few


class MazeAugmenter:
    """The eight symmetries of the square; the four that keep the shape where rows and columns differ in number.

    Published labels follow one rule among the shortest ways (`shortest_ways`), which turning a maze breaks: what was
    the first way by that rule is another one then, and no model could know which. So turned mazes are labelled anew.

    Source: HRM's published data set of mazes.

    Args:
        side: rows and columns.
        relabel: whether labels follow the rule, as `follows_rule` says.
    """

    def __init__(self, side: tuple[int, int], relabel: bool) -> None:
        self.side, self.relabel = side, relabel
        self._known: dict[bytes, NDArray[np.uint8]] = {}  # turned maze -> its label

    def augment(
        self, inputs: NDArray[np.uint8], labels: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Every row of `inputs` and `labels` (B, S) seen through a symmetry of its own."""
        every = symmetries(self.side)
        places = every[rng.integers(len(every), size=len(inputs))]
        inputs = np.take_along_axis(inputs, places, 1)
        return inputs, self._labels(inputs) if self.relabel else np.take_along_axis(labels, places, 1)

    def _labels(self, inputs: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Labels (B, S), each searched for once: a maze has eight copies, and a training run sees them for ever."""
        keys = [maze.tobytes() for maze in inputs]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        if len(self._known) + len(new) > _KNOWN_MAZES:
            self._known = {}
            new = {key: row for row, key in enumerate(keys)}
        found = shortest_ways(inputs[list(new.values())], self.side)[0] if new else ()
        self._known.update(zip(new, found, strict=True))
        return np.stack([self._known[key] for key in keys])


def follows_rule(puzzles: PuzzleSet) -> bool:
    """Whether the labels of the first mazes are those of `shortest_ways`, as the published ones are."""
    inputs, labels = puzzles.inputs[:64], puzzles.labels[:64]
    return np.array_equal(shortest_ways(inputs, puzzles.side)[0], labels)


@lru_cache(maxsize=4)
def symmetries(side: tuple[int, int]) -> NDArray[np.int64]:
    """Where each cell comes from, (8 or 4, S)."""
    cells = np.arange(side[0] * side[1]).reshape(side)
    flips = [cells, cells[::-1], cells[:, ::-1], cells[::-1, ::-1]]
    turned = [flip.T for flip in flips] if side[0] == side[1] else []
    return np.stack([symmetry.reshape(-1) for symmetry in flips + turned])


def canonical(maze: NDArray[np.uint8], side: tuple[int, int]) -> bytes:
    """The same for all symmetric copies of a maze (S,), and for these only."""
    return min(copy.tobytes() for copy in maze[symmetries(side)])


# ------------------------------------------------------------------------------------------------ ways


def distances(free: NDArray[np.bool_], start: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Steps from the start to every cell of many mazes at once, (N, rows, columns); -1 where no way leads."""
    steps = np.where(start, 0, -1).astype(np.int32)
    front, unseen, number = start, free & ~start, 0
    while front.any():
        number += 1
        spread = np.zeros_like(front)
        spread[:, 1:] |= front[:, :-1]
        spread[:, :-1] |= front[:, 1:]
        spread[:, :, 1:] |= front[:, :, :-1]
        spread[:, :, :-1] |= front[:, :, 1:]
        front = spread & unseen
        unseen = unseen & ~front
        steps[front] = number
    return steps


def is_solved(inputs: NDArray[np.uint8], predictions: NDArray[np.uint8], side: tuple[int, int]) -> NDArray[np.bool_]:
    """Which predictions (N, S) show a shortest way through their inputs (N, S), be it the label's or another.

    Padding and ids outside the vocabulary make a prediction wrong, as does any cell that differs from the input but
    for free cells on the way.
    """
    solved = np.ones(len(inputs), bool)
    for wrong, _ in _flaws(inputs, predictions, side):
        solved &= ~wrong
    return solved


def _flaws(
    inputs: NDArray[np.uint8], labels: NDArray[np.uint8], side: tuple[int, int]
) -> list[tuple[NDArray[np.bool_], str]]:
    """What may be wrong with a maze and its label, with the rows (N,) that have it; the most basic first."""
    way = (labels == PATH) | (inputs == START) | (inputs == GOAL)
    start, goal = (inputs == START).reshape(-1, *side), (inputs == GOAL).reshape(-1, *side)
    along, shortest = (
        distances(cells.reshape(-1, *side), start).max((1, 2), where=goal, initial=-1)
        for cells in (way, inputs != WALL)
    )
    starts, goals = (inputs == START).sum(1), (inputs == GOAL).sum(1)
    return [
        ((inputs < WALL).any(1) | (inputs > GOAL).any(1), "the maze has other symbols than '#', ' ', 'S' and 'G'"),
        (starts != 1, "the maze has no start S, or several; it should have one"),
        (goals != 1, "the maze has no goal G, or several; it should have one"),
        (shortest < 0, "the maze has no way from S to G; it should have one"),
        ((labels != np.where((labels == PATH) & (inputs == FREE), PATH, inputs)).any(1),
         "the answer differs from the maze elsewhere than on free cells that became 'o'"),
        (along < 0, "the answer's path does not lead from S to G"),
        (along > shortest, "the answer's path is not a shortest one"),
        ((labels == PATH).sum(1) + 1 > along, "the answer has 'o' aside from its path"),
    ]  # fmt: skip


def shortest_ways(
    inputs: NDArray[np.uint8], side: tuple[int, int], rng: np.random.Generator | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One shortest way through each maze.

    Args:
        inputs: mazes (N, S), each with a way from S to G.
        side: rows and columns.
        rng: draws, step by step, where there are several; None: from S on the first of down, left, right and up, as
            in the published labels.

    Returns:
        labels (N, S), and the cells (N, S) to which another shortest way would have turned off from this one: with
        walls there, this one is the only shortest.
    """
    count, width = len(inputs), side[1] + 2
    inside = np.pad(np.ones(side, bool), 1).reshape(-1)
    labels = np.zeros((count, len(inside)), np.uint8)
    labels[:, inside] = inputs
    others = np.zeros(labels.shape, bool)
    goal = (inputs == GOAL).reshape(-1, *side)
    steps = distances((inputs != WALL).reshape(-1, *side), goal)
    steps = np.pad(steps, ((0, 0), (1, 1), (1, 1)), constant_values=-1).reshape(count, len(inside))
    every, place = np.arange(count), (labels == START).argmax(1)
    left = steps[every, place]
    while (left > 1).any():
        rows = np.flatnonzero(left > 1)
        after = place[rows, None] + np.array([width, -1, 1, -width])
        nearer = steps[rows[:, None], after] == left[rows, None] - 1
        choice = (nearer if rng is None else np.where(nearer, rng.random(nearer.shape), -1.0)).argmax(1)
        others[rows[np.nonzero(nearer)[0]], after[nearer]] = True
        others[rows, after[np.arange(len(rows)), choice]] = False
        place[rows] = after[np.arange(len(rows)), choice]
        labels[rows, place[rows]] = PATH
        left[rows] -= 1
    return labels[:, inside], others[:, inside]


# ------------------------------------------------------------------------------------------------ reading


def from_rows(rows: Sequence[TextRow]) -> tuple[PuzzleSet, list[str]]:
    """The sound mazes of a text file and, for each other row, where it stands and why it is refused.

    A row without answer gets a shortest way.

    Raises:
        UsageError: no maze is a square.
    """
    side = _side_of(rows)
    length = side * side
    inputs, labels = np.zeros((2, len(rows), length), np.uint8)
    flaws: dict[int, str] = {}
    for index, row in enumerate(rows):
        if row.flaw is not None:
            flaws[index] = row.flaw
            continue
        try:
            inputs[index] = _ids(row.question, "maze", length)
            if row.answer is not None:
                labels[index] = _ids(row.answer, "answer", length)
        except ValueError as error:
            flaws[index] = str(error)
    open_rows = np.array([row.answer is None and index not in flaws for index, row in enumerate(rows)])
    labels[open_rows] = _answers(inputs[open_rows], (side, side))
    return _sound(inputs, labels, (side, side), [row.source for row in rows], flaws)


def _side_of(rows: Sequence[TextRow]) -> int:
    """The side of the first maze that is a square."""
    for row in sound_first(rows):
        side = math.isqrt(len(row.question))
        if side >= 2 and side * side == len(row.question):
            return side
    length = len(rows[0].question)
    raise UsageError(f"{rows[0].source}: the maze has {length} characters; it should have a square number, as 900")


def from_arrays(arrays: Mapping[str, NDArray], path: str | os.PathLike[str]) -> tuple[PuzzleSet, list[str]]:
    """The sound mazes of `inputs` and `labels` (N, side * side) uint8, as published; the rest as in `from_rows`.

    Raises:
        UsageError: the arrays have another shape or dtype; the message names the file.
    """
    inputs, labels = arrays["inputs"], arrays["labels"]
    should = "mazes, cells" if inputs.ndim != 2 else ", ".join(map(str, inputs.shape))
    for name, array in (("inputs", inputs), ("labels", labels)):
        if array.dtype != np.uint8 or array.ndim != 2 or array.shape != inputs.shape:
            raise UsageError(f"{path}: {name} is {array.dtype}{array.shape}; it should be uint8({should})")
    side, cells = math.isqrt(inputs.shape[1]), inputs.shape[1]
    if side < 2 or side * side != cells:
        raise UsageError(f"{path}: its mazes have {cells} cells; they should be squares, such as 900 cells (30 x 30)")
    return _sound(inputs, labels, (side, side), [f"{path}: row {row}" for row in range(len(inputs))], {})


def from_set(puzzles: PuzzleSet, path: str | os.PathLike[str]) -> tuple[PuzzleSet, list[str]]:
    """The sound mazes of a .npz file that says what it holds; the rest as in `from_rows`.

    Raises:
        UsageError: its vocabulary is not that of mazes; the message names the file.
    """
    if puzzles.vocab_size != len(SYMBOLS) + 1:
        raise UsageError(f"{path}: vocab_size is {puzzles.vocab_size}; it should be {len(SYMBOLS) + 1}")
    labels, unanswered = puzzles.labels.copy(), ~puzzles.labels.any(1)
    labels[unanswered] = _answers(puzzles.inputs[unanswered], puzzles.side)
    flaws = _flaws_of(puzzles.inputs, labels, puzzles.side, {})
    sound = [row for row in range(len(labels)) if row not in flaws]
    return replace(puzzles, labels=labels).subset(sound), [f"{path}: row {row}: {flaws[row]}" for row in sorted(flaws)]


def as_puzzles(inputs: NDArray[np.uint8], labels: NDArray[np.uint8], side: tuple[int, int]) -> PuzzleSet:
    """Mazes (N, S) with their labels as a set."""
    count = len(inputs)
    return PuzzleSet(
        task="maze",
        inputs=inputs,
        labels=labels,
        groups=np.arange(count, dtype=np.int32),
        puzzle_ids=np.zeros(count, np.int32),
        vocab_size=len(SYMBOLS) + 1,
        side=side,
    )


def _sound(
    inputs: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    side: tuple[int, int],
    sources: Sequence[str],
    flaws: dict[int, str],
) -> tuple[PuzzleSet, list[str]]:
    flaws = _flaws_of(inputs, labels, side, flaws)
    sound = np.array([index for index in range(len(inputs)) if index not in flaws], np.int64)
    return as_puzzles(inputs[sound], labels[sound], side), [f"{sources[i]}: {flaws[i]}" for i in sorted(flaws)]


def _flaws_of(
    inputs: NDArray[np.uint8], labels: NDArray[np.uint8], side: tuple[int, int], flaws: Mapping[int, str]
) -> dict[int, str]:
    """`flaws`, and of each other row that has some the most basic."""
    found = dict(flaws)
    for wrong, why in _flaws(inputs, labels, side):
        for index in np.flatnonzero(wrong).tolist():
            found.setdefault(index, why)
    return found


def _answers(inputs: NDArray[np.uint8], side: tuple[int, int]) -> NDArray[np.uint8]:
    """A shortest way for each maze; the maze itself where it has none, which the checks then say."""
    labels = inputs.copy()
    one = ((inputs == START).sum(1) == 1) & ((inputs == GOAL).sum(1) == 1)
    labels[one] = shortest_ways(inputs[one], side)[0]
    return labels


def _ids(text: str, what: str, length: int) -> NDArray[np.uint8]:
    """The ids of a maze; raises a ValueError that says what is wrong."""
    if len(text) != length:
        raise ValueError(f"the {what} has {len(text)} characters; it should have {length}")
    ids = np.array([SYMBOLS.find(symbol) + 1 for symbol in text], np.uint8)
    if not ids.all():
        place = int(ids.argmin())
        raise ValueError(f"the {what} has {text[place]!r} at character {place + 1}; it should be one of {SYMBOLS!r}")
    return ids


# ------------------------------------------------------------------------------------------------ generating


def generate(side: int, size: int, held_out: int, seed: int) -> tuple[PuzzleSet, PuzzleSet]:
    """`size` mazes with one shortest way, and `held_out` more of which none is a symmetric copy of any of the former.

    Walls stand at random, S and G where the way is long: 109 steps or more for 30 x 30, as in the published mazes, and
    in proportion to the cells for other sides. Then as few walls as it takes are added to leave one shortest way.

    Raises:
        UsageError: a side below 5; or too few such mazes were found.
    """
    if side < 5:
        raise UsageError(f"side is {side}; it should be at least 5")
    rng, wanted = np.random.default_rng(seed), size + held_out
    if wanted > _ROUNDS * _DRAWN:
        raise UsageError(f"size is {size} and held_out {held_out}; they should be at most {_ROUNDS * _DRAWN} together")
    check_room(f"side is {side}", "the first mazes to choose from", _DRAWN * side * side * 8)
    kept: dict[bytes, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
    for _ in range(_ROUNDS):
        for maze, label in zip(*_draw(side, rng), strict=True):
            kept.setdefault(canonical(maze, (side, side)), (maze, label))
        if len(kept) >= wanted:
            boards = np.array(list(kept.values())[:wanted], np.uint8).reshape(wanted, 2, side * side)
            puzzles = as_puzzles(boards[:, 0], boards[:, 1], (side, side))
            return puzzles.subset(slice(size)), puzzles.subset(slice(size, None))
    raise UsageError(f"size is {size} and held_out {held_out}; {len(kept)} different mazes of side {side} were found")


def _draw(side: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Some mazes and their labels (K, side * side)."""
    least = round(109 / 900 * side * side)
    share = rng.uniform(*_WALLS, size=(_DRAWN, 1))
    free = rng.random((_DRAWN, side * side)) >= share
    steps = _steps_from(free, _one_of(free, rng), side)
    wide = 2 * steps.max(1) >= least  # else no two cells are far enough apart
    free, steps = free[wide], steps[wide]
    start = steps.argmax(1)  # the end of a long way is at one end of the longest ones
    far = _steps_from(free, start, side) >= least
    free, start, far = (part[far.any(1)] for part in (free, start, far))
    mazes = np.where(free, FREE, WALL).astype(np.uint8)
    every = np.arange(len(mazes))
    mazes[every, start] = START
    mazes[every, _one_of(far, rng)] = GOAL
    labels, others = shortest_ways(mazes, (side, side), rng)
    return np.where(others, WALL, mazes).astype(np.uint8), np.where(others, WALL, labels).astype(np.uint8)


def _steps_from(free: NDArray[np.bool_], start: NDArray[np.int64], side: int) -> NDArray[np.int32]:
    """`distances` from the cell `start` (K,) in mazes (K, side * side), in that shape."""
    at_start = np.zeros_like(free)
    at_start[np.arange(len(free)), start] = True
    return distances(free.reshape(-1, side, side), at_start.reshape(-1, side, side)).reshape(free.shape)


def _one_of(allowed: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """One allowed place (K,) of each row (K, S)."""
    return np.where(allowed, rng.random(allowed.shape, np.float32), np.float32(-1)).argmax(1)
