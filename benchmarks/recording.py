"""A step as a CUDA graph, for every benchmark that replays one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def record(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Runs `step` three times, which compiles its kernels, and records a fourth run: the graph, and what that returned,
    which each `replay` of the graph fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result
