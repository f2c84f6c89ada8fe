"""Which rows a step trains on, and how they become batches: padded or packed, in parts that fit the memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hrm.data import Encoded, collate


class Place(NamedTuple):
    """A row's place in the training: its number, and the segment of the batch that the step runs."""

    row: int
    segment: int


class StepRows:
    """The rows of one optimizer step on one process.

    No list: accelerate would look into every token of one.
    """

    def __init__(self, placed: Sequence[tuple[Encoded, int]]) -> None:
        self.rows = [row for row, _ in placed]
        self.segment = placed[0][1]  # 0 with update_every="batch", else the segment that the step is


class Rows(Dataset):
    """Rows by their place."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Place) -> tuple[Encoded, int]:
        return self._rows[place.row], place.segment


class BatchPlan(Sampler):
    """The rows of every optimizer step on this process; a function of the seed and the step, so any can be resumed at.

    Each pass over the rows has an order of its own; batches cross from pass to pass, so all are full. Within a step
    rows stand by length, so that those of one part of it are alike, and are dealt to the processes in turn.

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch, over all processes.
        steps: optimizer steps.
        seed: of the order.
        segments: steps that each batch is trained on: 1, or one a segment.
        rank, world: this process and how many there are.
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, steps: int, seed: int, segments: int = 1, rank: int = 0,
        world: int = 1,
    ) -> None:  # fmt: skip
        self._lengths, self._batch_size, self._steps, self._segments = lengths, batch_size, steps, segments
        self._seed, self._rank, self._world = seed, rank, world
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[Place]]:
        for step in range(len(self)):
            batch, segment = divmod(step, self._segments)
            rows = sorted(self.rows(batch), key=lambda row: self._lengths[row])
            yield [Place(row, segment) for row in rows[self._rank :: self._world]]

    def rows(self, batch: int) -> list[int]:
        """The rows of batch `batch` on all processes, in the order in which they are drawn."""
        count = len(self._lengths)
        places = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        return [self._order(place // count)[place % count] for place in places]

    def _order_of(self, number: int) -> list[int]:
        return random.Random(f"{self._seed}-{number}").sample(range(len(self._lengths)), len(self._lengths))


def micro_batches(rows: Sequence[Encoded], size: int, pad: int, *, pack: bool) -> list[dict[str, Tensor]]:
    """The arguments of the forward passes on `rows`, at most `size` each; padded on the right, or packed into one row.

    Packed rows have no mask: `position_ids` (1, S) start anew at each document. Nothing at a document's start is
    scored, since no token before it may know it.
    """
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [_packed(part) if pack else collate(part, pad)._asdict() for part in parts]


def _packed(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row.tokens]]),
        "position_ids": torch.cat([torch.arange(len(row.tokens)) for row in rows])[None],
        "labels": torch.tensor([[label for row in rows for label in row.labels]]),
    }


def widest_part(lengths: Sequence[int], size: int, batch_size: int) -> int:
    """The most tokens that `micro_batches` can pack into a part of `size` rows, given the lengths of all rows.

    A batch may reach from one pass over the rows into the next, and so hold its longest rows more than once.
    """
    passes = 1 + -(-(batch_size - 1) // len(lengths))
    return sum(sorted(sorted(lengths)[-size:] * passes)[-size:])


def scored_tokens(rows: Sequence[Encoded]) -> int:
    """Tokens of `rows` that the loss is a mean over: the answers', but a row's first token, which nothing predicts."""
    return sum(len(row.answer) + len(row.beside) - (not row.prompt) for row in rows)
