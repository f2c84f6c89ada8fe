"""Evaluation and voting: what they count, and that nothing else has a say in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hrm.puzzle import PuzzleConfig, PuzzleModel, puzzle_loss
from hrm.puzzle.data import PuzzleSet, as_batch
from hrm.puzzle.evaluate import Ballots, check_votes, evaluate, noise_of, predict, rows_of, thinking, view_of, vote
from hrm.puzzle.maze import as_puzzles, shortest_ways
from hrm.settings import UsageError

BOARD = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1], np.uint8)


def small_model(seed: int = 0, **values: object) -> PuzzleModel:
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "num_heads": 2, "l_layers": 1, "h_layers": 1, "expansion": 1, "seq_len": 16,
             "vocab_size": 6, "max_segments": 3, "puzzle_emb_size": 32, "dtype": "float32"}  # fmt: skip
    model = PuzzleModel(PuzzleConfig(**small | values))
    with torch.no_grad():
        model.q_head.normal_()
    return model


def boards(count: int = 10, seed: int = 0) -> PuzzleSet:
    """4 x 4 sudokus with about half of the cells given."""
    rng = np.random.default_rng(seed)
    digits = np.stack([np.argsort(np.argsort(rng.random(4)))[BOARD - 1] + 1 for _ in range(count)]).astype(np.uint8)
    questions = np.where(rng.random(digits.shape) < 0.5, digits, 0)
    return PuzzleSet(
        "sudoku", (questions + 1).astype(np.uint8), digits + np.uint8(1), np.arange(count, dtype=np.int32),
        np.zeros(count, np.int32), 6, (4, 4),
    )  # fmt: skip


def by_hand(model: PuzzleModel, puzzles: PuzzleSet) -> list[torch.Tensor]:
    """The answers after each segment, by calling the model on all puzzles."""
    model.eval()
    batch = {k: torch.from_numpy(v) for k, v in as_batch(puzzles.inputs, puzzles.labels, puzzles.puzzle_ids).items()}
    carry, answers = model.initial_carry(batch), []
    for _ in range(model.config.max_segments):
        carry, output = model(carry, batch)
        answers.append(output.logits.detach().argmax(-1))
    return answers


def answered(model: PuzzleModel, puzzles: PuzzleSet, segment: int, every: int = 2) -> PuzzleSet:
    """The puzzles with labels that the model's answers of `segment` fulfil in every other row; padding is no label."""
    answers = by_hand(model, puzzles)[segment].numpy().astype(np.uint8)
    answers[1::every, 0] = np.where(answers[1::every, 0] == 5, 4, 5)
    fields = {name: getattr(puzzles, name) for name in ("inputs", "groups", "puzzle_ids", "vocab_size", "side")}
    return PuzzleSet(task="sudoku", labels=answers, **fields)


class Reader(torch.nn.Module):
    """Stands in for a model: solves each row in the segment that its first input says, and then knows it."""

    def __init__(self, max_segments: int = 5) -> None:
        super().__init__()
        self.inner = small_model(max_segments=max_segments)
        self.config, self.device, self.runs = self.inner.config, self.inner.device, 0
        self.weights, self.initial_carry = self.inner.weights, self.inner.initial_carry

    def forward(self, carry, batch, *, halting=False, weights=None):
        after, output = self.inner(carry, batch, halting=False, weights=weights)
        self.runs += len(batch["inputs"])
        done = output.steps >= batch["inputs"][:, 0]
        answers = torch.where(done[:, None], batch["inputs"], 0).long()
        halted = output.halted | done if halting else output.halted
        logits = torch.nn.functional.one_hot(answers, 6).float()
        state = after.state._replace(steps=carry.state.steps + 1)
        q_halt = torch.where(done, 1.0, -1.0)
        return after._replace(state=state), output._replace(logits=logits, q_halt=q_halt, halted=halted)


def copied(first: list[int]) -> PuzzleSet:
    """Puzzles that are their own answer, with `first` in the first cell."""
    puzzles = boards(len(first))
    inputs = puzzles.inputs.copy()
    inputs[:, 0] = first
    return PuzzleSet("sudoku", inputs, inputs, puzzles.groups, puzzles.puzzle_ids, 6, (4, 4))


