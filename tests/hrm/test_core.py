"""The schedule, its gradients, the states that are handed on, and halting."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hrm_kernels
from hrm import HRMCarry, HRMConfig, HRMCore
from hrm.attention import SlotCache
from hrm_kernels import BackendError

SIZES = {
    "hidden_size": 24,
    "d_l": 32,
    "d_h": 64,
    "head_size": 16,
    "h_cycles": 3,
    "l_steps": 4,
    "attn_heads": 2,
    "attn_kv_heads": 1,
}
BATCH, TOKENS = 2, 5


def make_core(**settings):
    core = HRMCore(HRMConfig(**{**SIZES, **settings}))
    with torch.no_grad():
        core.w_out.normal_(std=0.1)
        core.w_q.normal_(std=0.3)
        core.b_q.zero_()
    return core


@pytest.fixture
def h():
    return torch.randn(BATCH, TOKENS, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------- the equations


def norm(values, size):
    heads = values.unflatten(-1, (-1, size))
    return (heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)


def blocks(values, weight):
    """Row vectors times a block-diagonal matrix, written as the full matrix that it is."""
    return values @ torch.block_diag(*weight)


def plain_attention(core, z):
    heads, kv_heads, size = core.config.attn_heads, core.config.attn_kv_heads, core.attn_head_dim
    q, k, v = (z @ core.w_qkv).split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    angles = torch.arange(z.shape[1])[:, None] * core.config.rope_theta ** (-torch.arange(0, size, 2) / size)
    turns = torch.polar(torch.ones_like(angles), angles)

    def rotated(part):  # RoPE as complex multiplication, pairs (i, i + size / 2)
        turned = torch.complex(*part.chunk(2, dim=-1)) * turns
        return torch.cat((turned.real, turned.imag), dim=-1)

    later = torch.ones(z.shape[1], z.shape[1], dtype=torch.bool).triu(1)
    mixed = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        query = rotated(q[..., head * size : (head + 1) * size])
        key = rotated(k[..., group * size : (group + 1) * size])
        scores = (query @ key.mT / size**0.5).masked_fill(later, float("-inf"))
        mixed.append(scores.softmax(-1) @ v[..., group * size : (group + 1) * size])
    return torch.cat(mixed, dim=-1) @ core.w_o


def plain_segment(core, h, z_l, z_h):
    """One segment written from the equations, with the gradient cut where the schedule says."""
    c = core.config
    x = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for cycle in range(c.h_cycles):
        carries_gradient = cycle >= c.h_cycles - c.grad_cycles
        if c.l_reset == "init":
            z_l = core.z_l_init.expand_as(z_l)
        context = x @ core.w_x + z_h @ core.w_c + core.b_c
        for step in range(c.l_steps):
            if not carries_gradient or step == c.l_steps - c.grad_l_steps:
                z_l = z_l if carries_gradient and c.grad_l_steps == c.l_steps else z_l.detach()
            g, u = (context + torch.cat((blocks(z_l, core.r_gate), blocks(z_l, core.r_up)), -1)).chunk(2, -1)
            z_l = norm(z_l + blocks(F.silu(g) * u, core.r_down), c.head_size)
        a = z_h + plain_attention(core, z_h) if c.h_mixer == "attention" else z_h
        inputs = z_l @ core.w_l + core.b_h + torch.cat([blocks(a, w) for w in core.r_h], -1)
        p, q, r = inputs.chunk(3, -1)
        z_h = norm((1 - torch.sigmoid(r)) * a + torch.sigmoid(r) * F.silu(p) * q, c.head_size)
        if not carries_gradient:
            z_l, z_h = z_l.detach(), z_h.detach()
    return z_l, z_h


@pytest.mark.parametrize("mixer", ["attention", "none"])
@pytest.mark.parametrize("reset", ["carry", "init"])
@pytest.mark.parametrize(("grad_cycles", "grad_l_steps"), [(1, 1), (1, 4), (2, 3), (3, 4), (3, 1)])
def test_segment_and_its_gradients_follow_the_equations(h, mixer, reset, grad_cycles, grad_l_steps):
    core = make_core(h_mixer=mixer, l_reset=reset, grad_cycles=grad_cycles, grad_l_steps=grad_l_steps)
    weights = [core.w_x, core.w_c, core.b_c, core.r_gate, core.r_up, core.r_down, core.w_l, core.b_h, core.r_h]
    weights += [core.w_qkv, core.w_o] if mixer == "attention" else []
    h.requires_grad_(True)
    start = core.initial_carry((BATCH, TOKENS))
    _, expected = plain_segment(core, h, start.z_l, start.z_h)
    out = core(h).z_h
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)  # 15 steps amplify rounding
    cotangent = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, [h, *weights], cotangent)
    got = torch.autograd.grad(out, [h, *weights], cotangent)
    for should, was in zip(wanted, got, strict=True):
        torch.testing.assert_close(was, should, rtol=1e-2, atol=1e-2 * float(should.abs().max()))


def test_read_out_adds_to_the_hidden_state(h):
    core = make_core()
    z_h = torch.randn(BATCH, TOKENS, SIZES["d_h"])
    torch.testing.assert_close(core.read_out(h, z_h), h + z_h @ core.w_out)
    assert core.read_out(h.bfloat16(), z_h).dtype == torch.bfloat16


def saved_bytes(core, h):
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    kept = {}
    parameters = {p.untyped_storage().data_ptr() for p in core.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps its address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        core(h)
    return sum(size for size, _ in kept.values())


def test_saved_activations_do_not_grow_with_cycles_or_steps(h):
    few = saved_bytes(make_core(h_cycles=2, l_steps=2), h)
    assert saved_bytes(make_core(h_cycles=8, l_steps=2), h) == few
    assert saved_bytes(make_core(h_cycles=2, l_steps=16), h) == few
    assert saved_bytes(make_core(h_cycles=2, l_steps=2, grad_cycles=2), h) > few


# ---------------------------------------------------------------------------------------------------- set-up


def test_initial_states_are_drawn_once_and_head_normed():
    core = make_core()
    for init in (core.z_l_init, core.z_h_init):
        heads = init.unflatten(-1, (-1, 16))
        torch.testing.assert_close(heads.square().mean(-1), torch.ones(heads.shape[0]), rtol=1e-4, atol=1e-4)
    assert {"z_l_init", "z_h_init"} <= core.state_dict().keys()


def test_a_fresh_core_reads_out_nothing_and_does_not_want_to_halt(h):
    core = HRMCore(HRMConfig(**SIZES, act=True, max_segments=2))
    out = core(h)
    assert len(out.segments) == 2
    assert torch.equal(core.read_out(h, out.z_h), h)
    assert torch.equal(out.segments[0].q, torch.full((BATCH, TOKENS, 2), -5.0))


def test_fused_can_be_switched_and_changes_no_number_on_the_reference(h):
    core = make_core()
    state = {name: tensor.clone() for name, tensor in core.state_dict().items()}
    auto = core(h).z_h
    core.fused = False
    assert core.config.fused is False
    torch.testing.assert_close(core(h).z_h, auto)
    assert all(torch.equal(tensor, state[name]) for name, tensor in core.state_dict().items())
    with pytest.raises(ValueError, match="fused is 'fast'; it should be True, False or 'auto'"):
        core.fused = "fast"


def test_fused_true_is_an_error_where_it_cannot_run(h, device):
    core = make_core(head_size=128, d_l=128, d_h=128, fused=True).to(device)
    with pytest.raises(BackendError, match="head size 128"):
        core(h.to(device))


def test_fused_kernels_give_the_same_segment_and_gradients(h, device):
    """On the CPU the kernels run in Triton's interpreter."""
    core = make_core(h_cycles=2, l_steps=2, grad_cycles=2, grad_l_steps=2).to(device)
    cotangent = torch.randn(BATCH, TOKENS, SIZES["d_h"], device=device)
    results = []
    for core.fused in (False, True):
        out = core(h.to(device)).z_h
        results.append([out, *torch.autograd.grad(out, [core.w_x, core.r_up, core.r_h], cotangent)])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-3, atol=1e-3 * float(eager.detach().abs().max()))


