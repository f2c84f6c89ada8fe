"""HRM and TRM, the puzzle models of arXiv 2506.21734 and 2510.04871: post-norm blocks under the shared schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hrm_kernels
from hrm.config import check_fused
from hrm.core import BACKENDS, Q_BIAS, HRMCarry
from hrm.puzzle.config import PuzzleConfig
from hrm.schedule import continue_target, least_segments, run_cycles, run_steps

Batch = Mapping[str, Tensor]  # inputs, labels (B, S), puzzle_identifiers (B,), all int32
FIELDS = ("inputs", "labels", "puzzle_identifiers")
ROW = 8  # products want rows of a multiple of 16 bytes: the vocabulary is padded to a multiple of this


class PuzzleCarry(NamedTuple):
    """What one segment hands to the next, without graph: the states and the puzzles that they belong to.

    Rows that halted are back at the initial state with zero steps; the next batch's puzzles take their place.
    """

    state: HRMCarry
    data: dict[str, Tensor]


class PuzzleOutput(NamedTuple):
    """What one segment of a `PuzzleModel` computes."""

    logits: Tensor  # (B, S, vocab_size)
    q_halt: Tensor  # (B,) float32
    q_continue: Tensor  # (B,) float32
    q_target: Tensor | None  # (B,) float32 target of sigmoid(q_continue); in training with q_target="bootstrap"
    steps: Tensor  # (B,) int32, segments that each row has run, this one included
    halted: Tensor  # (B,) bool, rows for which this segment was the last
    residuals: Tensor  # (B, 2) float32, relative change of z_L and z_H; 0 where halted


class BlockWeights(NamedTuple):
    """One block's weights in the dtype that the recurrence runs in (nn.Linear layout)."""

    mix_in: Tensor  # (3 d, d) query, key, value; or (2 I', tokens) of the MLP over positions
    mix_out: Tensor  # (d, d); or (tokens, I')
    gate_up: Tensor  # (2 I, d), gate first
    down: Tensor  # (d, I)


class Weights(NamedTuple):
    """All weights, cast once for a whole segment."""

    embedding: Tensor  # (V, d), V the padded vocabulary
    head: Tensor  # (V, d)
    q_head: Tensor  # (2, d)
    q_bias: Tensor  # (2,)
    l_stack: list[BlockWeights]
    h_stack: list[BlockWeights]
    z_l_init: Tensor  # (d,)
    z_h_init: Tensor  # (d,)
    cos_sin: tuple[Tensor, Tensor] | tuple[None, None]  # (tokens, d / heads) float32
    positions: Tensor | None  # (tokens, d)


