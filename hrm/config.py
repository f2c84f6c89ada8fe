"""Settings of the HRM core and of the adapters: validated dataclasses that JSON can hold, without PyTorch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """Builds the dataclass `kind` from `values`; an unknown key is an error that names the nearest field."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{kind.__name__} has no field {key!r}; the nearest is {nearest!r}")
    return kind(**values)


class CheckedConfig:
    """What the settings of all models share: JSON's forms, and checks that name the field."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; an unknown key raises a ValueError that names the nearest field."""
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-serialisable."""
        return asdict(self)  # type: ignore[call-overload]

    def _check_count(self, name: str, least: int = 1) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._fail(name, f"a whole number, at least {least}")
        if value >= 2**31:  # what counts segments and steps on the device is an int32
            self._fail(name, "a whole number below 2147483648")

    def _check_reach(self) -> None:
        """The gradient reaches no further than there are cycles and steps."""
        for name, limit in (("grad_cycles", "h_cycles"), ("grad_l_steps", "l_steps")):
            if getattr(self, name) > getattr(self, limit):
                self._fail(name, f"from 1 to {limit} = {getattr(self, limit)}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                self._fail(name, "a finite number above 0")

    def _check_weight(self, name: str) -> None:
        if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
            self._fail(name, "a finite number, at least 0")

    def _fail(self, name: str, should: str) -> None:
        raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}; it should be {should}")


@dataclass
class HRMConfig(CheckedConfig):
    """What an `HRMCore` is made of and how it runs; equations and letters as in docs/equations.md.

    Every field has a default; a wrong value raises a ValueError that names the field, what it was and what is allowed.
    """

    hidden_size: int = 2048
    """d, the backbone's width; `HRMGemmaForCausalLM.from_backbone` fills it in."""
    d_l: int = 2048
    """Width of the fast state z_L, a multiple of `head_size`."""
    d_h: int = 4096
    """Width of the slow state z_H, a multiple of `head_size`."""
    head_size: int = 64
    """D, the size of one head of the block-diagonal weights; the Triton kernels go up to 64."""
    h_cycles: int = 4
    """N, cycles in a segment (one H step each)."""
    l_steps: int = 8
    """T, L steps in a cycle."""
    grad_cycles: int = 1
    """How many of the last cycles carry gradient, 1 to `h_cycles`."""
    grad_l_steps: int = 1
    """How many of the last L steps of such a cycle carry gradient, 1 to `l_steps`."""
    l_reset: str = "carry"
    """What z_L starts a cycle from: "carry" (the last cycle's) or "init" (its initial state)."""
    h_mixer: str = "attention"
    """How positions mix in the H step: "attention" (causal, RoPE) or "none"."""
    attn_heads: int | None = None
    """Query heads of the mixer; None: d_h // 64, or the next number below that cuts d_h into even sizes."""
    attn_kv_heads: int | None = None
    """Key/value heads of the mixer, a divisor of `attn_heads`; None: the largest of at most an eighth of them."""
    rope_theta: float = 10000.0
    """Base of the mixer's rotary position embedding."""
    segments: int = 1
    """M, segments of a forward pass without ACT where the call names no number."""
    max_segments: int = 1
    """The most segments a row may run under ACT; raised to `segments` where it is below."""
    act: bool = False
    """Adaptive computation time: the Q head decides after each segment who goes on."""
    min_segments: int = 1
    """The fewest segments that a sequence runs in training under ACT."""
    exploration: float = 0.0
    """Probability that a sequence in training must run a random number of segments, 2 to `max_segments`; drawn once a
    forward pass, so with an update a segment anew for each segment, as the paper's code does."""
    segment_price: float = 0.0
    """What each segment after the first takes off the reward of halting, whose size is 1 for a right prediction."""
    q_target: str = "bootstrap"
    """What q_continue learns: "bootstrap" (the next segment's Q values), "replay" (the same, read from a buffer of past
    segments), or "none" (nothing: a sequence halts where q_halt > 0)."""
    q_gradient: str = "trunk"
    """Where the Q loss' gradient goes: "trunk" (Q head, core and adapters) or "head" (the Q head alone), which "replay"
    always means."""
    q_loss_weight: float = 0.5
    """Weight of the Q head's loss beside the language model's."""
    replay_size: int = 4096
    """Segments that the replay buffer holds."""
    segment_weights: list[float] | None = None
    """Weight of each segment's loss, at least as many as segments run; None: all alike."""
    stop_residual: float = 0.0
    """A sequence in training, a token in decoding, runs no further segment once the relative change of both its states
    (a sequence's mean) is at most this; 0: never."""
    norm_eps: float = 1e-6
    """eps of every RMS norm."""
    fused: bool | str = "auto"
    """True: Triton kernels or an error; False: plain PyTorch; "auto": Triton on CUDA, else plain PyTorch."""

    @property
    def weights(self) -> int:
        """Numbers in the core's parameters."""
        d, d_l, d_h, size = self.hidden_size, self.d_l, self.d_h, self.head_size
        into_l, into_h = 2 * d_l * (d + d_h + 1), 3 * d_h * (d_l + 1)
        mixer = 0
        if self.h_mixer == "attention":
            assert self.attn_heads is not None and self.attn_kv_heads is not None  # filled in below
            mixer = 2 * d_h * (d_h + d_h // self.attn_heads * self.attn_kv_heads)
        return into_l + into_h + 3 * size * (d_l + d_h) + mixer + d_h * (d + 2) + 2

    def __post_init__(self) -> None:
        self._fill_in()
        self._check_numbers()
        self._check_choices()
        self._check_sizes()

    def _fill_in(self) -> None:
        for name in ("d_h", "segments", "max_segments", "attn_heads"):  # what the lines below compute with
            if getattr(self, name) is not None:
                self._check_count(name)
        if self.attn_heads is None:
            self.attn_heads = _largest_divisor(self.d_h // 2, self.d_h // 64)
        if self.attn_kv_heads is None:
            self.attn_kv_heads = _largest_divisor(self.attn_heads, self.attn_heads // 8)
        self.max_segments = max(self.segments, self.max_segments)

    def _check_numbers(self) -> None:
        for name in (
            "hidden_size",
            "d_l",
            "head_size",
            "h_cycles",
            "l_steps",
            "grad_cycles",
            "grad_l_steps",
            "attn_kv_heads",
        ):
            self._check_count(name)
        self._check_reach()
        self._check_positive("rope_theta", "norm_eps")
        for name in ("q_loss_weight", "segment_price", "stop_residual"):
            self._check_weight(name)
        self._check_halting()

    def _check_halting(self) -> None:
        self._check_count("replay_size")
        self._check_count("min_segments")
        if self.min_segments > self.max_segments:
            self._fail("min_segments", f"from 1 to max_segments = {self.max_segments}")
        if not (is_number(self.exploration) and 0 <= self.exploration <= 1):
            self._fail("exploration", "a probability, 0 to 1")
        weights = self.segment_weights
        if weights is None:
            return
        most = self.max_segments if self.act else self.segments
        early = self.act or self.stop_residual > 0  # then a row may end after its first
        counted = weights[:1] if early else weights[:most]
        if len(weights) < most or not all(is_number(w) and w >= 0 for w in weights) or not any(counted):
            what = "the first" if early else "one of them"
            self._fail("segment_weights", f"at least {most} numbers from 0, {what} above 0")

    def _check_choices(self) -> None:
        if self.l_reset not in ("carry", "init"):
            self._fail("l_reset", "'carry' or 'init'")
        if self.h_mixer not in ("attention", "none"):
            self._fail("h_mixer", "'attention' or 'none'")
        if not isinstance(self.act, bool):
            self._fail("act", "True or False")
        if self.q_target not in ("bootstrap", "replay", "none"):
            self._fail("q_target", "'bootstrap', 'replay' or 'none'")
        if self.q_gradient not in ("trunk", "head"):
            self._fail("q_gradient", "'trunk' or 'head'")
        check_fused(self.fused)

    def _check_sizes(self) -> None:
        for name in ("d_l", "d_h"):
            if getattr(self, name) % self.head_size:
                self._fail(name, f"a multiple of head_size = {self.head_size}")
        if self.h_mixer == "attention":
            self._check_heads()

    def _check_heads(self) -> None:
        assert self.attn_heads is not None and self.attn_kv_heads is not None  # filled in above
        if self.d_h % (2 * self.attn_heads):
            self._fail("attn_heads", f"a number that cuts d_h = {self.d_h} into heads of an even size")
        if self.attn_heads % self.attn_kv_heads:
            self._fail("attn_kv_heads", f"a divisor of attn_heads = {self.attn_heads}")


@dataclass
class AdapterConfig:
    """Sizes of the two adapters; alpha equals the rank, so that neither needs a learning rate of its own."""

    low_rank: int = 32
    high_rank: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("low_rank", "high_rank"):
            rank = getattr(self, name)
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"AdapterConfig: {name} is {rank!r}; it should be a whole number, at least 1")
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"AdapterConfig: dropout is {self.dropout!r}; it should be from 0 to below 1")

    @classmethod
    def resolve(cls, lora: bool | Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What a config stores for `lora`: True the defaults, False or None no adapters, a mapping its values."""
        if lora is None or lora is False:
            return None
        return asdict(cls() if lora is True else from_mapping(cls, lora))


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is no larger than `limit`, at least 1."""
    return next((candidate for candidate in range(limit, 1, -1) if number % candidate == 0), 1)


def check_fused(fused: object, kind: str = "HRMConfig") -> None:
    """`fused` is True, False or "auto"; a ValueError that names the settings' `kind` else."""
    if not isinstance(fused, bool) and fused != "auto":
        raise ValueError(f"{kind}: fused is {fused!r}; it should be True, False or 'auto'")
