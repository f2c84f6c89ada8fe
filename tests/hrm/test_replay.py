"""The ring of past segments, what it learns from them, and where its gradient goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import ACT

from hrm import HRMGemmaForCausalLM
from hrm.replay import ReplayBuffer, Transitions


def transitions(rewards: list[float], width: int = 3) -> Transitions:
    count = len(rewards)
    return Transitions(
        torch.tensor(rewards)[:, None].expand(count, width),
        torch.tensor(rewards),
        torch.zeros(count, dtype=torch.bool),
        torch.zeros(count, width),
        torch.zeros(count, dtype=torch.bool),
        torch.ones(count, dtype=torch.bool),
    )


def kept(buffer: ReplayBuffer) -> list[float]:
    return sorted(buffer.state()["reward"].tolist())


def test_the_oldest_are_written_over_and_memory_stays() -> None:
    buffer = ReplayBuffer(4)
    buffer.add(transitions([1.0, 2.0, 3.0]))
    place = buffer.state()["state"].data_ptr()
    assert set(buffer.sample(200).reward.tolist()) == {1.0, 2.0, 3.0}  # the empty place is never drawn
    buffer.add(transitions([4.0, 5.0]))
    assert kept(buffer) == [2.0, 3.0, 4.0, 5.0]
    buffer.add(transitions([6.0, 7.0, 8.0, 9.0, 10.0, 11.0]))
    assert kept(buffer) == [8.0, 9.0, 10.0, 11.0]
    assert buffer.state()["state"].data_ptr() == place


def test_what_is_not_finite_teaches_nothing() -> None:
    good, both = ReplayBuffer(4), ReplayBuffer(4)
    good.add(transitions([1.0]))
    both.add(transitions([1.0, float("nan"), float("inf")]))
    w, b = torch.ones(3, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    torch.testing.assert_close(both.loss(w, b), good.loss(w, b))
    (gradient,) = torch.autograd.grad(both.loss(w, b), w)
    assert gradient.isfinite().all()


def test_a_restored_buffer_goes_on_alike() -> None:
    buffer, other = ReplayBuffer(4), ReplayBuffer(4)
    buffer.add(transitions([1.0, 2.0, 3.0, 4.0, 5.0]))
    other.load_state(buffer.state(), torch.device("cpu"))
    for each in (buffer, other):
        each.add(transitions([6.0]))
    assert kept(buffer) == kept(other) == [3.0, 4.0, 5.0, 6.0]
    with pytest.raises(ValueError, match="holds 4 transitions; it should hold 5"):
        ReplayBuffer(5).load_state(buffer.state(), torch.device("cpu"))


def test_loss_by_hand() -> None:
    buffer = ReplayBuffer(1)
    state, following = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    yes, no = torch.tensor([True]), torch.tensor([False])
    buffer.add(Transitions(state, torch.tensor([0.7]), yes, following, no, yes))
    w, b = torch.tensor([[0.1, 0.2], [0.3, -0.4]]), torch.tensor([0.5, -0.5])
    q, target = (state @ w + b)[0], (following @ w + b)[0].max().sigmoid()
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(buffer.loss(w, b), bce(q[0], torch.tensor(0.7)) + bce(q[1], target))


def test_training_fills_it_and_only_the_head_learns_from_it(
    make_model: Callable[..., HRMGemmaForCausalLM], ids: torch.Tensor
) -> None:
    model = make_model(**ACT, q_target="replay", replay_size=64).train()
    out = model(ids, labels=ids)
    segments = int(out.token_segments.max())
    assert model.replay.added == segments * len(ids)
    out.q_loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"hrm.w_q", "hrm.b_q"}
    state = model.replay.state()
    assert ((state["reward"][: model.replay.added] >= 0) & (state["reward"][: model.replay.added] <= 1)).all()
    used = out.token_segments[:, 0]
    went_on = state["went_on"][: segments * len(ids)].view(segments, len(ids))
    assert torch.equal(went_on.sum(0, dtype=torch.int32), used - 1)  # every segment but a row's last is gone on from
    model.eval()
    model(ids, labels=ids)
    assert model.replay.added == segments * len(ids)  # evaluation leaves it as it is


def test_what_a_packed_document_did_is_kept_by_itself(
    make_model: Callable[..., HRMGemmaForCausalLM], ids: torch.Tensor
) -> None:
    model = make_model(**ACT, q_target="replay").train()
    flat, positions = ids.reshape(1, -1), torch.arange(12).repeat(2)[None]
    model(flat, position_ids=positions, labels=flat)
    packed = model.replay.state()
    other = make_model(**ACT, q_target="replay").train()
    other.load_state_dict(model.state_dict())
    other(ids, labels=ids)
    apart = other.replay.state()
    assert torch.equal(packed["valid"], apart["valid"]) and torch.equal(packed["went_on"], apart["went_on"])
    for name, where in (("state", "valid"), ("reward", "valid"), ("next_state", "went_on"), ("next_last", "went_on")):
        torch.testing.assert_close(packed[name][packed[where]], apart[name][packed[where]], rtol=1e-4, atol=1e-4)
