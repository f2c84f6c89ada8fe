"""The HRM core: two recurrent states, their schedule, halting, and the carry between segments (docs/equations.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hrm_kernels
from hrm.attention import Mixing, SlotCache, mix, packed_documents, recording, rotation, visible
from hrm.config import HRMConfig, check_fused
from hrm.inputs import check_beside, check_places
from hrm.schedule import least_segments, run_cycles
from hrm.segment_gradients import SegmentGradients

G_BIAS, P_BIAS, R_BIAS = 2.0, 2.0, 1.0  # of the gates g (L step), p and r (H step): SiLUs nearly linear, r mostly open
Q_BIAS = -5.0  # both Q values start near "no": sigmoid(-5) < 1 %, so an untrained core never halts early
# not cuDNN's: it plans anew for every length of the cache, 14 ms a token on an H100
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KERNELS = ("l_recurrence", "h_update", "carry_update")  # the functions of hrm_kernels that the core calls
BACKENDS = {True: "triton", False: "reference", "auto": "auto"}


class HRMCarry(NamedTuple):
    """The states that one forward pass hands to the next; nothing in it carries a graph.

    Rows that halted are already back at the initial state with zero steps: replace their tokens and go on.
    """

    z_l: Tensor  # (B, S, d_l)
    z_h: Tensor  # (B, S, d_h)
    steps: Tensor  # (B,) int32, segments that each row has run
    halted: Tensor  # (B,) bool


@dataclass
class Halting:
    """Who ran one segment, who halted after it, and by what."""

    active: Tensor  # (B, S) bool: real tokens that had not halted before this segment
    halted: Tensor  # (B, S) bool: tokens that run no further segment; without ACT and `stop_residual` none
    q: Tensor | None = None  # (B, S, 2) float32, q_halt and q_continue; with ACT only
    last: Tensor | None = None  # (B, S) bool: tokens that may run no further segment after this one; with ACT only
    start: tuple[Tensor, Tensor] | None = None  # (n, d_l), (n, d_h), the states in front of its cycles with gradient


@dataclass
class Segment(Halting):
    """What one segment hands to the outside; gradients flow through `z_h` and `q`.

    Rows that the segment left out, all of whose tokens had halted, have `z_h` and `q` of their last one.
    """

    z_h: Tensor = field(kw_only=True)  # (B, S, d_h), the slow state that the read-out sees


class Weights(NamedTuple):
    """A core's parameters and initial states in the dtype that a forward pass runs in (shapes: `HRMCore`)."""

    w_x: Tensor
    w_c: Tensor
    b_c: Tensor
    r_gate: Tensor
    r_up: Tensor
    r_down: Tensor
    w_l: Tensor
    b_h: Tensor
    r_h: Tensor
    w_out: Tensor
    w_q: Tensor
    b_q: Tensor
    z_l_init: Tensor
    z_h_init: Tensor
    w_qkv: Tensor | None = None  # None without a mixer
    w_o: Tensor | None = None


class Autocast(NamedTuple):
    """What is cast around a call."""

    enabled: bool
    dtype: torch.dtype


class EachSegment(Protocol):
    """What takes the segments of a forward pass one by one, and says what each one's loss is."""

    def plan(self, ran: Sequence[Halting], ahead: Halting | None) -> None:
        """Hears, before the first call, of all segments that there are, and of the one that was looked ahead to."""

    def __call__(self, segment: Segment, h: Tensor, w_out: Tensor) -> Tensor:
        """() the part of the loss of the next `segment`, read out of h (B, S, d) with w_out (d_h, d)."""


class CoreOutput(NamedTuple):
    """What `HRMCore.forward` returns."""

    segments: list[Segment]  # with `each` the last alone
    z_h: Tensor  # (B, S, d_h), each token's slow state after its own last segment
    segments_used: Tensor  # (B, S) int32, segments that each token ran in this call; 0 for padding
    carry: HRMCarry | None = None  # None with a cache: decoding hands on slots, not states
    residuals: Tensor | None = None  # (M, 2) float32, mean relative change of z_L and z_H over the real tokens of rows
    # that go on; with `stop_residual` over all that ran the segment; None with a cache
    ahead: Segment | None = None  # one more segment, without graph, for its Q values alone; where `look_ahead` asked
    documents: Tensor | None = None  # (B, S) int64, numbered in each row; None where rows are not packed
    residual_tokens: Tensor | None = None  # (M,) int64, tokens that each of `residuals` is a mean over
    loss: Tensor | None = None  # () what `each` returned, summed, with graph


