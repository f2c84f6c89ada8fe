"""The H step's mixer: causal attention of the slow state over positions, and the key/value slots that decoding keeps.

Equation (per head; q, k rotated by RoPE at their positions; k, v shared by groups of query heads):

    [q, k, v] = z_H W_qkv
    a = z_H + softmax(q k^T / sqrt(head_dim) + causal mask) v W_o
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- positions


def rotation(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of RoPE (arXiv 2104.09864): position_ids (B, S) -> two of (B, 1, S, head_dim)."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of heads (B, H, S, head_dim) by their position's angles."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


# ---------------------------------------------------------------------------------------------------- slots


class SlotCache:
    """Keys and values of the tokens seen so far: one slot for each cycle of each segment that ran.

    A slot of segment m holds, for every token, what it offers to tokens that run segment m: its own key and value of
    that segment, or those of its last one (same cycle) where it halted before. A slot that no call has needed yet
    would be a copy of the deepest one, so it is made when first written.

    Buffers are (cycles, 2, B, kv_heads, capacity, head_dim), one a segment; capacity doubles as tokens arrive.
    """

    def __init__(self) -> None:
        self.length = 0
        self._segments: list[Tensor] = []

    @property
    def depth(self) -> int:
        """Segments that have slots."""
        return len(self._segments)

    def extend(
        self, segment: int, cycle: int, cycles: int, keys: Tensor, values: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Writes the tokens of this call behind those of `length` and returns all keys and values of the slot.

        keys, values: (b, kv_heads, S, head_dim) -> two of (b, kv_heads, length + S, head_dim).
        rows: (b,) int64, the batch rows that run this segment; None: all B. The others go on offering what they offer
        in the slot of the segment before.

        Raises:
            RuntimeError: keys or values carry a graph, which the slots cannot keep.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise RuntimeError("use_cache=True keeps no gradients; call the model under torch.no_grad()")
        end = self.length + keys.shape[2]
        buffer = self._buffer(segment, cycles, keys, end)
        slot, new = buffer[cycle, ..., :end, :], buffer[cycle, ..., self.length : end, :]
        if rows is None:
            new[0], new[1] = keys, values
            return slot[0], slot[1]
        new.copy_(self._segments[segment - 1][cycle, ..., self.length : end, :])
        new.index_copy_(1, rows, torch.stack((keys, values)))
        kept = slot.index_select(1, rows)
        return kept[0], kept[1]

    def commit(self, tokens: int, ran: int) -> None:
        """Ends a call: the `tokens` that ran `ran` segments offer the last one's entries in all deeper slots."""
        new = slice(self.length, self.length + tokens)
        for segment in range(ran, self.depth):
            self._segments[segment] = self._grown(self._segments[segment], new.stop)
            self._segments[segment][..., new, :] = self._segments[ran - 1][..., new, :]
        self.length = new.stop

    def select(self, rows: Tensor) -> None:
        """Keeps the batch rows `rows` (int64), in that order."""
        self._segments = [buffer.index_select(2, rows.to(buffer.device)) for buffer in self._segments]

    def repeat(self, times: int) -> None:
        """Repeats every batch row `times` times, neighbours together."""
        self._segments = [buffer.repeat_interleave(times, dim=2) for buffer in self._segments]

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first `length`."""
        self.length = min(self.length, length)

    def clear(self) -> None:
        """Forgets everything."""
        self.length = 0
        self._segments = []

    def _buffer(self, segment: int, cycles: int, like: Tensor, end: int) -> Tensor:
        if segment == self.depth:
            batch, heads, _, size = like.shape
            fresh = self._segments[-1].clone() if self.depth else like.new_empty(cycles, 2, batch, heads, 0, size)
            self._segments.append(fresh)
        self._segments[segment] = self._grown(self._segments[segment], end)
        return self._segments[segment]

    def _grown(self, buffer: Tensor, end: int) -> Tensor:
        if buffer.shape[-2] >= end:
            return buffer
        bigger = buffer.new_empty(*buffer.shape[:-2], max(end, 2 * buffer.shape[-2]), buffer.shape[-1])
        bigger[..., : self.length, :] = buffer[..., : self.length, :]
        return bigger


# ---------------------------------------------------------------------------------------------------- mixer


@dataclass
class Mixing:
    """What the mixer needs to know about one forward pass, for the b rows of the batch that its segments still run."""

    heads: int
    cycles: int
    cos: Tensor  # (b, 1, S, head_dim)
    sin: Tensor  # (b, 1, S, head_dim), as `rotation` signs them
    mask: Tensor | None  # (b, 1, S, past + S) bool, True where a query may look; None: `causal` says it all
    causal: bool  # without a mask: whether a query sees only keys up to its own
    cache: SlotCache | None
    segment: int = 0
    rows: Tensor | None = None  # (b,) int64, which of the batch's rows these are; None: all
    active: Tensor | None = None  # (b, S) bool, tokens that have not halted; None: nothing halts by token
    offered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # cycle -> what this call's tokens offer

    def offer(self, cycle: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values to attend to, given those of this call's tokens: (b, kv_heads, S, head_dim) each.

        Tokens that halted go on offering those of their last segment, same cycle.
        """
        if self.active is not None:
            if cycle in self.offered:
                active = self.active[:, None, :, None]
                old_keys, old_values = self.offered[cycle]
                keys, values = torch.where(active, keys, old_keys), torch.where(active, values, old_values)
            self.offered[cycle] = (keys, values)
        if self.cache is None:
            return keys, values
        return self.cache.extend(self.segment, cycle, self.cycles, keys, values, self.rows)

    def keep(self, chosen: Tensor, rows: Tensor) -> None:
        """Goes on with the rows `chosen` (int64) of those so far, `rows` of the batch."""
        self.rows = rows
        self.cos, self.sin = self.cos.index_select(0, chosen), self.sin.index_select(0, chosen)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, chosen)
        self.offered = {
            cycle: (keys.index_select(0, chosen), values.index_select(0, chosen))
            for cycle, (keys, values) in self.offered.items()
        }