@pytest.mark.parametrize("padded", [False, True])
def test_compiles_into_one_graph(h, padded):
    core = make_core(segments=2, fused=False)
    mask = None
    if padded:
        mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
        mask[0, :2] = 0

    def segments(h):
        out = core(h, attention_mask=mask)
        return core.read_out(h, out.z_h)

    torch._dynamo.reset()
    compiled = torch.compile(segments, fullgraph=True, backend="aot_eager")
    wanted, got = segments(h), compiled(h)
    torch.testing.assert_close(got, wanted)
    weights = [core.w_out, core.w_x, core.w_qkv]
    for should, was in zip(
        torch.autograd.grad(wanted.sum(), weights), torch.autograd.grad(got.sum(), weights), strict=True
    ):
        torch.testing.assert_close(was, should, rtol=1e-4, atol=1e-4)


def test_explain_names_every_kernel_of_the_core_and_no_other():
    core = make_core()
    assert [line.split()[0] for line in core.explain().splitlines()] == ["l_recurrence", "h_update", "carry_update"]
    core.fused = False
    assert "reference (asked for: fused=False)" in core.explain()


def test_the_config_given_is_not_shared():
    config = HRMConfig(**SIZES)
    HRMCore(config).fused = False
    assert config.fused == "auto"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_recurrence_in_its_dtype_and_reaches_every_weight(h, dtype):
    core = make_core(grad_cycles=2)
    exact = core(h).z_h
    with torch.autocast("cpu", dtype=dtype):
        out = core(h)
    assert out.z_h.dtype == out.carry.z_h.dtype == dtype
    assert (out.z_h - exact).square().mean().sqrt() < 0.05  # states have a root mean square of 1
    out.z_h.float().square().sum().backward()
    idle = {name for name, p in core.named_parameters() if p.requires_grad and p.grad is None}
    assert idle == {"w_out"}  # the read-out was not run