class Call(NamedTuple):
    """What the segments of one forward pass share."""

    context: Tensor  # (B * S, 2 d_l)
    carry: HRMCarry
    weights: Weights
    mixing: Mixing | None
    rule: HaltingRule
    segments: int | None  # as `forward` takes it, and so is `look_ahead`
    keep_carry: bool  # whether states are handed on: not with a cache
    look_ahead: bool


@dataclass
class Running:
    """The b rows of a batch that a forward pass still computes: all B, until every token of some has halted."""

    context: Tensor  # (b * S, 2 d_l)
    z_l: Tensor  # (b * S, d_l)
    z_h: Tensor  # (b * S, d_h)
    steps: Tensor  # (b, S) int32, as in the carry
    mixing: Mixing | None
    rows: Tensor | None = None  # (b,) int64, which of the batch's rows these are; None: all

    def pick(self, values: Tensor) -> Tensor:
        """These rows of (B, ...)."""
        return values if self.rows is None else values.index_select(0, self.rows)

    def spread(self, values: Tensor, others: Tensor) -> Tensor:
        """(B, ...), given `values` (b, ...) of these rows and, for those left out, `others` (B, ...)."""
        return values if self.rows is None else others.index_copy(0, self.rows, values)

    def keep(self, left: Tensor) -> bool:
        """Leaves out the rows without a token in `left` (B, S); False where that would be all."""
        goes_on = self.pick(left).any(1)
        chosen = goes_on.nonzero().squeeze(1)  # waits for the device: once a segment, which it must to end at all
        if 0 < len(chosen) < len(goes_on):
            self._keep(chosen)
        return len(chosen) > 0

    def _keep(self, chosen: Tensor) -> None:
        def tokens(flat: Tensor) -> Tensor:
            return flat.unflatten(0, self.steps.shape).index_select(0, chosen).flatten(0, 1)

        self.context, self.z_l, self.z_h = tokens(self.context), tokens(self.z_l), tokens(self.z_h)
        self.steps = self.steps.index_select(0, chosen)
        self.rows = chosen if self.rows is None else self.rows.index_select(0, chosen)
        if self.mixing is not None:
            self.mixing.keep(chosen, self.rows)