def numbers(evaluation) -> tuple:
    return tuple(v for k, v in vars(evaluation).items() if k != "seconds")


def test_what_is_counted_is_what_the_model_answers() -> None:
    model = small_model()
    puzzles = answered(model, boards(), segment=2)
    answers, labels = by_hand(model, puzzles), torch.from_numpy(puzzles.labels)
    result = evaluate(model, puzzles)
    by_segment = [((a == labels) | (labels == 0)).all(-1).float().mean().item() for a in answers]
    assert result.by_segment == pytest.approx(by_segment) and by_segment[-1] == 0.5
    assert result.exact == result.by_segment[-1]
    assert result.cells == pytest.approx((answers[-1] == labels)[labels > 0].float().mean().item())
    assert (result.count, result.segments_used) == (10, 3)


def test_cells_without_label_are_not_scored() -> None:
    model = small_model()
    puzzles = answered(model, boards(), segment=2)
    labels = puzzles.labels.copy()
    labels[:, 0] = 0
    assert evaluate(model, puzzles).exact == 0.5
    free = PuzzleSet("sudoku", puzzles.inputs, labels, puzzles.groups, puzzles.puzzle_ids, 6, (4, 4))
    assert evaluate(model, free).exact == evaluate(model, free).cells == 1.0


@pytest.mark.parametrize("halting", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 9, 10])
def test_batch_size_changes_nothing(size: int, halting: bool) -> None:
    model = small_model()
    puzzles = answered(model, boards(), segment=2)
    whole = evaluate(model, puzzles, halting=halting)
    assert numbers(evaluate(model, puzzles, batch_size=size, halting=halting)) == numbers(whole)
    one = [evaluate(model, puzzles.subset([i]), halting=halting).exact for i in range(10)]
    assert np.mean(one) == pytest.approx(whole.exact)


def test_rows_that_fill_up_a_batch_are_not_counted() -> None:
    result = evaluate(Reader(), copied([2, 2, 2, 2, 2, 2, 9 - 4]), batch_size=4)  # two batches of 4
    assert result.by_segment == pytest.approx([0, 6 / 7, 6 / 7, 6 / 7, 1])


@pytest.mark.parametrize("target", ["bootstrap", "none"])
def test_a_model_that_never_halts_is_evaluated_alike_with_halting(target: str) -> None:
    model = small_model(q_target=target)
    with torch.no_grad():
        model.q_bias.copy_(torch.tensor([-99.0, 99.0]))
    puzzles = answered(model, boards(), segment=2)
    result = evaluate(model, puzzles, halting=True)
    assert numbers(result) == numbers(evaluate(model, puzzles))
    assert result.halt_accuracy == 0.5  # "no" for all, of which half are wrong


def test_a_model_that_halts_at_once_runs_one_segment() -> None:
    model = small_model()
    with torch.no_grad():
        model.q_bias.copy_(torch.tensor([99.0, -99.0]))
    puzzles = answered(model, boards(), segment=0)
    result = evaluate(model, puzzles, halting=True)
    assert result.by_segment == [0.5, 0.5, 0.5] and result.segments_used == 1
    assert evaluate(model, puzzles).segments_used == 3


def test_halting_takes_each_row_at_its_own_segment_and_spares_the_rest() -> None:
    model = Reader()
    result = evaluate(model, copied([1, 1, 2, 3, 5]), halting=True)
    assert result.by_segment == pytest.approx([0.4, 0.6, 0.8, 0.8, 1.0])
    assert result.segments_used == pytest.approx(12 / 5) and model.runs == 12
    assert result.halt_accuracy == 1.0


def test_segments_may_be_fewer_or_more_than_in_training() -> None:
    puzzles = copied([1, 2, 3, 4])
    for segments, expected in ((2, [0.25, 0.5]), (4, [0.25, 0.5, 0.75, 1.0])):
        assert evaluate(Reader(3), puzzles, segments=segments).by_segment == pytest.approx(expected)
        result = evaluate(Reader(3), puzzles, segments=segments, halting=True)
        assert result.by_segment == pytest.approx(expected)