# ---------------------------------------------------------------------------------------------------- segments


def test_segments_in_one_call_are_segments_with_a_carry(h):
    core = make_core(max_segments=3).eval()
    together = core(h, segments=3)
    carry = None
    for index in range(3):
        step = core(h, segments=1, carry=carry)
        carry = step.carry
        assert torch.equal(step.z_h, together.segments[index].z_h)
        torch.testing.assert_close(step.residuals[0], together.residuals[index])
    assert torch.equal(carry.z_l, together.carry.z_l)
    assert carry.steps.tolist() == together.carry.steps.tolist() == [3, 3]
    assert not together.carry.halted.any()
    assert not carry.z_h.requires_grad


def test_residuals_are_the_relative_change_of_real_tokens(h):
    core = make_core()
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, 3:] = 0
    start = core.initial_carry((BATCH, TOKENS))
    with torch.no_grad():
        out = core(h, attention_mask=mask)
    for column, (before, after) in enumerate(((start.z_l, out.carry.z_l), (start.z_h, out.carry.z_h))):
        change = (after - before).norm(dim=-1) / before.norm(dim=-1)
        torch.testing.assert_close(out.residuals[0, column], change[mask.bool()].mean())


def test_training_halts_by_row_and_starts_halted_rows_afresh(h):
    core = make_core(act=True, max_segments=4).train()
    counted = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    out = core(h, segments=1, counted=counted)
    margin = (out.segments[0].q[..., 0] - out.segments[0].q[..., 1]).mean(1)
    assert out.carry.halted.tolist() == (margin > 0).tolist()
    with torch.no_grad():
        core.b_q += torch.tensor([-margin.mean().item(), 0.0])  # between the two rows: one halts, one goes on
    out = core(h, segments=1, counted=counted)
    assert sorted(out.carry.halted.tolist()) == [False, True]
    row = int(out.carry.halted.long().argmax())
    assert torch.equal(out.carry.z_h[row], core.z_h_init.expand(TOKENS, -1))
    assert torch.equal(out.carry.z_l[row], core.z_l_init.expand(TOKENS, -1))
    assert out.carry.steps.tolist() == [int(i != row) for i in range(BATCH)]
    full = core(h, counted=counted)
    assert full.segments_used[row].tolist() == [1] * TOKENS
    assert full.segments_used[1 - row, 0] > 1
    assert torch.equal(full.z_h[row], full.segments[0].z_h[row])  # the read-out keeps its last segment's state
    assert not full.segments[1].active[row].any()


