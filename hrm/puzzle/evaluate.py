"""How many puzzles a model solves: after each segment, with halting, and by a majority of votes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrm.puzzle import maze, sudoku
from hrm.puzzle.config import PuzzleConfig
from hrm.puzzle.data import IGNORED, PuzzleSet
from hrm.puzzle.model import PuzzleCarry, PuzzleModel, Weights
from hrm.settings import UsageError


@dataclass(frozen=True)
class Evaluation:
    """How a model did on a set of puzzles. Shares are from 0 to 1."""

    exact: float  # puzzles with every scored cell right
    cells: float  # scored cells that are right
    by_segment: list[float]  # `exact` had every row stopped there: after 1, 2, ... segments; the last is `exact`
    segments_used: float  # mean over the puzzles
    halt_accuracy: float  # puzzles for which q_halt > 0 says rightly whether the answer is right
    count: int  # puzzles
    seconds: float


@dataclass(frozen=True)
class Votes:
    """How a model did with the votes of 1, 2, ... runs on each puzzle. Shares are from 0 to 1."""

    exact: list[float]  # puzzles with every scored cell right; mazes that show a shortest way, be it the label's or not
    cells: list[float]  # scored cells that are right
    count: int  # puzzles
    seconds: float


class Thought(NamedTuple):
    """What one segment answers."""

    rows: Tensor  # (R,) int64, the rows of the batch that still run
    answers: Tensor  # (R, S) int64
    q_halt: Tensor  # (R,) float32
    ended: Tensor  # (R,) bool, rows for which this answer is the last


class Noise(NamedTuple):
    """What is added to the states that a puzzle starts from."""

    z_l: Tensor  # (tokens, d)
    z_h: Tensor  # (tokens, d)


@dataclass(frozen=True)
class Thinker:
    """A model in evaluation mode with its weights cast; from `thinking`."""

    model: PuzzleModel
    weights: Weights
    segments: int
    halting: bool

    def think(self, batch: dict[str, Tensor], noise: Noise | None = None) -> Iterator[Thought]:
        """The answers of one segment after the other; rows that halted are left out of what follows.

        Nothing waits for the device unless `halting`, which takes one look at it a segment.
        """
        carry = _disturbed(self.model.initial_carry(batch), noise)
        rows = torch.arange(len(batch["inputs"]), device=self.model.device)
        for segment in range(1, self.segments + 1):
            carry, output = self.model(carry, batch, halting=self.halting, weights=self.weights)
            ended = output.halted if segment < self.segments else torch.ones_like(output.halted)
            yield Thought(rows, output.logits.argmax(-1), output.q_halt, ended)
            if self.halting and segment < self.segments:
                going = (~ended).nonzero()[:, 0]
                if not len(going):
                    return
                if len(going) < len(rows):
                    rows, batch = rows[going], {name: values[going] for name, values in batch.items()}
                    state = type(carry.state)(*(part[going] for part in carry.state))
                    carry = PuzzleCarry(state, {name: values[going] for name, values in carry.data.items()})

    def answer(self, batch: dict[str, Tensor], noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """The last answers (B, S) int64 and their q_halt (B,) float32."""
        answers = torch.zeros_like(batch["inputs"], dtype=torch.int64)
        q_halt = torch.zeros(len(answers), device=answers.device)
        for thought in self.think(batch, noise):
            answers[thought.rows], q_halt[thought.rows] = thought.answers, thought.q_halt
        return answers, q_halt


@contextmanager
def thinking(model: PuzzleModel, segments: int | None = None, halting: bool = False) -> Iterator[Thinker]:
    """The model in evaluation mode and without graphs; afterwards it is as it was.

    Args:
        segments: how many to run, more than the model was trained with too; None: its `max_segments`.
        halting: let rows halt earlier, as in training.
    """
    segments = model.config.max_segments if segments is None else segments
    if segments < 1:
        raise UsageError(f"segments is {segments}; it should be at least 1")
    was_training, most = model.training, model.config.max_segments
    with torch.no_grad():  # not yet inference mode: the table of positions is kept, and training uses it later
        weights = model.weights()
    model.eval()
    model.config.max_segments = max(segments, most)
    try:
        with torch.inference_mode():
            yield Thinker(model, weights, segments, halting)
    finally:
        model.config.max_segments = most
        model.train(was_training)


def evaluate(
    model: PuzzleModel,
    puzzles: PuzzleSet,
    *,
    batch_size: int = 768,
    segments: int | None = None,
    halting: bool = False,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    told: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Evaluation:
    """Solves the puzzles and counts the right answers.

    Args:
        puzzles: with answers; cells of label 0 are not scored.
        batch_size: the most puzzles solved together.
        segments: run by every puzzle; None: the model's `max_segments`.
        halting: take each puzzle's answer where its Q head halts, and spare the segments after it.
        limit: only the first so many puzzles.
        rank: the process that this is, of `world`; each solves its share, and all are told how the whole was done.
        world: processes.
        told: is given rows of this process (R,), their last answers (R, S) and q_halt (R,), each row once.

    Raises:
        UsageError: no puzzles, puzzles without answers or that the model cannot take, or a number below 1.
    """
    rows = _scored_rows(model, puzzles, limit)
    started = time.perf_counter()
    with thinking(model, segments, halting) as thinker:
        exact = torch.zeros(thinker.segments, dtype=torch.int64, device=model.device)
        tally = torch.zeros(3, dtype=torch.int64, device=model.device)  # cells right, segments, q_halt right
        for indices, counted in _batches(len(rows.inputs), batch_size, model.device, rank, world):
            batch = rows.batch(indices)
            for segment, thought in enumerate(thinker.think(batch)):
                right, solved = _compared(thought.answers, batch["labels"][thought.rows])
                counts = counted[thought.rows]
                ended = thought.ended & counts
                exact[segment] += (solved & counts).sum()
                exact[segment + 1 :] += (solved & ended).sum()
                agrees = (thought.q_halt > 0) == solved
                tally += torch.stack(((right * ended).sum(), (segment + 1) * ended.sum(), (agrees & ended).sum()))
                if told is not None:
                    told(indices[thought.rows[ended]], thought.answers[ended], thought.q_halt[ended])
        if world > 1:
            torch.distributed.all_reduce(exact)
            torch.distributed.all_reduce(tally)
        count, cells = len(rows.inputs), int((rows.labels > 0).sum())
        by_segment, (rightcells, used, agreed) = [int(n) / count for n in exact.tolist()], tally.tolist()
    return Evaluation(
        exact=by_segment[-1],
        cells=rightcells / cells,
        by_segment=by_segment,
        segments_used=used / count,
        halt_accuracy=agreed / count,
        count=count,
        seconds=time.perf_counter() - started,
    )


def predict(
    model: PuzzleModel,
    puzzles: PuzzleSet,
    *,
    batch_size: int = 768,
    segments: int | None = None,
    halting: bool = False,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The answers (N, S), and q_halt (N,), the higher the surer: what `hrm.puzzle.arc.vote` counts.

    Arguments and errors as those of `evaluate`; the puzzles need no answers.
    """
    rows = rows_of(model, puzzles)
    answers = torch.empty_like(rows.inputs)
    q_halt = torch.empty(len(answers), device=model.device)
    with thinking(model, segments, halting) as thinker:
        for indices, _ in _batches(len(answers), batch_size, model.device):
            found, q_halt[indices] = thinker.answer(rows.batch(indices))
            answers[indices] = found.to(answers.dtype)
    return answers.cpu().numpy(), q_halt.cpu().numpy()


