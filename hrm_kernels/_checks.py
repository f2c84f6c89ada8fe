"""Checks of arguments, shared by the public functions: a message names the argument, what it is, what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_kernels._backend import DTYPES


def fail(function: str, argument: str, was: object, should: str) -> None:
    raise ValueError(f"{function}: {argument} is {was}; it should be {should}")


def shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def check_tensors(function: str, first: str, tensors: dict[str, Tensor]) -> None:
    """All are floating-point tensors of one supported dtype on one device, those of `tensors[first]`."""
    lead = tensors[first]
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} is {type(tensor).__name__}; it should be a torch.Tensor")
        if tensor.device != lead.device:
            fail(function, f"{name}.device", tensor.device, f"{lead.device}, the device of {first}")
        if tensor.dtype not in DTYPES:
            fail(function, f"{name}.dtype", tensor.dtype, "float32, bfloat16 or float16")
        if tensor.dtype != lead.dtype:
            fail(function, f"{name}.dtype", tensor.dtype, f"{lead.dtype}, the dtype of {first}")


def check_shape(function: str, argument: str, tensor: Tensor, should: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(should):
        fail(function, f"{argument}.shape", shape(tensor), f"({', '.join(map(str, should))}), {meaning}")


def check_eps(function: str, eps: float) -> None:
    if not eps > 0:
        fail(function, "eps", eps, "above 0")


def autocast(*tensors: Tensor) -> list[Tensor]:
    """Casts to the autocast dtype where autocast is on for their device; unchanged elsewhere.

    The whole operation then runs in that dtype, as matrix products do under autocast, on either backend alike.
    """
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta tensors have no autocast to ask
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