def test_training_stops_at_max_segments_counting_those_in_the_carry(h):
    core = make_core(act=True, max_segments=3).train()
    with torch.no_grad():
        core.b_q.copy_(torch.tensor([-100.0, 100.0]))  # never wants to halt
    first = core(h, segments=2)
    assert first.carry.steps.tolist() == [2, 2]
    assert not first.carry.halted.any()
    second = core(h, carry=first.carry)
    assert len(second.segments) == 1
    assert second.carry.halted.all()
    assert second.carry.steps.tolist() == [0, 0]


def test_nothing_halts_before_min_segments(h):
    core = make_core(act=True, max_segments=4, min_segments=3).train()
    with torch.no_grad():
        core.b_q.copy_(torch.tensor([100.0, -100.0]))  # always wants to halt
    assert core(h).segments_used.eq(3).all()
    carry = core(h, segments=2).carry
    assert len(core(h, carry=carry).segments) == 1  # those of the carry count
    assert core.eval()(h).segments_used.eq(1).all()  # in evaluation the model decides


def test_exploration_makes_some_rows_go_on():
    core = make_core(act=True, max_segments=4, exploration=0.5).train()
    with torch.no_grad():
        core.b_q.copy_(torch.tensor([100.0, -100.0]))
    used = core(torch.randn(300, 1, SIZES["hidden_size"])).segments_used[:, 0]
    shares = [float((used == depth).float().mean()) for depth in (1, 2, 3, 4)]
    assert shares == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=0.08)


def test_without_a_target_for_going_on_q_halt_alone_decides(h):
    core = make_core(act=True, max_segments=4, q_target="none").train()
    with torch.no_grad():
        core.b_q.copy_(torch.tensor([50.0, 100.0]))
    assert core(h).segments_used.eq(1).all()
    assert core.eval()(h).segments_used.eq(1).all()
    with torch.no_grad():
        core.b_q.copy_(torch.tensor([-50.0, -100.0]))
    assert core(h).segments_used.eq(4).all()


def test_looking_ahead_adds_the_next_segment_without_graph_where_one_is_left(h):
    core = make_core(act=True, max_segments=3).train()
    with torch.no_grad():
        core.b_q.copy_(torch.tensor([-100.0, 100.0]))
    longer = core(h, segments=2)
    out = core(h, segments=1, look_ahead=True)
    assert len(out.segments) == 1 and not out.ahead.q.requires_grad
    torch.testing.assert_close(out.ahead.q, longer.segments[1].q)
    torch.testing.assert_close(out.carry.z_h, core(h, segments=1).carry.z_h)  # and changes nothing else
    assert core(h, look_ahead=True).ahead is None  # all have run their last


@pytest.mark.parametrize("where", ["trunk", "head"])
def test_where_the_gradient_of_the_q_values_goes(h, where):
    core = make_core(act=True, max_segments=2, q_gradient=where).train()
    core(h).segments[0].q.sum().backward()
    assert core.w_q.grad.abs().max() > 0
    assert (core.w_l.grad is None) == (where == "head")


