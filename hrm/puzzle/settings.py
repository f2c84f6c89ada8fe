"""Settings of `hrm train puzzle=...`: the published models' own fields, and recipes kept as YAML presets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from hrm.curriculum import is_depth
from hrm.puzzle.config import MODELS, PuzzleConfig
from hrm.puzzle.engine import OPTIMIZERS
from hrm.settings import UsageError, load_settings, nearest, require, resumed, saved_settings, section_of

PRESETS = Path(__file__).parent / "presets"
DEFAULT_MODEL = {"sudoku": "trm-mlp", "sudoku-4x4": "trm-mlp", "maze": "trm", "arc": "trm"}
FROM_DATA = ("vocab_size", "seq_len", "num_puzzle_ids")  # fields that the data decide

ModelSection = section_of("ModelSection", PuzzleConfig, leave_out=FROM_DATA, optional=True)


@dataclass
class PuzzleDataSection:
    path: str | None = None
    """Puzzles to train on: .npz of `hrm data`, .csv or .npz as published; null: 4 x 4 Sudokus are generated."""
    test_path: str | None = None
    """Puzzles to evaluate on, never trained on; null: `held_out` of the generated ones, or no evaluation."""
    size: int = 1000
    """Puzzles to generate."""
    held_out: int = 200
    """Further puzzles to generate for evaluation, none a symmetric copy of a training puzzle."""
    augment: bool = True
    """Change each puzzle at random as the published training runs do."""
    easier: float = 0.0
    """Share of the Sudokus shown with up to half of their empty cells filled in (arXiv 2601.10679); needs augment."""


@dataclass
class PuzzleTrainSection:
    steps: int = 50000
    """Optimizer steps; each is one segment of every row."""
    batch_size: int = 768
    """Rows in a step."""
    optimizer: str = "adamw"
    """"adamw", or "muon" for the blocks' matrices with adamw for the rest."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 2000
    """Steps in which the learning rate rises from 0."""
    lr_min_ratio: float = 1.0
    """Share of the peak at which the cosine ends; 1: constant after the rise, as published."""
    weight_decay: float = 1.0
    """Decoupled decay of all weights."""
    embedding_lr: float = 1e-4
    """Learning rate of the puzzle embedding's SignSGD."""
    embedding_weight_decay: float = 1.0
    """Its decay."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: not clipped, as published."""
    ema: float = 0.999
    """Share that the averaged weights, which are evaluated and kept, retain at each step; 0: none."""
    stagger: bool = True
    """Let the first puzzles end after different numbers of segments, so that no step sees all in the same one;
    false, as published: all start together."""
    depth: list[Any] = field(default_factory=list)
    """Depth curriculum: [share of the steps, h_cycles, l_steps] of each stage before the full depth."""
    save_every: int = 2000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, and two looks for a loss that is not finite."""
    seed: int = 0
    """Seed of weights, order, augmentation and exploration."""


@dataclass
class PuzzleEvalSection:
    every: int = 0
    """Steps between evaluations; 0: only at the end."""
    limit: int | None = None
    """Puzzles of the test file in the evaluations on the way; the last one takes all."""
    batch_size: int = 768
    """Rows evaluated together."""


@dataclass
class PuzzleRunSection:
    name: str | None = None
    """First part of the run folder's name; null: puzzle and model."""
    folder: str = "runs"
    """Where run folders are made."""
    resume: str | None = None
    """Run folder to go on with, from its newest checkpoint and with its settings; other keys may not be given."""


@dataclass
class PuzzleTrainingSettings:
    """Keys of `hrm train puzzle=...`."""

    puzzle: str = "sudoku"
    """What is learnt: sudoku, sudoku-4x4, maze or arc; chooses the preset together with `model`."""
    model: str | None = None
    """Published model to start from: hrm, trm or trm-mlp; null: the one that does best on the puzzle."""
    hrm: ModelSection = field(default_factory=ModelSection)  # type: ignore[valid-type]
    data: PuzzleDataSection = field(default_factory=PuzzleDataSection)
    train: PuzzleTrainSection = field(default_factory=PuzzleTrainSection)
    eval: PuzzleEvalSection = field(default_factory=PuzzleEvalSection)
    run: PuzzleRunSection = field(default_factory=PuzzleRunSection)


def load_puzzle_settings(overrides: Sequence[str]) -> Any:
    """The settings of one `hrm train puzzle=...`: defaults, then the preset, then `overrides`.

    Raises:
        UsageError: an override, puzzle or model that there is not, or a value that makes no sense.
    """
    if (folder := resumed(overrides)) is not None:
        return _resumed_settings(folder, overrides)
    chosen = preset_of(overrides)
    names = [f"{key}={chosen[key]}" for key in ("puzzle", "model")]
    settings = load_settings(PuzzleTrainingSettings, [*overrides, *names], chosen)
    check_puzzle_training(settings)
    return settings


