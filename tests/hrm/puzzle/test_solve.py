"""`hrm solve`: what it reads, how it judges answers by the rules, and what it prints."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from hrm.cli import main
from hrm.puzzle import PuzzleConfig, PuzzleModel, maze, sudoku
from hrm.puzzle.data import PuzzleSet
from hrm.puzzle.evaluate import thinking
from hrm.puzzle.saving import save_model
from hrm.puzzle.solve import Solution, SolveSettings, judge, solutions, solve
from hrm.settings import UsageError

QUESTION, ANSWER = "1..4" "...." "2..." "4..1", "1234" "3412" "2143" "4321"  # fmt: skip
MAZE, WAY = "S # " "  # " " ##G" "    ", "S # " "o # " "o##G" "oooo"  # fmt: skip


def board(question: str = QUESTION, answer: str = ANSWER) -> PuzzleSet:
    digits = [np.array([[int(c) for c in text.replace(".", "0")]], np.uint8) for text in (question, answer)]
    return sudoku.as_puzzles(*digits)


def ids(text: str) -> np.ndarray:
    return np.array([maze.SYMBOLS.find(c) + 1 for c in text], np.uint8)


def mazes(text: str = MAZE, way: str = WAY) -> PuzzleSet:
    side = int(len(text) ** 0.5)
    return maze.as_puzzles(ids(text)[None], ids(way)[None], (side, side))


class Copier(torch.nn.Module):
    """Stands in for the weights: answers with the puzzle's own label from the segment on that `after` says."""

    def __init__(self, model: PuzzleModel, after: int = 2) -> None:
        super().__init__()
        self.inner, self.after, self.config, self.device = model, after, model.config, model.device
        self.weights, self.initial_carry = model.weights, model.initial_carry

    def forward(self, carry: Any, batch: Any, *, halting: bool = False, weights: Any = None) -> Any:
        after, output = self.inner(carry, batch, weights=weights)
        done = output.steps >= self.after
        answers = torch.where(done[:, None], batch["labels"].clamp_min(0), batch["inputs"])
        state = after.state._replace(steps=output.steps)
        return after._replace(state=state), output._replace(
            logits=torch.nn.functional.one_hot(answers.long(), self.config.vocab_size).float(),
            halted=output.halted | (done if halting else False),
        )


def model(seq_len: int = 16, **values: Any) -> PuzzleModel:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_heads": 2, "l_layers": 1, "h_layers": 1, "expansion": 1, "seq_len": seq_len,
             "vocab_size": 6, "max_segments": 4, "puzzle_emb_size": 32, "dtype": "float32"}  # fmt: skip
    return PuzzleModel(PuzzleConfig(**small | values))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_model(model(), tmp_path / "run" / "model", {"task": "sudoku", "side": [4, 4], "vocab_size": 6})
    return tmp_path / "run"