# ------------------------------------------------------------------------------------------------ voting


def vote(
    model: PuzzleModel,
    puzzles: PuzzleSet,
    *,
    votes: int,
    seed: int = 0,
    views: bool = True,
    noise: float = 0.0,
    choose: str | None = None,
    batch_size: int = 768,
    segments: int | None = None,
    halting: bool = False,
    limit: int | None = None,
) -> Votes:
    """How many puzzles are right by the votes of several runs on each, as a function of the number of votes.

    Source: arXiv 2601.10679, which perturbs inputs and states so that a run can leave a wrong fixed point.

    Args:
        puzzles: as in `evaluate`, as are batch_size, segments, halting and limit.
        votes: runs; the first is on the puzzle as it is. Without noise at most as many as `copies_of` says.
        seed: of all that is drawn; the same seed gives the same result for any batch size.
        views: every later run sees each puzzle through a symmetry (the training's; none for ARC).
        noise: standard deviation of what is added to the initial states of a later run, where they have about 1.
        choose: "majority" (in every cell, a vote weighing sigmoid(q_halt)) or "confidence" (the whole answer of
            highest q_halt); None: as `choice_of` says.

    Raises:
        UsageError: as `evaluate`; or several votes that would all be the same, or that make no answer.
    """
    rows = _scored_rows(model, puzzles, limit)
    choose = choice_of(puzzles) if choose is None else choose
    check_votes(puzzles, votes, views, noise, choose)
    started = time.perf_counter()
    tally = []
    with thinking(model, segments, halting) as thinker:
        ballots = Ballots(len(rows.inputs), puzzles, choose, model.device)
        for number in range(votes):
            view = view_of(puzzles, len(rows.inputs), seed, number, model.device) if views else None
            disturbance = noise_of(model, noise, seed, number)
            for indices, _ in _batches(len(rows.inputs), batch_size, model.device):
                ballots.cast(indices, *vote_of(thinker, rows.batch(indices), indices, view, disturbance))
            winners = ballots.winners()
            right, solved = _compared(winners, rows.labels)
            if puzzles.task == "maze":
                solved = _shows_a_way(rows.inputs, winners, puzzles.side)
            tally.append(torch.stack((solved.sum(), right.sum())))
        count, cells = len(rows.inputs), int((rows.labels > 0).sum())
        exact, rightcells = torch.stack(tally, 1).tolist()
    return Votes([n / count for n in exact], [n / cells for n in rightcells], count, time.perf_counter() - started)


