"""`hrm data`: what it writes, what it says, and what it refuses."""

import json

import numpy as np
import pytest

from hrm.puzzle import maze, sudoku
from hrm.puzzle.command_data import DataSettings, make_data
from hrm.puzzle.data import PuzzleSet, load_puzzles
from hrm.settings import UsageError, keys_of, load_settings

HARD = "....5.7..4....9.3..8.2..........5.4.3...4.9.....6....15...7..9..68........1.....2"
ANSWER = "123456789457189236689237154296715843315842967874693521542371698768924315931568472"


@pytest.fixture
def run(tmp_path):
    """run(*overrides): what was said and the set that was written to out.npz."""

    def data(*overrides):
        said: list[str] = []
        make_data(load_settings(DataSettings, [f"output={tmp_path}/out.npz", *overrides]), said.append)
        return said, PuzzleSet.load(tmp_path / "out.npz")

    return data


@pytest.fixture
def folder(tmp_path):
    """A data set's folder: 40 boards of 4 x 4, ratings 0 to 39, of which the 11th has no solution."""
    boards = sudoku.generate(4, 40, 0, seed=5)[0].puzzles
    lines = ["source,question,answer,rating"]
    for rating, (question, answer) in enumerate(zip(boards.inputs, boards.labels, strict=True)):
        text = ["".join(map(str, row - 1)) for row in (question, answer)]
        lines.append(f"x,{text[0]},{text[1] if rating != 10 else text[1][::-1]},{rating}")
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards" / "train.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "boards"


def test_generates_small_sudokus_with_some_held_out(run, tmp_path):
    said, shown = run("task=sudoku", "side=4", "size=100", "held_out=20")
    held_out = load_puzzles(tmp_path / "out-held-out.npz")
    assert (len(shown), len(held_out), shown.side, shown.vocab_size) == (100, 20, (4, 4), 6)
    keys = [{sudoku.signature(row - np.uint8(1)) for row in part.inputs} for part in (shown, held_out)]
    assert not keys[0] & keys[1]
    assert said == [
        f"{tmp_path}/out.npz: 100 puzzles of sudoku, 4 x 4; ratings 0 to 0, mean 0.0",
        f"{tmp_path}/out-held-out.npz: 20 puzzles of sudoku, 4 x 4; ratings 0 to 0, mean 0.0",
    ]


def test_generates_mazes(run):
    said, shown = run("task=maze", "side=10", "size=8")
    assert maze.is_solved(shown.inputs, shown.labels, (10, 10)).all()
    assert said[0].endswith("out.npz: 8 puzzles of maze, 10 x 10")


def test_reads_a_file_and_draws_from_it(run, folder):
    draw = (f"path={folder}/train.csv", "size=10", "min_rating=11", "overwrite=true")
    said, shown = run(*draw)
    assert len(shown) == 10
    assert "10 puzzles of sudoku, 4 x 4; ratings " in said[0]
    assert np.array_equal(shown.inputs, run(*draw)[1].inputs)
    assert not np.array_equal(shown.inputs, run(*draw, "seed=1")[1].inputs)


def test_symmetric_copies_of_what_is_held_out_are_left_out(run, tmp_path):
    board = sudoku.generate(4, 3, 0, seed=0)[0].puzzles
    rng = np.random.default_rng(0)
    copies = [sudoku.SudokuAugmenter(4).augment(board.inputs, board.labels, rng)[0] for _ in range(10)]
    lines = ["".join(map(str, row - 1)) for row in np.concatenate(copies)]
    (tmp_path / "boards.txt").write_text("\n".join(lines) + "\n")
    _, shown = run(f"path={tmp_path}/boards.txt", "held_out=1")
    kinds = {sudoku.signature(row - np.uint8(1)) for row in shown.inputs}
    held_out = load_puzzles(tmp_path / "out-held-out.npz")
    assert len(kinds) == 2
    assert len(shown) == 20
    assert sudoku.signature(held_out.inputs[0] - np.uint8(1)) not in kinds


