"""Settings of the puzzle models: one validated dataclass that JSON can hold, with the two papers' choices by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hrm.config import CheckedConfig, check_fused, is_number

MODELS = ("hrm", "trm", "trm-mlp")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class PuzzleConfig(CheckedConfig):
    """What a `PuzzleModel` is made of and how it runs. The defaults are HRM's (arXiv 2506.21734) on 9 x 9 Sudoku;
    `PuzzleConfig.of("trm")` gives TRM's (arXiv 2510.04871).

    A wrong value raises a ValueError that names the field, what it was and what is allowed.
    """

    vocab_size: int = 11
    """Symbols, 0 (padding) among them."""
    seq_len: int = 81
    """Cells of a puzzle, the puzzle tokens aside."""
    num_puzzle_ids: int = 1
    """Rows of the puzzle embedding."""
    puzzle_tokens: int = 1
    """Tokens in front of the cells that carry the puzzle embedding; 0: none, and the Q head reads the first cell."""
    puzzle_emb_size: int = 512
    """Width of the puzzle embedding, at most puzzle_tokens * hidden_size; the rest of those tokens is zero."""
    hidden_size: int = 512
    """d, the width of both states."""
    num_heads: int = 8
    """Attention heads."""
    expansion: float = 4.0
    """Inner width of a SwiGLU: round(expansion * width * 2 / 3), rounded up to a multiple of 256."""
    l_layers: int = 4
    """Blocks of the L stack."""
    h_layers: int = 4
    """Blocks of the H stack; 0: the L stack serves both, as in TRM."""
    mixer: str = "attention"
    """How positions mix in a block: "attention", or "mlp" (a SwiGLU over the positions, for short fixed lengths)."""
    positions: str = "rope"
    """Position encoding: "rope", "learned" or "none"."""
    h_cycles: int = 2
    """N, cycles of a segment."""
    l_steps: int = 2
    """T, L steps of a cycle."""
    grad_cycles: int = 1
    """How many of the last cycles carry gradient."""
    grad_l_steps: int = 1
    """How many of the last L steps of such a cycle carry gradient: 1 in HRM, all in TRM."""
    max_segments: int = 16
    """The most segments a sequence runs; in evaluation each runs all of them unless asked to halt."""
    exploration: float = 0.1
    """Probability that a sequence in training must run a random number of segments before it may halt."""
    q_target: str = "bootstrap"
    """Target of q_continue: "bootstrap" (a second forward pass, HRM) or "none" (halt where q_halt > 0, TRM)."""
    loss: str = "stablemax"
    """"stablemax" or "softmax" cross entropy."""
    q_loss_weight: float = 0.5
    """Weight of the Q head's loss."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-5
    """eps of every RMS norm."""
    dtype: str = "auto"
    """What the recurrence runs in: "bfloat16", "float16", "float32", or "auto" (bfloat16 on a GPU, else float32)."""
    recompute: bool = False
    """Compute the SwiGLU's inner activations again in the backward pass instead of saving them: less memory."""
    fused: bool | str = "auto"
    """True: Triton kernels or an error; False: plain PyTorch; "auto": Triton on CUDA, else plain PyTorch."""

    @classmethod
    def of(cls, model: str, **values: Any) -> PuzzleConfig:
        """The published settings of `model`: "hrm", "trm" (attention) or "trm-mlp"; `values` replace single fields."""
        if model not in MODELS:
            raise ValueError(f"PuzzleConfig.of: model is {model!r}; it should be one of {', '.join(map(repr, MODELS))}")
        if model == "hrm":
            return cls(**values)
        whole_cycle = {"grad_l_steps": values.get("l_steps", _TRM["l_steps"])}
        return cls(**_TRM | (_MLP if model == "trm-mlp" else {}) | whole_cycle | values)

    @property
    def tokens(self) -> int:
        """Positions of a state: puzzle tokens and cells."""
        return self.puzzle_tokens + self.seq_len

    @property
    def embed_scale(self) -> float:
        """What the input embedding is multiplied by."""
        return self.hidden_size**0.5

    @property
    def weights(self) -> int:
        """Numbers that training changes: parameters and puzzle embeddings."""
        d, tokens = self.hidden_size, self.tokens
        mixer = 3 * self.inner_size(tokens) * tokens if self.mixer == "mlp" else 4 * d * d
        blocks = (self.l_layers + self.h_layers) * (mixer + 3 * self.inner_size(d) * d)
        positions = tokens * d if self.positions == "learned" else 0
        return blocks + 2 * self.vocab_size * d + 2 * (d + 1) + positions + self.num_puzzle_ids * self.puzzle_emb_size

    def inner_size(self, width: int) -> int:
        """Inner width of a SwiGLU on `width` features."""
        return -(-round(self.expansion * width * 2 / 3) // 256) * 256

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "num_puzzle_ids", "hidden_size", "num_heads", "l_layers", "h_cycles",
                     "l_steps", "grad_cycles", "grad_l_steps", "max_segments"):  # fmt: skip
            self._check_count(name, 1)
        for name in ("puzzle_tokens", "puzzle_emb_size", "h_layers"):
            self._check_count(name, 0)
        self._check_reach()
        self._check_positive("expansion", "rope_theta", "norm_eps")
        self._check_weight("q_loss_weight")
        if not (is_number(self.exploration) and 0 <= self.exploration <= 1):
            self._fail("exploration", "a probability, 0 to 1")
        self._check_choices()

    def _check_choices(self) -> None:
        choices = {
            "mixer": ("attention", "mlp"),
            "positions": ("rope", "learned", "none"),
            "q_target": ("bootstrap", "none"),
            "loss": ("stablemax", "softmax"),
            "dtype": DTYPES,
            "recompute": (True, False),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                self._fail(name, "one of " + ", ".join(map(repr, allowed)))
        if self.hidden_size % (2 * self.num_heads):
            self._fail("num_heads", f"a number that cuts hidden_size = {self.hidden_size} into heads of an even size")
        if self.puzzle_emb_size > self.puzzle_tokens * self.hidden_size:
            most = self.puzzle_tokens * self.hidden_size
            self._fail("puzzle_emb_size", f"at most puzzle_tokens * hidden_size = {most}")
        check_fused(self.fused, "PuzzleConfig")


_TRM: dict[str, Any] = {
    "puzzle_tokens": 16, "l_layers": 2, "h_layers": 0, "h_cycles": 3, "l_steps": 6, "q_target": "none",
}  # fmt: skip
_MLP = {"mixer": "mlp", "positions": "none"}
