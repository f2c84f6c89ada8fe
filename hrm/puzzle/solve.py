"""`hrm solve`: answers to puzzles from a trained model, checked by the puzzles' own rules."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from hrm.puzzle import maze, sudoku
from hrm.puzzle.data import PuzzleSet, TextRow, check_writable, load_puzzles
from hrm.puzzle.evaluate import Ballots, Thinker, check_votes, choice_of, rows_of, thinking, view_of, vote_of
from hrm.puzzle.saving import load_model
from hrm.puzzle.solver import BOXES
from hrm.settings import UsageError, require, typed_lines

STDIN = "-"
TOGETHER = 64  # puzzles of a file that are solved at once
SYMBOLS_OF = {"sudoku": "?." + sudoku.SYMBOLS, "maze": "?" + maze.SYMBOLS, "arc": "  0123456789"}  # by id


@dataclass
class SolveSettings:
    """Keys of `hrm solve`."""

    path: str | None = None
    """File of puzzles, one a line (.txt), .csv or .npz, which need no answers; - or null: one a line from standard
    input."""
    run: str | None = None
    """Run folder or model folder."""
    segments: int | None = None
    """Segments to run; null: as in training."""
    halting: bool = False
    """Stop at each puzzle where the Q head says that it is solved."""
    votes: int = 1
    """Runs on symmetric copies of each puzzle; in each cell they vote, the surer the heavier; mazes: the surest."""
    picture: str | None = None
    """.png or .gif file for the first puzzle's answers after each segment."""
    seed: int = 0
    """Seed of the symmetric copies."""
    quiet: bool = False
    """Print one answer a line and nothing else; the count goes to standard error."""


class Solution(NamedTuple):
    """What the model makes of one puzzle."""

    thoughts: NDArray[np.uint8]  # (M, S) answers after each segment that ran
    answer: NDArray[np.uint8]  # (S,) the last of them, or the majority's

    @property
    def settled(self) -> int:
        """The segment after which `thoughts` no longer change."""
        changes = (self.thoughts[1:] != self.thoughts[:-1]).any(1)
        return int(np.flatnonzero(changes).max(initial=-1)) + 2


class Verdict(NamedTuple):
    """Whether an answer is right, by the rules alone where the task has rules."""

    solved: bool | None  # None: there is nothing to tell by
    wrong: NDArray[np.bool_]  # (S,) cells to show as wrong
    text: str


def solve(settings: Any, lines: TextIO | None = None, console: Console | None = None) -> None:
    """Solves the puzzles of `settings.path`, or of each line of `lines` as it comes, and prints answers and a count.

    Args:
        settings: `SolveSettings`.
        lines: read where the path is "-" or None; None: standard input.
        console: printed to; None: standard output.

    Raises:
        UsageError: a setting or puzzle that cannot be used, with the line that it stands in; or no model.
    """
    check_solving(settings)
    model, about = load_model(settings.run)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    task, console = about["task"], console or Console()
    from_lines = settings.path in (None, STDIN)
    if from_lines and lines is None and sys.stdin.isatty():
        print(f"One {task} a line; Ctrl-D ends.", file=sys.stderr)
    chunks = _from_lines(lines or sys.stdin, task) if from_lines else _from_file(Path(settings.path), task)
    count, verdicts, started = 0, list[bool](), time.perf_counter()
    with thinking(model, settings.segments, settings.halting) as thinker:
        for source, puzzles in chunks:
            check_votes(puzzles, settings.votes)
            try:
                found = solutions(thinker, puzzles, settings.votes, settings.seed)
            except UsageError as error:
                raise UsageError(f"{source}: {error}") from error
            for index, solution in enumerate(found):
                verdict = judge(puzzles, index, solution.answer)
                count += 1
                verdicts += [] if verdict.solved is None else [verdict.solved]
                if count == 1 and settings.picture:
                    _draw(Path(settings.picture), puzzles, solution)
                if settings.quiet:
                    _print(console, _line(task, solution.answer))
                else:
                    _show(console, puzzles, index, solution, verdict, count, settings)
    _print(
        Console(stderr=True) if settings.quiet else console,
        f"{_outcome(count, verdicts)} in {time.perf_counter() - started:.1f} s",
    )


def _outcome(count: int, verdicts: Sequence[bool]) -> str:
    """How many puzzles were solved, of those that there is something to judge by."""
    if count and not verdicts:
        return f"{count} puzzle{'s' * (count != 1)} answered"
    return f"{sum(verdicts)} of {len(verdicts)} puzzle{'s' * (len(verdicts) != 1)} solved"


def check_solving(settings: Any) -> None:
    """Raises a UsageError that names the first key of `hrm solve` whose value makes no sense."""
    if settings.run is None:
        raise UsageError("run is missing; it should be a run folder or a model folder: run=runs/sudoku-...")
    require(settings, "segments", lambda value: value is None or value >= 1, "at least 1, or null")
    require(settings, "votes", lambda value: value >= 1, "at least 1")
    require(settings, "seed", lambda value: value >= 0, "at least 0")
    if settings.picture is not None:
        from hrm.puzzle.picture import check_format  # takes half a second, which most calls need not wait for

        check_format(Path(settings.picture))
        check_writable("picture", Path(settings.picture))


