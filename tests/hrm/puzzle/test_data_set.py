"""Puzzle sets: the file, and batches as a function of seed and step."""

import time

import numpy as np
import pytest

from hrm.puzzle.data import BatchStream, PuzzleSet, load_puzzles
from hrm.settings import UsageError


def numbered(count, **changes):
    """A set of 4 x 4 boards that can be told apart by their first two cells."""
    inputs = np.ones((count, 16), np.uint8)
    inputs[:, 0], inputs[:, 1] = 1 + np.arange(count) // 5, 1 + np.arange(count) % 5
    arrays = {
        "inputs": inputs,
        "labels": inputs.copy(),
        "groups": np.arange(count, dtype=np.int32),
        "puzzle_ids": np.zeros(count, np.int32),
    }
    return PuzzleSet("sudoku", **{**arrays, **changes}, vocab_size=6, side=(4, 4))


def grouped():
    """Three groups: one of two puzzle ids with three rows each, two of one id with one row."""
    groups = np.array([7, 7, 7, 7, 7, 7, 2, 3], np.int32)
    ids = np.array([1, 2, 1, 2, 1, 2, 3, 4], np.int32)
    board = np.ones((8, 16), np.uint8)
    return PuzzleSet("sudoku", board, board, groups, ids, vocab_size=6, side=(4, 4), num_puzzle_ids=5)


# ------------------------------------------------------------------------------------------------ the set and its file


def test_what_is_saved_is_loaded(tmp_path):
    puzzles = PuzzleSet("arc", *(np.arange(12, dtype=np.uint8).reshape(3, 4) % 12,) * 2, np.array([0, 0, 5], np.int32),
                        np.array([1, 1, 2], np.int32), 12, (2, 2), 3, ("none", "ä|1", "b"))  # fmt: skip
    puzzles.save(tmp_path / "new" / "set.npz")
    loaded = PuzzleSet.load(tmp_path / "new" / "set.npz")
    for name in ("inputs", "labels", "groups", "puzzle_ids"):
        assert np.array_equal(getattr(loaded, name), getattr(puzzles, name))
        assert getattr(loaded, name).dtype == getattr(puzzles, name).dtype
    assert (loaded.task, loaded.vocab_size, loaded.side, loaded.num_puzzle_ids, loaded.names) == (
        "arc", 12, (2, 2), 3, ("none", "ä|1", "b"))  # fmt: skip


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "set.npz"
    numbered(3).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", lambda file, **_: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        numbered(4).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["set.npz"]


def test_subset_keeps_the_names():
    chosen = grouped().subset([6, 0])
    assert chosen.puzzle_ids.tolist() == [3, 1]
    assert (len(chosen), chosen.num_puzzle_ids) == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inputs": np.ones((2, 15), np.uint8)},
            "inputs has puzzles of 15 cells; they should have 16, as side is 4 x 4",
        ),
        ({"labels": np.ones((2, 16), np.int64)}, r"labels is int64\(2, 16\)"),
        ({"labels": np.full((2, 16), 6, np.uint8)}, "labels has ids from 6 to 6; they should be below 6"),
        ({"puzzle_ids": np.ones(2, np.int32)}, "puzzle_ids has ids from 1 to 1; they should be below 1"),
    ],
)
def test_arrays_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        numbered(2, **changes)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ([9, 9], "inputs has puzzles of 16 cells; they should have 81, as side is 9 x 9"),
        ([2, 8], "side is 2 x 8; a sudoku should have one of 4 x 4, 6 x 6, 9 x 9"),
        (4, r"side is \(4,\); it should be rows and columns"),
        ([0, 4], r"side is \(0, 4\); it should be rows and columns, at least 1 each"),
    ],
)
def test_a_side_that_does_not_fit(tmp_path, side, message):
    path = tmp_path / "set.npz"
    numbered(2).save(path)
    np.savez(path, **{**np.load(path), "side": np.array(side)})
    with pytest.raises(UsageError, match=f"set.npz: {message}"):
        load_puzzles(path)


def test_files_that_are_no_set(tmp_path):
    path = tmp_path / "set.npz"
    with pytest.raises(UsageError, match=r"set.npz is no file"):
        PuzzleSet.load(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(UsageError, match=r"set.npz is no .npz file, or one cut short$"):
        PuzzleSet.load(path)
    np.savez(path, task="sudoku", inputs=np.array([{}], object))
    with pytest.raises(UsageError, match=r"set.npz is no .npz file of plain arrays"):
        PuzzleSet.load(path)
    np.savez(path, task="sudoku")
    with pytest.raises(UsageError, match=r"set.npz: no array 'inputs'; it has task"):
        PuzzleSet.load(path)
    numbered(2).save(path)
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "task": "chess"})
    with pytest.raises(UsageError, match=r"set.npz: task is 'chess'; it should be one of sudoku, maze, arc"):
        PuzzleSet.load(path)
    np.savez(path, **arrays)
    with pytest.raises(UsageError, match=r"holds puzzles of the task 'sudoku'; it should hold 'maze'"):
        load_puzzles(path, "maze")


