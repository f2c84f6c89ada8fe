"""Checkpoints that an interruption cannot leave half written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


def save_atomically(save: Callable[..., Any], folder: Path, *args: Any, **kwargs: Any) -> None:
    """Lets `save` write into a folder inside `folder`, then moves its files into place, each in one step.

    Killed at any time, `folder` holds the old checkpoint, the new one, or (weights in several shards only) one that
    does not load for want of its index; other files in it stay as they are.

    Args:
        save: a `save_pretrained`; called with a folder, then `args` and `kwargs`.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        save(staging, *args, **kwargs)
        if not any(Path(staging).iterdir()):  # a process that is not the main one writes nothing
            return
        # shards of two checkpoints must never stand under one index: it goes first and comes last
        (folder / INDEX).unlink(missing_ok=True)
        written = sorted(Path(staging).iterdir(), key=lambda path: (path.name == INDEX, path.name))
        for path in written:
            os.replace(path, folder / path.name)
    _remove_stale(folder, {path.name for path in written})


def _remove_stale(folder: Path, written: set[str]) -> None:
    """Takes away weights of an earlier checkpoint that was cut into other files, and what a killed save left."""
    for path in folder.glob("model*.safetensors"):
        if path.name not in written:
            path.unlink()
    for path in folder.glob(".saving-*"):
        shutil.rmtree(path, ignore_errors=True)
