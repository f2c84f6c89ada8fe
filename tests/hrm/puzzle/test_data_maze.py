"""Mazes: what is refused and where, shortest ways, the eight symmetries, and generated mazes."""

from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hrm.puzzle import maze
from hrm.puzzle.data import TextRow, load_puzzles
from hrm.settings import UsageError

SHARED = Path(__file__).parents[4] / "shared" / "data" / "maze"
MAZE = """\
S #  \
  # #\
 ##  \
    #\
### G"""
ANSWER = """\
S #  \
o # #\
o##  \
oooo#\
###oG"""


def rows_of(count, question=MAZE, answer=ANSWER):
    return [f"{question},{answer}"] * count


@pytest.fixture
def csv_file(tmp_path):
    def write(*rows):
        path = tmp_path / "mazes.csv"
        path.write_text("\n".join(["question,answer", *rows]) + "\n")
        return path

    return write


def ids(text):
    return np.array([[maze.SYMBOLS.index(c) + 1 for c in text]], np.uint8)


def steps_by_queue(free, start):
    """Breadth first search over one maze, cell by cell."""
    found, queue = {start: 0}, deque([start])
    while queue:
        row, column = queue.popleft()
        for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if min(near) >= 0 and max(near) < len(free) and free[near] and near not in found:
                found[near] = found[row, column] + 1
                queue.append(near)
    return found


@pytest.fixture(scope="module")
def generated():
    """60 mazes of 12 x 12 and 20 held-out ones."""
    return maze.generate(12, 60, 20, seed=0)


# ------------------------------------------------------------------------------------------------ reading


def test_reads_text_with_and_without_answers(csv_file, tmp_path):
    given = load_puzzles(csv_file(*rows_of(1)))
    (tmp_path / "mazes.txt").write_text(MAZE + "\n")
    found = load_puzzles(tmp_path / "mazes.txt")
    assert np.array_equal(given.inputs, ids(MAZE))
    assert np.array_equal(given.labels, ids(ANSWER))
    assert np.array_equal(found.labels, given.labels)
    assert (given.task, given.vocab_size, given.side, given.puzzle_ids.tolist()) == ("maze", 6, (5, 5), [0])


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        (MAZE[1:], ANSWER, "the maze has 24 characters; it should have 25"),
        (MAZE, ANSWER + "#", "the answer has 26 characters; it should have 25"),
        (MAZE.replace("G", "x"), ANSWER, "the maze has 'x' at character 25; it should be one of '# SGo'"),
        (ANSWER, ANSWER, "the maze has other symbols than '#', ' ', 'S' and 'G'"),
        (MAZE.replace("G", " "), ANSWER, "the maze has no goal G, or several"),
        (MAZE.replace("G", "S"), ANSWER, "the maze has no start S, or several"),
        (MAZE[:15] + "#" + MAZE[16:], ANSWER, "the maze has no way from S to G"),
        (MAZE, ANSWER.replace("#", " ", 1), "the answer differs from the maze elsewhere than"),
        (MAZE, ANSWER.replace("#", "o", 1), "the answer differs from the maze elsewhere than"),
        (MAZE, ANSWER.replace("o", " ", 1), "the answer's path does not lead from S to G"),
        (MAZE, ANSWER[:3] + "o" + ANSWER[4:], "the answer has 'o' aside from its path"),
        ("S" + " " * 23 + "G", "Soooo    ooooooo    ooooG", "the answer's path is not a shortest one"),
    ],
)
def test_bad_mazes_are_named_by_file_and_line(csv_file, question, answer, message):
    path = csv_file(*rows_of(2), f"{question},{answer}")
    with pytest.raises(UsageError) as error:
        load_puzzles(path, "maze")
    assert str(error.value).startswith(f"{path}:4: {message}")