def solutions(thinker: Thinker, puzzles: PuzzleSet, votes: int = 1, seed: int = 0) -> list[Solution]:
    """What the model makes of each puzzle, all of them in one batch.

    Args:
        votes: runs on each puzzle; all but the first see it through a symmetry drawn by `seed`.
    """
    rows = rows_of(thinker.model, puzzles)
    every = torch.arange(len(puzzles), device=thinker.model.device)
    batch = rows.batch(every)
    thoughts: list[list[NDArray[np.uint8]]] = [[] for _ in range(len(puzzles))]
    ballots = Ballots(len(puzzles), puzzles, choice_of(puzzles), thinker.model.device)
    for thought in thinker.think(batch):
        ballots.cast(thought.rows[thought.ended], thought.answers[thought.ended], thought.q_halt[thought.ended])
        for row, answer in zip(thought.rows.tolist(), thought.answers.byte().cpu().numpy(), strict=True):
            thoughts[row].append(answer)
    for number in range(1, votes):
        view = view_of(puzzles, len(puzzles), seed, number, thinker.model.device)
        ballots.cast(every, *vote_of(thinker, batch, every, view, None))
    winners = ballots.winners().byte().cpu().numpy()
    return [Solution(np.stack(each), winner) for each, winner in zip(thoughts, winners, strict=True)]


# ------------------------------------------------------------------------------------------------ reading


def _from_file(path: Path, task: str) -> Iterator[tuple[str, PuzzleSet]]:
    """Several puzzles at a time, and where they stand."""
    puzzles = load_puzzles(path, task, check_unique=False, answered=False)
    for start in range(0, len(puzzles), TOGETHER):
        yield str(path), puzzles.subset(slice(start, start + TOGETHER))


def _from_lines(lines: Iterable[str], task: str) -> Iterator[tuple[str, PuzzleSet]]:
    """Each line by itself, as soon as it is there; empty ones are passed over."""
    if task == "arc":
        raise UsageError("path is missing; it should be an .npz file, since ARC's grids are not read from lines")
    for number, line in enumerate(typed_lines(lines), 1):
        if not line.strip():
            continue
        row = TextRow(f"line {number}", line.rstrip("\r\n"), None, None)
        if task == "maze":
            puzzles, refused = maze.from_rows([row])
        else:
            rated, refused = sudoku.from_rows([row])
            puzzles = rated.puzzles
        if refused:
            raise UsageError(refused[0])
        yield row.source, puzzles


# ------------------------------------------------------------------------------------------------ judging


def judge(puzzles: PuzzleSet, index: int, answer: NDArray[np.uint8]) -> Verdict:
    """Whether `answer` (S,) solves the puzzle at `index`: by the rules of Sudoku or mazes, not by the set's answer.

    The set's answer only tells which further cells are wrong in a Sudoku that the rules refuse. ARC has no rules: an
    answer is right where it is the set's, and nothing is told where the set has none.
    """
    question, label = puzzles.inputs[index], puzzles.labels[index]
    differs = (label > 0) & (label != answer)
    if puzzles.task == "sudoku":
        return _judge_sudoku(puzzles.side[0], question, answer, differs)
    if puzzles.task == "maze":
        return _judge_maze(puzzles.side, question, answer)
    if not label.any():
        return Verdict(None, differs, "no answer to compare with")
    return _verdict(
        not differs.any(), differs, [_counted(differs, "cell differs", "cells differ") + " from the answer"]
    )


def _judge_sudoku(
    side: int, question: NDArray[np.uint8], answer: NDArray[np.uint8], differs: NDArray[np.bool_]
) -> Verdict:
    changed, empty = (question > 1) & (question != answer), answer < 2
    clash = ~empty & (_peers(side) & (answer[:, None] == answer[None, :])).any(1)
    solved = not (changed | empty | clash).any()
    flaws = [
        _counted(clash, "cell clashes", "cells clash"),
        _counted(empty, "cell is empty", "cells are empty"),
        _counted(changed, "given is changed", "givens are changed"),
    ]
    return _verdict(solved, clash | empty | changed | differs, [flaw for flaw in flaws if not flaw.startswith("0 ")])


def _peers(side: int) -> NDArray[np.bool_]:
    """Which cells share a row, column or box with which others, (S, S)."""
    row, column = np.divmod(np.arange(side * side), side)
    box = row // BOXES[side][0] * side + column // BOXES[side][1]
    return np.any([unit[:, None] == unit[None, :] for unit in (row, column, box)], 0) & ~np.eye(side * side, dtype=bool)