def choice_of(puzzles: PuzzleSet) -> str:
    """How runs on copies of puzzles make one answer: by "majority" in each cell where there is one answer to find;
    mazes have several shortest ways and a turned maze another one as its label, so there whole answers compete by
    "confidence"."""
    return "confidence" if puzzles.task == "maze" else "majority"


class View(NamedTuple):
    """Puzzles seen through symmetries that keep their meaning."""

    cells: Tensor  # (N, S) int16, the cell of the puzzle that each cell of the view shows
    symbols: Tensor  # (N, V) uint8, the id in the view of each id


def view_of(puzzles: PuzzleSet, count: int, seed: int, number: int, device: torch.device) -> View | None:
    """What run `number` sees of the first `count` puzzles; None: the puzzles as they are, in run 0.

    Sudokus get a symmetry each; mazes take turns through those of the square, which are few.
    """
    if number == 0:
        return None
    rng = np.random.default_rng([seed, number])
    symbols = np.tile(np.arange(puzzles.vocab_size), (count, 1))
    if puzzles.task == "sudoku":
        cells = sudoku.SudokuAugmenter(puzzles.side[0]).cells(count, rng)
        symbols[:, 2:] = rng.permuted(symbols[:, 2:], axis=1)  # padding and empty stay
    else:
        symmetries = maze.symmetries(puzzles.side)  # the first leaves the maze as it is
        order = np.concatenate(([0], np.random.default_rng(seed).permutation(len(symmetries) - 1) + 1))
        cells = np.tile(symmetries[order[number % len(order)]], (count, 1))
    return View(*(torch.from_numpy(a).to(device) for a in (cells.astype(np.int16), symbols.astype(np.uint8))))


def copies_of(puzzles: PuzzleSet) -> int:
    """How many different views a puzzle of Sudoku or a maze has at most, the puzzle as it is among them."""
    if puzzles.task == "sudoku":
        return sudoku.count_symmetries(puzzles.side[0])
    return len(maze.symmetries(puzzles.side))


