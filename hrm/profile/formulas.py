"""Bytes that are counted by formula: what autograd keeps of the core, the loss's peak, and weights in nf4."""

from __future__ import annotations

from transformers import PreTrainedConfig

from hrm.config import HRMConfig
from hrm.loss import CHUNK_BYTES

NF4_BLOCK = 64  # values that share one scale


def core_activations(config: HRMConfig, rows: int, width: int, *, fused: bool, packed: bool = False) -> int:
    """Bytes that autograd saves of one segment of the core on `rows` tokens, in values of `width` bytes.

    For n = rows, C = grad_cycles, G = grad_l_steps: it grows with C G, and neither with N nor with T, whose other steps
    run without graph. With the kernels it does not grow with G either:

        once           x, the norm's float32 input, its scales, RoPE's two tables
        L, eager       G (state, g, u, silu, hidden, and y and its scales in float32), new state
        L, fused       state before the G steps, context, new state
        mixer          z_H, [q k v], rotated [q k], its output, logarithms
        mixer, packed  z_H, rotated [q k], keys and values for every query head, the mask in values (n a token), its
                       output, logarithms
        H, eager       a, p, silu, q, sigmoid, silu * q, and v and its scales in float32
        H, fused       a, p q r

    At most that: initial states are no tokens' own, so where every cycle of a segment carries gradient the first one's
    are not saved.

    Args:
        config: of the core.
        rows: tokens of a micro batch.
        width: of a value, 2 or 4.
        fused: whether the Triton kernels run.
        packed: whether the tokens are one row of several documents.
    """
    d, d_l, d_h, size = config.hidden_size, config.d_l, config.d_h, config.head_size
    once = d * (4 + width) + 4
    if fused:
        low, high = 4 * d_l * width, 4 * d_h * width
    else:
        low = config.grad_l_steps * (5 * d_l * width + 4 * d_l + 4 * d_l // size) + d_l * width
        high = 6 * d_h * width + 4 * d_h + 4 * d_h // size
    if config.h_mixer == "attention":
        assert config.attn_heads is not None and config.attn_kv_heads is not None  # HRMConfig fills them in
        head = d_h // config.attn_heads
        once += 2 * head * width
        heads = 2 * config.attn_heads + 3 * config.attn_kv_heads
        if packed:  # [q k v] is not kept for v's sake
            heads = 3 * config.attn_heads + config.attn_kv_heads
            high += rows * width
        high += (2 * d_h + heads * head) * width + 4 * config.attn_heads
    act = d_h * width if config.act else 0
    whole = config.grad_l_steps == config.l_steps and config.l_reset == "carry"
    shared = (config.grad_cycles - 1) * d_l * width if whole else 0  # a cycle's new state is the next one's first
    return rows * (once + config.grad_cycles * (low + high) + act - shared)


def between_segments(config: HRMConfig, rows: int, segments: int, weights: int, width: int) -> int:
    """Bytes of what outlives a segment where there are several (`hrm.segment_gradients`); 0 for one.

    What gradients add up in: those of the backbone's output, of x W_x + b_c and of the core's weights, twice, since one
    segment's are there beside the sum; and two states, those that the segment before ended in, or where segments may
    halt, those that each of them starts again from.

    Args:
        config: of the core.
        rows: tokens of a micro batch.
        segments: the most that run.
        weights: bytes of the core's weights in float32.
        width: of a value in the recurrence, 2 or 4.
    """
    if segments == 1:
        return 0
    sums = 2 * (rows * (config.hidden_size + 2 * config.d_l) * width + weights * width // 4)
    kept = segments if config.act or config.stop_residual else 1
    return sums + kept * rows * (config.d_l + config.d_h) * width


def loss_bytes(text: PreTrainedConfig, config: HRMConfig, rows: int, width: int) -> int:
    """Bytes at the peak of `hrm.loss.linear_cross_entropy` with a frozen head, every token scored.

    A segment's z_H twice (as the core returned it and at the scored tokens) and its gradient; the backbone's output
    twice; and of one chunk the logarithms, two gradients in float32, and the soft cap's output.
    """
    chunk = min(rows, max(1, CHUNK_BYTES // (4 * text.vocab_size))) * text.vocab_size
    capped = getattr(text, "final_logit_softcapping", None) is not None
    d = config.hidden_size
    return rows * width * (2 * config.d_h + 3 * d) + chunk * (12 + width * capped)


def nf4_bytes(size: int) -> int:
    """Bytes of `size` values in bitsandbytes' nf4 with double quantisation.

    Half a byte each; a scale a block, itself in 8 bits with a float32 scale for 256 of them and one offset; the 16 and
    256 values that the codes stand for.
    """
    blocks = -(-size // NF4_BLOCK)
    return -(-size // 2) + blocks + 4 * -(-blocks // 256) + 4 * (1 + 16 + 256)