class HRMCore(nn.Module):
    """Refines a sequence of hidden states x by N x T recurrent steps a segment.

    Source: arXiv 2506.21734, section 2, with the gated cell of docs/equations.md.

    Parameters (row-vector @ weight): w_x (d, 2 d_l), w_c (d_h, 2 d_l), b_c (2 d_l,), r_gate, r_up, r_down
    (d_l / D, D, D), w_l (d_l, 3 d_h), b_h (3 d_h,), r_h (3, d_h / D, D, D), w_qkv and w_o of the mixer, w_out
    (d_h, d) zeros, w_q (d_h, 2) zeros, b_q (2,) -5. Buffers: z_l_init (d_l,), z_h_init (d_h,).
    """

    z_l_init: Tensor
    z_h_init: Tensor

    def __init__(self, config: HRMConfig | None = None) -> None:
        super().__init__()
        self.config = config = replace(config) if config is not None else HRMConfig()
        d, d_l, d_h, size = config.hidden_size, config.d_l, config.d_h, config.head_size
        self.w_x = _parameter(d, 2 * d_l)
        self.w_c = _parameter(d_h, 2 * d_l)
        self.b_c = _parameter(2 * d_l)
        self.r_gate, self.r_up, self.r_down = (_parameter(d_l // size, size, size) for _ in range(3))
        self.w_l = _parameter(d_l, 3 * d_h)
        self.b_h = _parameter(3 * d_h)
        self.r_h = _parameter(3, d_h // size, size, size)
        if config.h_mixer == "attention":
            assert config.attn_kv_heads is not None  # HRMConfig fills it in
            kv_width = config.attn_kv_heads * self.attn_head_dim
            self.w_qkv = _parameter(d_h, d_h + 2 * kv_width)
            self.w_o = _parameter(d_h, d_h)
        self.w_out = _parameter(d_h, d)
        self.w_q = _parameter(d_h, 2)
        self.b_q = _parameter(2)
        self.register_buffer("z_l_init", torch.empty(d_l))
        self.register_buffer("z_h_init", torch.empty(d_h))
        if not config.act:  # nothing would send them a gradient, which data-parallel wrappers take for an error
            self.w_q.requires_grad_(False)
            self.b_q.requires_grad_(False)
        self.reset_parameters()

    # ------------------------------------------------------------------------------------------------ set-up

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights and the initial states anew from torch's generator."""
        for name, parameter in self.named_parameters():
            if name in ("w_out", "w_q") or name.startswith("b_"):
                nn.init.zeros_(parameter)
            else:  # blocks are (..., fan in, fan out), like the plain matrices
                nn.init.trunc_normal_(parameter, std=parameter.shape[-2] ** -0.5)
        nn.init.constant_(self.b_q, Q_BIAS)
        # gates start open: else the states' constant beginnings drown what x says of a token for thousands of steps
        # (docs/training.md, "Problems of known depth")
        nn.init.constant_(self.b_c[: self.config.d_l], G_BIAS)
        nn.init.constant_(self.b_h[: self.config.d_h], P_BIAS)
        nn.init.constant_(self.b_h[2 * self.config.d_h :], R_BIAS)
        for init in (self.z_l_init, self.z_h_init):
            nn.init.trunc_normal_(init, std=1.0)
            init.copy_(self._norm(init.unflatten(-1, (-1, self.config.head_size))).flatten(-2))

    @property
    def attn_head_dim(self) -> int:
        """Size of one head of the mixer."""
        assert self.config.attn_heads is not None
        return self.config.d_h // self.config.attn_heads

    @property
    def fused(self) -> bool | str:
        """Which kernels run: True (Triton, or an error), False (plain PyTorch) or "auto"; may be set at any time."""
        return self.config.fused

    @fused.setter
    def fused(self, value: bool | str) -> None:
        check_fused(value)
        self.config.fused = value

    @property
    def backend(self) -> str:
        """The backend that `fused` means to `hrm_kernels`."""
        return BACKENDS[self.config.fused]

    def explain(self) -> str:
        """Says which backend each kernel uses on this core's device, and why; one line each."""
        if self.fused != "auto":
            return f"every kernel: {self.backend} (asked for: fused={self.fused})"
        choices = hrm_kernels.explain(self.w_x.device, head_size=self.config.head_size)
        return "\n".join(str(choice) for choice in choices if choice.function in KERNELS)

    def extra_repr(self) -> str:
        c = self.config
        return f"d_l={c.d_l}, d_h={c.d_h}, h_cycles={c.h_cycles}, l_steps={c.l_steps}, fused={c.fused!r}"

    # ------------------------------------------------------------------------------------------------ states

    def initial_carry(
        self,
        rows_shape: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HRMCarry:
        """A fresh carry for `rows_shape` = (B, S): the fixed initial states, expanded without a copy."""
        device, dtype = device or self.w_x.device, dtype or self.w_x.dtype
        return HRMCarry(
            self.z_l_init.to(device, dtype).expand(*rows_shape, -1),
            self.z_h_init.to(device, dtype).expand(*rows_shape, -1),
            torch.zeros(rows_shape[0], dtype=torch.int32, device=device),
            torch.zeros(rows_shape[0], dtype=torch.bool, device=device),
        )

    def check_carry(
        self, carry: HRMCarry, rows_shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raises a ValueError that names the part of `carry` that does not fit, or that holds a NaN or infinity."""
        if not isinstance(carry, HRMCarry):
            raise ValueError(f"carry is a {type(carry).__name__}; it should be an HRMCarry")
        expected = self.initial_carry(rows_shape, device, dtype)
        for name, tensor, like in zip(HRMCarry._fields, carry, expected, strict=True):
            for what in ("shape", "dtype", "device"):
                was, should = getattr(tensor, what), getattr(like, what)
                if was != should:
                    raise ValueError(f"carry.{name}.{what} is {_text(was)}; it should be {_text(should)}")
            if tensor.is_floating_point() and not recording(tensor) and not torch.isfinite(tensor).all():
                raise ValueError(f"carry.{name} holds NaN or infinite values; it should be finite")

    # ------------------------------------------------------------------------------------------------ the recurrence

    def forward(
        self,
        h: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        carry: HRMCarry | None = None,
        segments: int | None = None,
        counted: Tensor | None = None,
        cache: SlotCache | None = None,
        look_ahead: bool = False,
        each: EachSegment | None = None,
    ) -> CoreOutput:
        """Runs up to `segments` segments on the hidden states `h`.

        Halting (with `config.act`): in training a row, or each document of a packed one, halts when its mean of
        q_halt - q_continue over the tokens of `counted` is above 0, but not before `min_segments`, nor, with
        probability `exploration`, before a number drawn at random; in evaluation each token halts by its own two
        values, and a row all of whose tokens have halted costs nothing more; at `max_segments` all do. With q_target
        "none" it is q_halt alone. With `stop_residual`, with or without ACT, sequences and tokens halt too once both of
        their states move by no more than that. A training step that a CUDA graph records runs every segment there may
        be, since what it runs cannot depend on the data; `active` tells the sequences that have halted as always.

        Packing: without `attention_mask` and cache, positions that do not rise by one start a new document, which sees
        nothing of those before it; so does the backbone, by the same rule of transformers.

        Args:
            h: (B, S, d) the backbone's last hidden state, after its final norm.
            attention_mask: (B, past + S), nonzero for real tokens; None: all are.
            position_ids: (B, S) for the mixer's RoPE; None: counted from the mask.
            carry: states to go on from; None: fresh ones.
            segments: None: `config.segments`, or with ACT as many as halting asks for. In evaluation a number runs
                exactly that many; in training it is the most that this call may run.
            counted: (B, S) bool, tokens that decide whether a row halts in training; None: all real ones.
            cache: slots of the tokens before these; this call's are added.
            look_ahead: with ACT run one more segment without graph where something is left to run after the last one,
                for what q_continue is to learn.
            each: takes each segment and returns its part of the loss, whose gradients are taken there and then: only
                one segment's activations exist at a time. Where segments may halt, which decides what a segment counts,
                all run without graph first, and their cycles with gradient a second time.

        Raises:
            ValueError: an argument is not as above; the message names it.
        """
        self._check_inputs(h, attention_mask, position_ids, counted, past=0 if cache is None else cache.length)
        if each is not None and cache is not None:
            raise ValueError("each is given together with cache; one of them should be None: slots keep no gradients")
        dtype, kind = _compute_dtype(self, h), h.device.type
        caller = Autocast(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        real = _real_tokens(attention_mask, h)
        if carry is None:
            carry = self.initial_carry((h.shape[0], h.shape[1]), h.device, dtype)
        else:
            self.check_carry(carry, (h.shape[0], h.shape[1]), h.device, dtype)
        with torch.autocast(h.device.type, enabled=False), sdpa_kernel(SDPA_BACKENDS):
            weights = self._weights(dtype)
            context = self.input_context(h, weights)
            documents = packed_documents(attention_mask, position_ids, cache is not None)
            mixing = self._mixing(attention_mask, position_ids, documents, h, cache, dtype)
            rule = HaltingRule(self.config, real, real if counted is None else counted, documents, self.training)
            call = Call(context, carry, weights, mixing, rule, segments, cache is None, look_ahead)
            output = self._run(call) if each is None else self._run_each(h, call, each, caller)
        if cache is not None:
            cache.commit(h.shape[1], len(output.segments))
        return output

    def input_context(self, h: Tensor, weights: Weights | None = None) -> Tensor:
        """x W_x + b_c with x = rms_norm(h): (B, S, d) -> (B * S, 2 d_l), what all cycles and segments share."""
        weights = weights or self._weights(_compute_dtype(self, h))
        x = self._norm(h).to(weights.w_x.dtype).flatten(0, -2)
        return torch.addmm(weights.b_c, x, weights.w_x)

    def segment(
        self,
        context: Tensor,
        z_l: Tensor,
        z_h: Tensor,
        weights: Weights,
        mixing: Mixing | None,
        cycles: range | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One segment: N cycles of T L steps and one H step; the last `grad_cycles` carry gradient.

        context (n, 2 d_l) from `input_context`, z_l (n, d_l), z_h (n, d_h) -> new z_l, z_h, for n = B * S tokens.
        `cycles`: which of the N; None: all.
        """
        count = self.config.h_cycles

        def cycle(index: int, z_l: Tensor, z_h: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
            return self._cycle(index, context, z_l, z_h, weights, mixing, differentiate)

        graph_from = count - self.config.grad_cycles
        return run_cycles(cycle, z_l, z_h, cycles=range(count) if cycles is None else cycles, graph_from=graph_from)

    def _cycle(
        self,
        cycle: int,
        context: Tensor,
        z_l: Tensor,
        z_h: Tensor,
        weights: Weights,
        mixing: Mixing | None,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.l_reset == "init":
            z_l = weights.z_l_init.expand_as(z_l)
        z_l = hrm_kernels.l_recurrence(
            z_l,
            torch.addmm(context, z_h, weights.w_c),
            weights.r_gate,
            weights.r_up,
            weights.r_down,
            steps=config.l_steps,
            grad_steps=config.grad_l_steps if differentiate else 1,
            eps=config.norm_eps,
            backend=self.backend,
        )
        if mixing is not None:
            assert weights.w_qkv is not None and weights.w_o is not None
            z_h = mix(z_h, weights.w_qkv, weights.w_o, mixing, cycle)
        inputs = torch.addmm(weights.b_h, z_l, weights.w_l)
        return z_l, hrm_kernels.h_update(z_h, inputs, weights.r_h, eps=config.norm_eps, backend=self.backend)

    def read_out(self, h: Tensor, z_h: Tensor, w_out: Tensor | None = None) -> Tensor:
        """h + z_H W_out in the dtype of h: (..., d), (..., d_h) -> (..., d).

        w_out: (d_h, d) in place of the core's own.
        """
        w_out = self.w_out if w_out is None else w_out
        with torch.autocast(h.device.type, enabled=False):
            return h + (z_h @ w_out.to(z_h.dtype)).to(h.dtype)

    # ------------------------------------------------------------------------------------------------ segments

    def _run(self, call: Call, each: Callable[[Segment], None] | None = None, *, starts: bool = False) -> CoreOutput:
        """All segments of a call; `each` takes them as they have run, with `starts` if that is asked for."""
        carry, rule, keep_carry = call.carry, call.rule, call.keep_carry
        halting, limit = self._plan(call.segments)
        if halting and not self.training and recording(call.context):
            raise ValueError("segments is None; it should be a number while a CUDA graph is recorded: else tokens halt")
        by_token, real, steps = halting and not self.training, rule.real, carry.steps[:, None].expand(rule.real.shape)
        running = Running(call.context, carry.z_l.flatten(0, 1), carry.z_h.flatten(0, 1), steps, call.mixing)
        halted = restart = torch.zeros_like(real)  # restart: tokens whose row is over and starts anew
        out, residuals, going_on, ahead = carry.z_h, [], [], None
        done: list[Segment] = []
        used = torch.zeros_like(real, dtype=torch.int32)
        for index in range(limit):
            old = running.z_l, running.z_h
            segment, new = self._one_segment(
                index, running, call, halted, by_token, done[-1] if done else None, starts=starts
            )
            settled = None
            if halting and self.config.stop_residual:
                settled = self._moved(running, new, real.shape)
                segment.halted = segment.halted | rule.settled(settled)
            if each is not None:
                each(segment)
                segment.z_h, segment.start = segment.z_h.detach(), None
                done = []
            out = torch.where(segment.active[..., None], segment.z_h, out) if halting else segment.z_h
            used = used + segment.active
            done.append(segment)
            halted = segment.halted if halting else halted
            new = new[0].detach(), new[1].detach()
            if keep_carry:
                restart = (halted | ~real).all(1, keepdim=True).expand(real.shape) if halting else halted
                rows = running.pick(restart)
                new, running.steps, moved = self._hand_over(rows, running.steps, old, new, call.weights)
                # where sequences end by how far they move, those that end count too: a threshold is chosen by this
                moved, where = (moved, running.pick(real & ~restart)) if settled is None else (settled, segment.active)
                going_on.append(where)
                residuals.append(_mean(moved, where))
            running.z_l, running.z_h = new
            left = real & ~halted
            if halting and not (running.keep(left) if by_token else _any(left)):
                break
        may_go_on = self.config.act and halting and limit < self.config.max_segments
        if call.look_ahead and may_go_on and _any(real & ~halted):
            with torch.no_grad():
                ahead, _ = self._one_segment(index + 1, running, call, halted, by_token, done[-1])
        if not keep_carry:
            return CoreOutput(done, out, used)
        carry = self._carry(running, restart[:, 0].clone())
        counts = torch.stack([tokens.sum() for tokens in going_on])
        return CoreOutput(done, out, used, carry, torch.stack(residuals), ahead, rule.documents, counts)

    def _run_each(self, h: Tensor, call: Call, each: EachSegment, caller: Autocast) -> CoreOutput:
        """`_run` for a call with `each`, which runs under the caller's autocast."""
        may_halt = self.config.act or self.config.stop_residual > 0
        if may_halt and not self.training:
            raise ValueError("each is given; it should be None in evaluation with ACT or stop_residual")
        kind = h.device.type
        names = [name for name, tensor in zip(Weights._fields, call.weights, strict=True) if tensor is not None]
        taken = SegmentGradients([h, call.context, *(getattr(call.weights, name) for name in names)])
        h, context, *parts = taken.leaves
        call = call._replace(context=context, weights=call.weights._replace(**dict(zip(names, parts, strict=True))))

        def take(segment: Segment) -> None:
            with torch.autocast(kind, dtype=caller.dtype, enabled=caller.enabled):  # the head's, not the core's
                taken.take(each(segment, h, call.weights.w_out))

        if may_halt:
            output = self._run_twice(call, each, take)
        else:
            each.plan([Halting(call.rule.real, torch.zeros_like(call.rule.real))] * self._plan(call.segments)[1], None)
            output = self._run(call, take)
        return output._replace(loss=taken.loss())

    def _run_twice(self, call: Call, each: EachSegment, take: Callable[[Segment], None]) -> CoreOutput:
        """`_run` without graph, and then, for `take`, each segment's cycles with gradient again, from where they were.

        What is kept of every segment meanwhile are two states a token, not what its cycles save for the backward pass.
        """
        ran: list[Halting] = []
        with torch.no_grad():
            output = self._run(
                call, lambda one: ran.append(Halting(one.active, one.halted, one.q, one.last, one.start)), starts=True
            )
        each.plan(ran, output.ahead)
        for index, one in enumerate(ran):
            assert one.start is not None
            z_h = self.segment(call.context, *one.start, call.weights, call.mixing, self._cycles(graph=True))[1]
            q = self._q(z_h, call).view(*one.active.shape, 2) if self.config.act else None
            take(Segment(one.active, one.halted, q, one.last, z_h=z_h.view(*one.active.shape, -1)))
            ran[index] = replace(one, start=None)
        return output

    def _cycles(self, *, graph: bool) -> range:
        """Which of a segment's cycles carry gradient, or which come before."""
        count = self.config.h_cycles
        first = count - self.config.grad_cycles
        return range(first, count) if graph else range(first)

    def _one_segment(
        self,
        index: int,
        running: Running,
        call: Call,
        before: Tensor,
        by_token: bool,
        previous: Segment | None,
        *,
        starts: bool = False,
    ) -> tuple[Segment, tuple[Tensor, Tensor]]:
        """Segment `index` of a call, and the states it ends in.

        `before` (B, S) had halted already; rows that no longer run have `previous`'s values.
        """
        active, shape, steps = call.rule.real & ~before, running.steps.shape, call.carry.steps + index + 1
        if running.mixing is not None:
            running.mixing.segment, running.mixing.active = index, running.pick(active) if by_token else None
        z_l, z_h, start = running.z_l, running.z_h, None
        if starts:
            start = self.segment(running.context, z_l, z_h, call.weights, running.mixing, self._cycles(graph=False))
            z_l, z_h = self.segment(running.context, *start, call.weights, running.mixing, self._cycles(graph=True))
        else:
            z_l, z_h = self.segment(running.context, z_l, z_h, call.weights, running.mixing)
        state = z_h.view(*shape, self.config.d_h)
        state = state if previous is None else running.spread(state, previous.z_h)
        segment = Segment(active, before, start=start, z_h=state)
        if self.config.act:
            q = self._q(z_h, call).view(*shape, 2)
            segment.q = q if previous is None or previous.q is None else running.spread(q, previous.q)
            segment.last = (steps >= self.config.max_segments)[:, None].expand(call.rule.real.shape)
            segment.halted = before | call.rule.halted(segment.q, segment.last, steps)
        return segment, (z_l, z_h)

    def _q(self, z_h: Tensor, call: Call) -> Tensor:
        """(n, d_h) -> (n, 2) float32, q_halt and q_continue."""
        seen = z_h.detach() if self.config.q_gradient == "head" else z_h
        return torch.addmm(call.weights.b_q, seen, call.weights.w_q).float()

    @staticmethod
    @torch.no_grad()
    def _moved(running: Running, new: tuple[Tensor, Tensor], shape: torch.Size) -> Tensor:
        """(B, S, 2) float32, the relative change of each token's two states; 0 in rows left out."""
        pairs = zip((running.z_l, running.z_h), new, strict=True)
        moved = [(after - before).float().norm(dim=-1) / before.float().norm(dim=-1) for before, after in pairs]
        of_these = torch.stack(moved, -1).view(*running.steps.shape, 2)
        return running.spread(of_these, of_these.new_zeros(*shape, 2))

    def _carry(self, running: Running, halted: Tensor) -> HRMCarry:
        """What the next pass goes on from; rows `halted` (B,), those left out among them, start anew."""
        shape = running.steps.shape
        carry = HRMCarry(
            running.z_l.unflatten(0, shape), running.z_h.unflatten(0, shape), running.steps[:, 0].clone(), halted
        )
        if running.rows is None:
            return carry
        fresh = self.initial_carry((len(halted), shape[1]), halted.device, carry.z_l.dtype)
        z_l, z_h, steps = (running.spread(*pair) for pair in zip(carry[:3], fresh[:3], strict=True))
        return HRMCarry(z_l, z_h, steps, halted)

    def _plan(self, segments: int | None) -> tuple[bool, int]:
        """Whether anything may halt in this call, and the most segments that it runs."""
        if segments is not None and (not isinstance(segments, int) or segments < 1):
            raise ValueError(f"segments is {segments!r}; it should be a whole number, at least 1, or None")
        config = self.config
        halting = (config.act or config.stop_residual > 0) and (self.training or segments is None)
        return halting, segments or (config.max_segments if config.act and halting else config.segments)

    def _hand_over(
        self,
        restart: Tensor,
        steps: Tensor,
        old: tuple[Tensor, Tensor],
        new: tuple[Tensor, Tensor],
        weights: Weights,
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """The states and steps to go on with, and how far each token's two states moved (B, S, 2)."""
        rows, counts = restart.flatten(), steps.flatten()

        def update(before: Tensor, after: Tensor, init: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return hrm_kernels.carry_update(rows, counts, before, after, init, backend=self.backend)

        z_l, counts_after, moved_l = update(old[0], new[0], weights.z_l_init)
        z_h, _, moved_h = update(old[1], new[1], weights.z_h_init)
        return (z_l, z_h), counts_after.view_as(restart), torch.stack((moved_l, moved_h), -1).view(*restart.shape, 2)

    # ------------------------------------------------------------------------------------------------ helpers

    def _check_inputs(
        self, h: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, counted: Tensor | None, past: int
    ) -> None:
        width, device = self.config.hidden_size, self.w_x.device
        if h.dim() != 3 or h.shape[-1] != width:
            raise ValueError(f"h.shape is {tuple(h.shape)}; it should be (batch, tokens, {width})")
        if not h.is_floating_point():
            raise ValueError(f"h.dtype is {h.dtype}; it should be a floating-point type")
        if h.device != device:
            raise ValueError(f"h.device is {h.device}; it should be {device}, the device of the core")
        check_places(h, attention_mask, position_ids, past)
        if counted is not None:
            check_beside(h, "counted", counted, tuple(h.shape[:2]), "(batch, tokens)")

    def _weights(self, dtype: torch.dtype) -> Weights:
        """All parameters and initial states in `dtype`: cast once a forward pass, with graph, for all its cycles."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return Weights(**{name: tensor.to(dtype) for name, tensor in tensors.items()})

    def _mixing(
        self,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        documents: Tensor | None,
        h: Tensor,
        cache: SlotCache | None,
        dtype: torch.dtype,
    ) -> Mixing | None:
        if self.config.h_mixer == "none":
            return None
        assert self.config.attn_heads is not None  # HRMConfig fills it in
        batch, tokens, _ = h.shape
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = _positions(attention_mask, batch, tokens, past, h.device)
        cos, sin = rotation(position_ids.expand(batch, tokens), self.attn_head_dim, self.config.rope_theta, dtype)
        mask = visible(attention_mask, batch, tokens, past, h.device, documents)
        return Mixing(self.config.attn_heads, self.config.h_cycles, cos, sin, mask, causal=past == 0, cache=cache)

    def _norm(self, values: Tensor) -> Tensor:
        """RMS norm over the last dimension without weight, statistics in float32."""
        return F.rms_norm(values.float(), values.shape[-1:], eps=self.config.norm_eps).to(values.dtype)


class HaltingRule:
    """Who halts after a segment of one forward pass.

    Args:
        config: of the core.
        real: (B, S) bool, tokens that are no padding.
        counted: (B, S) bool, tokens whose Q values a sequence halts by in training.
        documents: (B, S) int64 of packed rows, each of whose documents halts by itself; None: a row is one sequence.
        training: by sequence, with the fewest segments drawn from torch's generator, or by token.
    """

    def __init__(
        self, config: HRMConfig, real: Tensor, counted: Tensor, documents: Tensor | None, training: bool
    ) -> None:
        self.real, self.documents = real, documents
        self._config, self._counted, self._training = config, counted, training
        self._sequences = torch.zeros_like(real, dtype=torch.int64) if documents is None else documents
        self._least = self._drawn() if training and config.act else None

    def _drawn(self) -> Tensor:
        """(B, S) int32, the fewest segments that each token's sequence runs."""
        least, config = self._config.min_segments, self._config
        if not config.exploration or config.max_segments < 2:
            return torch.full_like(self._sequences, least, dtype=torch.int32)
        draw, choice = torch.rand(2, *self.real.shape, device=self.real.device).gather(
            2, self._sequences.expand(2, *self.real.shape)
        )
        return least_segments(draw, choice, config.max_segments, config.exploration).clamp_min(least)

    @torch.no_grad()
    def halted(self, q: Tensor, last: Tensor, steps: Tensor) -> Tensor:
        """(B, S) bool, given q (B, S, 2), last (B, S) bool and the segments run so far (B,)."""
        margin = q[..., 0] if self._config.q_target == "none" else q[..., 0] - q[..., 1]
        if not self._training:
            return last | (margin > 0)
        assert self._least is not None
        total, counted = self._over_sequence(margin * self._counted), self._over_sequence(self._counted.float())
        # the sequence's mean decides; one in which nothing counts has nothing to go on for
        return last | (counted == 0) | (total > 0) & (steps[:, None] >= self._least)

    @torch.no_grad()
    def settled(self, moved: Tensor) -> Tensor:
        """(B, S) bool, given how far each token's two states moved (B, S, 2): whether its sequence's in training, its
        own in decoding, moved by at most `stop_residual`, so that no further segment is worth running."""
        if self._training:
            total = torch.stack([self._over_sequence(part * self.real) for part in moved.unbind(-1)], -1)
            moved = total / self._over_sequence(self.real.float()).clamp_min(1)[..., None]
        return (moved <= self._config.stop_residual).all(-1)

    def _over_sequence(self, values: Tensor) -> Tensor:
        """Sums (B, S) over each sequence, at every of its tokens."""
        return torch.zeros_like(values).scatter_add_(1, self._sequences, values).gather(1, self._sequences)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def _compute_dtype(core: HRMCore, h: Tensor) -> torch.dtype:
    """What the recurrence runs in: the autocast dtype where autocast is on, else that of the core's weights."""
    if torch.is_autocast_enabled(h.device.type):
        return torch.get_autocast_dtype(h.device.type)
    return core.w_x.dtype


def _real_tokens(attention_mask: Tensor | None, h: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    return attention_mask[:, -h.shape[1] :].bool()


def _positions(mask: Tensor | None, batch: int, tokens: int, past: int, device: torch.device) -> Tensor:
    """(B, S) positions of the last `tokens` tokens, counted over real ones as Hugging Face counts them."""
    if mask is None:
        return torch.arange(past, past + tokens, device=device).expand(batch, -1)
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of (B, S, k) over the tokens of `where` (B, S); 0 where there are none."""
    return (values * where[..., None]).sum((0, 1)) / where.sum().clamp_min(1)


def _any(values: Tensor) -> bool:
    """Whether any of `values` is True. A CUDA graph that is being recorded cannot ask: it runs what there might be."""
    return recording(values) or bool(values.any())


def _text(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