def test_a_data_set_in_a_folder(run, folder):
    with pytest.raises(UsageError, match=r"train.csv:12: the answer .*\. skip_refused=true leaves them out"):
        run(f"dataset={folder}")
    said, shown = run(f"dataset={folder}", "split=train", "skip_refused=true", "min_rating=5")
    assert len(shown) == 34
    assert "train.csv:12: " in said[0]
    assert said[1] == "1 rows refused"
    assert said[2].endswith("34 puzzles of sudoku, 4 x 4; ratings 5 to 39, mean 22.4")
    with pytest.raises(UsageError, match=r"test.csv is no file"):
        run(f"dataset={folder}", "split=test", "overwrite=true")


def test_rows_that_are_cut_short_are_refused_rows(run, folder):
    path = folder / "train.csv"
    header, *rows = path.read_text().splitlines()
    del rows[10]  # which has no solution
    cut = [f"x,{HARD[:16]}", *rows[:3], "x", "x,1.2.,12.4,5,6", rows[3].rpartition(",")[0] + ",easy", *rows[4:]]
    path.write_text("\n".join([header, *cut]) + "\n")
    with pytest.raises(UsageError, match=r"train.csv:2: the row ends before 'answer'; 3 more rows are refused\. skip_"):
        run(f"path={path}")
    said, shown = run(f"path={path}", "skip_refused=true", "check_unique=false", "held_out=2")
    assert said[:5] == [
        f"refused: {path}:2: the row ends before 'answer'",
        f"refused: {path}:6: the row ends before 'question'",
        f"refused: {path}:7: the puzzle has 4 characters; it should have 16",
        f"refused: {path}:8: 'rating' is 'easy'; it should be a whole number",
        "4 rows refused",
    ]
    assert shown.side == (4, 4)


def test_a_maze_that_is_cut_short_is_a_refused_row(run, tmp_path):
    path = tmp_path / "mazes.csv"
    path.write_text("question,answer\nS   \nS  ## ##G,Soo##o##G\n")
    said, shown = run(f"path={path}", "skip_refused=true")
    assert said[:2] == [f"refused: {path}:2: the row ends before 'answer'", "1 rows refused"]
    assert (shown.task, len(shown)) == ("maze", 1)


