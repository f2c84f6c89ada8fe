"""A training's whole state in one folder: safetensors and JSON, complete or not there, and refused where damaged.

    model.safetensors      what trains, and the core's buffers; the rest is the backbone's own
    optimizer.safetensors  its tensors by parameter; numbers are in optimizer.json
    trainer_state.json     the Trainer's own: step, epoch
    metrics.jsonl          the run's lines so far
    progress.json          schedule, curriculum, counters, what was measured since the last line of metrics.jsonl,
                           settings, digests of data and backbone, number of processes
    rank-<r>.safetensors   of each process: replay buffer and generators; numbers of these in rank-<r>.json
    manifest.json          SHA-256 of each file

Nothing is pickled. A checkpoint is written between batches, when no carry is under way.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from hrm.running import check_settings, on_each, on_first
from hrm.runs import METRICS, bring_back, keep_lines
from hrm.saving import (
    check_manifest,
    new_place,
    put_in_place,
    read_json,
    read_tensors,
    step_of,
    unwritable,
    write_json,
    write_tensors,
)
from hrm.settings import UsageError
from hrm.sharding import whole

if TYPE_CHECKING:
    from hrm.trainer import HRMTrainer

MODEL, OPTIMIZER, NUMBERS, PROGRESS = "model.safetensors", "optimizer.safetensors", "optimizer.json", "progress.json"


def save_training(trainer: HRMTrainer, folder: Path) -> None:
    """Writes `folder`; every process takes part, the first one puts it in place.

    Raises:
        UsageError: one of the processes cannot write, for want of space say; all are told, and what was there before
            still is.
    """
    # gathered here from all processes, where each has a part
    weights = {name: whole(tensor) for name, tensor in _trained(trainer.model_wrapped).items()}
    tensors, numbers = _optimizer_state(trainer)
    progress = {"world": trainer.args.world_size, "schedule": _schedule(trainer), **trainer.progress()}
    processes, told = PartialState(), unwritable(folder)

    def write() -> None:
        _write_rank(trainer, place)
        if not processes.is_main_process:
            return
        write_tensors(place / MODEL, weights)
        write_tensors(place / OPTIMIZER, tensors)
        write_json(place / NUMBERS, numbers)
        trainer.state.save_to_json(str(place / TRAINER_STATE_NAME))
        write_json(place / PROGRESS, progress)
        keep_lines(trainer.folder / METRICS, place)

    place = on_first(processes, told(lambda: new_place(folder)))
    try:
        on_each(processes, told(write))
        on_first(processes, told(lambda: put_in_place(place, folder)))
    except BaseException:
        if processes.is_main_process:
            shutil.rmtree(place, ignore_errors=True)
        raise


def check_training(folder: Path) -> None:
    """Raises a UsageError that names the file of a checkpoint that is missing, damaged or not in its manifest."""
    check_manifest(folder, (PROGRESS,))
    ranks = range(read_json(folder / PROGRESS, ("world",))["world"])
    of_ranks = (name for rank in ranks for name in _rank_files(rank))
    check_manifest(folder, (MODEL, OPTIMIZER, NUMBERS, TRAINER_STATE_NAME, METRICS, *of_ranks))


def check_record(folder: Path, now: Mapping[str, Any], run: Path) -> None:
    """Raises a UsageError that names the setting of the run in `run`, `now`, that is not what the checkpoint `folder`
    was written with. Reads one small file, so that it can be asked before anything is loaded."""
    check_manifest(folder, (PROGRESS,))
    check_settings(read_json(folder / PROGRESS, ("settings",))["settings"], now, run)


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Puts a checkpoint's weights into `model`.

    Raises:
        UsageError: they are not this model's; the message names the first.
    """
    weights = read_tensors(folder / MODEL)
    own = _trained(model)
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is not in the model" for name in weights if name not in own]
    for name in own.keys() & weights.keys():
        was, should = tuple(weights[name].shape), tuple(own[name].shape)
        problems += [f"{name} is {was} instead of {should}"] if was != should else []
    if problems:
        raise UsageError(f"{folder / MODEL} does not fit this run: {problems[0]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_cut_like(weights[name], tensor))


def load_lines(trainer: HRMTrainer, folder: Path) -> None:
    """Puts back what the run's metrics.jsonl has lost of its lines up to the checkpoint; the first process writes.

    Raises:
        UsageError: it cannot be written.
    """
    path = trainer.folder / METRICS
    on_first(PartialState(), unwritable(path)(lambda: bring_back(path, folder, step_of(folder))))


def load_optimizer(trainer: HRMTrainer, folder: Path) -> None:
    """Puts back the optimizer, its schedule, and what `HRMTrainer.progress` gave."""
    optimizer, numbers = _optimizer(trainer), read_json(folder / NUMBERS)
    found: dict[str, dict[str, Any]] = {name: dict(values) for name, values in numbers["state"].items()}
    for key, tensor in read_tensors(folder / OPTIMIZER).items():
        name, _, part = key.rpartition("/")
        found.setdefault(name, {})[part] = tensor
    names = {id(p): name for name, p in _trained(trainer.model_wrapped).items()}
    for group, rates in zip(optimizer.param_groups, numbers["rates"], strict=True):
        group |= rates
        for parameter in group["params"]:
            state = found.get(names[id(parameter)], {})
            optimizer.state[parameter] = {
                key: _like(value, parameter, group, optimizer) for key, value in state.items()
            }
    progress = read_json(folder / PROGRESS, ("schedule", *trainer.progress()))
    trainer.create_scheduler(trainer.args.max_steps).load_state_dict(progress["schedule"])
    trainer.load_progress(progress)


def load_rank(trainer: HRMTrainer, folder: Path) -> None:
    """Puts back this process's generators and replay buffer.

    With another number of processes than wrote the checkpoint, buffers are dealt out in turn, and generators start anew
    from the seed, the step and the process.
    """
    args, written = trainer.args, read_json(folder / PROGRESS)["world"]
    rank = args.process_index % written
    tensors_file, numbers_file = _rank_files(rank)
    tensors, numbers = read_tensors(folder / tensors_file), read_json(folder / numbers_file)
    replay = {name.removeprefix("replay."): t for name, t in tensors.items() if name.startswith("replay.")}
    trainer.core_model.replay.load_state(replay, args.device)
    if written != args.world_size:
        seed = [args.seed, trainer.state.global_step, args.process_index]
        set_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        return
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and args.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], args.device)