def test_published_arrays_are_checked_by_row(tmp_path):
    path = tmp_path / "mazes.npz"
    inputs, labels = ids(MAZE).repeat(3, 0), ids(ANSWER).repeat(3, 0)
    np.savez(path, inputs=inputs, labels=labels)
    assert np.array_equal(load_puzzles(path).labels, labels)
    labels[2, 5] = maze.FREE
    np.savez(path, inputs=inputs, labels=labels)
    with pytest.raises(UsageError, match=r"mazes.npz: row 2: the answer's path does not lead from S to G"):
        load_puzzles(path)
    np.savez(path, inputs=inputs, labels=labels[:, :20])
    with pytest.raises(UsageError, match=r"mazes.npz: labels is uint8\(3, 20\); it should be uint8\(3, 25\)"):
        load_puzzles(path)
    np.savez(path, inputs=inputs.reshape(3, 5, 5), labels=labels)
    with pytest.raises(UsageError, match=r"inputs is uint8\(3, 5, 5\); it should be uint8\(mazes, cells\)"):
        load_puzzles(path)
    np.savez(path, inputs=inputs[:, :24], labels=labels[:, :24])
    message = r"mazes.npz: its mazes have 24 cells; they should be squares, such as 900 cells \(30 x 30\)"
    with pytest.raises(UsageError, match=message):
        load_puzzles(path)
    with pytest.raises(UsageError, match="holds inputs and labels alone, as published mazes do; it should hold 'sudo"):
        load_puzzles(path, "sudoku")


def test_a_set_is_checked_by_row(tmp_path):
    path = tmp_path / "mazes.npz"
    inputs, labels = ids(MAZE).repeat(3, 0), ids(ANSWER).repeat(3, 0)
    labels[1] = 0
    made = maze.as_puzzles(inputs, labels, (5, 5))
    made.save(path)
    assert maze.is_solved(inputs, load_puzzles(path).labels, (5, 5)).all()
    made.labels[2, 5] = maze.FREE
    made.save(path)
    with pytest.raises(UsageError, match=r"mazes.npz: row 2: the answer's path does not lead from S to G"):
        load_puzzles(path)
    replace(made, vocab_size=7).save(path)
    with pytest.raises(UsageError, match=r"mazes.npz: vocab_size is 7; it should be 6"):
        load_puzzles(path)


def test_a_maze_that_is_no_square(csv_file):
    with pytest.raises(UsageError, match=r"mazes.csv:2: the maze has 24 characters; it should have a square number"):
        load_puzzles(csv_file(f"{MAZE[1:]},{ANSWER[1:]}"), "maze")
    puzzles, refused = maze.from_rows([TextRow("a:1", MAZE[1:], ANSWER, None), TextRow("a:2", MAZE, ANSWER, None)])
    assert len(puzzles) == 1 and refused == ["a:1: the maze has 24 characters; it should have 25"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the mazes of ../shared/data/maze")
def test_the_published_mazes_are_sound_and_have_many_shortest_ways():
    puzzles = load_puzzles(SHARED / "test.npz").subset(slice(100))
    assert len(puzzles) == 100
    other, ties = maze.shortest_ways(puzzles.inputs, puzzles.side, np.random.default_rng(0))
    assert ties.any(1).all()
    assert (other != puzzles.labels).any(1).mean() > 0.9
    assert np.array_equal(maze.shortest_ways(puzzles.inputs, puzzles.side)[0], puzzles.labels)
    assert maze.is_solved(puzzles.inputs, other, puzzles.side).all()


# ------------------------------------------------------------------------------------------------ ways


def test_distances_are_those_of_a_queue():
    rng = np.random.default_rng(0)
    free = rng.random((20, 9, 9)) < 0.65
    start = np.zeros_like(free)
    for number, cells in enumerate(free):
        row, column = np.argwhere(cells)[0]
        start[number, row, column] = True
    steps = maze.distances(free, start)
    for cells, at, found in zip(free, start, steps, strict=True):
        wanted = steps_by_queue(cells, tuple(np.argwhere(at)[0].tolist()))
        assert {tuple(c): int(found[tuple(c)]) for c in np.argwhere(found >= 0).tolist()} == wanted


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("Soo  o  G", True),
        ("S  oo  oG", True),
        ("S oo   oG", False),  # not joined
        ("Sooo oo G", False),  # more than a way
        ("So oo ooG", False),
        ("S       G", False),
        ("So# o# oG", False),  # other walls
    ],
)
def test_a_prediction_is_right_when_it_is_a_shortest_way(prediction, right):
    inputs, predicted = ids("S       G"), ids(prediction)
    assert maze.is_solved(inputs, predicted, (3, 3)).tolist() == [right]
    predicted[0, 6] = 0  # padding is no cell
    assert not maze.is_solved(inputs, predicted, (3, 3)).any()