@torch.no_grad()
def moved_by_segment(core, h, count):
    """(count, B, S, 2), the relative change of each token's two states in each of `count` segments."""
    state = core.initial_carry(h.shape[:2])
    found = []
    for _ in range(count):
        new = core(h, segments=1, carry=state).carry
        pairs = ((state.z_l, new.z_l), (state.z_h, new.z_h))
        found.append(torch.stack([(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in pairs], -1))
        state = new
    return torch.stack(found)


def first_below(moved, threshold):
    """How many segments run where they end with the first in which both states moved by no more than `threshold`."""
    still = (moved <= threshold).all(-1)
    return torch.where(still.any(0), still.int().argmax(0) + 1, len(moved))


def test_what_a_sequence_ends_by_is_told_where_it_ends():
    core = make_core(segments=3, stop_residual=100.0).train()
    h = torch.randn(BATCH, TOKENS, SIZES["hidden_size"])
    out = core(h)
    assert len(out.segments) == 1 and out.residual_tokens.tolist() == [BATCH * TOKENS]
    core.config.stop_residual = 0.0
    torch.testing.assert_close(out.residuals, core(h).residuals[:1])


def test_sequences_in_training_end_where_their_states_stand_still():
    core, h = make_core(segments=5).train(), rows_of(6)
    moved = moved_by_segment(core, h, 5).mean(2)
    core.config.stop_residual = float(moved[2].max(-1).values.median())  # reached by half of the rows in the third
    out, expected = core(h), first_below(moved, core.config.stop_residual)
    assert torch.equal(out.segments_used, expected[:, None].expand(-1, 6).int())
    assert len(expected.unique()) > 1 and len(out.segments) == expected.max()
    ended = expected < 5
    assert torch.equal(out.carry.halted, ended | (moved[-1] <= core.config.stop_residual).all(-1))
    for row, used in enumerate(expected.tolist()):  # whatever its neighbours do
        alone = core(h[row : row + 1])
        assert len(alone.segments) == used
        torch.testing.assert_close(out.z_h[row], alone.z_h[0], rtol=1e-4, atol=1e-4)
    core.config.stop_residual = 1e-30
    assert len(core(h).segments) == 5


@torch.no_grad()
def test_tokens_in_decoding_end_where_their_states_stand_still():
    core, h = make_core(segments=5, h_mixer="none").eval(), rows_of(6)
    moved = moved_by_segment(core, h, 5)
    core.config.stop_residual = float(moved[2].max(-1).values.median())
    out, expected = core(h), first_below(moved, core.config.stop_residual).int()
    assert torch.equal(out.segments_used, expected) and len(expected.unique()) > 2
    assert torch.equal(core(h, cache=SlotCache()).segments_used, expected)
    assert len(core(h, segments=5).segments) == 5  # a number in evaluation is exactly that many


def test_padding_does_not_keep_a_sequence_going():
    core, h = make_core(segments=5).train(), rows_of(6)
    mask = padding("right", 6)
    core.config.stop_residual = float(moved_by_segment(core, h, 5).mean(2)[2].max(-1).values.median())
    out, changed = core(h, attention_mask=mask), torch.where(mask.bool()[..., None], h, 100.0)
    assert torch.equal(out.segments_used, core(changed, attention_mask=mask).segments_used)


def test_padding_decides_nothing(h):
    core = make_core(act=True, max_segments=4).train()
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, 2:] = 0
    mask[1] = 0  # a row of padding alone
    changed = h.clone()
    changed[~mask.bool()] = 100.0
    out, other = core(h, attention_mask=mask), core(changed, attention_mask=mask)
    assert torch.equal(out.segments_used, other.segments_used)
    assert not out.segments_used[1].any()
    torch.testing.assert_close(out.z_h[0, :2], other.z_h[0, :2])
    torch.testing.assert_close(out.residuals, other.residuals)
    assert torch.isfinite(out.z_h).all()


def test_evaluation_halts_by_token_and_freezes_what_halted(h):
    core = make_core(act=True, max_segments=4).eval()
    out = core(h)
    for segment, following in zip(out.segments, out.segments[1:], strict=False):
        goes_on = segment.active & (segment.q[..., 0] <= segment.q[..., 1])
        assert torch.equal(following.active, goes_on)
    assert out.segments_used.unique().numel() > 1
    for depth in out.segments_used.unique().tolist():
        chosen = out.segments_used == depth
        assert torch.equal(out.z_h[chosen], out.segments[depth - 1].z_h[chosen])


def test_evaluation_with_a_number_runs_exactly_that_many(h):
    core = make_core(act=True, max_segments=4).eval()
    out = core(h, segments=3)
    assert len(out.segments) == 3
    assert out.segments_used.eq(3).all()


# ------------------------------------------------------------------------------------------- rows that have halted

ROWS = 9


