"""Puzzle models and training states in files: safetensors and JSON, put in place whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hrm.puzzle.config import PuzzleConfig
from hrm.puzzle.data import TASKS
from hrm.puzzle.model import PuzzleModel
from hrm.runs import METRICS, keep_lines
from hrm.saving import (
    check_manifest,
    checkpoint_folder,
    read_json,
    read_tensors,
    remove_old_checkpoints,
    replace_folder,
    write_json,
    write_tensors,
)
from hrm.settings import UsageError

CONFIG, WEIGHTS, STATE, PROGRESS = "config.json", "model.safetensors", "state.safetensors", "progress.json"
MODEL = "model"  # folder of a run
EVALUATIONS = "evaluations.jsonl"  # of a run folder


def save_model(model: PuzzleModel, folder: Path, about: Mapping[str, Any]) -> None:
    """Writes `folder`: config.json, with `about` (task, side, ...) beside the model's settings, and the weights."""

    def fill(place: Path) -> None:
        write_json(place / CONFIG, {**about, "model": model.config.to_dict()})
        write_tensors(place / WEIGHTS, model.state_dict())

    replace_folder(folder, fill)


def load_model(path: str | os.PathLike[str]) -> tuple[PuzzleModel, dict[str, Any]]:
    """The model of a run folder or of a folder that `save_model` wrote, in evaluation mode on the CPU, and its `about`.

    Raises:
        UsageError: there is none, or a file is damaged; the message names it.
    """
    folder = Path(path)
    if (folder / MODEL / CONFIG).is_file():
        folder = folder / MODEL
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{path} holds no model; it should be a run folder with a checkpoint, or a model's folder")
    about = read_json(folder / CONFIG)
    if not isinstance(about.get("model"), dict):
        raise UsageError(f"{folder / CONFIG} describes no puzzle model")
    if about.get("task") not in TASKS:
        raise UsageError(f"{folder / CONFIG}: task is {about.get('task')!r}; it should be one of {', '.join(TASKS)}")
    try:
        model = PuzzleModel(PuzzleConfig.from_dict(about.pop("model")))
        model.load_state_dict(read_tensors(folder / WEIGHTS))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{folder} holds no puzzle model: {error}") from error
    return model.eval(), about


# ------------------------------------------------------------------------------------------------ training states


def save_checkpoint(run: Path, step: int, state: Mapping[str, Tensor], progress: Mapping[str, Any]) -> Path:
    """Writes checkpoints/step-<step> of a run after `step` steps, with its lines so far, and removes all but the newest
    `KEPT`."""
    folder = checkpoint_folder(run, step)

    def fill(place: Path) -> None:
        write_tensors(place / STATE, state)
        write_json(place / PROGRESS, {**progress, "step": step})
        for name in (METRICS, EVALUATIONS):
            keep_lines(run / name, place)

    replace_folder(folder, fill)
    remove_old_checkpoints(run)
    return folder


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and progress that `save_checkpoint` wrote.

    Raises:
        UsageError: a file is missing, damaged, or of another version; the message names it.
    """
    check_manifest(folder, (STATE, PROGRESS, METRICS, EVALUATIONS))
    return read_tensors(folder / STATE), read_json(folder / PROGRESS, ("step", "seconds", "identity", "settings"))