# ------------------------------------------------------------------------------------------------ symmetries


def test_all_eight_symmetries_and_no_others(generated):
    puzzles = generated[0].subset([0] * 4000)
    inputs, labels = maze.MazeAugmenter(puzzles.side, relabel=False).augment(
        puzzles.inputs, puzzles.labels, np.random.default_rng(0)
    )
    board = puzzles.inputs[0].reshape(12, 12)
    wanted = {np.rot90(b, k).tobytes() for b in (board, board.T) for k in range(4)}
    seen, counts = np.unique(inputs, axis=0, return_counts=True)
    assert len(wanted) == 8
    assert {row.tobytes() for row in seen} == wanted
    assert counts.min() > 400
    assert maze.is_solved(inputs, labels, puzzles.side).all()
    assert {maze.canonical(row, (12, 12)) for row in seen} == {min(wanted)}


# ------------------------------------------------------------------------------------------------ generating


def test_generated_mazes_have_one_shortest_way(generated):
    puzzles = generated[0]
    again, ties = maze.shortest_ways(puzzles.inputs, puzzles.side, np.random.default_rng(9))
    assert maze.is_solved(puzzles.inputs, puzzles.labels, puzzles.side).all()
    assert np.array_equal(again, puzzles.labels)
    assert not ties.any()
    for cell in np.flatnonzero(puzzles.labels[0] == maze.PATH):  # without any one of its cells the way is longer
        closed = puzzles.inputs[:1].copy()
        closed[0, cell] = maze.WALL
        free = closed.reshape(12, 12) != maze.WALL
        start, goal = (
            tuple(np.argwhere(closed.reshape(12, 12) == what)[0].tolist()) for what in (maze.START, maze.GOAL)
        )
        length = int((puzzles.labels[0] == maze.PATH).sum()) + 1
        assert steps_by_queue(free, start).get(goal, length + 1) > length


def test_generated_mazes_are_long_and_walled_like_the_published(generated):
    inputs = np.concatenate([part.inputs for part in generated])
    lengths = np.concatenate([(part.labels == maze.PATH).sum(1) + 1 for part in generated])
    assert lengths.min() >= round(109 / 900 * 144)
    assert 0.3 < (inputs == maze.WALL).mean() < 0.5


def test_held_out_mazes_are_no_symmetric_copies(generated):
    forms = [maze.canonical(row, (12, 12)) for part in generated for row in part.inputs]
    assert len(set(forms)) == 80


def test_generating_depends_on_the_seed_alone(generated):
    assert np.array_equal(maze.generate(12, 60, 20, seed=0)[1].inputs, generated[1].inputs)
    assert not np.array_equal(maze.generate(12, 60, 20, seed=1)[1].inputs, generated[1].inputs)


def test_full_size():
    puzzles, held_out = maze.generate(30, 3, 0, seed=0)
    assert ((puzzles.labels == maze.PATH).sum(1) + 1 >= 109).all()
    assert (len(puzzles), len(held_out)) == (3, 0)
    with pytest.raises(UsageError, match=r"side is 4; it should be at least 5"):
        maze.generate(4, 1, 0, seed=0)


def test_turned_mazes_with_several_shortest_ways_are_labelled_by_the_rule() -> None:
    open_field = np.full((1, 25), 2, np.uint8)
    open_field[0, 0], open_field[0, 24] = maze.START, maze.GOAL
    labels = maze.shortest_ways(open_field, (5, 5))[0]
    puzzles = maze.as_puzzles(open_field, labels, (5, 5))
    assert maze.follows_rule(puzzles)
    augmenter = maze.MazeAugmenter((5, 5), relabel=True)
    many = np.repeat(open_field, 32, 0), np.repeat(labels, 32, 0)
    inputs, found = augmenter.augment(*many, np.random.default_rng(0))
    assert len(np.unique(inputs, axis=0)) == 4  # S and G in the corners: eight symmetries, two by two the same
    assert np.array_equal(found, maze.shortest_ways(inputs, (5, 5))[0])
    turned = maze.MazeAugmenter((5, 5), relabel=False).augment(*many, np.random.default_rng(0))[1]
    assert not np.array_equal(found, turned)
    assert not maze.follows_rule(maze.as_puzzles(inputs, turned, (5, 5)))