def _rank_files(rank: int) -> tuple[str, str]:
    """Of a process: its tensors and its numbers."""
    return f"rank-{rank}.safetensors", f"rank-{rank}.json"


def _optimizer(trainer: HRMTrainer) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # below accelerate's wrapper


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a training changes or draws: parameters with gradient and the core's buffers, by their names in the model
    without what wrappers put in front."""
    named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name.removeprefix("module."): b for name, b in model.named_buffers()}
    return named | {name: buffer for name, buffer in buffers.items() if name.startswith("hrm.")}


def _cut_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` where `like` is, and the same part of it."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def _optimizer_state(trainer: HRMTrainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors, as "parameter/key", and its numbers; every process takes part."""
    optimizer = _optimizer(trainer)
    names = {id(p): name for name, p in _trained(trainer.model_wrapped).items()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = whole(value)
                else:
                    numbers.setdefault(name, {})[key] = value
    rates = [{key: group[key] for key in ("lr", "initial_lr") if key in group} for group in optimizer.param_groups]
    return tensors, {"state": numbers, "rates": rates}


def _like(value: Any, parameter: Tensor, group: dict[str, Any], optimizer: Any) -> Any:
    """A state's value where its parameter is, and cut as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        if getattr(optimizer, "is_paged", False):  # bitsandbytes' own memory, which leaves the GPU when it is full
            return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
        return _cut_like(value, parameter)
    counter = value.dim() == 0 and not (group.get("fused") or group.get("capturable"))  # torch keeps it on the CPU
    return value if counter else value.to(parameter.device)


def _schedule(trainer: HRMTrainer) -> dict[str, Any]:
    assert trainer.lr_scheduler is not None
    return trainer.lr_scheduler.state_dict()


def _write_rank(trainer: HRMTrainer, place: Path) -> None:
    rank, device = trainer.args.process_index, trainer.args.device
    kind, words, position, has_gauss, cached = tuple[Any, ...](np.random.get_state())
    tensors = {f"replay.{name}": tensor for name, tensor in trainer.core_model.replay.state().items()}
    tensors |= {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(words.astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    tensors_file, numbers_file = _rank_files(rank)
    write_tensors(place / tensors_file, tensors)
    numbers = {"python": random.getstate(), "numpy": [kind, position, has_gauss, cached]}
    write_json(place / numbers_file, numbers)
