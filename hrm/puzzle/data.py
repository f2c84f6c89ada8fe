"""Puzzles as arrays: the set, its file, augmentation on the fly, and batches that are a function of seed and step."""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hrm.loss import IGNORED
from hrm.puzzle.solver import BOXES
from hrm.settings import UsageError

TASKS = ("sudoku", "maze", "arc")


@dataclass(frozen=True)
class PuzzleSet:
    """N puzzles of one task on grids of S = rows * columns cells.

    Raises:
        ValueError: a side that such puzzles do not have, an array of another shape or dtype, or ids outside the
            vocabulary; the message names it.
    """

    task: str  # one of TASKS
    inputs: NDArray[np.uint8]  # (N, S): ids from 1; 0 is padding
    labels: NDArray[np.uint8]  # (N, S): ids from 1; 0 is ignored by the loss
    groups: NDArray[np.int32]  # (N,): the puzzle that a row is an example of
    puzzle_ids: NDArray[np.int32]  # (N,): index of the puzzle embedding; 0 where the task has none
    vocab_size: int
    side: tuple[int, int]  # rows, columns
    num_puzzle_ids: int = 1
    names: tuple[str, ...] = ()  # of puzzle ids, where they have any

    def __post_init__(self) -> None:
        rows = len(self.inputs) if self.inputs.ndim else 0
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; it should be one of {', '.join(TASKS)}")
        cells = self._checked_cells()
        for name, shape, dtype in (("inputs", (rows, cells), np.uint8), ("labels", (rows, cells), np.uint8),
                                   ("groups", (rows,), np.int32), ("puzzle_ids", (rows,), np.int32)):  # fmt: skip
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype}{array.shape}; it should be {np.dtype(dtype)}{shape}")
        for name, limit in (("inputs", self.vocab_size), ("labels", self.vocab_size),
                            ("puzzle_ids", self.num_puzzle_ids)):  # fmt: skip
            array = getattr(self, name)
            if rows and not 0 <= array.min() <= array.max() < limit:
                raise ValueError(f"{name} has ids from {array.min()} to {array.max()}; they should be below {limit}")
        if self.names and len(self.names) != self.num_puzzle_ids:
            raise ValueError(
                f"names has {len(self.names)} entries; it should have num_puzzle_ids={self.num_puzzle_ids}"
            )

    def _checked_cells(self) -> int:
        """Cells of a puzzle, after a look at whether its sides make sense."""
        if len(self.side) != 2 or min(self.side) < 1:
            raise ValueError(f"side is {self.side}; it should be rows and columns, at least 1 each")
        rows, columns = self.side
        if self.task == "sudoku" and (rows != columns or rows not in BOXES):
            sizes = ", ".join(f"{side} x {side}" for side in BOXES)
            raise ValueError(f"side is {rows} x {columns}; a sudoku should have one of {sizes}")
        if self.inputs.ndim == 2 and self.inputs.shape[1] != rows * columns:
            has = self.inputs.shape[1]
            should = f"{rows * columns}, as side is {rows} x {columns}"
            raise ValueError(f"inputs has puzzles of {has} cells; they should have {should}")
        return rows * columns

    def __len__(self) -> int:
        return len(self.inputs)

    def digest(self) -> str:
        """SHA-256 of the puzzles and their order; names aside."""
        sha256 = hashlib.sha256(f"{self.task}{self.side}{self.vocab_size}{self.num_puzzle_ids}".encode())
        for array in (self.inputs, self.labels, self.groups, self.puzzle_ids):
            sha256.update(np.ascontiguousarray(array).data)
        return sha256.hexdigest()

    def subset(self, indices: NDArray[np.integer] | Sequence[int] | slice) -> PuzzleSet:
        """The rows at `indices`; puzzle ids and their names stay as they are."""
        rows = {name: getattr(self, name)[indices] for name in ("inputs", "labels", "groups", "puzzle_ids")}
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in rows}
        return PuzzleSet(**rows, **others)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one compressed .npz; the file is there whole or, after a failure, as it was before."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(file, **{f.name: np.asarray(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PuzzleSet:
        """Reads what `save` wrote; never unpickles.

        Raises:
            UsageError: no such file, no .npz, or not the arrays of a PuzzleSet; the message names file and array.
        """
        arrays = read_npz(path)
        if missing := [f.name for f in fields(cls) if f.name not in arrays]:
            raise UsageError(f"{path}: no array {missing[0]!r}; it has {', '.join(arrays) or 'none'}")
        try:
            return cls(
                task=str(arrays["task"]),
                vocab_size=int(arrays["vocab_size"]),
                num_puzzle_ids=int(arrays["num_puzzle_ids"]),
                side=tuple(int(n) for n in np.atleast_1d(arrays["side"])),  # type: ignore[arg-type]
                names=tuple(str(name) for name in arrays["names"]),
                **{name: arrays[name] for name in ("inputs", "labels", "groups", "puzzle_ids")},  # type: ignore[arg-type]
            )
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise UsageError(f"{path}: {error}") from error