def _resumed_settings(folder: str, overrides: Sequence[str]) -> Any:
    settings = saved_settings(folder, PuzzleTrainingSettings, overrides, beside=("puzzle",))
    for word in overrides:
        name, _, puzzle = word.partition("=")
        if name == "puzzle" and puzzle.split("-")[0] != settings.puzzle.split("-")[0]:  # 4 x 4 boards are sudoku too
            raise UsageError(f"puzzle is {puzzle!r}; it should be {settings.puzzle!r}, as of the run in {folder}")
    return settings


def preset_of(overrides: Sequence[str]) -> dict[str, Any]:
    """The preset that `overrides` choose by puzzle and model, with these two in it.

    Raises:
        UsageError: an override, puzzle or model that there is not.
    """
    given = load_settings(PuzzleTrainingSettings, overrides)
    puzzle, model = given.puzzle, given.model
    if puzzle not in DEFAULT_MODEL:
        raise UsageError(f"puzzle is {puzzle!r}{nearest(puzzle, list(DEFAULT_MODEL))}")
    if puzzle == "sudoku" and given.data.path is None and not torch.cuda.is_available():
        puzzle = "sudoku-4x4"  # what a CPU learns in minutes, and what needs no file
    model = model or DEFAULT_MODEL[puzzle]
    if model not in MODELS:
        raise UsageError(f"model is {model!r}; it should be one of {', '.join(MODELS)}")
    path = PRESETS / f"{puzzle}-{model}.yaml"
    preset = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    assert isinstance(preset, dict)
    return {**preset, "puzzle": puzzle, "model": model}  # type: ignore[dict-item]


def check_puzzle_training(settings: Any) -> None:
    """Raises a UsageError that names the first key whose value makes no sense."""
    for name in ("data.size", "data.held_out", "train.steps", "train.batch_size", "train.save_every",
                 "train.log_every", "eval.batch_size"):  # fmt: skip
        require(settings, name, lambda value: value >= 1, "at least 1")
    for name in ("train.lr", "train.embedding_lr"):
        require(settings, name, lambda value: 0 < value < math.inf, "a finite number above 0")
    for name in ("train.weight_decay", "train.embedding_weight_decay", "train.clip"):
        require(settings, name, lambda value: 0 <= value < math.inf, "a finite number, at least 0")
    for name in ("train.warmup_steps", "train.seed", "eval.every"):
        require(settings, name, lambda value: value >= 0, "at least 0")
    if settings.data.test_path is not None and settings.data.path is None:
        where = f"data.test_path is {settings.data.test_path!r} and data.path null"
        raise UsageError(f"{where}; both should be files, or neither, since generated puzzles bring their own test")
    require(settings, "data.easier", lambda value: 0 <= value <= 1, "from 0 to 1")
    if settings.data.easier and not (settings.data.augment and settings.puzzle.startswith("sudoku")):
        raise UsageError(f"data.easier is {settings.data.easier}; it should be 0 without augment and for other puzzles")
    require(settings, "train.lr_min_ratio", lambda value: 0 <= value <= 1, "from 0 to 1")
    require(settings, "train.ema", lambda value: 0 <= value < 1, "from 0 to below 1")
    require(settings, "train.optimizer", lambda value: value in OPTIMIZERS, " or ".join(OPTIMIZERS))
    require(settings, "eval.limit", lambda value: value is None or value >= 1, "at least 1, or null")
    require(settings, "train.depth", is_depth, "[[share, h_cycles, l_steps], ...] with rising shares below 1")


def check_processes(settings: Any, processes: int) -> None:
    """Raises a UsageError where a batch cannot be dealt out to so many processes."""
    what = f"a multiple of the {processes} processes"
    require(settings, "train.batch_size", lambda value: value % processes == 0, what)


def model_config(settings: Any, **from_data: int) -> PuzzleConfig:
    """The published settings of `settings.model` with the `hrm` section's values and those of the data.

    Raises:
        UsageError: a value that `PuzzleConfig` refuses; the message names it.
    """
    given = {str(key): value for key, value in settings.hrm.items() if value is not None}
    try:
        return PuzzleConfig.of(settings.model, **given, **from_data)
    except ValueError as error:
        raise UsageError(str(error).replace("PuzzleConfig: ", "hrm.", 1)) from error