def test_more_segments_go_on_thinking_where_training_stops() -> None:
    model, deeper = small_model(max_segments=3), small_model(max_segments=6)
    batch = {k: torch.from_numpy(v) for k, v in as_batch(boards().inputs, boards().labels, np.zeros(10, int)).items()}
    with thinking(model, 6) as few, thinking(deeper) as many:
        for a, b in zip(few.think(batch), many.think(batch), strict=True):
            assert torch.equal(a.answers, b.answers) and torch.equal(a.q_halt, b.q_halt)
    assert model.config.max_segments == 3


def test_the_model_is_left_as_it_was_and_trains_on() -> None:
    model = small_model().train()
    evaluate(model, boards(), segments=7)
    assert model.training and model.config.max_segments == 3
    with pytest.raises(RuntimeError), thinking(model.eval(), 5):
        raise RuntimeError
    assert not model.training and model.config.max_segments == 3
    model.train()
    puzzles = boards()
    batch = {k: torch.from_numpy(v) for k, v in as_batch(puzzles.inputs, puzzles.labels, puzzles.puzzle_ids).items()}
    _, output = model(model.initial_carry(batch), batch)
    puzzle_loss(output, batch["labels"], model.config).loss.backward()
    assert model.head.grad.abs().sum() > 0


def test_the_limit_takes_the_first_puzzles() -> None:
    model = small_model()
    puzzles = answered(model, boards(), segment=2)
    assert numbers(evaluate(model, puzzles, limit=3)) == numbers(evaluate(model, puzzles.subset(slice(3))))
    assert evaluate(model, puzzles, limit=1).exact == 1.0 and evaluate(model, puzzles, limit=99).count == 10


@pytest.mark.parametrize("size", [3, 768])
def test_predictions_are_the_last_answers(size: int) -> None:
    model, puzzles = small_model(), boards()
    answers, q_halt = predict(model, puzzles, batch_size=size)
    assert (answers == by_hand(model, puzzles)[-1].numpy()).all() and answers.dtype == np.uint8
    assert q_halt.shape == (10,) and len(set(q_halt.tolist())) == 10
    first, _ = predict(model, puzzles, segments=1, batch_size=size)
    assert (first == by_hand(model, puzzles)[0].numpy()).all() and (first != answers).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"segments": 0}, "segments is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"puzzles": boards().subset([])}, "puzzles is empty"),
        ({"model": small_model(seq_len=81)}, "puzzles have 16 cells; they should have 81"),
        ({"model": small_model(vocab_size=11)}, "puzzles have 6 symbols; they should have 11"),
    ],
)
def test_wrong_use_is_named(change: dict, message: str) -> None:
    arguments = {"model": small_model(), "puzzles": boards(), **change}
    with pytest.raises(UsageError, match=message):
        evaluate(arguments.pop("model"), arguments.pop("puzzles"), **arguments)


def test_puzzles_without_answers_are_refused() -> None:
    puzzles = boards()
    puzzles.labels[4] = 0
    with pytest.raises(UsageError, match="puzzle 5 has no answer"):
        evaluate(small_model(), puzzles)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    model, puzzles = small_model(dtype="auto").cuda(), boards()
    evaluate(model, puzzles)  # kernels are compiled
    batch = rows_of(model, puzzles).batch(torch.arange(10, device="cuda"))
    with thinking(model) as thinker:
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(thinker.think(batch))) == 3
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------------ votes


@pytest.mark.parametrize("choose", ["majority", "confidence"])
def test_one_vote_is_no_vote(choose: str) -> None:
    model = small_model()
    puzzles = answered(model, boards(), segment=2)
    plain = evaluate(model, puzzles)
    for extra in ({}, {"noise": 1.0}):
        result = vote(model, puzzles, votes=3, choose=choose, batch_size=4, **extra)
        assert (result.exact[0], result.cells[0]) == (plain.exact, plain.cells)
        assert len(result.exact) == len(result.cells) == 3 and result.count == 10
    assert vote(model, puzzles, votes=1, choose=choose).exact == [plain.exact]