def uneven_core(**settings):
    """A core whose tokens halt after one to six segments, some of them after each."""
    core = make_core(act=True, max_segments=6, **settings).eval()
    with torch.no_grad():
        q = torch.cat([segment.q.flatten(0, 1) for segment in core(rows_of(8), segments=6).segments])
        core.b_q[0] -= (q[:, 0] - q[:, 1]).quantile(0.75)  # so that about one in four halts after each segment
    return core


def rows_of(tokens):
    return torch.randn(ROWS, tokens, SIZES["hidden_size"], generator=torch.Generator().manual_seed(2))


def padding(side, tokens):
    """(ROWS, tokens), 0 to 3 tokens of padding a row; None: no mask."""
    if side is None:
        return None
    places = torch.arange(tokens) if side == "left" else torch.arange(tokens).flip(0)
    return (places >= torch.arange(ROWS)[:, None] % 4).long()


def each_row_alone(core, h, mask=None):
    """What every row gives by itself, where no other row can be left out."""
    rows = range(len(h))
    return [core(h[i : i + 1], attention_mask=None if mask is None else mask[i : i + 1]) for i in rows]


@pytest.fixture
def recurred(monkeypatch):
    """How many rows each call of the L recurrence got."""
    counts, plain = [], hrm_kernels.l_recurrence

    def spy(z, *args, **kwargs):
        counts.append(len(z))
        return plain(z, *args, **kwargs)

    monkeypatch.setattr(hrm_kernels, "l_recurrence", spy)
    return counts


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "none"])
@torch.no_grad()
def test_a_segment_computes_the_rows_that_go_on_and_no_others(recurred, tokens, cached, mixer):
    core = uneven_core(h_mixer=mixer)
    recurred.clear()
    out = core(rows_of(tokens), cache=SlotCache() if cached else None)
    going = [int(segment.active.any(1).sum()) for segment in out.segments]
    assert recurred == [tokens * rows for rows in going for _ in range(SIZES["h_cycles"])]
    assert going[0] == ROWS > going[-1] > 0  # the case really occurs
    if tokens == 1:
        assert sum(recurred) == SIZES["h_cycles"] * int(out.segments_used.sum())


@pytest.mark.parametrize(("training", "segments"), [(True, None), (True, 3), (False, 3)])
def test_training_and_a_number_of_segments_compute_all_rows(recurred, training, segments):
    core = uneven_core().train(training)
    recurred.clear()
    out = core(rows_of(1), segments=segments)
    assert recurred == [ROWS] * SIZES["h_cycles"] * len(out.segments)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("mixer", ["attention", "none"])