def test_inputs_without_any_axis_are_named(tmp_path):
    path = tmp_path / "set.npz"
    numbered(2).save(path)
    np.savez(path, **{**np.load(path), "inputs": np.uint8(3)})
    with pytest.raises(UsageError, match=r"set.npz: inputs is uint8\(\); it should be uint8\(0, 16\)"):
        PuzzleSet.load(path)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "set.npz"
    rng = np.random.default_rng(0)
    numbered(20, inputs=rng.integers(1, 6, (20, 16), np.uint8)).save(path)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole) - 30):
        path.write_bytes(whole[:place] + rng.bytes(30) + whole[place + 30 :])
        try:
            PuzzleSet.load(path)  # where only a date or a comment is hit
        except UsageError as error:
            assert "set.npz" in str(error)
            refused += 1
    assert refused > 0.8 * len(whole)


def test_sizes_that_are_no_numbers(tmp_path):
    path = tmp_path / "set.npz"
    numbered(2).save(path)
    np.savez(path, **{**np.load(path), "vocab_size": np.inf})
    with pytest.raises(UsageError, match=r"set.npz: cannot convert float infinity to integer"):
        PuzzleSet.load(path)


# ------------------------------------------------------------------------------------------------ batches


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_a_batch_is_what_the_model_takes():
    labels = np.ones((4, 16), np.uint8)
    labels[:, 3] = 0
    batch = BatchStream(numbered(4, labels=labels), 6, seed=0, augment=False).batch(0)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "inputs": ((6, 16), "int32"), "labels": ((6, 16), "int32"), "puzzle_identifiers": ((6,), "int32")
    }  # fmt: skip
    assert (batch["labels"][:, 3] == -100).all()
    assert (batch["labels"][:, :3] == 1).all()


@pytest.mark.parametrize("augment", [True, False])
def test_batches_depend_on_seed_and_step_alone(augment):
    puzzles = numbered(10)
    straight = [BatchStream(puzzles, 4, seed=3, augment=augment).batch(step) for step in range(9)]
    stream = BatchStream(puzzles, 4, seed=3, augment=augment)
    for step in (8, 0, 7, 7, 2):
        assert same(stream.batch(step), straight[step])
    assert not same(BatchStream(puzzles, 4, seed=4, augment=augment).batch(0), straight[0])
    assert not same(straight[0], straight[1])


def test_each_pass_shows_each_puzzle_once_in_a_new_order():
    stream = BatchStream(numbered(10), 4, seed=0)
    rows = np.concatenate([stream.rows(step) for step in range(10)]).reshape(4, 10)
    assert all(sorted(order) == list(range(10)) for order in rows.tolist())
    assert len({tuple(order) for order in rows.tolist()}) == 4


def test_a_batch_larger_than_a_pass():
    rows = BatchStream(numbered(3), 10, seed=0).rows(1)
    assert sorted(rows[2:5]) == sorted(rows[5:8]) == [0, 1, 2]


def test_a_visit_shows_all_rows_of_one_id_of_the_group():
    puzzles, seen = grouped(), set()
    stream = BatchStream(puzzles, 5, seed=0, augment=False)
    assert stream.rows_per_pass == 5
    for number in range(40):
        rows = stream.rows(number)
        ids = puzzles.puzzle_ids[rows].tolist()
        chosen = {i for i in ids if i in (1, 2)}
        assert len(chosen) == 1
        assert sorted(ids) == sorted([*chosen] * 3 + [3, 4])
        assert len(set(rows.tolist())) == 5
        first = [i in (1, 2) for i in ids].index(True)
        assert {ids[first], ids[first + 1], ids[first + 2]} == chosen, "rows of a visit stand together"
        seen.add((chosen.pop(), tuple(rows.tolist())))
    assert {i for i, _ in seen} == {1, 2}
    assert len(seen) > 25, "order of groups and of rows in a visit is drawn"


def test_what_a_stream_refuses():
    with pytest.raises(ValueError, match=r"puzzles is empty"):
        BatchStream(numbered(2).subset([]), 4, 0)
    with pytest.raises(ValueError, match=r"batch_size is 0; it should be at least 1"):
        BatchStream(numbered(2), 0, 0)
    with pytest.raises(ValueError, match=r"group 7 has puzzle ids with unequal numbers of rows"):
        BatchStream(grouped().subset([0, 1, 2]), 4, 0)


def test_batches_are_cheap():
    """Loosely: training on a GPU takes a batch of 768 sudokus every 80 ms."""
    board = np.tile(np.arange(1, 10, dtype=np.uint8) + 1, 9)[None].repeat(1000, 0)
    rows = np.arange(1000, dtype=np.int32)
    stream = BatchStream(PuzzleSet("sudoku", board, board, rows, rows * 0, 11, (9, 9)), 768, 0)
    stream.batch(0)
    start = time.process_time()
    for step in range(10):
        stream.batch(step)
    assert (time.process_time() - start) / 10 < 0.02