class Block(nn.Module):
    """h = rms_norm(h + Mix(h)); h = rms_norm(h + SwiGLU(h)), the norms without weight."""

    def __init__(self, config: PuzzleConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.inner_size(config.hidden_size)
        if config.mixer == "mlp":
            mix_inner = config.inner_size(config.tokens)
            self.mix_in, self.mix_out = _linear(2 * mix_inner, config.tokens), _linear(config.tokens, mix_inner)
        else:
            self.mix_in, self.mix_out = _linear(3 * d, d), _linear(d, d)
        self.gate_up, self.down = _linear(2 * inner, d), _linear(d, inner)

    def cast(self, dtype: torch.dtype) -> BlockWeights:
        """Its weights in `dtype`, with graph."""
        return BlockWeights(*(getattr(self, name).to(dtype) for name in BlockWeights._fields))


class PuzzleEmbedding(nn.Module):
    """One row for each puzzle identifier, trained by the sign of its gradient: Adam's step where a row is seen once.

    `weight` (ids, size) is a buffer: a dense gradient of up to a million rows would cost more than the model.
    """

    weight: Tensor

    def __init__(self, ids: int, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(ids, size))
        self.rows: Tensor | None = None
        self.seen: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """(B,) int -> (B, size) float32; with gradients on, the rows become what the next `step` updates."""
        rows = self.weight[ids.long()]
        if self.training and torch.is_grad_enabled():
            rows.requires_grad_()
            self.rows, self.seen = rows, ids.long()
        return rows

    @torch.no_grad()
    def step(self, lr: Tensor | float, weight_decay: float, whole: tuple[Tensor, Tensor] | None = None) -> None:
        """SignSGD with decoupled decay on the rows of the last forward pass; their gradients are used up.

        Shapes do not depend on how many identifiers differ, so that a CUDA graph can hold it.

        Args:
            lr: learning rate.
            weight_decay: decay.
            whole: identifiers (B,) int64 and gradients (B, size) of the rows of all processes; None: there is one.
        """
        if self.rows is None or self.seen is None or self.rows.grad is None:
            return
        seen, gradient = (self.seen, self.rows.grad) if whole is None else whole
        same = (seen[:, None] == seen[None, :]).to(gradient.dtype)
        sign = torch.sign(same @ gradient)  # rows of one identifier get the same sum, so all write the same
        self.weight[seen] = self.weight[seen] * (1 - lr * weight_decay) - lr * sign
        self.rows = self.seen = None


class PuzzleModel(nn.Module):
    """HRM or TRM, as `config` says. Buffers: z_l_init, z_h_init (d,), the states' start, drawn once.

    `forward` runs one segment on a batch in which finished puzzles are replaced by fresh ones (adaptive computation
    time as published). `load_published` in hrm.puzzle.published reads both repositories' checkpoints.
    """

    z_l_init: Tensor
    z_h_init: Tensor

    def __init__(self, config: PuzzleConfig | None = None) -> None:
        super().__init__()
        self.config = config = replace(config) if config is not None else PuzzleConfig()
        d = config.hidden_size
        self.embedding = _linear(config.vocab_size, d)
        self.head = _linear(config.vocab_size, d)
        self.q_head = _linear(2, d)
        self.q_bias = nn.Parameter(torch.empty(2))
        self.positions = _linear(config.tokens, d) if config.positions == "learned" else None
        self.puzzle_embedding = None
        if config.puzzle_emb_size:
            self.puzzle_embedding = PuzzleEmbedding(config.num_puzzle_ids, config.puzzle_emb_size)
        self.l_stack = nn.ModuleList(Block(config) for _ in range(config.l_layers))
        self.h_stack = nn.ModuleList(Block(config) for _ in range(config.h_layers))
        self.register_buffer("z_l_init", torch.empty(d))
        self.register_buffer("z_h_init", torch.empty(d))
        self._rotation: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights and the initial states anew: truncated normal at two standard deviations."""
        scale = self.config.embed_scale
        for name, parameter in self.named_parameters():
            if name in ("q_head", "q_bias"):  # Q starts near "no", so that nothing halts before it is learnt
                nn.init.constant_(parameter, 0.0 if name == "q_head" else Q_BIAS)
            else:
                columns = scale if name in ("embedding", "positions") else math.sqrt(parameter.shape[1])
                trunc_normal_(parameter, 1 / columns)
        trunc_normal_(self.z_l_init, 1.0)
        trunc_normal_(self.z_h_init, 1.0)
        if self.puzzle_embedding is not None:
            self.puzzle_embedding.weight.zero_()

    # ------------------------------------------------------------------------------------------------ set-up

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """What the recurrence runs in."""
        if self.config.dtype == "auto":
            return torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return getattr(torch, self.config.dtype)

    @property
    def fused(self) -> bool | str:
        """Which kernels run: True (Triton, or an error), False (plain PyTorch) or "auto"; may be set at any time."""
        return self.config.fused

    @fused.setter
    def fused(self, value: bool | str) -> None:
        check_fused(value, "PuzzleConfig")
        self.config.fused = value

    def extra_repr(self) -> str:
        c = self.config
        return f"mixer={c.mixer!r}, h_cycles={c.h_cycles}, l_steps={c.l_steps}, dtype={self.dtype}, fused={c.fused!r}"

    def initial_carry(self, batch: Batch) -> PuzzleCarry:
        """A carry in which every row has halted, so that the first segment takes all its puzzles from the batch."""
        rows, device = batch["inputs"].shape[0], self.device
        shape = (rows, self.config.tokens, self.config.hidden_size)
        state = HRMCarry(
            self.z_l_init.to(self.dtype).expand(shape).contiguous(),
            self.z_h_init.to(self.dtype).expand(shape).contiguous(),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.bool, device=device),
        )
        return PuzzleCarry(state, {name: torch.zeros_like(batch[name], device=device) for name in FIELDS})

    def weights(self) -> Weights:
        """All weights in the dtype that the recurrence runs in, with graph: cast once a segment, for all its steps."""
        dtype, padding = self.dtype, (0, 0, 0, -self.config.vocab_size % ROW)
        l_stack = [block.cast(dtype) for block in self.l_stack]  # type: ignore[operator]
        return Weights(
            F.pad(self.embedding, padding).to(dtype),
            F.pad(self.head, padding).to(dtype),
            self.q_head.to(dtype),
            self.q_bias.to(dtype),
            l_stack,
            [block.cast(dtype) for block in self.h_stack] or l_stack,  # type: ignore[operator]
            self.z_l_init.to(dtype),
            self.z_h_init.to(dtype),
            self._cos_sin(),
            None if self.positions is None else self.positions.to(dtype),
        )

    # ------------------------------------------------------------------------------------------------ one segment

    def forward(
        self, carry: PuzzleCarry, batch: Batch, *, least: Tensor | None = None, halting: bool = False,
        weights: Weights | None = None,
    ) -> tuple[PuzzleCarry, PuzzleOutput]:  # fmt: skip
        """One segment for every row: fresh puzzles where the last one halted, N cycles, read-out, halting.

        Halting: in training where q_halt > q_continue (q_target "bootstrap") or q_halt > 0 ("none"), not before
        `least` segments; always at `max_segments`. In evaluation only there, unless `halting`.

        Args:
            carry: from `initial_carry` or the last call.
            batch: inputs and labels (B, S), puzzle_identifiers (B,), all int32; rows that have not halted ignore it.
            least: (B,) int32, segments that a row has to run in training; None: drawn with `exploration`.
            halting: in evaluation, let rows halt as in training, without exploration.
            weights: from `weights()`, to share one cast among several calls.

        Returns:
            The next carry, without graph, and the segment's output.
        """
        weights = weights or self.weights()
        fresh = carry.state.halted
        data = {name: torch.where(_beside(fresh, batch[name]), batch[name], carry.data[name]) for name in FIELDS}
        embedded = self.embed(data["inputs"], data["puzzle_identifiers"], weights)
        z_l, z_h = self.segment(embedded, carry.state.z_l, carry.state.z_h, weights)
        logits = F.linear(z_h, weights.head)[:, self.config.puzzle_tokens :, : self.config.vocab_size]
        q_halt, q_continue = self._q_values(z_h, weights)
        with torch.no_grad():
            steps = carry.state.steps + 1
            last = steps >= self.config.max_segments
            halted = self._halted(steps, last, q_halt, q_continue, least, halting)
            target = None
            if self.training and self.config.q_target == "bootstrap" and self.config.max_segments > 1:
                _, ahead = self.segment(embedded, z_l, z_h, weights, read_first=True)
                target = continue_target(*self._q_values(ahead, weights), last)
            state, residuals = self._hand_over(halted, carry.state, z_l.detach(), z_h.detach(), weights)
        output = PuzzleOutput(logits, q_halt, q_continue, target, steps, halted, residuals)
        return PuzzleCarry(state, data), output

    def embed(self, inputs: Tensor, ids: Tensor, weights: Weights) -> Tensor:
        """(B, S) symbols and (B,) puzzle identifiers -> (B, tokens, d), scaled by sqrt(d).

        A product with one-hot rows: exact, and its gradient needs no atomics on a dozen rows.
        """
        config, dtype = self.config, weights.embedding.dtype
        symbols = torch.arange(weights.embedding.shape[0], device=inputs.device)
        embedded = (inputs[..., None] == symbols).to(dtype) @ weights.embedding
        if config.puzzle_tokens:
            width = config.puzzle_tokens * config.hidden_size
            if self.puzzle_embedding is None:
                prefix = embedded.new_zeros(inputs.shape[0], width)
            else:
                prefix = F.pad(self.puzzle_embedding(ids).to(dtype), (0, width - config.puzzle_emb_size))
            embedded = torch.cat((prefix.unflatten(1, (config.puzzle_tokens, config.hidden_size)), embedded), 1)
        if weights.positions is not None:
            embedded = math.sqrt(0.5) * (embedded + weights.positions)  # keeps the variance
        return config.embed_scale * embedded

    def segment(
        self, embedded: Tensor, z_l: Tensor, z_h: Tensor, weights: Weights, read_first: bool = False
    ) -> tuple[Tensor, Tensor]:
        """N cycles of T L steps and one H step, all tensors (B, tokens, d).

        `read_first`: only the first position of the returned z_H is asked for, so the last block skips the others.
        """
        config = self.config

        def cycle(index: int, z_l: Tensor, z_h: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
            injected = z_h + embedded
            first = read_first and index == config.h_cycles - 1
            z_l = run_steps(
                lambda z: self._stack(z + injected, weights.l_stack, weights),
                z_l,
                steps=config.l_steps,
                grad_steps=config.grad_l_steps,
            )
            return z_l, self._stack(z_h + z_l, weights.h_stack, weights, first)

        graph_from = config.h_cycles - config.grad_cycles
        return run_cycles(cycle, z_l, z_h, cycles=range(config.h_cycles), graph_from=graph_from)

    def _stack(self, h: Tensor, stack: list[BlockWeights], weights: Weights, read_first: bool = False) -> Tensor:
        for index, block in enumerate(stack):
            h = self._block(h, block, weights, read_first and index == len(stack) - 1)
        return h

    def _block(self, h: Tensor, block: BlockWeights, weights: Weights, read_first: bool) -> Tensor:
        eps, backend = self.config.norm_eps, BACKENDS[self.config.fused]
        if self.config.mixer == "mlp":
            h = hrm_kernels.token_mixer(h, block.mix_in, block.mix_out, eps=eps, backend=backend)
            h = h[:, :1] if read_first else h
        else:
            cos, sin = weights.cos_sin
            qkv = F.linear(h, block.mix_in)
            mixed = hrm_kernels.rope_attention(qkv, cos, sin, heads=self.config.num_heads, backend=backend)
            h, mixed = (h[:, :1], mixed[:, :1]) if read_first else (h, mixed)
            h = hrm_kernels.residual_norm(h, F.linear(mixed, block.mix_out), eps=eps, backend=backend)
        return hrm_kernels.swiglu_block(
            h, block.gate_up, block.down, eps=eps, recompute=self.config.recompute, backend=backend
        )

    # ------------------------------------------------------------------------------------------------ halting, carry

    def _q_values(self, z_h: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        q = F.linear(z_h[:, 0], weights.q_head, weights.q_bias).float()
        return q[:, 0], q[:, 1]

    def _halted(
        self, steps: Tensor, last: Tensor, q_halt: Tensor, q_continue: Tensor, least: Tensor | None, halting: bool
    ) -> Tensor:
        if not (self.training or halting) or self.config.max_segments == 1:
            return last
        stop = q_halt > (q_continue if self.config.q_target == "bootstrap" else 0.0)
        if self.training and least is None:
            draw, choice = torch.rand((2, *q_halt.shape), device=q_halt.device)
            least = least_segments(draw, choice, self.config.max_segments, self.config.exploration)
        return last | (stop if least is None else stop & (steps >= least))

    def _hand_over(
        self, halted: Tensor, old: HRMCarry, z_l: Tensor, z_h: Tensor, weights: Weights
    ) -> tuple[HRMCarry, Tensor]:
        backend = BACKENDS[self.config.fused]
        z_l, steps, moved_l = hrm_kernels.carry_update(
            halted, old.steps, old.z_l, z_l, weights.z_l_init, backend=backend
        )
        z_h, _, moved_h = hrm_kernels.carry_update(halted, old.steps, old.z_h, z_h, weights.z_h_init, backend=backend)
        return HRMCarry(z_l, z_h, steps, halted), torch.stack((moved_l, moved_h), -1)

    def _cos_sin(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(tokens, d / heads) float32, kept: a table of positions, the same for every segment."""
        if self.config.positions != "rope":
            return None, None
        if self._rotation is None or self._rotation[0].device != self.device:
            size = self.config.hidden_size // self.config.num_heads
            with torch.inference_mode(False):  # training may use what an evaluation made
                halves = torch.arange(0, size, 2, dtype=torch.float32, device=self.device) / size
                places = torch.arange(self.config.tokens, dtype=torch.float32, device=self.device)
                angles = torch.outer(places, 1.0 / self.config.rope_theta**halves).repeat(1, 2)
                self._rotation = angles.cos(), angles.sin()
        return self._rotation


@torch.no_grad()
def trunc_normal_(tensor: Tensor, std: float) -> Tensor:
    """Normal values cut at two standard deviations and widened to have the standard deviation `std` after the cut."""
    return nn.init.trunc_normal_(tensor, a=-2.0, b=2.0).mul_(std / _CUT_STD)


# standard deviation of a normal variable cut at 2: sqrt(1 - 2 a phi(a) / (Phi(a) - Phi(-a))) at a = 2
_CUT_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def _linear(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


def _beside(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.dim() - 1))
