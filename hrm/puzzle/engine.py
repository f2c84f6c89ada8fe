"""One training step of a puzzle model: forward, backward, optimizer, averaged weights; on a GPU from one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hrm.puzzle.loss import puzzle_loss
from hrm.puzzle.model import FIELDS, PuzzleCarry, PuzzleModel
from hrm.schedule import least_segments

METRICS = ("loss", "cells", "halt", "go_on", "rows", "exact", "accuracy", "segments", "halt_accuracy", "norm",
           "residual_l", "residual_h", "worst_loss", "worst_norm", "bad_step")  # fmt: skip
_WORST = METRICS.index("worst_loss")
NO_STEP = float(2**24 - 1)  # exact in float32
BETAS = (0.9, 0.95)
OPTIMIZERS = ("adamw", "muon")


class Engine:
    """Holds a model with its optimizer, averaged weights and carry, and takes steps.

    A step is a function of the state, the batch and (seed, step): exploration too is drawn from them, so that a run
    resumed from a checkpoint goes on bit for bit. On a GPU the first step of each depth runs as it is and the second
    is captured as a CUDA graph, which the others replay.

    Args:
        model: on its device, in training mode.
        optimizer: "adamw" (PyTorch's fused) or "muon" (matrices of the blocks by torch.optim.Muon, the rest by AdamW).
        weight_decay: of all weights, as published.
        clip: largest norm of the gradient; 0: not clipped.
        ema: share that the averaged weights keep at each step; 0: none are kept.
        seed: of the exploration.
        stagger: let the first puzzles end after 1 to max_segments segments, so that from then on every step sees
            puzzles in all segments and replaces a few of them. False, as published: all rows start together, so that
            for max_segments steps on end the model is fitted to the same puzzles.
        graph: capture CUDA graphs; False where a debugger has to see each kernel.
    """

    def __init__(
        self, model: PuzzleModel, *, optimizer: str = "adamw", weight_decay: float = 1.0, clip: float = 0.0,
        ema: float = 0.999, embedding_weight_decay: float = 1.0, seed: int = 0, stagger: bool = True,
        graph: bool = True,
    ) -> None:  # fmt: skip
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r}; it should be one of {', '.join(map(repr, OPTIMIZERS))}")
        self.model, self.clip, self.seed, self.ema_decay = model, clip, seed, ema
        self.embedding_weight_decay, self.stagger = embedding_weight_decay, stagger
        self.parameters: list[Tensor] = list(model.parameters())
        self.optimizers = _optimizers(model, optimizer, weight_decay)
        self.averaged = [p.detach().clone() for p in self.parameters] if ema else []
        self.carry: PuzzleCarry | None = None
        self.metrics = torch.zeros(len(METRICS), device=model.device)
        self.reset_metrics()
        self._embedding_lr = torch.zeros((), device=model.device)
        self._step = torch.zeros((), device=model.device)
        self._batch: dict[str, Tensor] = {}
        self._use_graph = graph and model.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_of: tuple[int, ...] | None = None  # the depth whose first step has run
        self._stream = torch.cuda.Stream() if self._use_graph else None

    # ------------------------------------------------------------------------------------------------ one step

    def step(self, number: int, batch: Mapping[str, np.ndarray], lr: float, embedding_lr: float) -> None:
        """Optimizer step `number` (from 0) on `batch` (of `BatchStream.batch`); nothing waits for the device."""
        self._load(number, batch)
        self._embedding_lr.fill_(embedding_lr)
        self._step.fill_(number)
        self._gradients()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        if self.averaged:
            with torch.no_grad():  # or the averages would grow a graph
                torch._foreach_lerp_(self.averaged, self.parameters, 1 - self.ema_decay)

    def _load(self, number: int, batch: Mapping[str, np.ndarray]) -> None:
        """Copies the batch, and how long each row has to explore, into the tensors that the step reads."""
        config, device = self.model.config, self.model.device
        draw, choice = np.random.default_rng([self.seed, 2, number]).random((2, len(batch["inputs"])), np.float32)
        far = least_segments(torch.from_numpy(draw), torch.from_numpy(choice), config.max_segments, config.exploration)
        tensors = {name: torch.from_numpy(batch[name]) for name in FIELDS} | {"least": far}
        for name, tensor in tensors.items():
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            if name not in self._batch:
                self._batch[name] = torch.empty_like(tensor, device=device)
            self._batch[name].copy_(tensor, non_blocking=True)
        if self.carry is None:
            self.carry = self._first_carry()

    def _first_carry(self) -> PuzzleCarry:
        carry = self.model.initial_carry(self._batch)
        if self.stagger:
            most = self.model.config.max_segments
            ages = np.random.default_rng([self.seed, 3]).integers(0, most, carry.state.steps.shape[0])
            carry.state.steps.copy_(torch.from_numpy(ages))
        return carry

    def _gradients(self) -> None:
        config = self.model.config
        depth = (config.h_cycles, config.l_steps, config.grad_cycles, config.grad_l_steps)
        if not self._use_graph:
            self._compute()
        elif depth != self._graph_of:
            self._graph = None  # its memory goes first
            self._on_stream(self._compute)
            self._graph_of = depth
        else:
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            self._graph.replay()

    def _on_stream(self, work: Any) -> None:
        """Runs `work` where the capture will: autograd remembers the stream of the first backward pass."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        for parameter in self.parameters:
            parameter.grad = None  # so that the graph's own memory holds the gradients
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._compute()

    def _compute(self) -> None:
        """Forward and backward pass, gradients clipped, carry and metrics put where the next step looks for them."""
        assert self.carry is not None
        model, rows = self.model, self._batch["inputs"].shape[0]
        for parameter in self.parameters:
            parameter.grad = None
        carry, output = model(self.carry, self._batch, least=self._batch["least"])
        loss = puzzle_loss(output, carry.data["labels"], model.config)
        (loss.loss / rows).backward()
        with torch.no_grad():
            if self.clip:
                norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
            else:
                norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            if model.puzzle_embedding is not None:
                model.puzzle_embedding.step(self._embedding_lr, self.embedding_weight_decay)
            for old, new in zip(_tensors(self.carry), _tensors(carry), strict=True):
                old.copy_(new)
            done, q_right = output.halted, (output.q_halt > 0) == loss.correct
            total = loss.loss.detach() / rows
            bad = ~(torch.isfinite(total) & torch.isfinite(norm))
            sums = [total, loss.cells / rows, loss.halt / rows, loss.go_on / rows, done.sum(),
                    (done & loss.correct).sum(), (loss.share * done).sum(), (output.steps * done).sum(),
                    (done & q_right).sum(), norm, *output.residuals.mean(0)]  # fmt: skip
            self.metrics[:_WORST] += torch.stack([value.float() for value in sums])
            worst = torch.stack((total, norm.float()))
            torch.maximum(self.metrics[_WORST : _WORST + 2], worst, out=self.metrics[_WORST : _WORST + 2])
            first = torch.where(bad, self._step, NO_STEP)
            torch.minimum(self.metrics[-1:], first[None], out=self.metrics[-1:])

    # ------------------------------------------------------------------------------------------------ metrics

    def reset_metrics(self) -> None:
        """Starts the sums of `metrics` anew."""
        self.metrics.zero_()
        self.metrics[-1] = NO_STEP

    def read_metrics(self, steps: int) -> dict[str, float]:
        """Means over the `steps` steps since the last reading (waits for them): those of exact, accuracy, segments and
        halt_accuracy over the rows that halted; `bad_step` is the first with a loss or gradient that is not finite."""
        values = dict(zip(METRICS, self.metrics.tolist(), strict=True))
        self.reset_metrics()
        rows = max(values["rows"], 1)
        for name in METRICS[:_WORST]:
            per_row = name in ("exact", "accuracy", "segments", "halt_accuracy")
            values[name] /= rows if per_row else max(steps, 1)
        return values

    # ------------------------------------------------------------------------------------------------ weights, state

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has its averaged weights inside the `with` block, where they are kept."""
        if not self.averaged:
            yield
            return
        trained = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averaged)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, trained)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as named tensors (none is copied)."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        names = [name for name, _ in self.model.named_parameters()]
        state |= {f"averaged.{name}": tensor for name, tensor in zip(names, self.averaged, strict=False)}
        by_parameter = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                state |= {f"optimizer.{by_parameter[id(parameter)]}.{key}": v for key, v in values.items()}
        if self.carry is not None:
            state |= {f"carry.{name}": tensor for name, tensor in _named(self.carry).items()}
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave.

        Raises:
            ValueError: a tensor is missing; the message names it.
        """
        device = self.model.device
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        by_name = dict(self.model.named_parameters())
        for name, averaged in zip(by_name, self.averaged, strict=False):
            averaged.copy_(_of(state, f"averaged.{name}"))
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = next(name for name, p in by_name.items() if p is parameter)
                prefix = f"optimizer.{name}."
                found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                optimizer.state[parameter] = {k: v.to(device, copy=True) for k, v in found.items()}
        data = {name: _of(state, f"carry.{name}").to(device) for name in FIELDS}
        self.carry = self.model.initial_carry(data)
        for name, tensor in _named(self.carry).items():
            tensor.copy_(_of(state, f"carry.{name}"))


def _optimizers(model: PuzzleModel, kind: str, weight_decay: float) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    matrices: Sequence[nn.Parameter] = []
    made: list[torch.optim.Optimizer] = []
    if kind == "muon":
        blocks = [*model.l_stack, *model.h_stack]
        matrices = [p for block in blocks for p in block.parameters()]
        # steps of the size of AdamW's, so that learning rates and decay mean the same for both
        made.append(torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    return [*made, torch.optim.AdamW(rest, betas=BETAS, weight_decay=weight_decay, fused=True)]


def _named(carry: PuzzleCarry) -> dict[str, Tensor]:
    return {**carry.state._asdict(), **carry.data}


def _tensors(carry: PuzzleCarry) -> list[Tensor]:
    return list(_named(carry).values())


def _of(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the training state has no {name!r}")
    return state[name]
