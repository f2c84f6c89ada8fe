"""Run by test_distributed.py in two processes: a model that FSDP2 has cut up is saved, generates, and takes one step,
whose checkpoint is read again."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from small_models import ACT, CORE, backbone_config, seem_trained
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hrm import HRMGemmaForCausalLM
from hrm.loss import IGNORED
from hrm.replay import ReplayBuffer
from hrm.running import TrainingError
from hrm.sharding import whole_state
from hrm.trainer import HRMTrainer
from hrm.training_state import load_optimizer, load_weights, save_training


def make_model(kind: str) -> HRMGemmaForCausalLM:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(backbone_config(kind))
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm={**CORE, **ACT})
    seem_trained(model)
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 256, (4, 12), generator=torch.Generator().manual_seed(1))
    return ids, ids.masked_fill(torch.arange(12) < torch.tensor([[2], [4], [6], [8]]), IGNORED)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainer_of(model: Any, optimizer: Any, folder: Path, rank: int, world: int) -> Any:
    """What `hrm.training_state` needs of a trainer."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return SimpleNamespace(
        model_wrapped=model, core_model=SimpleNamespace(replay=ReplayBuffer(4)), optimizer=optimizer, folder=folder,
        lr_scheduler=schedule, progress=dict, load_progress=lambda _: None,
        create_scheduler=lambda steps: schedule,
        args=SimpleNamespace(process_index=rank, world_size=world, device=torch.device("cpu"), max_steps=1, seed=0),
        state=SimpleNamespace(save_to_json=lambda path: Path(path).write_text("{}")),
    )  # fmt: skip


def save_and_generate(model: Any, folder: Path, rank: int, world: int) -> None:
    state = whole_state(model, keep=rank == 0)
    assert bool(state) == (rank == 0)
    if rank == 0:
        model.save_pretrained(folder / "model", state_dict=state)
    ids = batch()[0][rank::world]
    model.eval()
    most = (2, 7)[rank]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, synced_gpus=True)
    model.train()
    save_file({"tokens": tokens}, folder / f"tokens-{rank}.safetensors")


def all_hear_of_a_nan(model: Any, rank: int) -> None:
    """A weight that is not finite in one process's part ends the training in all of them, before they save together."""

    def over_processes(values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    trainer: Any = SimpleNamespace(
        core_model=model, state=SimpleNamespace(global_step=3), _sum_over_processes=over_processes,
        _no_way_on=lambda: f"{trainer._why} at step {trainer._first_bad}",
    )  # fmt: skip
    HRMTrainer._check_weights(trainer)
    if rank == 1:
        with torch.no_grad():
            model.hrm.w_l.to_local()[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"hrm\.w_l are not finite at step 3"):
        HRMTrainer._check_weights(trainer)


def main(folder: Path, kind: str) -> None:
    processes = PartialState(cpu=True)
    rank, world = processes.process_index, processes.num_processes
    model = make_model(kind)
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    save_and_generate(model, folder, rank, world)
    ids, labels = batch()
    items = int((labels[:, 1:] != IGNORED).sum())
    out = model(ids[rank::world], labels=labels[rank::world], num_items_in_batch=items)
    (out.loss * world).backward()
    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    trainer = trainer_of(model, optimizer, folder, rank, world)
    save_training(trainer, folder / "step-00000001")
    before = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    moments = [full(state[key]) for state in optimizer.state.values() for key in sorted(state)]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer.state.clear()
    load_weights(folder / "step-00000001", model)
    load_optimizer(trainer, folder / "step-00000001")
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(full(p.detach()), before[name]), name
    again = [full(state[key]) for state in optimizer.state.values() for key in sorted(state)]
    assert len(again) == len(moments) and all(map(torch.equal, again, moments))
    all_hear_of_a_nan(model, rank)
    if rank == 0:
        save_file(gradients, folder / "gradients.safetensors")
        assert load_file(folder / "step-00000001" / "model.safetensors")["hrm.w_l"].shape == (32, 192)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
