"""How the model wires ACT together: what its Q head learns, token by token, and where the gradient of that goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import ACT

from hrm import HRMGemmaForCausalLM
from hrm.loss import IGNORED

PROMPT, PRICE, MOST = 5, 0.1, ACT["max_segments"]


class Traced:
    """A small model, rows whose prompt is not scored, and what each of the segments gives that it can run at most.

    The answer of each row is right at every other place after the second segment. The first row goes on after the first
    segment, but would halt if its prompt counted too.
    """

    def __init__(self, model: HRMGemmaForCausalLM, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.places = range(PROMPT - 1, ids.shape[1] - 1)
        greedy, self.q = self._segments()  # after each segment: tokens (M, B, S), Q values (M, B, S, 2)
        self._put_first_row_between()
        self.labels = ids.clone()
        self.labels[:, :PROMPT] = IGNORED
        for place in self.places[::2]:
            self.labels[:, place + 1] = greedy[1, :, place]
        self.right = greedy[:, :, :-1] == self.labels[:, 1:]

    @torch.no_grad()
    def _segments(self) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.model.eval()
        h = model.get_decoder()(self.ids).last_hidden_state
        segments = model.hrm(h, segments=MOST).segments  # in evaluation, where a number means that none halts
        logits = [model.get_output_embeddings()(h + segment.z_h @ model.hrm.w_out) for segment in segments]
        return torch.stack(logits).argmax(-1), torch.stack([segment.q for segment in segments])

    @torch.no_grad()
    def _put_first_row_between(self) -> None:
        scored, every = self.margin(0, 0), self._margins(0, 0).mean()
        if scored > every:
            self.model.hrm.w_q.neg_()
            self.model.hrm.b_q.neg_()
            self.q, scored, every = -self.q, -scored, -every
        self.model.hrm.b_q[0] -= (scored + every) / 2
        self.q[..., 0] -= (scored + every) / 2
        assert self.margin(0, 0) < 0 < self._margins(0, 0).mean()

    def _margins(self, segment: int, row: int) -> torch.Tensor:
        q = self.q[segment, row]
        return q[:, 0] if self.model.hrm.config.q_target == "none" else q[:, 0] - q[:, 1]

    def margin(self, segment: int, row: int) -> torch.Tensor:
        """The row halts where this is above 0."""
        return self._margins(segment, row)[list(self.places)].mean()

    def used(self, row: int) -> int:
        """Segments that the row runs in training if the call does not end before."""
        return next((m + 1 for m in range(MOST) if self.margin(m, row) > 0), MOST)

    def reward(self, segment: int, right: torch.Tensor) -> torch.Tensor:
        return (right.float() - PRICE * segment).clamp(min=0)

    def q_loss(self, most: int) -> torch.Tensor:
        """What training with at most `most` segments makes of it, and one more for its values where a row goes on."""
        tokens = []
        for row in range(len(self.ids)):
            ran = min(self.used(row), most)
            known = min(ran + 1, self.used(row))  # segments whose values q_continue can learn from
            for place in self.places:
                q = self.q[:, row, place]
                halt = [bce(q[m, 0], self.reward(m, self.right[m, row, place])) for m in range(ran)]
                worth = [(q[m, 0] if m == MOST - 1 else q[m].max()).sigmoid() for m in range(1, known)]
                go_on = [bce(q[m, 1], value) for m, value in enumerate(worth)]
                learns = go_on and self.model.hrm.config.q_target == "bootstrap"
                tokens.append(sum(halt) / len(halt) + (sum(go_on) / len(go_on) if learns else 0))
        return torch.stack(tokens).mean()


def bce(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * value.sigmoid().log() + (1 - target) * (-value).sigmoid().log())


@pytest.fixture
def traced(make_model: Callable[..., HRMGemmaForCausalLM], ids: torch.Tensor) -> Callable[..., Traced]:
    """traced(**hrm settings): a `Traced`, the same each time."""

    def make(**hrm: object) -> Traced:
        torch.manual_seed(0)
        return Traced(make_model(**ACT, segment_price=PRICE, **hrm), ids)

    return make


@pytest.mark.parametrize("segments", [None, 1, 2])
@pytest.mark.parametrize("target", ["bootstrap", "none"])
def test_q_loss_by_hand(traced: Callable[..., Traced], target: str, segments: int | None) -> None:
    case = traced(q_target=target)
    out = case.model.train()(case.ids, labels=case.labels, segments=segments)
    most = segments or MOST
    assert out.token_segments[:, 0].tolist() == [min(case.used(row), most) for row in range(2)]
    assert case.used(0) > 1  # so that something is learnt of going on, and the price of a second segment shows
    torch.testing.assert_close(out.q_loss, case.q_loss(most))


def test_rewards_in_the_replay_buffer_by_hand(traced: Callable[..., Traced]) -> None:
    case = traced(q_target="replay")
    out = case.model.train()(case.ids, labels=case.labels)
    ran = int(out.token_segments.max())
    state, shares = case.model.replay.state(), case.right[:, :, list(case.places)].float().mean(-1)
    valid, rewards = (state[name][: 2 * ran].view(ran, 2) for name in ("valid", "reward"))
    assert valid.tolist() == [[m < case.used(row) for row in range(2)] for m in range(ran)]
    assert ran > 1 and shares[1, 0] >= 0.5  # the price of the second segment shows
    expected = torch.stack([case.reward(m, shares[m]) for m in range(ran)])
    torch.testing.assert_close(rewards[valid], expected[valid])


@pytest.mark.parametrize("where", ["trunk", "head"])
def test_where_the_gradient_of_the_q_loss_goes(traced: Callable[..., Traced], where: str) -> None:
    case = traced(q_gradient=where)
    model = case.model.train()

    def gradients(weight: float) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.hrm.config.q_loss_weight = weight
        torch.manual_seed(0)
        model(case.ids, labels=case.labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with_q, without = gradients(1.0), gradients(0.0)
    reached = {name for name, gradient in with_q.items() if not torch.equal(gradient, without[name])}
    trained = {name for name, p in case.model.named_parameters() if p.requires_grad}
    expected = trained - {"hrm.w_out"}  # the read-out, which the Q values do not see
    assert reached == (expected if where == "trunk" else {"hrm.w_q", "hrm.b_q"})
