"""The chunked cross entropy, the targets and the Q head's loss."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hrm.loss import IGNORED, linear_cross_entropy, masked_mean, next_token_targets, q_loss, reward, token_mean

TOKENS, WIDTH, VOCABULARY = 13, 8, 50


class CappedHead(nn.Module):
    """Counts the logits that it is asked for at a time."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.rows = []

    def forward(self, hidden):
        self.rows.append(hidden.shape[0])
        return torch.tanh(self.linear(hidden) / 3) * 3


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 13, 100])
def test_equals_the_plain_cross_entropy_with_its_gradients(rows, frozen):
    head, hidden = CappedHead(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets, weights = torch.randint(0, VOCABULARY, (TOKENS,)), torch.rand(TOKENS)
    logits = head(hidden)
    plain = F.cross_entropy(logits, targets, reduction="none")
    chunk_bytes = rows * VOCABULARY * 4
    chunked = linear_cross_entropy(hidden, targets, head, VOCABULARY, frozen=frozen, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(chunked.loss, plain)
    assert torch.equal(chunked.correct, logits.argmax(-1) == targets)
    inputs = [hidden] if frozen else [hidden, head.linear.weight]
    wanted = torch.autograd.grad(plain, inputs, weights)
    for should, was in zip(wanted, torch.autograd.grad(chunked.loss, inputs, weights), strict=True):
        torch.testing.assert_close(was, should)


@pytest.mark.parametrize("frozen", [True, False])
def test_never_holds_more_logits_than_a_chunk(frozen):
    head, hidden = CappedHead(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        scored = linear_cross_entropy(
            hidden,
            torch.zeros(TOKENS, dtype=torch.long),
            head,
            VOCABULARY,
            frozen=frozen,
            chunk_bytes=4 * VOCABULARY * 4,
        )
    scored.loss.sum().backward()
    assert max(head.rows) == 4
    assert sum(head.rows) == TOKENS * (1 if frozen else 2)  # a frozen head's logits are computed once
    assert max(size for size in sizes if size != head.linear.weight.numel()) <= 4 * VOCABULARY


@pytest.mark.parametrize("frozen", [True, False])
def test_float32_loss_from_bfloat16_logits(frozen):
    head, hidden = CappedHead().bfloat16(), torch.randn(3, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.tensor([1, 2, 3]), head, VOCABULARY, frozen=frozen).loss
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss.sum(), hidden)[0].dtype == torch.bfloat16


def test_a_frozen_head_under_no_grad():
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, torch.tensor([1, 2, 3]), CappedHead(), VOCABULARY, frozen=True).loss
    assert not loss.requires_grad


@pytest.mark.parametrize("frozen", [True, False])
def test_no_tokens_give_a_loss_of_zero_with_graph(frozen):
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    scored = linear_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), CappedHead(), VOCABULARY, frozen=frozen)
    loss = masked_mean(scored.loss, torch.ones(0, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad.shape == (0, WIDTH)


def test_mismatched_targets_are_named():
    with pytest.raises(ValueError, match=r"targets.shape is \(2,\); it should be \(3,\)"):
        linear_cross_entropy(torch.randn(3, WIDTH), torch.tensor([1, 2]), CappedHead(), VOCABULARY)


def test_targets_are_shifted_and_leave_padding_out():
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert next_token_targets(labels, None).tolist() == [[2, 3, 4, IGNORED], [6, 7, 8, IGNORED]]
    assert next_token_targets(labels, mask).tolist() == [[2, 3, IGNORED, IGNORED], [IGNORED, 7, 8, IGNORED]]
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
    assert next_token_targets(labels, None, documents).tolist() == [
        [2, IGNORED, 4, IGNORED],
        [IGNORED, 7, IGNORED, IGNORED],
    ]
    assert labels.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_q_loss_by_hand():
    # two segments, three tokens; the third token's row halted after the first segment
    values = torch.tensor([[[0.5, -1.0], [2.0, 0.0], [1.0, 1.0]], [[0.0, 3.0], [-1.0, 1.0], [9.0, 9.0]]])
    correct = torch.tensor([[True, False, True], [True, True, False]])
    active = torch.tensor([[True, True, True], [True, True, False]])
    last = torch.tensor([[False] * 3, [True, False, False]])

    def bce(value, target):
        probability = torch.sigmoid(torch.tensor(value))
        return -(target * probability.log() + (1 - target) * (1 - probability).log())

    halt = torch.stack([(bce(0.5, 1) + bce(0.0, 1)) / 2, (bce(2.0, 0) + bce(-1.0, 1)) / 2, bce(1.0, 1)])
    worth = torch.sigmoid(torch.tensor([0.0, 1.0]))  # at its last segment a row can only halt
    go_on = torch.stack([bce(-1.0, worth[0]), bce(0.0, worth[1]), torch.tensor(0.0)])
    torch.testing.assert_close(q_loss(values, correct, active, last), halt + go_on)
    torch.testing.assert_close(q_loss(values, correct, active, last, go_on=False), halt)
    paid = torch.stack([(bce(0.5, 1) + bce(0.0, 0.9)) / 2, (bce(2.0, 0) + bce(-1.0, 0.9)) / 2, bce(1.0, 1)])
    torch.testing.assert_close(q_loss(values, correct, active, last, price=0.1, go_on=False), paid)
    # the second segment run for its values alone: the same targets for going on, no halting term of its own
    ahead = q_loss(values, correct[:1], active, last)
    torch.testing.assert_close(ahead, torch.stack([bce(0.5, 1), bce(2.0, 0), bce(1.0, 1)]) + go_on)


def test_the_reward_of_halting_falls_with_each_segment_and_stays_above_zero():
    earned = [reward(torch.tensor([True, False]), index, 0.6) for index in range(3)]
    torch.testing.assert_close(torch.stack(earned), torch.tensor([[1.0, 0.0], [0.4, 0.0], [0.0, 0.0]]))


def test_each_token_has_its_own_mean_over_the_segments_it_ran():
    values, ran = (
        torch.tensor([[1.0, 4.0, 9.0], [3.0, 8.0, 9.0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    assert token_mean(values, ran).tolist() == [2.0, 4.0, 0.0]
    torch.testing.assert_close(token_mean(values, ran, torch.tensor([1.0, 3.0])), torch.tensor([2.5, 4.0, 0.0]))


def test_q_loss_of_one_segment_trains_halting_alone():
    values = torch.zeros(1, 2, 2, requires_grad=True)
    every = torch.ones(1, 2, dtype=torch.bool)
    q_loss(values, every, every, ~every).sum().backward()
    assert (values.grad[..., 0] < 0).all()
    assert (values.grad[..., 1] == 0).all()


def test_a_frozen_head_leaves_nothing_in_autocasts_cache():
    weight, seen = torch.randn(50, 8), []

    def head(hidden):
        seen.append(weakref.ref(hidden))
        return hidden @ weight.T

    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(torch.randn(6, 8, requires_grad=True), torch.arange(6), head, 50, frozen=True)
        assert [hidden() for hidden in seen] == [None]