@pytest.fixture
def solver(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model gives right answers from its second segment on."""
    monkeypatch.setattr("hrm.puzzle.solve.load_model", lambda path: (Copier(model()), {"task": "sudoku"}))
    return run


def printed(run: Path | None, lines: str = "", **values: Any) -> str:
    settings = OmegaConf.merge(OmegaConf.structured(SolveSettings), {"run": run and str(run), **values})
    text = io.StringIO()
    solve(settings, io.StringIO(lines), Console(file=text, width=80))
    return text.getvalue()


# ------------------------------------------------------------------------------------------------ judging


def changed(answer: str, **cells: str) -> str:
    return "".join(cells.get(f"c{place}", symbol) for place, symbol in enumerate(answer))


@pytest.mark.parametrize(
    ("answer", "text", "wrong"),
    [
        (ANSWER, "solved", []),
        (changed(ANSWER, c1="3", c2="2"), "not solved: 6 cells clash", [1, 2, 4, 7, 13, 14]),
        (changed(ANSWER, c5="0"), "not solved: 1 cell is empty", [5]),
        ("2143" "4321" "1234" "3412", "not solved: 5 givens are changed", range(16)),
    ],
)  # fmt: skip
def test_a_sudoku_is_judged_by_its_rules(answer: str, text: str, wrong: Any) -> None:
    verdict = judge(board(), 0, np.array([int(c) + 1 for c in answer], np.uint8))
    assert verdict.text == text and verdict.solved == (text == "solved")
    assert set(wrong) <= set(np.flatnonzero(verdict.wrong)) and (not wrong) == (not verdict.wrong.any())


def test_the_sets_answer_has_no_say_in_a_sudoku_that_keeps_the_rules() -> None:
    puzzles = board("1..4" + "." * 12, "1234" "4312" "2143" "3421")  # fmt: skip
    assert judge(puzzles, 0, np.array([int(c) + 1 for c in ANSWER], np.uint8)).solved


def test_padding_in_an_answer_is_an_empty_cell() -> None:
    assert judge(board(), 0, np.zeros(16, np.uint8)).text == "not solved: 16 cells are empty, 5 givens are changed"


def test_boards_with_oblong_boxes_are_judged_too() -> None:
    first = np.arange(6)
    rows = [np.roll(first, -shift) for shift in (0, 3, 1, 4, 2, 5)]
    answer = (np.stack(rows).reshape(-1) + 1).astype(np.uint8)
    puzzles = sudoku.as_puzzles(np.zeros((1, 36), np.uint8), answer[None])
    assert judge(puzzles, 0, answer + np.uint8(1)).solved
    rotated = np.stack([np.roll(first, -shift) for shift in range(6)]).reshape(-1)  # boxes have repeats, lines none
    assert not judge(puzzles, 0, (rotated + 2).astype(np.uint8)).solved


OPEN = "S   " "    " "    " "   G"  # fmt: skip


@pytest.mark.parametrize(
    ("question", "answer", "text", "wrong"),
    [
        (MAZE, WAY, "solved", []),
        (OPEN, "Sooo" "   o" "   o" "   G", "solved", []),
        (OPEN, "S   " "oo  " " oo " "  oG", "solved", []),
        (MAZE, changed(WAY, c12=" "), "not solved: the way from S does not reach G", [13, 14, 15]),
        (MAZE, changed(WAY, c5="o"), "not solved: 7 cells are marked, the way has 6", []),
        (MAZE, changed(WAY, c3="o"), "not solved: 7 cells are marked, the way has 6", [3]),
        (MAZE, changed(WAY, c2="o"), "not solved: 1 cell is changed", [2]),
        (MAZE, changed(WAY, c11="o"), "not solved: 1 cell is changed", [11]),
        ("S  " "   " "G  ", "Soo" "  o" "Goo", "not solved: the way has 6 steps, 2 would do", []),
    ],
)  # fmt: skip
def test_a_maze_is_judged_by_its_way(question: str, answer: str, text: str, wrong: list[int]) -> None:
    label = question if question != MAZE else WAY
    verdict = judge(mazes(question, label), 0, ids(answer))
    assert (verdict.text, np.flatnonzero(verdict.wrong).tolist()) == (text, wrong)
    assert verdict.solved == (text == "solved")


def test_arc_is_judged_by_the_answer_where_there_is_one() -> None:
    labels = np.array([[2, 3, 1, 0], [0, 0, 0, 0]], np.uint8)
    count = np.zeros(2, np.int32)
    puzzles = PuzzleSet("arc", np.full((2, 4), 2, np.uint8), labels, count, count, 12, (2, 2))
    assert judge(puzzles, 0, np.array([2, 3, 1, 7], np.uint8)).solved
    assert judge(puzzles, 0, np.array([2, 4, 1, 7], np.uint8)).text == "not solved: 1 cell differs from the answer"
    assert judge(puzzles, 1, np.array([2, 3, 1, 7], np.uint8)).solved is None


# ------------------------------------------------------------------------------------------------ solving


def test_settled_is_the_segment_after_which_nothing_changes() -> None:
    for thoughts, settled in (([1], 1), ([1, 1, 1], 1), ([1, 2, 2], 2), ([1, 2, 1], 3), ([1, 2, 1, 1], 3)):
        cells = np.array([[n, 0] for n in thoughts], np.uint8)
        assert Solution(cells, cells[-1]).settled == settled


@pytest.mark.parametrize("halting", [False, True])
def test_solutions_hold_every_thought(halting: bool) -> None:
    puzzles = board()
    with thinking(Copier(model(), after=3), None, halting) as thinker:
        (solution,) = solutions(thinker, puzzles)
    assert len(solution.thoughts) == (3 if halting else 4) and solution.settled == 3
    assert (solution.thoughts[1] == puzzles.inputs[0]).all() and (solution.answer == puzzles.labels[0]).all()


def test_one_vote_is_the_last_thought() -> None:
    puzzles = board()
    with thinking(model()) as thinker:
        (once,), (voted,) = solutions(thinker, puzzles), solutions(thinker, puzzles, votes=5)
        (again,) = solutions(thinker, puzzles, votes=5)
    assert (once.answer == once.thoughts[-1]).all() and (once.thoughts == voted.thoughts).all()
    assert (voted.answer == again.answer).all() and (voted.answer != once.answer).any()


def test_solved_puzzles_are_shown_beside_their_question(solver: Path, tmp_path: Path) -> None:
    (tmp_path / "puzzles.txt").write_text(f"{QUESTION}\n\n{ANSWER}\n")
    text = printed(solver, path=str(tmp_path / "puzzles.txt"))
    assert "1 . │ . 4   1 2 │ 3 4\n. . │ . .   3 4 │ 1 2\n────┼────   ────┼────\n2 ." in text
    assert "puzzle 1: solved; ran 4 segments, answer unchanged since segment 2\n" in text
    assert "puzzle 2: solved; ran 4 segments, answer unchanged since segment 1\n" in text
    assert "\n2 of 2 puzzles solved in " in text and "\x1b" not in text


def test_halting_and_votes_are_told(solver: Path) -> None:
    text = printed(solver, QUESTION, halting=True)
    assert "halted after 2 segments, the last of which still changed the answer" in text
    assert "ran 1 segment;" not in text and "not solved" in printed(solver, QUESTION, segments=1)
    assert "weighted majority of 2 runs" in printed(solver, QUESTION, votes=2)


def test_a_terminal_sees_givens_bold_and_mistakes_red(solver: Path) -> None:
    settings = OmegaConf.merge(OmegaConf.structured(SolveSettings), {"run": str(solver)})
    for segments, marks in (
        (4, {"\x1b[1m1\x1b[0m", "\x1b[36m2\x1b[0m"}),
        (1, {"\x1b[1m1\x1b[0m", "\x1b[1;31m.\x1b[0m"}),
    ):
        text = io.StringIO()
        settings.segments = segments
        solve(
            settings, io.StringIO(QUESTION), Console(file=text, force_terminal=True, color_system="standard", width=80)
        )
        assert all(mark in text.getvalue() for mark in marks)


def test_quiet_prints_answers_alone(solver: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(solver, f"{QUESTION}\n{QUESTION}\n", quiet=True) == f"{ANSWER}\n{ANSWER}\n"
    assert "2 of 2 puzzles solved" in capsys.readouterr().err


def test_lines_are_answered_as_they_come(solver: Path) -> None:
    text = io.StringIO()

    def lines() -> Any:
        yield QUESTION
        assert text.getvalue().count("puzzle 1: solved") == 1
        yield QUESTION

    solve(OmegaConf.merge(OmegaConf.structured(SolveSettings), {"run": "x"}), lines(), Console(file=text))  # type: ignore[arg-type]
    assert "2 of 2 puzzles solved" in text.getvalue()


def test_a_dash_is_standard_input(
    solver: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert main(["solve", "-", f"run={solver}", "quiet=true"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"


@pytest.mark.parametrize("text", [f"id,question\n1,{QUESTION}\n", f"question,answer\n{QUESTION},\n{QUESTION}\n"])
def test_a_csv_needs_no_answers(text: str, solver: Path, tmp_path: Path) -> None:
    (tmp_path / "boards.csv").write_text(text)
    count = text.count(QUESTION)
    assert f"{count} of {count} puzzle" in printed(solver, path=str(tmp_path / "boards.csv"))
    (tmp_path / "boards.csv").write_text(f"puzzle,answer\n{QUESTION},{ANSWER}\n")
    with pytest.raises(UsageError, match=r"boards.csv:2: no 'question'; it has puzzle, answer"):
        printed(solver, path=str(tmp_path / "boards.csv"))


def test_nothing_is_told_of_answers_that_cannot_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.array([[2] * 16, [0] * 16, [0] * 16], np.uint8)
    count = np.zeros(3, np.int32)
    grids = PuzzleSet("arc", np.full((3, 16), 2, np.uint8), labels, count, count, 6, (4, 4))
    monkeypatch.setattr("hrm.puzzle.solve.load_model", lambda path: (Copier(model()), {"task": "arc"}))
    for rows, told in (([0, 1], "1 of 1 puzzle solved in"), ([1, 2], "2 puzzles answered in")):
        grids.subset(rows).save(tmp_path / "grids.npz")
        assert told in printed(tmp_path, path=str(tmp_path / "grids.npz"))


def test_several_files_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", "a.txt", "b.txt", f"run={run}"]) == 2
    assert "solve takes one path and was given 2: a.txt, b.txt" in capsys.readouterr().err


def test_an_untrained_model_from_disk_solves_nothing(run: Path) -> None:
    text = printed(run, QUESTION)
    assert "puzzle 1: not solved: " in text and "0 of 1 puzzle solved" in text


def test_mazes_keep_their_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm.puzzle.solve.load_model", lambda path: (Copier(model()), {"task": "maze"}))
    text = printed(tmp_path, MAZE + "\n")
    assert "S #    S # \n  #    o # \n ##G   o##G\n       oooo\npuzzle 1: solved" in text


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_the_picture_shows_every_segment(ending: str, run: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "new" / f"thoughts.{ending}"
    printed(run, f"{QUESTION}\n{ANSWER}", picture=str(picture))
    with Image.open(picture) as image:
        assert getattr(image, "n_frames", 1) == (4 if ending == "gif" else 1)


@pytest.mark.parametrize(
    ("lines", "values", "message"),
    [
        (f"{QUESTION}\n123\n", {}, "line 2: the puzzle has 3 characters"),
        (f"\n{QUESTION[:-1]}9\n", {}, "line 2: the puzzle has '9' at character 16"),
        ("11" + QUESTION[2:], {}, "line 1: the puzzle has a digit twice"),
        ("." * 81, {}, "line 1: the puzzle has several solutions"),
        ("", {"path": "no/such.txt"}, "no/such.txt is no file"),
        ("", {"segments": 0}, "segments is 0"),
        ("", {"votes": 0}, "votes is 0"),
        (QUESTION, {"votes": 2, "seed": -1}, "seed is -1"),
        ("", {"picture": "a.jpg"}, "picture is 'a.jpg'"),
        ("", {"run": None}, "run is missing"),
        ("", {"run": "no/such/run"}, "no/such/run holds no model"),
        ("", {"picture": "/dev/null/a.png"}, "picture is '/dev/null/a.png'; nothing can be written there"),
    ],
)
def test_what_cannot_be_used_is_named(lines: str, values: dict[str, Any], message: str, run: Path) -> None:
    with pytest.raises(UsageError, match=message):
        printed(values.pop("run", run), lines, **values)


@pytest.mark.parametrize("about", [{}, {"task": "chess"}])
def test_a_model_of_no_known_task_is_refused(about: dict[str, str], tmp_path: Path) -> None:
    save_model(model(), tmp_path / "model", about)
    with pytest.raises(UsageError, match=r"config.json: task is .*; it should be one of sudoku, maze, arc"):
        printed(tmp_path, QUESTION)


def test_puzzles_of_another_size_than_the_models_are_refused(run: Path, tmp_path: Path) -> None:
    nine = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    with pytest.raises(UsageError, match="line 2: puzzles have 81 cells; they should have 16"):
        printed(run, f"{QUESTION}\n{nine}")
    (tmp_path / "nine.txt").write_text(nine)
    with pytest.raises(UsageError, match=r"nine.txt: puzzles have 81 cells; they should have 16"):
        printed(run, path=str(tmp_path / "nine.txt"))