def _judge_maze(side: tuple[int, int], question: NDArray[np.uint8], answer: NDArray[np.uint8]) -> Verdict:
    path = (answer == maze.PATH) & (question == maze.FREE)
    changed = (answer != question) & ~path
    start, goal = (question == maze.START).reshape(1, *side), question == maze.GOAL
    reached, steps = (
        maze.distances(cells.reshape(1, *side), start).reshape(-1) for cells in (path | goal, question != maze.WALL)
    )
    along, shortest = int(reached[goal].max(initial=-1)), int(steps[goal].max(initial=-1))
    stray = path & (reached < 0)
    flaws = [_counted(changed, "cell is changed", "cells are changed")] if changed.any() else []
    if along < 0:
        flaws.append("the way from S does not reach G")
    elif along > shortest:
        flaws.append(f"the way has {along} steps, {shortest} would do")
    elif path.sum() >= along:
        flaws.append(_counted(path, "cell is marked", "cells are marked") + f", the way has {along - 1}")
    return _verdict(bool(maze.is_solved(question[None], answer[None], side)[0]), changed | stray, flaws)


def _counted(cells: NDArray[np.bool_], one: str, several: str) -> str:
    count = int(cells.sum())
    return f"{count} {one if count == 1 else several}"


def _verdict(solved: bool, wrong: NDArray[np.bool_], flaws: Sequence[str]) -> Verdict:
    if solved:
        return Verdict(True, np.zeros_like(wrong), "solved")
    return Verdict(False, wrong, f"not solved: {', '.join(flaws)}")


# ------------------------------------------------------------------------------------------------ showing


def _show(
    console: Console, puzzles: PuzzleSet, index: int, solution: Solution, verdict: Verdict, number: int, settings: Any
) -> None:
    """Puzzle and answer side by side, and below them what there is to say."""
    question = puzzles.inputs[index]
    used = np.any([question > 1, solution.answer > 1], 0).reshape(puzzles.side)  # ARC's padding and ends are left out
    rows, columns = (int(np.flatnonzero(used.any(axis)).max(initial=0)) + 1 for axis in (1, 0))
    shown = (rows, columns) if puzzles.task == "arc" else puzzles.side
    left = _grid(puzzles, question, question, np.zeros_like(verdict.wrong), shown)
    right = _grid(puzzles, question, solution.answer, verdict.wrong, shown)
    for first, second in zip(left, right, strict=True):
        _print(console, Text("   ").join((first, second)))
    _print(console, f"puzzle {number}: {verdict.text}; {_depth(puzzles, solution, settings)}\n")


def _depth(puzzles: PuzzleSet, solution: Solution, settings: Any) -> str:
    """How the model came to its answer."""
    segments, settled = len(solution.thoughts), solution.settled
    words = [f"{'halted after' if settings.halting else 'ran'} {segments} segment{'s' * (segments != 1)}"]
    if segments > 1 and settled == segments:
        words.append("the last of which still changed the answer")
    elif segments > 1:
        words.append(f"answer unchanged since segment {settled}")
    if settings.votes > 1:
        how = "weighted majority" if choice_of(puzzles) == "majority" else "the surest"
        words.append(f"{how} of {settings.votes} runs")
    return ", ".join(words)


def _grid(
    puzzles: PuzzleSet,
    question: NDArray[np.uint8],
    ids: NDArray[np.uint8],
    wrong: NDArray[np.bool_],
    shown: tuple[int, int],
) -> list[Text]:
    """The first `shown` rows and columns as lines of one width."""
    task, lines = puzzles.task, []
    box = BOXES[puzzles.side[0]] if task == "sudoku" else puzzles.side
    cells = [values.reshape(puzzles.side)[: shown[0], : shown[1]] for values in (question, ids, wrong)]
    for number, row in enumerate(zip(*cells, strict=True)):
        line = Text()
        for column, (given, symbol, is_wrong) in enumerate(zip(*row, strict=True)):
            if task == "sudoku":
                line.append(" │ " if column and column % box[1] == 0 else " " * (column > 0))
            shape = SYMBOLS_OF[task][symbol]
            line.append(shape, _style(task, shape, given == symbol, is_wrong))
        if task == "sudoku" and number and number % box[0] == 0:
            lines.append(Text(_rule(box[1], puzzles.side[1] // box[1])))
        lines.append(line)
    return lines


def _rule(width: int, boxes: int) -> str:
    """The line between two bands of boxes of `width` cells."""
    return "┼".join("─" * (2 * width + (0 < number < boxes - 1)) for number in range(boxes))


def _style(task: str, shape: str, given: bool, wrong: bool) -> str:
    if wrong:
        return "on red" if shape == " " else "bold red"
    if task == "arc":
        return ""
    if shape in "#.?":
        return "dim"
    return "bold" if given else "cyan"


def _line(task: str, answer: NDArray[np.uint8]) -> str:
    return "".join(SYMBOLS_OF[task][symbol] for symbol in answer)


def _print(console: Console, text: str | Text) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)  # no line is cut or wrapped


def _draw(path: Path, puzzles: PuzzleSet, solution: Solution) -> None:
    """The first puzzle's answers after each segment, as a picture."""
    from hrm.puzzle.picture import thought_picture

    wrong = np.stack([judge(puzzles, 0, thought).wrong for thought in solution.thoughts])
    thought_picture(path, puzzles.task, puzzles.side, puzzles.inputs[0], solution.thoughts, wrong)
