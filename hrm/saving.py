"""Checkpoints that an interruption cannot leave half written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrm.settings import UsageError

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


# ---------------------------------------------------------------------------------------------------- training states

CHECKPOINTS = "checkpoints"  # folder of a run
KEPT = 2  # checkpoints of a run
MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"step-(\d+)")


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps its training state of after `step` steps."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first; each is complete, since a folder gets its name last."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def remove_old_checkpoints(run: Path) -> None:
    """Takes away all but the newest `KEPT`."""
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a checkpoint's folder is named by."""
    return int(checkpoint.name.rpartition("-")[2])


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write files into a new folder, adds a manifest, waits until the disk has them, and gives it the name.

    Raises:
        UsageError: it cannot be written; what `folder` held before is still there.
    """
    with unwritable(folder):
        place = new_place(folder)
        try:
            fill(place)
            put_in_place(place, folder)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise


def new_place(folder: Path) -> Path:
    """Makes a folder beside `folder`, whose files `put_in_place` gives its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".writing-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))


def put_in_place(place: Path, folder: Path) -> None:
    """Adds a manifest to the files in `place`, waits until the disk has them, and renames `place` to `folder`."""
    write_json(place / MANIFEST, {path.name: sha256_of(path) for path in sorted(place.iterdir())})
    for path in (*place.iterdir(), place):
        _to_disk(path)
    place.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(place, folder)
    _to_disk(folder.parent)


@contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Inside, what comes of a full disk and the like becomes a UsageError that names `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk is either
        raise UsageError(f"{folder} cannot be written: {error}") from error


def check_manifest(folder: Path, names: Collection[str]) -> None:
    """Raises a UsageError that names the first file of `names` that the manifest in `folder` does not list, that is
    missing, or that is not as it was written."""
    digests = read_json(folder / MANIFEST)
    for name in names:  # not those of the manifest, which may have been cut short too
        path = folder / name
        if name not in digests:
            raise UsageError(
                f"{folder / MANIFEST} does not list {name}, as it should: it was cut short or changed, "
                "or another version of hrm wrote it"
            )
        if not path.is_file():
            raise UsageError(f"{path} is no file")
        if sha256_of(path) != digests[name]:
            raise UsageError(f"{path} cannot be read: it is not what was written, cut short or changed")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of `tensors`, which may be on any device; those that share memory are written once each."""
    on_cpu, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        where = tensor.untyped_storage().data_ptr()
        on_cpu[name] = tensor.clone() if where in seen else tensor  # bitsandbytes has one table for all parameters
        seen.add(where)
    save_file(on_cpu, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote, on the CPU; a UsageError that names a file that cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def read_json(path: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """A file's JSON object; a UsageError that names a file that is missing, or holds none or one without all `keys`."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} is no file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no JSON object")
    if missing := [key for key in keys if key not in values]:
        raise UsageError(f"{path} has no {', '.join(map(repr, missing))}; another version of hrm wrote it")
    return values


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            sha256.update(block)
    return sha256.hexdigest()


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