def packed_documents(attention_mask: Tensor | None, position_ids: Tensor | None, cached: bool) -> Tensor | None:
    """(B, S) int64, which of its row's packed documents each token belongs to; None where rows are one document each.

    As in transformers: without a mask and a cache, a position that does not follow on the last starts a document.
    """
    if attention_mask is not None or position_ids is None or cached:
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not _unseen(starts) and not bool(starts.any()):
        return None
    return F.pad(starts.long().cumsum(1), (1, 0))


def visible(
    attention_mask: Tensor | None,
    batch: int,
    tokens: int,
    past: int,
    device: torch.device,
    documents: Tensor | None = None,
) -> Tensor | None:
    """Mask (B, 1, tokens, past + tokens) of the keys each query may see; None where causality alone decides.

    documents: (B, tokens) of `packed_documents`; a query sees its own alone.

    Every query sees itself, so that a row of padding has no empty softmax. Padding on the right needs no mask: what
    lies behind a token is hidden from it anyway.
    """
    if documents is not None:
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        return ((documents[:, :, None] == documents[:, None, :]) & causal).expand(batch, -1, -1)[:, None]
    if past == 0 and (attention_mask is None or _only_right_padding(attention_mask)):
        return None
    if tokens == 1 and attention_mask is None:
        return None
    keys = torch.arange(past + tokens, device=device)
    queries = keys[past:, None]
    seen = (keys <= queries)[None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, :].bool() | (keys == queries)
    return seen.expand(batch, tokens, past + tokens)[:, None]


def _only_right_padding(attention_mask: Tensor) -> bool:
    if _unseen(attention_mask):
        return False
    return not bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())


def recording(values: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, which cannot wait for `values`, its own or another's."""
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def _unseen(values: Tensor) -> bool:
    """Whether what is run may not depend on `values`: then it takes the general path."""
    return torch.compiler.is_compiling() or recording(values)


def mix(z: Tensor, w_qkv: Tensor, w_o: Tensor, mixing: Mixing, cycle: int) -> Tensor:
    """The `a` of the H step, z + Attn(z).

    z (b * S, d_h), w_qkv (d_h, (heads + 2 kv_heads) * head_dim), w_o (d_h, d_h) -> (b * S, d_h).
    """
    batch, _, tokens, head_dim = mixing.cos.shape
    kv_heads = (w_qkv.shape[1] // head_dim - mixing.heads) // 2
    qkv = (z @ w_qkv).view(batch, tokens, mixing.heads + 2 * kv_heads, head_dim).transpose(1, 2)
    turned = rotate(qkv[:, :-kv_heads], mixing.cos, mixing.sin)
    queries, keys = turned.split([mixing.heads, kv_heads], dim=1)
    keys, values = mixing.offer(cycle, keys, qkv[:, -kv_heads:])
    if mixing.mask is not None:  # SDPA's memory-saving CUDA kernel takes a mask or grouped heads, not both
        keys, values = (part.repeat_interleave(mixing.heads // kv_heads, dim=1) for part in (keys, values))
    mixed = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mixing.mask,
        is_causal=mixing.causal and mixing.mask is None,
        enable_gqa=keys.shape[1] != mixing.heads,
    )
    return torch.addmm(z, mixed.transpose(1, 2).reshape(z.shape), w_o)
