"""One training step of a puzzle model: forward, backward, optimizer, averaged weights; on a GPU from one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hrm.puzzle.data import share_of
from hrm.puzzle.loss import PuzzleLoss, puzzle_loss
from hrm.puzzle.model import FIELDS, PuzzleCarry, PuzzleModel, PuzzleOutput
from hrm.puzzle.shared import SharedStep, gathered
from hrm.schedule import least_segments

METRICS = ("loss", "cells", "halt", "go_on", "rows", "exact", "accuracy", "segments", "halt_accuracy", "norm",
           "residual_l", "residual_h", "worst_loss", "worst_norm", "bad_step")  # fmt: skip
_NORM, _WORST = METRICS.index("norm"), METRICS.index("worst_loss")
NO_STEP = float(2**24 - 1)  # exact in float32
BETAS = (0.9, 0.95)
OPTIMIZERS = ("adamw", "muon")


class Engine:
    """Holds a model with its optimizer, averaged weights and carry, and takes steps.

    A step is a function of the state, the batch and (seed, step): exploration too is drawn from them, so that a run
    resumed from a checkpoint goes on bit for bit. On a GPU the first step of each depth runs as it is and the second
    is captured as a CUDA graph, which the others replay.

    Several processes hold the same weights and each a share of the batch's rows and of the carry. What a step finds is
    summed over them by one all-reduce (`SharedStep`), so that weights and metrics are everywhere those of the whole
    batch, and those of one process to rounding.

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
        rank: the process that this is, of `world`.
        world: processes, of an initialized `torch.distributed` where there are several.
    """

    def __init__(
        self, model: PuzzleModel, *, optimizer: str = "adamw", weight_decay: float = 1.0, clip: float = 0.0,
        ema: float = 0.999, embedding_weight_decay: float = 1.0, seed: int = 0, stagger: bool = True,
        graph: bool = True, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {optimizer!r}; it should be one of {', '.join(map(repr, OPTIMIZERS))}")
        self.model, self.clip, self.seed, self.ema_decay = model, clip, seed, ema
        self.embedding_weight_decay, self.stagger = embedding_weight_decay, stagger
        self.rank, self.world = rank, world
        self._shared: SharedStep | None = None
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
        """Optimizer step `number` (from 0) on `batch` (of `BatchStream.batch`, this process's rows); nothing waits for
        the device."""
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
        rows = len(batch["inputs"])
        drawn = np.random.default_rng([self.seed, 2, number]).random((2, rows * self.world), np.float32)
        draw, choice = drawn[:, self._own(rows)]
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
        if self.world > 1 and self._shared is None:
            self._shared = SharedStep(self.model, _WORST - 1, rows, self.rank, self.world)  # all sums but the norm

    def _own(self, rows: int) -> slice:
        """Where in the whole batch the `rows` rows of this process are."""
        return share_of(rows * self.world, self.rank, self.world)

    def _first_carry(self) -> PuzzleCarry:
        carry = self.model.initial_carry(self._batch)
        if self.stagger:
            most = self.model.config.max_segments
            rows = carry.state.steps.shape[0]
            ages = np.random.default_rng([self.seed, 3]).integers(0, most, rows * self.world)
            carry.state.steps.copy_(torch.from_numpy(ages[self._own(rows)]))
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
        # NCCL's watchdog thread looks at events meanwhile, which "global" takes for a fault of the capture
        mode = "global" if self.world == 1 else "thread_local"
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode=mode):
            self._compute()

    def close(self) -> None:
        """Lets go of the CUDA graph: processes that part wait for ever while one holds NCCL's work."""
        self._graph = self._graph_of = None

    def _compute(self) -> None:
        """Forward and backward pass, gradients clipped, carry and metrics put where the next step looks for them."""
        assert self.carry is not None
        model, rows = self.model, self._batch["inputs"].shape[0] * self.world
        for parameter in self.parameters:
            parameter.grad = None
        carry, output = model(self.carry, self._batch, least=self._batch["least"])
        loss = puzzle_loss(output, carry.data["labels"], model.config)
        (loss.loss / rows).backward()
        with torch.no_grad():
            sums = self._sums(loss, output, rows)
            if self._shared is not None:
                sums = self._shared.sum(sums)
            if self.clip:
                norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
            else:
                norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            if model.puzzle_embedding is not None:
                whole = None if self._shared is None else self._shared.embedding()
                model.puzzle_embedding.step(self._embedding_lr, self.embedding_weight_decay, whole)
            for old, new in zip(_tensors(self.carry), _tensors(carry), strict=True):
                old.copy_(new)
            self._measure(sums, norm)

    def _sums(self, loss: PuzzleLoss, output: PuzzleOutput, rows: int) -> list[Tensor]:
        """This process's part of the metrics up to the worst ones, without the norm; `rows` is the whole batch's."""
        done, q_right = output.halted, (output.q_halt > 0) == loss.correct
        return [loss.loss.detach() / rows, loss.cells / rows, loss.halt / rows, loss.go_on / rows, done.sum(),
                (done & loss.correct).sum(), (loss.share * done).sum(), (output.steps * done).sum(),
                (done & q_right).sum(), *(output.residuals.mean(0) / self.world)]  # fmt: skip

    def _measure(self, sums: list[Tensor], norm: Tensor) -> None:
        total = sums[0]
        bad = ~(torch.isfinite(total) & torch.isfinite(norm))
        every = [*sums[:_NORM], norm, *sums[_NORM:]]
        self.metrics[:_WORST] += torch.stack([value.float() for value in every])
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
        """Everything that the next step depends on, as named tensors (none is copied where there is one process).

        The carry is the whole batch's: all processes have to call this together, and any number can go on from it.
        """
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        names = [name for name, _ in self.model.named_parameters()]
        state |= {f"averaged.{name}": tensor for name, tensor in zip(names, self.averaged, strict=False)}
        by_parameter = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                state |= {f"optimizer.{by_parameter[id(parameter)]}.{key}": v for key, v in values.items()}
        if self.carry is not None:
            carry = _named(self.carry) if self.world == 1 else gathered(_named(self.carry), self.world)
            state |= {f"carry.{name}": tensor for name, tensor in carry.items()}
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave, of the carry this process's rows.

        Raises:
            ValueError: a tensor is missing; the message names it. Or the rows cannot be dealt out to the processes.
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
        own = share_of(len(_of(state, "carry.inputs")), self.rank, self.world)
        data = {name: _of(state, f"carry.{name}")[own].to(device) for name in FIELDS}
        self.carry = self.model.initial_carry(data)
        for name, tensor in _named(self.carry).items():
            tensor.copy_(_of(state, f"carry.{name}")[own])


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