def test_votes_halt_where_asked_to() -> None:
    puzzles = copied([1, 1, 2, 3, 5])
    model = Reader()
    assert vote(model, puzzles, votes=1, halting=True).exact == [1.0] and model.runs == 12
    model = Reader()
    assert vote(model, puzzles, votes=1).exact == [1.0] and model.runs == 25


@pytest.mark.parametrize("choose", ["majority", "confidence"])
def test_votes_depend_on_the_seed_alone(choose: str) -> None:
    model, puzzles = small_model(), boards(40)
    first = vote(model, puzzles, votes=4, seed=3, noise=0.5, choose=choose)
    again = vote(model, puzzles, votes=4, seed=3, noise=0.5, choose=choose, batch_size=7)
    other = vote(model, puzzles, votes=4, seed=4, noise=0.5, choose=choose)
    assert first.cells == again.cells and first.cells != other.cells


def test_a_view_of_a_sudoku_is_a_sudoku_and_leads_back() -> None:
    """A reader that copies what it sees answers every view with the puzzle itself, once mapped back."""
    puzzles = boards(50)
    solved = PuzzleSet("sudoku", puzzles.labels, puzzles.labels, puzzles.groups, puzzles.puzzle_ids, 6, (4, 4))
    seen: list[torch.Tensor] = []
    model = Reader(5)
    forward = model.forward
    model.forward = lambda carry, batch, **kwargs: (seen.append(batch["inputs"]), forward(carry, batch, **kwargs))[1]
    result = vote(model, solved, votes=6)
    assert result.exact == [1.0] * 6
    views = torch.stack(seen[::5]).reshape(-1, 4, 4)
    assert all(sorted(line) == [2, 3, 4, 5] for view in views.tolist() for line in (*view, *zip(*view, strict=True)))
    boxes = views.reshape(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4)
    assert (boxes.sort(-1).values == torch.arange(2, 6)).all()
    assert len({tuple(view.reshape(-1).tolist()) for view in views[:: len(solved)]}) == 6  # each run sees another


def test_mazes_take_turns_through_the_eight_symmetries() -> None:
    inputs = np.tile(np.arange(9, dtype=np.uint8) % 5 + 1, (2, 1))
    maze = PuzzleSet("maze", inputs, inputs, np.arange(2, dtype=np.int32), np.zeros(2, np.int32), 6, (3, 3))
    views = [view_of(maze, 2, seed=0, number=n, device=torch.device("cpu")) for n in range(9)]
    assert views[0] is None
    seen = {tuple(view.cells[0].tolist()) for view in views[1:]}
    assert len(seen) == 8 and tuple(range(9)) in seen
    assert all((view.symbols == torch.arange(6)).all() for view in views[1:])


def test_noise_moves_the_states_of_later_runs_alone() -> None:
    model = small_model()
    assert noise_of(model, 0.5, 0, 0) is None and noise_of(model, 0.0, 0, 1) is None
    one, two = noise_of(model, 0.5, 0, 1), noise_of(model, 0.5, 0, 2)
    assert one.z_l.shape == (17, 32) and one.z_l.std() == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(one.z_l, two.z_l) and not torch.equal(one.z_l, one.z_h)
    batch = {k: torch.from_numpy(v) for k, v in as_batch(boards().inputs, boards().labels, np.zeros(10, int)).items()}
    with thinking(model) as thinker:
        (_, plain), (_, moved) = thinker.answer(batch), thinker.answer(batch, one)
    assert (plain != moved).all()


def elected(*votes: tuple[list[int], float]) -> list[int]:
    """The majority of answers with their q_halt on one puzzle; each answer's 2 symbols are repeated to 16 cells."""
    ballots = Ballots(1, boards(1), "majority", torch.device("cpu"))
    for symbols, q_halt in votes:
        answer = torch.tensor([[symbols[0]] * 8 + [symbols[1]] * 8])
        ballots.cast(torch.tensor([0]), answer, torch.tensor([q_halt]))
    return ballots.winners()[0, [0, 8]].tolist()