@pytest.mark.parametrize("tokens", [1, 5])
@torch.no_grad()
def test_leaving_rows_out_changes_nothing_for_those_that_go_on(side, mixer, tokens):
    core, mask = uneven_core(h_mixer=mixer), padding(side, tokens)
    h = rows_of(tokens)
    out = core(h, attention_mask=mask)
    for row, alone in enumerate(each_row_alone(core, h, mask)):
        assert torch.equal(out.segments_used[row], alone.segments_used[0])
        torch.testing.assert_close(out.z_h[row], alone.z_h[0], rtol=1e-3, atol=1e-3)
        for segment, expected in zip(out.segments, alone.segments, strict=False):
            assert torch.equal(segment.active[row], expected.active[0])
            torch.testing.assert_close(segment.z_h[row], expected.z_h[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(segment.q[row], expected.q[0], rtol=1e-3, atol=1e-3)
        for segment in out.segments[len(alone.segments) :]:  # left out: as its last one was
            assert not segment.active[row].any()
            assert torch.equal(segment.z_h[row], out.segments[len(alone.segments) - 1].z_h[row])
            assert torch.equal(segment.q[row], out.segments[len(alone.segments) - 1].q[row])
    assert out.carry.halted.all() and not out.carry.steps.any()
    assert torch.equal(out.carry.z_l, core.z_l_init.expand(ROWS, tokens, -1))
    assert torch.equal(out.carry.z_h, core.z_h_init.expand(ROWS, tokens, -1))


@torch.no_grad()
def test_rows_left_out_start_anew_in_the_carry_while_others_go_on():
    core, h = make_core(segments=3).eval(), rows_of(1)
    least = moved_by_segment(core, h, 3).max(-1).values.amin(0)  # of both states, over the three segments
    core.config.stop_residual = float(least.median())
    out = core(h)  # half of the rows stand still by then, the others go on to the call's end
    over, core.config.stop_residual = out.carry.halted, 0.0
    assert 0 < over.sum() < ROWS
    assert out.carry.steps.tolist() == [0 if done else 3 for done in over]
    assert torch.equal(out.carry.z_l[over][:, 0], core.z_l_init.expand(int(over.sum()), -1))
    assert torch.equal(out.carry.z_h[over][:, 0], core.z_h_init.expand(int(over.sum()), -1))
    fixed = core(h, segments=3).carry
    torch.testing.assert_close(out.carry.z_l[~over], fixed.z_l[~over], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.carry.z_h[~over], fixed.z_h[~over], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("pieces", [[8], [1] * 8, [4, 1, 1, 2]])
@torch.no_grad()
def test_slots_of_rows_left_out_serve_later_tokens_that_go_deeper(side, pieces):
    core, tokens, cache = uneven_core(), 8, SlotCache()
    h, mask = rows_of(tokens), padding(side, tokens)
    alone = each_row_alone(core, h, mask)
    states, used, end = [], [], 0
    for piece in h.split(pieces, dim=1):
        end += piece.shape[1]
        out = core(piece, attention_mask=None if mask is None else mask[:, :end], cache=cache)
        states.append(out.z_h)
        used.append(out.segments_used)
    used, real = torch.cat(used, 1), torch.ones(ROWS, tokens, dtype=torch.bool) if mask is None else mask.bool()
    assert torch.equal(used, torch.cat([out.segments_used for out in alone]))
    apart = (torch.cat(states, 1) - torch.cat([out.z_h for out in alone]))[real]
    assert apart.square().mean().sqrt() < 1e-3  # of states of size 1: up to 72 steps amplify rounding
    assert (used[:, 1:] > used[:, :-1]).any() and used.unique().numel() > 3  # the case really occurs


@pytest.mark.parametrize("limit", [2, None])
def test_a_recorded_step_scores_what_a_plain_one_does_and_waits_for_nothing(monkeypatch, limit):
    core = uneven_core(exploration=0.3).train()
    h = rows_of(1)

    def step():
        torch.manual_seed(0)
        return core(h, segments=limit, look_ahead=True)

    plain = step()
    pretend_to_record(monkeypatch)
    with torch.no_grad():
        assert not waits_of(step)
    recorded = step()
    assert len(recorded.segments) == (limit or core.config.max_segments) >= len(plain.segments)
    assert plain.segments[-1].active.any() and not plain.segments[-1].active.all()  # the case really occurs
    for of, other in zip(plain.segments, recorded.segments, strict=False):
        for name in ("z_h", "active", "halted", "q", "last"):
            assert torch.equal(getattr(of, name), getattr(other, name))
    assert not any(segment.active.any() for segment in recorded.segments[len(plain.segments) :])
    assert torch.equal(plain.z_h, recorded.z_h) and torch.equal(plain.segments_used, recorded.segments_used)
    assert all(torch.equal(*pair) for pair in zip(plain.carry, recorded.carry, strict=True))
    if limit is None:
        assert recorded.ahead is None  # nobody may go on
    else:
        assert torch.equal(plain.ahead.q, recorded.ahead.q) and torch.equal(plain.ahead.active, recorded.ahead.active)


def pretend_to_record(monkeypatch):
    for module in ("core", "attention"):
        monkeypatch.setattr(f"hrm.{module}.recording", lambda values: True)


@pytest.mark.parametrize("what", ["mask", "documents", "carry"])
def test_a_recorded_step_waits_for_no_argument_and_gives_the_same(monkeypatch, what):
    core = uneven_core().train()
    h = rows_of(4)
    given = {
        "mask": {"attention_mask": padding("right", 4)},
        "documents": {"position_ids": torch.tensor([0, 1, 0, 1]).expand(ROWS, -1)},
        "carry": {"carry": core(h, segments=1).carry},
    }[what]
    plain = core(h, **given)
    pretend_to_record(monkeypatch)
    with torch.no_grad():
        assert not waits_of(lambda: core(h, **given))
    torch.testing.assert_close(core(h, **given).z_h, plain.z_h)


def test_tokens_that_halt_by_themselves_cannot_be_recorded(monkeypatch):
    core = uneven_core()
    pretend_to_record(monkeypatch)
    with pytest.raises(ValueError, match="segments is None; it should be a number while a CUDA graph is recorded"):
        core(rows_of(2))
    assert not waits_of(lambda: core(rows_of(2), segments=2))


@pytest.mark.gpu
def test_a_step_recorded_in_a_cuda_graph_is_the_plain_one():
    core, h = uneven_core().cuda().train(), rows_of(2).cuda()

    def step():
        out = core(h)
        core.zero_grad()
        sum((segment.z_h * segment.active[..., None]).square().sum() for segment in out.segments).backward()
        return out.z_h.detach(), core.w_x.grad

    expected = [part.clone() for part in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_device_is_waited_for_once_a_segment():
    core = uneven_core()
    h = rows_of(1)
    found = []
    waits = waits_of(lambda: found.append(core(h, cache=SlotCache())))
    assert len(waits) == len(found[0].segments) > 2


def waits_of(step):
    """The operations of `step` whose result the CPU waits for."""
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                waits.append(function)
            return function(*args, **kwargs or {})

    with Watch():
        step()
    return waits


def test_an_empty_batch_is_no_error(h):
    for core in (make_core(), make_core(act=True, max_segments=2)):
        out = core(h[:0])
        assert out.z_h.shape == (0, TOKENS, SIZES["d_h"])
        assert not out.residuals.any()


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[..., 1:], r"h.shape is \(2, 5, 23\); it should be \(batch, tokens, 24\)"),
        (lambda h: h[0], r"h.shape is \(5, 24\)"),
        (lambda h: h.long(), "h.dtype is torch.int64; it should be a floating-point type"),
        (lambda h: h.to("meta"), "h.device is meta; it should be cpu"),
    ],
)
def test_hidden_states_that_do_not_fit_are_named(h, change, message):
    with pytest.raises(ValueError, match=message):
        make_core()(change(h))


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "counted"])
def test_what_does_not_fit_the_hidden_states_is_named(h, name):
    with pytest.raises(ValueError, match=rf"{name}.shape is \(2, 4\); it should be \(2, 5\)"):
        make_core()(h, **{name: torch.ones(BATCH, TOKENS - 1, dtype=torch.long)})


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("z_l", lambda t: t[:, :-1], r"carry.z_l.shape is \(2, 4, 32\); it should be \(2, 5, 32\)"),
        ("z_h", lambda t: t.double(), "carry.z_h.dtype is torch.float64; it should be torch.float32"),
        ("z_h", lambda t: t.to("meta"), "carry.z_h.device is meta; it should be cpu"),
        ("z_l", lambda t: t.clone().index_fill_(1, torch.tensor([2]), float("nan")), "carry.z_l holds NaN"),
        ("steps", lambda t: t.long(), "carry.steps.dtype is torch.int64"),
        ("halted", lambda t: t[:1], "carry.halted.shape"),
    ],
)
def test_a_carry_that_does_not_fit_is_named(h, field, change, message):
    core = make_core()
    carry = core.initial_carry((BATCH, TOKENS))
    with pytest.raises(ValueError, match=message):
        core(h, carry=carry._replace(**{field: change(getattr(carry, field))}))


def test_what_is_no_carry_is_named(h):
    with pytest.raises(ValueError, match="carry is a Tensor; it should be an HRMCarry"):
        make_core()(h, carry=h)


@pytest.mark.parametrize("segments", [0, -1, 1.5])
def test_a_wrong_number_of_segments_is_named(h, segments):
    with pytest.raises(ValueError, match=f"segments is {segments}; it should be a whole number"):
        make_core()(h, segments=segments)


def test_carry_is_a_plain_tuple_of_tensors():
    assert HRMCarry._fields == ("z_l", "z_h", "steps", "halted")