# what zipfile and numpy raise for a damaged file, a RuntimeError where the damage looks like encryption
_UNREADABLE = (ValueError, OSError, EOFError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_npz(path: str | os.PathLike[str]) -> dict[str, NDArray]:
    """The arrays of a .npz file.

    Raises:
        UsageError: no such file, no .npz, a damaged one, or one that holds pickled objects.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path} is no file")
    if not zipfile.is_zipfile(path):  # numpy would take anything else for a pickle, and advise to trust it
        raise UsageError(f"{path} is no .npz file, or one cut short")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise UsageError(f"{path} is no .npz file of plain arrays ({error})") from error


def check_writable(key: str, path: Path) -> None:
    """Makes the folder of a file that a long job will write, so that the job does not fail at its end.

    Raises:
        UsageError: nothing can be written there; the message names `key`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        why = f"{path.parent} is no folder" if path.parent.exists() and not path.parent.is_dir() else error.strerror
        raise UsageError(f"{key} is {str(path)!r}; nothing can be written there: {why}") from error
    if path.is_dir():
        raise UsageError(f"{key} is {str(path)!r}; it should be a file, and is a folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ------------------------------------------------------------------------------------------------ reading any file


class TextRow(NamedTuple):
    """One puzzle of a text file."""

    source: str  # where it stands, for messages: "file.csv:3"
    question: str
    answer: str | None
    rating: int | None
    flaw: str | None = None  # why the row is refused, whatever puzzle it holds


def load_puzzles(
    path: str | os.PathLike[str], task: str | None = None, *, check_unique: bool = True, answered: bool = True
) -> PuzzleSet:
    """The puzzles of a .npz, .csv or .txt file, every one checked.

    Args:
        path: a `PuzzleSet`, or the arrays `inputs` and `labels` of published mazes (.npz); columns `question`,
            `answer` and, if there, `rating` (.csv); one puzzle a line without answer (.txt).
        task: "sudoku" or "maze"; None: as the file says, or by the symbols of its first row. A `PuzzleSet` of another
            task than this is refused.
        check_unique: whether sudokus of which the file has the answer are searched for a second one.
        answered: whether the rows of a .csv have to have answers, so that no misspelt column goes unnoticed.

    Raises:
        UsageError: no such file, a puzzle that is not as it should be; with file and line number.
    """
    from hrm.puzzle import maze, sudoku

    path = Path(path)
    if path.suffix == ".npz":
        puzzles, _, refused = read_set(path, task, check_unique)
        return _unless_refused(puzzles, refused)
    rows = list(read_rows(path, answered))
    if not rows:
        raise UsageError(f"{path} has no rows")
    if (task or guess_task(rows)) == "maze":
        puzzles, refused = maze.from_rows(rows)
    else:
        rated, refused = sudoku.from_rows(rows, check_unique=check_unique)
        puzzles = rated.puzzles
    return _unless_refused(puzzles, refused)


def read_set(
    path: Path, task: str | None, check_unique: bool = True
) -> tuple[PuzzleSet, NDArray[np.int64] | None, list[str]]:
    """The sound puzzles of a .npz file, their ratings where they were searched for a second solution, and where each
    other row stands and why it is refused. ARC has no rules to check.

    Arguments and errors as those of `load_puzzles`.
    """
    from hrm.puzzle import maze, sudoku

    arrays = read_npz(path)
    if set(arrays) == {"inputs", "labels"}:
        if task not in (None, "maze"):
            raise UsageError(f"{path} holds inputs and labels alone, as published mazes do; it should hold {task!r}")
        puzzles, refused = maze.from_arrays(arrays, path)
        return puzzles, None, refused
    puzzles = PuzzleSet.load(path)
    if task not in (None, puzzles.task):
        raise UsageError(f"{path} holds puzzles of the task {puzzles.task!r}; it should hold {task!r}")
    if not len(puzzles):
        raise UsageError(f"{path} has no puzzles")
    if puzzles.task == "sudoku":
        rated, refused = sudoku.from_set(puzzles, path, check_unique=check_unique)
        return *rated, refused
    puzzles, refused = (puzzles, []) if puzzles.task == "arc" else maze.from_set(puzzles, path)
    return puzzles, None, refused


def _unless_refused(puzzles: PuzzleSet, refused: Sequence[str]) -> PuzzleSet:
    if refused:
        raise UsageError(refused[0] + (f" (and {len(refused) - 1} more rows)" if refused[1:] else ""))
    return puzzles


def guess_task(rows: Sequence[TextRow]) -> str:
    """The task that the first row belongs to, a refused one only where all are: only mazes have walls."""
    return "maze" if "#" in sound_first(rows)[0].question else "sudoku"


def sound_first(rows: Sequence[TextRow]) -> list[TextRow]:
    """The rows in their order, those with a flaw last: what is told of all rows should not be read off these."""
    return sorted(rows, key=lambda row: row.flaw is not None)


def read_rows(path: Path, answered: bool = True) -> Iterator[TextRow]:
    """The rows of a .csv or .txt file; empty lines are passed over.

    Raises:
        UsageError: no such file, no text, or a .csv without the column question or, `answered`, answer; with file and
            line number.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: no valid UTF-8 ({error.reason} at byte {error.start})") from error
    if path.suffix != ".csv":
        yield from (TextRow(f"{path}:{n}", line, None, None) for n, line in enumerate(lines, 1) if line.strip())
        return
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            yield text_row(row, f"{path}:{reader.line_num}", answered)
    except csv.Error as error:  # a quotation mark that nothing closes, until the field is too long
        raise UsageError(f"{path}:{reader.line_num}: cannot be read as CSV ({error})") from error


def text_row(row: dict[str, str | None], source: str, answered: bool = True) -> TextRow:
    """A row with the columns question, answer and, if there, rating; errors as in `read_rows`."""
    needed = ("question", "answer") if answered else ("question",)
    for column in needed:
        if column not in row:
            there = ", ".join(str(name) for name in row if name is not None)
            raise UsageError(f"{source}: no {column!r}; it has {there or 'no columns'}")
    missing = [column for column in needed if row[column] is None]
    flaw = f"the row ends before {missing[0]!r}" if missing else None
    rating, number = row.get("rating"), None
    try:
        number = None if rating in (None, "") else int(rating)  # type: ignore[arg-type]
    except ValueError:
        flaw = f"'rating' is {rating!r}; it should be a whole number"
    answer = row.get("answer") or ("" if answered else None)
    return TextRow(source, row["question"] or "", answer, number, flaw)


# ------------------------------------------------------------------------------------------------ batches


class Augmenter(Protocol):
    """Turns examples into others that are as true, without looking at the answer's meaning."""

    def augment(
        self, inputs: NDArray[np.uint8], labels: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Each row of `inputs` and `labels` (B, S) changed by a change of its own, drawn from `rng`."""
        ...


def augmenter_of(puzzles: PuzzleSet, easier: float = 0.0) -> Augmenter:
    """The augmentation that the published training runs use for the set's task.

    Args:
        easier: of `SudokuAugmenter`; 0 for other tasks.
    """
    from hrm.puzzle import arc, maze, sudoku

    if puzzles.task == "sudoku":
        return sudoku.SudokuAugmenter(puzzles.side[0], easier)
    if easier:
        raise ValueError(f"easier is {easier}; it should be 0 for the task {puzzles.task!r}")
    if puzzles.task == "maze":
        return maze.MazeAugmenter(puzzles.side, maze.follows_rule(puzzles))
    return arc.ArcAugmenter(puzzles.side)


class BatchStream:
    """Batches without end; `batch(step)` is a function of seed and step alone, so that any step can be resumed at.

    A pass visits every group once, in an order drawn from (seed, pass); a visit shows all rows of one of the group's
    puzzle ids, drawn anew in every pass, in random order. Batches cross from pass to pass, so all are full.

    Args:
        puzzles: what is shown; every puzzle id of a group has as many rows as the group's others.
        batch_size: rows in a batch, which may be more than a pass has.
        seed: of order and augmentation.
        augment: whether rows are changed as the published training runs do.
        easier: share of the Sudokus that augmentation makes easier (`SudokuAugmenter`).
        rank: the process that this is, of `world`; each makes only its own rows, which are the whole batch's.
        world: processes.

    Raises:
        ValueError: no puzzles, a batch size below 1 or that `world` does not divide, or puzzle ids of one group with
            unequal numbers of rows.
    """

    def __init__(
        self, puzzles: PuzzleSet, batch_size: int, seed: int, augment: bool = True, easier: float = 0.0,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if not len(puzzles):
            raise ValueError("puzzles is empty; it should have at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it should be at least 1")
        self.puzzles, self.batch_size, self.seed = puzzles, batch_size, seed
        self._own = share_of(batch_size, rank, world)
        self._augmenter = augmenter_of(puzzles, easier) if augment else None
        self._groups = _index(puzzles)
        self.rows_per_pass = int(self._groups.size.sum())
        self._order = lru_cache(maxsize=2)(self._order_of)

    def batch(self, step: int) -> dict[str, NDArray[np.int32]]:
        """The rows of optimizer step `step`, from 0: this process's, B = batch_size / world.

        Returns:
            inputs (B, S) int32, labels (B, S) int32 with -100 where ignored, puzzle_identifiers (B,) int32.
        """
        rows = self.rows(step)[self._own]
        inputs, labels = self.puzzles.inputs[rows], self.puzzles.labels[rows]
        if self._augmenter is not None:
            rng = np.random.default_rng([self.seed, 1, step])
            if len(rows) < self.batch_size:
                rng = _OwnDraws(rng.bit_generator, self.batch_size, self._own)
            inputs, labels = self._augmenter.augment(inputs, labels, rng)
        return as_batch(inputs, labels, self.puzzles.puzzle_ids[rows])

    def rows(self, step: int) -> NDArray[np.int64]:
        """The rows of the set (batch_size,) that step `step` shows, on all processes together."""
        first = step * self.batch_size
        passes, place = np.divmod(np.arange(first, first + self.batch_size), self.rows_per_pass)
        return np.concatenate([self._order(int(n))[place[passes == n]] for n in np.unique(passes)])

    def _order_of(self, number: int) -> NDArray[np.int64]:
        """The rows of pass `number` (rows_per_pass,) in the order in which they are shown."""
        rng = np.random.default_rng([self.seed, 0, number])
        groups = self._groups
        order = rng.permutation(len(groups.size))
        puzzle = (
            groups.first[order] + (rng.random(len(order)) * groups.puzzles[order]).astype(np.int64) * groups.size[order]
        )
        size = groups.size[order]
        visit = np.repeat(np.arange(len(order)), size)
        shuffled = np.lexsort((rng.random(len(visit)), visit))  # within each visit
        within = shuffled - np.repeat(np.cumsum(size) - size, size)
        return groups.rows[puzzle[visit] + within]


def share_of(rows: int, rank: int, world: int) -> slice:
    """Which of `rows` rows process `rank` of `world` takes; a ValueError where they cannot be dealt out equally."""
    if rows % world:
        raise ValueError(f"there are {rows} rows; they should be a multiple of the {world} processes")
    own = rows // world
    return slice(rank * own, (rank + 1) * own)


class _OwnDraws(np.random.Generator):
    """Draws for every row of a batch and returns those of a process's own rows, along the first axis.

    Drawing is the cheap part of an augmentation; what is made of the draws is made for the own rows only.
    """

    def __init__(self, bits: np.random.BitGenerator, rows: int, own: slice) -> None:
        super().__init__(bits)
        self._rows, self._own = rows, own

    def random(self, size: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().random(self._of_all(size), *args, **kwargs)[self._own]

    def integers(self, low: Any, high: Any = None, size: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().integers(low, high, size=self._of_all(size), **kwargs)[self._own]

    def _of_all(self, size: Any) -> tuple[int, ...]:
        return (self._rows, *(size[1:] if isinstance(size, tuple) else ()))


class _Groups(NamedTuple):
    rows: NDArray[np.int64]  # (N,) rows of the set, sorted by group and puzzle id
    first: NDArray[np.int64]  # (G,) where each group starts among them
    puzzles: NDArray[np.int64]  # (G,) puzzle ids of each group
    size: NDArray[np.int64]  # (G,) rows of each puzzle id


def _index(puzzles: PuzzleSet) -> _Groups:
    rows = np.lexsort((np.arange(len(puzzles)), puzzles.puzzle_ids, puzzles.groups))
    keys = np.stack([puzzles.groups[rows], puzzles.puzzle_ids[rows]])
    _, ids = np.unique(keys, axis=1, return_counts=True)
    pairs = np.unique(keys, axis=1)
    names, start, count = np.unique(pairs[0], return_index=True, return_counts=True)
    size = ids[start]
    if uneven := np.flatnonzero(np.repeat(size, count) != ids).tolist():
        group = pairs[0][uneven[0]]
        raise ValueError(f"group {group} has puzzle ids with unequal numbers of rows; they should be equal")
    first = np.searchsorted(keys[0], names)
    return _Groups(rows, first, count, size)


def as_batch(
    inputs: NDArray[np.uint8], labels: NDArray[np.uint8], puzzle_ids: NDArray[np.int32]
) -> dict[str, NDArray[np.int32]]:
    """What the model takes, as `BatchStream.batch` returns it."""
    wanted = labels.astype(np.int32)
    wanted[labels == 0] = IGNORED
    return {"inputs": inputs.astype(np.int32), "labels": wanted, "puzzle_identifiers": puzzle_ids.astype(np.int32)}
