"""Checkpoints that an interruption cannot leave half written."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save_atomically(save: Callable[..., Any], folder: Path, *args: Any, **kwargs: Any) -> None:
    """Lets `save` write into a folder inside `folder`, then moves its files into place, each in one step.

    An interruption while `save` writes leaves the old checkpoint. One while files are moved leaves whole files: the new
    config may stand beside the old weights, and weights in several shards do not load for want of their index. Other
    files in `folder`, weights of another variant too, stay as they are.

    Args:
        save: a `save_pretrained`; called with a folder, then `args` and `kwargs`.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        save(staging, *args, **kwargs)
        if not any(Path(staging).iterdir()):  # a process that is not the main one writes nothing
            return
        written = sorted(Path(staging).iterdir(), key=lambda path: (path.name == INDEX, path.name))
        weights = {path.name for path in written if WEIGHTS.fullmatch(path.name)}
        if weights:  # shards of two checkpoints must never stand under one index: it goes first and comes last
            (folder / INDEX).unlink(missing_ok=True)
        for path in written:
            os.replace(path, folder / path.name)
    _remove_stale(folder, weights)


def _remove_stale(folder: Path, weights: set[str]) -> None:
    """Takes away weights of an earlier checkpoint that was cut into other files, and what a killed save left."""
    for path in folder.iterdir():
        if weights and WEIGHTS.fullmatch(path.name) and path.name not in weights:
            path.unlink()
    for path in folder.glob(".saving-*"):
        shutil.rmtree(path, ignore_errors=True)
