"""`hrm evaluate`: how many puzzles of a file with answers a trained model gets right."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrm.puzzle import arc
from hrm.puzzle.data import PuzzleSet, load_puzzles
from hrm.puzzle.evaluate import check_fit, check_votes, evaluate, vote
from hrm.puzzle.saving import load_model
from hrm.settings import UsageError, require


@dataclass
class EvaluateSettings:
    """Keys of `hrm evaluate`."""

    run: str | None = None
    """Run folder, or the folder of a model."""
    path: str | None = None
    """Puzzles with answers: .npz of `hrm data`, .csv or .npz as published."""
    segments: int | None = None
    """Segments that every puzzle runs; null: the model's limit."""
    halting: bool = False
    """Take each puzzle's answer where its Q head halts, and spare the rest."""
    votes: int = 1
    """Above 1: also solve so many symmetric copies of each puzzle, and let them vote; of mazes, which have eight, let
    the surest win."""
    limit: int | None = None
    """Only the first so many puzzles."""
    batch_size: int = 768
    """Puzzles solved together."""
    seed: int = 0
    """Seed of the copies."""
    output: str | None = None
    """File for the results as JSON."""


def evaluate_puzzles(settings: Any) -> None:
    """Prints what `settings` (`EvaluateSettings`) asks for.

    Raises:
        UsageError: a setting, file or model that cannot be used.
    """
    for name in ("run", "path"):
        require(settings, name, lambda value: value is not None, "given: hrm evaluate run=FOLDER path=FILE")
    for name in ("votes", "batch_size"):
        require(settings, name, lambda value: value >= 1, "at least 1")
    for name in ("segments", "limit"):
        require(settings, name, lambda value: value is None or value >= 1, "at least 1, or null")
    require(settings, "seed", lambda value: value >= 0, "at least 0")
    model, about = load_model(settings.run)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    puzzles = load_puzzles(settings.path, about["task"], check_unique=False)
    check_votes(puzzles, settings.votes)  # this and the files now, not after an evaluation of hours
    check_fit(model.config, puzzles.subset(slice(settings.limit)), scored=True)
    if settings.output is not None:
        _write(Path(settings.output), "", "a")
    how = {name: settings[name] for name in ("batch_size", "segments", "halting", "limit")}
    kept = _Kept(puzzles.subset(slice(settings.limit))) if arc.can_vote(puzzles) else None
    found = evaluate(model, puzzles, **how, told=kept)
    results = dataclasses.asdict(found)
    print(f"{found.exact:.2%} of {found.count} puzzles right, {found.cells:.2%} of the cells, in {found.seconds:.1f} s")
    print(f"segments: {found.segments_used:.2f} on average; Q head right about its answer: {found.halt_accuracy:.2%}")
    print("right after each segment: " + ", ".join(f"{share:.1%}" for share in found.by_segment))
    if kept is not None:
        results["two_answers"] = kept.score()
        print(f"ARC's measure, two answers a test input by votes of its copies: {results['two_answers']:.2%}")
    if settings.votes > 1:
        votes = vote(model, puzzles, votes=settings.votes, seed=settings.seed, **how)
        results["votes"] = dataclasses.asdict(votes)
        what = "a shortest way" if puzzles.task == "maze" else "right"
        print(f"{what} by 1, 2, ... votes:  " + ", ".join(f"{share:.1%}" for share in votes.exact))
    if settings.output is not None:
        _write(Path(settings.output), json.dumps(results, indent=1) + "\n", "w")


class _Kept:
    """What a model answered to puzzles of ARC."""

    def __init__(self, puzzles: PuzzleSet) -> None:
        self._puzzles, self._answers = puzzles, np.zeros_like(puzzles.inputs)
        self._q_halt = np.zeros(len(puzzles), np.float32)

    def __call__(self, rows: Tensor, answers: Tensor, q_halt: Tensor) -> None:
        self._answers[rows.cpu().numpy()] = answers.byte().cpu().numpy()
        self._q_halt[rows.cpu().numpy()] = q_halt.cpu().numpy()

    def score(self) -> float:
        return arc.score(arc.vote(self._puzzles, self._answers, self._q_halt))


def _write(path: Path, text: str, mode: str) -> None:
    try:
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"output is {str(path)!r}: {error.strerror}") from error