def noise_of(model: PuzzleModel, std: float, seed: int, number: int) -> Noise | None:
    """What run `number` adds to the initial states, the same for all puzzles; None in run 0 and without noise."""
    if number == 0 or std == 0:
        return None
    # on the CPU, so that every device draws the same
    generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, number]).integers(2**62)))
    drawn = std * torch.randn(2, model.config.tokens, model.config.hidden_size, generator=generator)
    return Noise(*drawn.to(model.device, model.dtype))


def vote_of(
    thinker: Thinker, batch: dict[str, Tensor], indices: Tensor, view: View | None, noise: Noise | None
) -> tuple[Tensor, Tensor]:
    """The answers (B, S) int64 of one run on the puzzles at `indices`, seen as they are, and their q_halt (B,)."""
    if view is None:
        return thinker.answer(batch, noise)
    cells, symbols = view.cells[indices].long(), view.symbols[indices].long()
    seen = symbols.gather(1, batch["inputs"].long().gather(1, cells)).int()
    answers, q_halt = thinker.answer({**batch, "inputs": seen}, noise)
    return torch.zeros_like(cells).scatter_(1, cells, symbols.argsort(1).gather(1, answers)), q_halt


_UNSURE = -20.0  # q_halt below which a vote loses no more weight: sigmoid must not reach 0, so that every vote counts


class Ballots:
    """The votes on each of `count` puzzles, and which answer they make.

    "majority" weighs each vote by sigmoid(q_halt), the model's own probability that the answer is right: cells of
    different wrong answers make no right one, so a sure run should outvote several that know they failed.
    """

    def __init__(self, count: int, puzzles: PuzzleSet, choose: str, device: torch.device) -> None:
        self._majority = choose == "majority"
        cells = puzzles.inputs.shape[1]
        if self._majority:
            self._counts = torch.zeros(count, cells, puzzles.vocab_size, device=device)
        else:
            self._answers = torch.zeros(count, cells, dtype=torch.uint8, device=device)
            self._best = torch.full((count,), -torch.inf, device=device)

    def cast(self, rows: Tensor, answers: Tensor, q_halt: Tensor) -> None:
        """One vote on the puzzles at `rows` (B,): answers (B, S) int64, q_halt (B,); a row given twice votes once."""
        if self._majority:
            weight = q_halt.clamp(min=_UNSURE).sigmoid()[:, None, None].expand(*answers.shape, 1)
            self._counts[rows] = self._counts[rows].scatter_add(2, answers[..., None], weight)
        else:
            better = q_halt > self._best[rows]
            self._best[rows] = torch.where(better, q_halt, self._best[rows])
            self._answers[rows] = torch.where(better[:, None], answers.to(torch.uint8), self._answers[rows])

    def winners(self) -> Tensor:
        """The answers so far, (count, S) int."""
        return self._counts.argmax(-1) if self._majority else self._answers


def check_votes(
    puzzles: PuzzleSet, votes: int, views: bool = True, noise: float = 0.0, choose: str | None = None
) -> None:
    """Raises a UsageError that names an argument of `vote` that makes no sense."""
    choose = choice_of(puzzles) if choose is None else choose
    if votes < 1:
        raise UsageError(f"votes is {votes}; it should be at least 1")
    if choose not in ("majority", "confidence"):
        raise UsageError(f"choose is {choose!r}; it should be 'majority' or 'confidence'")
    if not 0 <= noise < math.inf:
        raise UsageError(f"noise is {noise}; it should be a finite number, at least 0")
    if votes > 1 and views and puzzles.task == "arc":
        raise UsageError(
            f"votes is {votes}; it should be 1, or views False, for the task 'arc', whose symmetric copies are puzzles "
            "of their own"
        )
    if views and noise == 0 and votes > (most := copies_of(puzzles)):
        raise UsageError(f"votes is {votes}; it should be at most {most}, the symmetric copies of a puzzle and itself")
    if votes > 1 and views and puzzles.task == "maze" and choose == "majority":
        raise UsageError(
            "choose is 'majority'; it should be 'confidence' for mazes, whose turned copies have other ways"
        )
    if votes > 1 and not views and noise == 0:
        raise UsageError(
            "noise is 0 and views is False, so that all votes would be the same; one of them should differ"
        )


