"""Sudoku: what is refused and where, what the solver finds, the symmetries, and generated boards."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hrm.puzzle import sudoku
from hrm.puzzle.data import BatchStream, load_puzzles
from hrm.puzzle.solver import BOXES, repeats, solve
from hrm.settings import UsageError

SHARED = Path(__file__).parents[4] / "shared" / "data" / "sudoku"
EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
EASY_ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HARD = "....5.7..4....9.3..8.2..........5.4.3...4.9.....6....15...7..9..68........1.....2"  # many guesses
HARD_ANSWER = "123456789457189236689237154296715843315842967874693521542371698768924315931568472"
FOUR, FOUR_ANSWER = ".34..2.3...42...", "1342421331242431"


@pytest.fixture
def csv_file(tmp_path):
    """csv_file(*rows): a file with the header question,answer,rating and these rows."""

    def write(*rows, header="question,answer,rating"):
        path = tmp_path / "boards.csv"
        path.write_text("\n".join([header, *rows]) + "\n")
        return path

    return write


def boards(text):
    return np.array([[int(c) for c in line.replace(".", "0")] for line in text.split()], np.uint8)


def is_latin(labels, side):
    """Whether each row of labels is a full board without repetition."""
    digits = labels - np.uint8(1)
    return bool((digits > 0).all() and not repeats(digits).any() and digits.max() == side)


# ------------------------------------------------------------------------------------------------ reading


def test_reads_both_forms_of_csv_and_plain_text(csv_file, tmp_path):
    plain = load_puzzles(csv_file(f"{EASY},{EASY_ANSWER},0"))
    published = load_puzzles(csv_file(f"x,{EASY},{EASY_ANSWER},0", header="source,question,answer,rating"))
    (tmp_path / "boards.txt").write_text(f"{EASY.replace('.', '0')}\n\n{HARD}\n")
    text = load_puzzles(tmp_path / "boards.txt")
    assert np.array_equal(plain.inputs, published.inputs)
    assert np.array_equal(text.inputs[:1], plain.inputs)
    assert text.labels.tolist() == [[int(c) + 1 for c in answer] for answer in (EASY_ANSWER, HARD_ANSWER)]
    assert plain.inputs[0, :5].tolist() == [6, 4, 1, 1, 8]
    assert (plain.task, plain.vocab_size, plain.side, plain.num_puzzle_ids) == ("sudoku", 11, (9, 9), 1)


def test_reads_small_boards(tmp_path):
    (tmp_path / "four.txt").write_text(FOUR + "\n")
    (tmp_path / "six.txt").write_text("1.3456456123.31564564231312645645312" + "\n")
    four, six = load_puzzles(tmp_path / "four.txt"), load_puzzles(tmp_path / "six.txt")
    assert four.labels[0].tolist() == [int(c) + 1 for c in FOUR_ANSWER]
    assert (four.vocab_size, four.side, six.vocab_size, six.side) == (6, (4, 4), 8, (6, 6))
    assert is_latin(six.labels, 6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{EASY[:-1]},{EASY_ANSWER},0", "the puzzle has 80 characters; it should have 81"),
        (f"{EASY},{EASY_ANSWER}1,0", "the answer has 82 characters; it should have 81"),
        (f"x{EASY[1:]},{EASY_ANSWER},0", "the puzzle has 'x' at character 1; it should be 1 to 9, '.' or 0"),
        (f"{EASY[:80]}€,{EASY_ANSWER},0", "the puzzle has '€' at character 81"),
        (f"55{EASY[2:]},{EASY_ANSWER},0", "the puzzle has a digit twice in a row, column or box"),
        (f"{EASY},.{EASY_ANSWER[1:]},0", "the answer has empty cells"),
        (f"{EASY},{HARD_ANSWER},0", "the answer changes a digit of the puzzle"),
        (f"{EASY},{EASY_ANSWER[:2]}6{EASY_ANSWER[3:]},0", "the answer has a digit twice in a row, column or box"),
        (f"..{EASY[2:30]}{'.' * 51},{EASY_ANSWER},0", "the puzzle has several solutions; it should have one"),
    ],
)
def test_bad_boards_are_named_by_file_and_line(csv_file, row, message):
    path = csv_file(f"{HARD},{HARD_ANSWER},20", row)
    with pytest.raises(UsageError) as error:
        load_puzzles(path)
    assert str(error.value).startswith(f"{path}:3: {message}")


def test_a_board_without_solution(tmp_path):
    path = tmp_path / "boards.txt"
    path.write_text(f"{EASY}\n{'12345678.' + '.' * 8 + '9' + '.' * 63}\n")
    with pytest.raises(UsageError, match=r"boards.txt:2: the puzzle has no solution; it should have one"):
        load_puzzles(path)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("question,rating", f"{EASY},0", "no 'answer'; it has question, rating"),
        ("question,answer,rating", EASY, "the row ends before 'answer'$"),
        ("question,answer,rating", f"{EASY},{EASY_ANSWER},hard", "'rating' is 'hard'; it should be a whole number"),
        ("question,answer", "123,123", r"the puzzle has 3 characters; it should have one of 16 \(4 x 4\), 36"),
    ],
)
def test_rows_that_are_no_boards(csv_file, header, row, message):
    with pytest.raises(UsageError, match=rf"boards.csv:2: {message}"):
        load_puzzles(csv_file(row, header=header))


def test_no_file_no_rows_no_text(csv_file, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere.csv is no file"):
        load_puzzles(tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match=r"boards.csv has no rows"):
        load_puzzles(csv_file())
    (tmp_path / "boards.csv").write_bytes(b"question,answer\n\xff\n")
    with pytest.raises(UsageError, match=r"boards.csv: no valid UTF-8"):
        load_puzzles(tmp_path / "boards.csv")


def test_a_quotation_mark_that_nothing_closes_is_named(tmp_path):
    path = tmp_path / "boards.csv"
    path.write_text('question,answer\n"' + "1...............,\n" * 10_000)
    with pytest.raises(UsageError, match=r"boards\.csv:\d+: cannot be read as CSV \(field larger than"):
        load_puzzles(path)


@pytest.mark.parametrize(
    ("name", "cell", "value", "message"),
    [
        ("inputs", slice(0, 2), 2, "the puzzle has a digit twice in a row, column or box"),
        ("inputs", 3, 0, "the puzzle has padding; it should have none"),
        ("labels", 5, 0, "the answer has empty cells; it should have none"),
        ("labels", slice(0, 16), 2, "the answer "),
    ],
)
def test_a_set_is_checked_by_row(tmp_path, name, cell, value, message):
    made = sudoku.generate(4, 3, 0, seed=0)[0].puzzles
    getattr(made, name)[2, cell] = value
    made.save(tmp_path / "set.npz")
    with pytest.raises(UsageError, match=rf"set.npz: row 2: {message}"):
        load_puzzles(tmp_path / "set.npz", check_unique=False)


def test_a_set_gets_the_answers_that_it_lacks_and_keeps_its_groups(tmp_path):
    made = sudoku.generate(4, 3, 0, seed=0)[0].puzzles
    replace(made, labels=np.zeros_like(made.labels), groups=made.groups + np.int32(7)).save(tmp_path / "set.npz")
    loaded = load_puzzles(tmp_path / "set.npz")
    assert np.array_equal(loaded.labels, made.labels) and loaded.groups.tolist() == [7, 8, 9]
    replace(made, inputs=np.ones_like(made.inputs)).save(tmp_path / "set.npz")
    load_puzzles(tmp_path / "set.npz", check_unique=False)
    with pytest.raises(UsageError, match=r"row 0: the puzzle has several solutions.* \(and 2 more rows\)"):
        load_puzzles(tmp_path / "set.npz")


def test_sets_that_are_no_sudokus(tmp_path):
    made = sudoku.generate(4, 3, 0, seed=0)[0].puzzles
    replace(made, vocab_size=7).save(tmp_path / "set.npz")
    with pytest.raises(UsageError, match=r"set.npz: vocab_size is 7; it should be 6 for 4 x 4"):
        load_puzzles(tmp_path / "set.npz")
    made.subset([]).save(tmp_path / "set.npz")
    with pytest.raises(UsageError, match=r"set.npz has no puzzles"):
        load_puzzles(tmp_path / "set.npz")


def test_all_refused_rows_are_told_and_the_others_kept(csv_file):
    from hrm.puzzle.data import read_rows

    path = csv_file(f"{EASY[1:]},{EASY_ANSWER},1", f"{HARD},{HARD_ANSWER},20", f"{EASY},{HARD_ANSWER},1")
    rated, refused = sudoku.from_rows(list(read_rows(path)))
    assert [line.split(": ")[0] for line in refused] == [f"{path}:2", f"{path}:4"]
    assert rated.ratings.tolist() == [20]
    with pytest.raises(UsageError, match=r"\(and 1 more rows\)"):
        load_puzzles(path)


def test_unique_solutions_are_taken_on_trust_when_asked(csv_file):
    several = csv_file(f"{'.' * 81},{EASY_ANSWER},0")
    assert len(load_puzzles(several, check_unique=False)) == 1
    with pytest.raises(UsageError, match=r"several solutions"):
        load_puzzles(several)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the puzzles of ../shared/data/sudoku")
def test_the_collected_puzzles_are_sound_and_rated_alike():
    from hrm.puzzle.data import read_rows

    rows = list(read_rows(SHARED / "train.csv"))[:100]
    rated, refused = sudoku.from_rows([row._replace(rating=None) for row in rows])
    assert not refused
    assert len(rated.puzzles) == 100
    ratings = np.array([row.rating for row in rows])
    assert np.corrcoef(np.log1p(ratings), np.log1p(rated.ratings))[0, 1] > 0.8


# ------------------------------------------------------------------------------------------------ solving


def test_counts_solutions_by_brute_force():
    """All 4 x 4 boards are 288; boards with some digits taken out have as many solutions as full boards agree."""
    lines = np.array(list(itertools.permutations(range(1, 5))), np.uint8)
    full = np.array([np.concatenate(rows) for rows in itertools.product(lines, repeat=4)], np.uint8)
    full = full[~repeats(full)]
    assert len(full) == 288
    rng = np.random.default_rng(0)
    questions = full[rng.integers(288, size=200)] * (rng.random((200, 16)) < 0.35)
    questions[:20, 0] = questions[:20, 0] % 4 + 1  # some without solution
    fits = np.array([((full == q) | (q == 0)).all(1).sum() for q in questions])
    found = solve(questions.astype(np.uint8), limit=1000)
    assert np.array_equal(found.solutions, fits)
    assert set(np.minimum(fits, 2)) == {0, 1, 2}
    limited = solve(questions.astype(np.uint8))
    assert np.array_equal(limited.solutions, np.minimum(fits, 2))


def test_solves_and_counts_guesses():
    found = solve(boards(f"{EASY} {HARD}"))
    assert ["".join(map(str, row)) for row in found.solution] == [EASY_ANSWER, HARD_ANSWER]
    assert found.solutions.tolist() == [1, 1]
    assert found.guesses[0] == 0
    assert found.guesses[1] > 5


def test_a_digit_can_be_forbidden():
    without = np.zeros((2, 81), np.uint8)
    without[0, 2], without[1, 2] = 4, 5
    assert solve(boards(f"{EASY} {EASY}"), without=without).solutions.tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------ symmetries


@pytest.fixture(scope="module", params=[4, 6, 9])
def solved(request):
    """30 boards of each size."""
    rated, _ = sudoku.generate(request.param, 30, 0, seed=1)
    return rated.puzzles


def test_an_augmented_answer_still_solves_its_question(solved):
    rng = np.random.default_rng(0)
    inputs, labels = sudoku.SudokuAugmenter(solved.side[0]).augment(solved.inputs, solved.labels, rng)
    assert inputs.dtype == labels.dtype == np.uint8
    assert is_latin(labels, solved.side[0])
    assert ((inputs == 1) | (inputs == labels)).all()
    assert ((inputs > 1).sum(1) == (solved.inputs > 1).sum(1)).all()
    assert (inputs != solved.inputs).any(1).all()
    assert solve(inputs - np.uint8(1)).solutions.tolist() == [1] * len(inputs)


def test_padding_and_empty_stay():
    inputs = np.array([[0] * 8 + [1] * 8], np.uint8).repeat(50, 0)
    changed, _ = sudoku.SudokuAugmenter(4).augment(inputs, inputs, np.random.default_rng(0))
    assert set(changed.reshape(-1)) == {0, 1}


def test_easier_boards_keep_their_answer_and_gain_digits(solved):
    count = 400
    inputs, labels = (np.repeat(board[:1], count, 0) for board in (solved.inputs, solved.labels))
    plain, answers = sudoku.SudokuAugmenter(solved.side[0]).augment(inputs, labels, np.random.default_rng(0))
    easier, same = sudoku.SudokuAugmenter(solved.side[0], 0.5).augment(inputs, labels, np.random.default_rng(0))
    assert np.array_equal(answers, same)
    filled = easier != plain
    assert (plain[filled] == 1).all() and np.array_equal(easier[filled], answers[filled])
    shares = filled.sum(1) / (plain == 1).sum(1)
    assert 0.3 < (shares > 0).mean() <= 0.55  # of few empty cells, sometimes none is drawn
    assert 0.15 < shares[shares > 0].mean() < 0.35


def test_symmetries_are_all_drawn_and_no_others():
    """A 4 x 4 board's cells have 128 symmetries and its digits 24; one clue of a kind visits every cell equally."""
    count = 40_000
    places = np.arange(16, dtype=np.uint8)[None].repeat(count, 0)
    cells = sudoku.SudokuAugmenter(4).cells(count, np.random.default_rng(0))
    assert len(np.unique(np.take_along_axis(places, cells, 1), axis=0)) == 128
    labels = np.tile(np.arange(2, 6, dtype=np.uint8), (count, 4))
    digits = sudoku.SudokuAugmenter(4).augment(labels, labels, np.random.default_rng(0))[1]
    shares = [np.bincount(digits[:, cell], minlength=6)[2:] / count for cell in range(16)]
    assert np.abs(np.array(shares) - 0.25).max() < 0.02
    nine = sudoku.SudokuAugmenter(9).cells(count, np.random.default_rng(0))
    share = np.array([np.bincount(nine[:, cell], minlength=81) / count for cell in (0, 40, 77)])
    assert np.abs(share - 1 / 81).max() < 0.004


