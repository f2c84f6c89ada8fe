"""One training step over several processes: what each found, summed over all with one all-reduce."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from hrm.puzzle.model import PuzzleModel

_LINE = 32  # float32 numbers: every part starts at a multiple of 128 bytes, for wide loads and stores


class SharedStep:
    """Sums gradients, and a few numbers beside them, over all processes.

    All lie in one float32 buffer that is made once, so that a CUDA graph can hold the step. The puzzle embedding's
    gradients, one a row of the batch, and the rows' identifiers are gathered by the same sum: each process leaves the
    others' places at zero.

    Args:
        model: its parameters all float32.
        numbers: how many numbers are summed beside the gradients.
        rows: rows of the batch on this process.
        rank: the process that this is, of `world`.
        world: processes.
    """

    def __init__(self, model: PuzzleModel, numbers: int, rows: int, rank: int, world: int) -> None:
        self._model, self._rank = model, rank
        self._parameters = list(model.parameters())
        shapes: list[tuple[int, ...]] = [*(tuple(p.shape) for p in self._parameters), (numbers,)]
        if model.puzzle_embedding is not None:
            if model.config.num_puzzle_ids > 2**24:
                raise ValueError(f"num_puzzle_ids is {model.config.num_puzzle_ids}; float32 holds them up to {2**24}")
            shapes += [(world, rows), (world, rows, model.config.puzzle_emb_size)]
        sizes = [-(-math.prod(shape) // _LINE) * _LINE for shape in shapes]
        self._buffer = torch.zeros(sum(sizes), device=model.device)
        parts = [
            part[: math.prod(shape)].view(shape) for part, shape in zip(self._buffer.split(sizes), shapes, strict=True)
        ]
        count = len(self._parameters)
        self._gradients, self._numbers, self._embedding = parts[:count], parts[count], parts[count + 1 :]

    @torch.no_grad()
    def sum(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """Makes the parameters' `grad` those of all processes and returns the sums of `numbers` (scalars), until the
        next call."""
        for parameter, part in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None:
                part.copy_(parameter.grad)
                parameter.grad = part
        self._numbers.copy_(torch.stack([number.float() for number in numbers]))
        embedding = self._model.puzzle_embedding
        if embedding is not None and embedding.rows is not None:
            for part, own in zip(self._embedding, (embedding.seen, embedding.rows.grad), strict=True):
                part.zero_()
                part[self._rank].copy_(own)
        dist.all_reduce(self._buffer)
        return list(self._numbers.unbind())

    def embedding(self) -> tuple[Tensor, Tensor]:
        """Identifiers (B,) int64 and gradients (B, size) of the puzzle embedding, for all rows of the batch."""
        seen, gradient = self._embedding
        return seen.flatten().long(), gradient.flatten(0, 1)


def gathered(tensors: Mapping[str, Tensor], world: int) -> dict[str, Tensor]:
    """The rows of all processes, one process after the other; tensors (B, ...) of any dtype, alike on all."""
    found = {}
    for name, tensor in tensors.items():
        own = tensor.contiguous().flatten().view(torch.uint8)  # as bytes: not every backend knows every dtype
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own)
        found[name] = torch.cat(parts).view(tensor.dtype).view(-1, *tensor.shape[1:])
    return found


def alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all processes have the same float32 tensors, by the sums of their bits, exact in any order."""
    sums = torch.stack([tensor.detach().contiguous().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors])
    least, most = sums.clone(), sums
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return torch.equal(least, most)