def test_a_data_set_of_the_hub(run, folder, monkeypatch):
    import huggingface_hub

    asked = []

    def download(*names, **more):
        asked.append((names, more))
        return str(folder / names[1])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    _, shown = run("dataset=sapientinc/sudoku-extreme", "min_rating=11")
    assert asked == [(("sapientinc/sudoku-extreme", "train.csv"), {"repo_type": "dataset"})]
    assert len(shown) == 29

    def missing(*names, **more):
        raise FileNotFoundError("no such data set\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(UsageError, match=r"dataset 'a/b', split 'train': no such data set$"):
        run("dataset=a/b", "overwrite=true")


def test_ratings_are_found_where_the_file_has_none(run, tmp_path):
    (tmp_path / "boards.txt").write_text(HARD + "\n")
    said, shown = run(f"path={tmp_path}/boards.txt", "min_rating=1")
    assert "".join(str(c - 1) for c in shown.labels[0]) == ANSWER
    assert "; ratings " in said[0]
    (tmp_path / "boards.csv").write_text(f"question,answer\n{HARD},{ANSWER}\n")
    with pytest.raises(UsageError, match=r"min_rating is 1; it should be 0, since .* check_unique=true would find"):
        run(f"path={tmp_path}/boards.csv", "min_rating=1", "check_unique=false", "overwrite=true")
    (tmp_path / "mazes.txt").write_text("S  ## ##G\n")
    with pytest.raises(UsageError, match=r"min_rating is 1; it should be 0, since .*mazes.txt has no ratings$"):
        run(f"path={tmp_path}/mazes.txt", "min_rating=1", "overwrite=true")


def test_a_set_is_checked_and_drawn_from_as_text_is(run, tmp_path):
    made = sudoku.generate(9, 20, 0, seed=1)[0]
    assert (made.ratings == 0).any() and (made.ratings > 0).any()
    made.puzzles.save(tmp_path / "set.npz")
    said, shown = run(f"path={tmp_path}/set.npz", "min_rating=1")
    assert np.array_equal(shown.inputs, made.puzzles.inputs[made.ratings > 0])
    assert f"ratings {made.ratings[made.ratings > 0].min()} to " in said[0]
    with pytest.raises(UsageError, match=r"set.npz has no rows of at least min_rating = 1000"):
        run(f"path={tmp_path}/set.npz", "min_rating=1000", "overwrite=true")
    made.puzzles.labels[3] = 2
    made.puzzles.save(tmp_path / "set.npz")
    with pytest.raises(UsageError, match=r"set.npz: row 3: the answer .*\. skip_refused=true leaves them out"):
        run(f"path={tmp_path}/set.npz", "overwrite=true")
    assert len(run(f"path={tmp_path}/set.npz", "overwrite=true", "skip_refused=true")[1]) == 19


def test_arc_of_a_folder(run, tmp_path):
    pair = {"input": [[0, 1]], "output": [[2]]}
    for part, name in (("training", "a"), ("evaluation", "b")):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{name}.json").write_text(json.dumps({"train": [pair], "test": [pair]}))
    said, shown = run("task=arc", f"path={tmp_path}", "copies=3")
    held_out = load_puzzles(tmp_path / "out-held-out.npz", "arc")
    assert (len(shown), len(held_out), shown.num_puzzle_ids) == (12, 4, 9)
    assert said[1].endswith("out-held-out.npz: 4 puzzles of arc, 30 x 30")


def test_files_are_not_overwritten(run, tmp_path):
    run("task=sudoku", "side=4", "size=5")
    with pytest.raises(UsageError, match=r"out.npz is there already; overwrite=true replaces it"):
        run("task=sudoku", "side=4", "size=6")
    assert len(PuzzleSet.load(tmp_path / "out.npz")) == 5
    assert len(run("task=sudoku", "side=4", "size=6", "overwrite=true")[1]) == 6
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UsageError, match=r"output is '.*folder.npz'; it should be a file"):
        run("task=sudoku", "side=4", "size=6", f"output={tmp_path}/folder.npz", "overwrite=true")
    (tmp_path / "out-held-out.npz").write_text("mine")
    with pytest.raises(UsageError, match=r"out-held-out.npz is there already"):
        run("task=sudoku", "side=4", "size=6", "held_out=1", "overwrite=false", f"output={tmp_path}/out2.npz",
            f"held_out_output={tmp_path}/out-held-out.npz")  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "task is null; it should be one of sudoku, maze, arc"),
        (["task=sudku"], "task is 'sudku'; the nearest is 'sudoku'"),
        (["task=sudoku", "output=out.csv"], "output is 'out.csv'; it should be the name of a file that ends in .npz"),
        (["path=a.csv", "dataset=b"], "path and dataset given; it should be one of them"),
        (["path=nowhere.csv"], "nowhere.csv is no file"),
        (["task=sudoku", "size=0"], "size is 0; it should be at least 1"),
        (["task=sudoku", "held_out=-1"], "held_out is -1; it should be at least 0"),
        (["task=sudoku", "side=0"], "side is 0; it should be at least 1"),
        (["path=a.csv", "side=4"], "side is 4; it should be null where puzzles are read"),
        (["task=arc", "size=10"], "size is 10; it should be null for arc"),
        (["task=arc", "held_out=10"], "held_out is 10; it should be 0 for arc"),
        (["task=maze", "min_rating=3"], "min_rating is 3; it should be 0 for maze, which has no ratings"),
        (["task=sudoku", "side=5"], "side is 5; it should be one of 4, 6, 9"),
        (["task=arc", "dataset=b"], "task is 'arc' and dataset given"),
        (
            ["task=sudoku", "output=/dev/null/a.npz"],
            "output is '/dev/null/a.npz'; nothing can be written there: /dev/null is no",
        ),
        (["task=sudoku", "held_out=1", "held_out_output=/dev/null/a.npz"], "held_out_output is '/dev/null/a.npz'"),
    ],
)
def test_settings_that_make_no_sense(run, overrides, message):
    with pytest.raises(UsageError, match=message):
        run(*overrides)


def test_no_rows_are_left(run, folder):
    with pytest.raises(UsageError, match=r"train.csv has no rows of at least min_rating = 40"):
        run(f"dataset={folder}", "min_rating=40")
    with pytest.raises(UsageError, match=r"held_out is 39; it should leave puzzles to train on, and 39 were read"):
        run(f"dataset={folder}", "held_out=39", "skip_refused=true")


def test_every_key_says_what_it_is_for():
    assert all(key.doc for key in keys_of(DataSettings))
