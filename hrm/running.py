"""What every training run needs around its loop: processes, a folder, a way to stop, a progress bar, memory in use."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from hrm.settings import UsageError, keys_of

T = TypeVar("T")
_parted: list[Any] = []  # process groups that are over


class _Ending(Exception):
    """Ends a training; `alone`: in this process, while others may go on."""

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


class TrainingError(_Ending, RuntimeError):
    """Training cannot go on; the message says at which step, and which checkpoint is good."""


class Interrupted(_Ending):
    """The user stopped the training; the message says where its checkpoint is."""


@contextmanager
def joined_processes() -> Iterator[PartialState]:
    """The processes of this training, joined where a launcher started several, until the `with` block ends; those that
    were joined before (`PartialState()`) stay so, for a program that trains more than once.

    Errors that end all of them alike part them too; after any other, parting could wait for processes that go on.

    Raises:
        UsageError: `accelerate launch` was told to start several processes, and has started one.
    """
    joined_before = _are_joined()
    processes = PartialState(cpu=not torch.cuda.is_available())
    if processes.num_processes == 1:
        _check_launch()

    def part() -> None:
        if _are_joined() and not joined_before:
            # were a model the last to hold the group, it would wait for a thread of gloo that waits for the GIL
            _parted.append(torch.distributed.group.WORLD)
            processes.destroy_process_group()

    try:
        yield processes
    except (UsageError, TrainingError, Interrupted) as error:
        if not getattr(error, "alone", False):
            part()
        raise
    part()


def _check_launch() -> None:
    """`accelerate launch` starts one process where it uses no GPU, however many it is told, but then sets MASTER_ADDR;
    its other way to start processes, and every other launcher, sets WORLD_SIZE too."""
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_ADDR" in os.environ
    if launched and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate launch was told to start several processes (it has set MASTER_ADDR) and has started one, as it "
            "does without GPUs; start them with torchrun --nproc-per-node N -m hrm ..., or let it start one with "
            "--num_processes 1, and MASTER_ADDR unset"
        )


def _are_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def on_first(processes: PartialState, make: Callable[[], T]) -> T:
    """What `make` returns on the first process, on all of them; its UsageError or OSError likewise."""
    if processes.num_processes == 1:
        return make()
    told: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            told[0] = make()
        except (UsageError, OSError) as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def on_each(processes: PartialState, make: Callable[[], T]) -> T:
    """What `make` returns, once it has returned on every process; the UsageError or OSError of one is raised on all,
    and says which process it is of, unless that is the first."""
    if processes.num_processes == 1:
        return make()
    made, error = None, None
    try:
        made = make()
    except (UsageError, OSError) as caught:
        error = caught
    for number, other in enumerate(gather_object([error])):
        if other is not None:
            kind = OSError if isinstance(other, OSError) else UsageError
            raise other if number == 0 else kind(f"process {number}: {other}")
    return cast(T, made)


def run_folder(settings: Any, name: str) -> Path:
    """The folder of the run that goes on, or a new one: `run.folder`/<name>-<time>, with its config.yaml.

    Raises:
        UsageError: it cannot be made.
    """
    if settings.run.resume is not None:
        return Path(settings.run.resume)
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    folder = next(path for name in names if not (path := Path(settings.run.folder) / name).exists())
    try:
        folder.mkdir(parents=True)
        OmegaConf.save(_with_whole_paths(settings), folder / "config.yaml")
    except OSError as error:
        raise UsageError(f"run.folder is {settings.run.folder!r}, and cannot be written to: {error}") from error
    return folder


PATHS = ("data.path", "data.held_out_path", "data.test_path", "hrm.backbone")


def _with_whole_paths(settings: Any) -> Any:
    """A copy in which what was named relative to the working folder is found from any other."""
    copied = copy.deepcopy(settings)
    for key in PATHS:
        value = OmegaConf.select(copied, key)
        if value is not None and Path(value).exists():
            OmegaConf.update(copied, key, str(Path(value).resolve()))
    return copied


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training into `folder` meanwhile; a UsageError where one does."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = folder / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{folder} is being trained into by another process") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_unchanged(before: Mapping[str, str], now: Mapping[str, str], names: Mapping[str, str], folder: Path) -> None:
    """That a run goes on with what it was started with.

    Args:
        before: digests in its checkpoint.
        now: digests of what there is, with the same keys.
        names: what messages call each.
        folder: of the run.

    Raises:
        UsageError: one has changed; the message names it.
    """
    for key, digest in before.items():
        if now.get(key) != digest:
            raise UsageError(f"{names[key]} not what the run in {folder} was started with; it cannot go on")


# where a run stands, who watches it, and what does not change what is computed but for rounding
NOT_RECORDED = (
    "run.", "train.prometheus_port", "train.report_to", "train.save_every", "train.log_every", "train.micro_batch",
    "train.gradient_checkpointing", "eval.batch_size", "hrm.fused", "hrm.offload_per_layer_embeddings",
)  # fmt: skip


def recorded(settings: Any) -> dict[str, Any]:
    """What a checkpoint says of the settings of its run, by key and for JSON; `settings` as of `hrm train`."""
    if settings.run.resume is None:  # else they are those of its config.yaml
        settings = _with_whole_paths(settings)
    schema = OmegaConf.get_type(settings)
    assert schema is not None
    names = [key.name for key in keys_of(schema) if not key.name.startswith(NOT_RECORDED)]
    values = {name: OmegaConf.select(settings, name) for name in names}
    return {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in values.items()}


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """That a run goes on with the settings that it was started with.

    Args:
        before: `recorded` in its checkpoint.
        now: `recorded` of its config.yaml; what is no longer where it was may be named anew, since `check_unchanged`
            compares what is trained with what it was.
        folder: of the run.

    Raises:
        UsageError: one has changed; the message names it.
    """
    for key, value in before.items():
        moved = key in PATHS and value is not None and not Path(value).exists()
        if now.get(key) != value and not moved:
            raise UsageError(
                f"{key} is {json.dumps(now.get(key))} in {folder / 'config.yaml'}; it should be {json.dumps(value)}, "
                "as the run was started with"
            )


class StopOnInterrupt:
    """While entered, the first Ctrl-C or SIGTERM only sets `asked`; one that comes `PATIENCE` seconds later or more is
    Python's own again.

    Not the very next one: a shell, `timeout` or a job scheduler sends the same signal to the process and to its group.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    PATIENCE = 1.0

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0

    def __enter__(self) -> StopOnInterrupt:
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
        elif time.monotonic() - self._first >= self.PATIENCE:
            self._restore()
            signal.raise_signal(number)


def progress_bar(console: Console) -> Progress:
    """Steps done, time left and the latest metrics."""
    text = TextColumn("{task.fields[text]}")
    return Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), text,
                    console=console)  # fmt: skip


NO_MEMORY = (  # what the list of accelerate lacks
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN, where each engine asks for more memory than is left
    "you tried to allocate",  # PyTorch on a CPU
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer rows at a time may help: by its type, or by what CUDA's libraries say in a RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return any(part in text for part in NO_MEMORY) or should_reduce_batch_size(RuntimeError(text))


def forget_peak(device: torch.device) -> None:
    """Starts anew what `peak_memory` says of a GPU. Not for steps that a CUDA graph replays: they allocate nothing."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Most memory in use, in GB: of the GPU's allocations since `forget_peak`; elsewhere, where such a peak cannot be
    read by intervals, of the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