# ------------------------------------------------------------------------------------------------ rows


class Rows(NamedTuple):
    """Puzzles on the model's device."""

    inputs: Tensor  # (N, S) uint8
    labels: Tensor  # (N, S) uint8, 0 where not scored
    ids: Tensor  # (N,) int32

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """What the model takes, for the rows at `indices` (B,)."""
        labels = self.labels[indices].int()
        return {
            "inputs": self.inputs[indices].int(),
            "labels": labels.masked_fill(labels == 0, IGNORED),
            "puzzle_identifiers": self.ids[indices],
        }


def rows_of(model: PuzzleModel, puzzles: PuzzleSet) -> Rows:
    """All puzzles, sent to the model's device at once: a copy for each batch would make the device wait.

    Raises:
        UsageError: puzzles of another size, vocabulary or embedding than the model's.
    """
    check_fit(model.config, puzzles)
    arrays = (puzzles.inputs, puzzles.labels, puzzles.puzzle_ids)
    return Rows(*(torch.from_numpy(np.ascontiguousarray(array)).to(model.device) for array in arrays))


def check_fit(config: PuzzleConfig, puzzles: PuzzleSet, scored: bool = False) -> None:
    """Raises a UsageError where a model of `config` cannot take `puzzles`, or, `scored`, where these lack answers."""
    if not len(puzzles):
        raise UsageError("puzzles is empty; it should have at least one")
    for what, has, takes in (("cells", puzzles.inputs.shape[1], config.seq_len),
                             ("symbols", puzzles.vocab_size, config.vocab_size)):  # fmt: skip
        if has != takes:
            raise UsageError(f"puzzles have {has} {what}; they should have {takes}, as the model's")
    if config.puzzle_emb_size and puzzles.num_puzzle_ids > config.num_puzzle_ids:
        known = config.num_puzzle_ids
        raise UsageError(
            f"puzzles have {puzzles.num_puzzle_ids} puzzle ids; they should have at most {known}, as the model's"
        )
    if scored and not (answered := puzzles.labels.any(axis=1)).all():
        raise UsageError(f"puzzle {int(answered.argmin()) + 1} has no answer; it should have one to be scored")


def _scored_rows(model: PuzzleModel, puzzles: PuzzleSet, limit: int | None) -> Rows:
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it should be at least 1, or None")
    puzzles = puzzles if limit is None else puzzles.subset(slice(limit))
    check_fit(model.config, puzzles, scored=True)
    return rows_of(model, puzzles)


def _batches(
    count: int, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Equal batches of at most `batch_size`, as many on each process: rows (B,), and which of them (B,) count; the last
    ones fill up."""
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it should be at least 1")
    batches = -(-count // (batch_size * world)) * world
    rows = torch.arange(batches * -(-count // batches), device=device).view(batches, -1)
    rows = rows[rank::world]
    return zip(rows.clamp(max=count - 1), rows < count, strict=True)


def _compared(answers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cells that are right (R,) and rows that are right in all (R,); labels (R, S), 0 or less where not scored."""
    scored = labels > 0
    right = ((answers == labels) & scored).sum(-1)
    return right, right == scored.sum(-1)


def _shows_a_way(inputs: Tensor, answers: Tensor, side: tuple[int, int]) -> Tensor:
    """Which answers (N, S) are a shortest way through their maze (N, S)."""
    shown = maze.is_solved(inputs.cpu().numpy(), answers.byte().cpu().numpy(), side)
    return torch.from_numpy(shown).to(inputs.device)


def _disturbed(carry: PuzzleCarry, noise: Noise | None) -> PuzzleCarry:
    if noise is None:
        return carry
    state = carry.state
    return PuzzleCarry(state._replace(z_l=state.z_l + noise.z_l, z_h=state.z_h + noise.z_h), carry.data)
