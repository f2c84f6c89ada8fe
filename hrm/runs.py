"""The lines that a run leaves: one JSON object each, strict JSON, and none that a kill has cut short is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"  # of a run folder


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Adds `values` to the file, which is made where it is missing; a number that is not finite becomes the string
    "nan", "inf" or "-inf", which `float` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    strict = {key: str(value) if _not_finite(value) else value for key, value in values.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(strict, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The file's objects in order; a line that a kill cut short is left out, and a missing file has none."""
    return [values for _, values in _whole_lines(path)]


def forget_after(path: Path, step: int, events: Collection[str] = ()) -> None:
    """Drops lines of steps after `step`, which come again when a run goes on from there, those of `events` whatever
    their step, and a line cut short by a kill. Lines without a step stay; a missing file stays missing."""
    if not path.is_file():
        return
    lines = [(text, values) for text, values in _whole_lines(path) if values.get("event") not in events]
    _replace(path, [text for text, values in lines if values.get("step", 0) <= step])


def keep_lines(path: Path, folder: Path) -> None:
    """Writes the lines so far into the `folder` of a checkpoint, under the file's name; a missing file has none."""
    (folder / path.name).write_bytes(path.read_bytes() if path.is_file() else b"")


def bring_back(path: Path, folder: Path, step: int) -> None:
    """Puts back the lines that `keep_lines` wrote into the `folder` of a checkpoint of `step` steps, whatever the file
    has lost; of its own lines, those stay that came after the checkpoint. Where neither has any, none is made."""
    kept = [text for text, _ in _whole_lines(folder / path.name)]
    known = set(kept)
    own = [text for text, values in _whole_lines(path) if text not in known and values.get("step", step) >= step]
    if kept or path.is_file():
        _replace(path, [*kept, *own])


def _replace(path: Path, lines: Iterable[str]) -> None:
    staging = path.with_name(f".{path.name}.writing")
    staging.write_text("".join(lines), encoding="utf-8")
    os.replace(staging, path)  # in one step: a kill on the way leaves the old lines


def _whole_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            values = json.loads(text)
        except ValueError:
            continue
        if text.endswith("\n") and isinstance(values, dict):
            found.append((text, values))
    return found


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