def test_six_by_six_is_not_transposed():
    cells = sudoku.SudokuAugmenter(6).cells(500, np.random.default_rng(0)).reshape(-1, 6, 6)
    assert (cells // 6 == cells[:, :, :1] // 6).all(), "rows stay rows"


# ------------------------------------------------------------------------------------------------ generating


def symmetric_copies(side):
    """Every order of the cells (X, side * side) that the symmetries of a board allow."""
    height, width = BOXES[side]

    def lines(block):
        orders = [list(itertools.permutations(range(start, start + block))) for start in range(0, side, block)]
        for blocks in itertools.permutations(range(side // block)):
            for parts in itertools.product(*(orders[b] for b in blocks)):
                yield np.concatenate(parts)

    plain = [r[:, None] * side + c for r, c in itertools.product(list(lines(height)), list(lines(width)))]
    turned = [cells.T for cells in plain] if height == width else []
    return np.array([cells.reshape(-1) for cells in plain + turned])


def canonical(question, copies):
    """The least of all symmetric copies with digits renamed in order of appearance."""
    forms = []
    for row in question[copies].tolist():
        names = {0: 0}
        forms.append(tuple(names.setdefault(digit, len(names)) for digit in row))
    return min(forms)


def test_held_out_boards_are_no_symmetric_copies():
    shown, held_out = sudoku.generate(4, 300, 60, seed=0)
    copies = symmetric_copies(4)
    assert len(copies) == 128 and sudoku.count_symmetries(4) == 128 * 24  # of the digits
    assert sudoku.count_symmetries(6) == (6 * 2**3) * (2 * 6**2) * 720  # bands of two rows, stacks of three columns
    of_shown = {canonical(q, copies) for q in shown.puzzles.inputs - np.uint8(1)}
    of_held_out = [canonical(q, copies) for q in held_out.puzzles.inputs - np.uint8(1)]
    assert (len(shown.puzzles), len(held_out.puzzles)) == (300, 60)
    assert len(set(of_held_out)) == 60
    assert not of_shown & set(of_held_out)
    assert len(np.unique(shown.puzzles.inputs, axis=0)) == 300


def test_symmetric_copies_have_one_signature(solved):
    rng = np.random.default_rng(0)
    copies, _ = sudoku.SudokuAugmenter(solved.side[0]).augment(solved.inputs, solved.labels, rng)
    for board, copy in zip(solved.inputs - np.uint8(1), copies - np.uint8(1), strict=True):
        assert sudoku.signature(board) == sudoku.signature(copy)
    if solved.side[0] == 9:
        assert len({sudoku.signature(board) for board in solved.inputs - np.uint8(1)}) == len(solved)


def test_generated_boards_have_one_solution_and_few_clues(solved):
    found = solve(solved.inputs - np.uint8(1))
    assert found.solutions.tolist() == [1] * len(solved)
    assert np.array_equal(found.solution + 1, solved.labels)
    clues = (solved.inputs > 1).sum(1)
    if solved.side[0] == 9:  # no clue can be left out
        board = solved.inputs[0] - np.uint8(1)
        fewer = np.where(np.eye(81, dtype=bool), 0, board)[board > 0].astype(np.uint8)
        assert (solve(fewer).solutions == 2).all()
    else:
        low, high = sudoku.GENERATED[solved.side[0]]
        assert low <= clues.min() < clues.max()
        assert np.median(clues) <= high


def test_generating_depends_on_the_seed_alone():
    one, other, third = (sudoku.generate(4, 50, 5, seed=seed) for seed in (2, 2, 3))
    for part in range(2):
        assert np.array_equal(one[part].puzzles.inputs, other[part].puzzles.inputs)
    assert not np.array_equal(one[0].puzzles.inputs, third[0].puzzles.inputs)


def test_ratings_are_reached_or_missed_with_a_message(monkeypatch):
    rated, _ = sudoku.generate(6, 3, 0, seed=0, min_rating=1)
    assert rated.ratings.min() >= 1
    assert np.array_equal(rated.ratings, solve(rated.puzzles.inputs - np.uint8(1)).guesses)
    monkeypatch.setattr(sudoku, "_ROUNDS", 3)
    with pytest.raises(UsageError, match=r"0 different puzzles of side 4 with at least min_rating = 50 guesses"):
        sudoku.generate(4, 4, 0, seed=0, min_rating=50)
    with pytest.raises(UsageError, match=r"side is 5; it should be one of 4, 6, 9"):
        sudoku.generate(5, 4, 0, seed=0)


def test_a_stream_of_boards_stays_sound():
    rated, _ = sudoku.generate(4, 20, 0, seed=0)
    batch = BatchStream(rated.puzzles, 64, seed=0).batch(3)
    assert is_latin(batch["labels"].astype(np.uint8), 4)
    assert ((batch["inputs"] == 1) | (batch["inputs"] == batch["labels"])).all()
