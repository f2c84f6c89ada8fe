"""Puzzle models and training states in files: safetensors and JSON, put in place whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrm.puzzle.config import PuzzleConfig
from hrm.puzzle.model import PuzzleModel
from hrm.settings import UsageError

CONFIG, WEIGHTS, STATE, PROGRESS = "config.json", "model.safetensors", "state.safetensors", "progress.json"
MODEL, CHECKPOINTS = "model", "checkpoints"  # folders of a run
KEPT = 2  # checkpoints of a run
_CHECKPOINT = re.compile(r"step-(\d+)")


def save_model(model: PuzzleModel, folder: Path, about: Mapping[str, Any]) -> None:
    """Writes `folder`: config.json, with `about` (task, side, ...) beside the model's settings, and the weights."""

    def fill(place: Path) -> None:
        _write_json(place / CONFIG, {**about, "model": model.config.to_dict()})
        save_file(_for_file(model.state_dict()), place / WEIGHTS)

    _replace_folder(folder, fill)


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
    about = _read_json(folder / CONFIG)
    if not isinstance(about.get("model"), dict):
        raise UsageError(f"{folder / CONFIG} describes no puzzle model")
    try:
        model = PuzzleModel(PuzzleConfig.from_dict(about.pop("model")))
        model.load_state_dict(_read_tensors(folder / WEIGHTS))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{folder} holds no puzzle model: {error}") from error
    return model.eval(), about


# ------------------------------------------------------------------------------------------------ training states


def save_checkpoint(run: Path, step: int, state: Mapping[str, Tensor], progress: Mapping[str, Any]) -> Path:
    """Writes checkpoints/step-<step> of a run after `step` steps and removes all but the newest `KEPT`."""
    folder = run / CHECKPOINTS / f"step-{step:08d}"

    def fill(place: Path) -> None:
        save_file(_for_file(state), place / STATE)
        _write_json(place / PROGRESS, {**progress, "step": step})

    _replace_folder(folder, fill)
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first; each is complete, since a folder gets its name last."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and progress that `save_checkpoint` wrote.

    Raises:
        UsageError: a file is missing or damaged; the message names it.
    """
    return _read_tensors(folder / STATE), _read_json(folder / PROGRESS)


# ------------------------------------------------------------------------------------------------ files


def _for_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _replace_folder(folder: Path, fill: Any) -> None:
    """Fills a new folder beside `folder`, waits until the disk has it, and gives it that name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".writing-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    try:
        fill(place)
        for path in (*place.iterdir(), place):
            _to_disk(path)
        place.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(place, folder)
        _to_disk(folder.parent)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):  # a full disk is either
            raise UsageError(f"{folder} cannot be written: {error}") from error
        raise


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} is no file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no JSON object")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
