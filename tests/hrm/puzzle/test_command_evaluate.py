"""`hrm evaluate` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hrm.cli import main
from hrm.puzzle import PuzzleConfig, PuzzleModel, arc
from hrm.puzzle.data import PuzzleSet
from hrm.puzzle.evaluate import evaluate, predict, vote
from hrm.puzzle.saving import load_model, save_model
from hrm.puzzle.sudoku import generate

NINE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that knows nothing, and puzzles."""
    torch.manual_seed(0)
    config = PuzzleConfig(vocab_size=6, seq_len=16, hidden_size=16, num_heads=2, expansion=1.0, l_layers=1, h_layers=1,
                          puzzle_tokens=0, puzzle_emb_size=0, max_segments=3)  # fmt: skip
    save_model(PuzzleModel(config), tmp_path / "model", {"task": "sudoku", "side": [4, 4], "vocab_size": 6})
    generate(4, 6, 1, seed=0)[0].puzzles.save(tmp_path / "puzzles.npz")
    (tmp_path / "nine.txt").write_text(NINE)
    return tmp_path


def test_it_prints_and_writes_what_evaluate_finds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "results.json"
    words = [f"run={folder}", f"path={folder / 'puzzles.npz'}", "votes=2", f"output={output}"]
    assert main(["evaluate", *words]) == 0
    model, _ = load_model(folder)
    expected = evaluate(model, PuzzleSet.load(folder / "puzzles.npz"))
    found = json.loads(output.read_text())
    assert found["exact"] == expected.exact and found["cells"] == expected.cells and found["count"] == 6
    assert len(found["votes"]["exact"]) == 2
    assert f"{expected.cells:.2%} of the cells" in capsys.readouterr().out


def test_puzzles_beyond_the_limit_need_no_answer(tmp_path: Path) -> None:
    grids = np.full((3, 16), 2, np.uint8)
    labels = grids * np.array([[1], [1], [0]], np.uint8)
    rows = np.arange(3, dtype=np.int32)
    PuzzleSet("arc", grids, labels, rows, rows * 0, vocab_size=6, side=(4, 4)).save(tmp_path / "grids.npz")
    config = PuzzleConfig(vocab_size=6, seq_len=16, hidden_size=16, num_heads=2, expansion=1.0, l_layers=1, h_layers=1,
                          puzzle_tokens=0, puzzle_emb_size=0, max_segments=1)  # fmt: skip
    save_model(PuzzleModel(config), tmp_path / "model", {"task": "arc"})
    words = ["evaluate", f"run={tmp_path}", f"path={tmp_path / 'grids.npz'}"]
    assert main([*words, "limit=2"]) == 0
    assert main(words) == 2


@pytest.mark.parametrize("halting", [False, True])
def test_arc_is_also_scored_by_two_answers(halting: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = PuzzleConfig(vocab_size=12, seq_len=900, hidden_size=16, num_heads=2, expansion=1.0, l_layers=1,
                          h_layers=1, puzzle_tokens=0, puzzle_emb_size=0, max_segments=2)  # fmt: skip
    model, one = PuzzleModel(config), np.ones((2, 2), np.uint8)
    tasks = [arc.Task(name, [(one, one)], [(number * one, one)]) for number, name in enumerate("abc")]
    _, puzzles = arc.build([], tasks, 2, seed=0)
    answers, sure = predict(model, puzzles, halting=halting)
    first = [puzzles.names[puzzle].startswith("a") for puzzle in puzzles.puzzle_ids].index(True)
    true = arc.unframed(answers[first])
    for row, puzzle in enumerate(puzzles.puzzle_ids):  # what it finds for the first copy of a is right
        name, copy = arc.copy_of(puzzles.names[puzzle])
        if name == "a":
            puzzles.labels[row] = arc.framed(copy.apply(true))
    save_model(model, tmp_path / "model", {"task": "arc"})
    puzzles.save(tmp_path / "arc.npz")
    words = [f"run={tmp_path}", f"path={tmp_path / 'arc.npz'}", f"output={tmp_path / 'found.json'}", "batch_size=4"]
    assert main(["evaluate", *words, f"halting={halting}"]) == 0
    expected = arc.score(arc.vote(puzzles, answers, sure))
    assert 0 < expected < 1
    assert json.loads((tmp_path / "found.json").read_text())["two_answers"] == expected
    assert f"two answers a test input by votes of its copies: {expected:.2%}\n" in capsys.readouterr().out


def test_the_votes_halt_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "hrm.puzzle.command_evaluate.vote", lambda *args, **how: asked.append(how) or vote(*args, **how)
    )
    assert main(["evaluate", f"run={folder}", f"path={folder / 'puzzles.npz'}", "votes=2", "halting=true"]) == 0
    assert asked[0]["halting"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["path=puzzles.npz"], "run is None"),
        (["run=nowhere", "path=puzzles.npz"], "nowhere"),
        (["run=.", "path=missing.npz"], "missing.npz is no file"),
        (["run=.", "path=puzzles.npz", "votes=0"], "votes is 0; it should be at least 1"),
        (["run=.", "path=puzzles.npz", "votes=2", "seed=-1"], "seed is -1; it should be at least 0"),
        (["run=.", "path=puzzles.npz", "output=no/such/file"], "output is 'no/such/file'"),
        (["run=.", "path=puzzles.npz", "output=new.json", "segments=0"], "segments is 0; it should be at least 1, or"),
        (["run=.", "path=puzzles.npz", "output=new.json", "limit=0"], "limit is 0; it should be at least 1, or null"),
        (["run=.", "path=nine.txt", "output=new.json"], "puzzles have 81 cells; they should have 16"),
    ],
)
def test_what_cannot_be_used_is_refused(
    folder: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["evaluate", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out  # before anything is evaluated
    assert not (folder / "new.json").exists()  # an empty file would look like a result