@pytest.mark.parametrize("low", [-3.0, -10.0, -1000.0])
def test_a_sure_run_outvotes_unsure_ones(low: float) -> None:
    unsure = [([2, 3], low)] * 7
    assert elected(*unsure, ([4, 5], 3.0)) == elected(([4, 5], 3.0), *unsure) == [4, 5]


@pytest.mark.parametrize("q_halt", [10.0, 0.0, -10.0, -1000.0])
def test_runs_as_sure_as_each_other_decide_each_cell_by_number(q_halt: float) -> None:
    assert elected(([4, 2], q_halt)) == [4, 2]
    assert elected(([2, 5], q_halt), ([4, 3], q_halt), ([4, 5], q_halt)) == [4, 5]


@pytest.mark.parametrize("q_halt", [9.0, -10.0])
def test_the_surer_of_two_runs_wins(q_halt: float) -> None:
    """Also where both are as good as sure, or as good as sure to be wrong."""
    assert elected(([2, 3], q_halt), ([4, 5], q_halt + 1)) == elected(([4, 5], q_halt + 1), ([2, 3], q_halt)) == [4, 5]


def test_confidence_takes_the_answer_of_the_highest_q_halt() -> None:
    ballots, rows = Ballots(2, boards(2), "confidence", torch.device("cpu")), torch.tensor([0, 1])
    for symbol, q_halt in ((2, [0.0, 3.0]), (3, [1.0, 2.0]), (4, [-1.0, 1.0])):
        ballots.cast(rows, torch.full((2, 16), symbol), torch.tensor(q_halt))
    assert ballots.winners()[:, 0].tolist() == [3, 2]


class Pathfinder(Reader):
    """Finds in every maze that it sees the way of the labels' rule, and is the surer the more steps go down."""

    def forward(self, carry, batch, *, halting=False, weights=None):
        after, output = super().forward(carry, batch, halting=halting, weights=weights)
        answers, _ = shortest_ways(batch["inputs"].numpy().astype(np.uint8), (4, 4))
        logits = torch.nn.functional.one_hot(torch.from_numpy(answers).long(), 6).float()
        return after, output._replace(logits=logits, q_halt=torch.from_numpy(answers[:, ::4].sum(1)).float())


def test_any_shortest_way_counts_where_turned_mazes_vote() -> None:
    """A way found in a turned maze is a shortest one, and seldom the label's; ways mixed cell by cell are none."""
    inputs = np.full((20, 16), 2, np.uint8)  # no walls
    places = np.random.default_rng(0).permuted(np.tile(np.arange(16), (20, 1)), axis=1)
    np.put_along_axis(inputs, places[:, :1], 3, 1)
    np.put_along_axis(inputs, places[:, 1:2], 4, 1)
    puzzles = as_puzzles(inputs, shortest_ways(inputs, (4, 4))[0], (4, 4))
    result = vote(Pathfinder(1), puzzles, votes=4)
    assert result.exact == [1.0] * 4
    assert result.cells[0] == 1.0 > min(result.cells)  # the label's way first, others with the turned mazes
    with pytest.raises(UsageError, match="choose is 'majority'; it should be 'confidence' for mazes"):
        vote(Pathfinder(1), puzzles, votes=2, choose="majority")


def test_votes_are_no_more_than_there_are_copies() -> None:
    inputs = np.tile(np.array([3, 2, 2, 4], np.uint8), (2, 1))
    mazes = as_puzzles(inputs, shortest_ways(inputs, (2, 2))[0], (2, 2))
    check_votes(mazes, 8)
    check_votes(mazes, 9, noise=0.1)  # which makes them different
    with pytest.raises(UsageError, match="votes is 9; it should be at most 8, the symmetric copies of a puzzle and"):
        check_votes(mazes, 9)
    check_votes(boards(), 3072)
    with pytest.raises(UsageError, match="votes is 3073; it should be at most 3072"):
        check_votes(boards(), 3073)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"votes": 0}, "votes is 0"),
        ({"choose": "best"}, "choose is 'best'"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": float("nan")}, "noise is nan; it should be a finite number, at least 0"),
        ({"views": False}, "all votes would be the same"),
    ],
)
def test_votes_that_make_no_sense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vote(small_model(), boards(), **{"votes": 2, **change})
