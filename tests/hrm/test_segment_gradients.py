"""Segments' losses taken one by one: the same numbers as all at once, in the memory of one."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm import HRMConfig, HRMCore, HRMGemmaForCausalLM
from hrm.segment_gradients import SegmentGradients

Make = Any


def test_gradients_are_those_of_the_sum() -> None:
    draw = torch.Generator().manual_seed(0)
    root, other = (torch.randn(3, generator=draw, requires_grad=True) for _ in range(2))
    constant, unused = torch.randn(3, generator=draw), torch.randn(3, requires_grad=True)

    def parts(shared: Tensor, other: Tensor) -> list[Tensor]:
        return [(shared * other).sum() ** 2, (shared * constant).sum().exp()]

    expected = torch.autograd.grad(sum(parts(root.sin(), other)) * 3, [root, other])
    taken = SegmentGradients([root.sin(), other, constant, unused])
    for part in range(2):
        taken.take(parts(*taken.leaves[:2])[part])
    assert [leaf.requires_grad for leaf in taken.leaves] == [True, True, False, True]
    loss = taken.loss()
    torch.testing.assert_close(loss, sum(parts(root.sin(), other)))
    (loss * 3).backward()
    torch.testing.assert_close([root.grad, other.grad], list(expected))
    assert unused.grad is None


def given(how: str) -> dict[str, Tensor]:
    ids = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(8) < 3, -100)
    if how == "padded":
        mask = (torch.arange(8) >= torch.tensor([[0], [2], [4]])).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if how == "packed":
        return {"input_ids": ids, "position_ids": torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]).expand(3, 8), "labels": labels}
    if how == "nothing scored":
        return {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    return {"input_ids": ids, "labels": labels}


def trained(model: HRMGemmaForCausalLM, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**inputs)
    (output.loss * 2).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
@pytest.mark.parametrize("how", ["plain", "padded", "packed", "nothing scored"])
def test_a_model_trains_as_with_all_segments_at_once(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, how: str, weights: list[float] | None, low: bool
) -> None:
    model = make_model(segments=3, segment_weights=weights, h_cycles=2, l_steps=2, grad_cycles=2).train()
    inputs, took = given(how) | {"num_items_in_batch": 20}, []
    take = SegmentGradients.take
    monkeypatch.setattr(SegmentGradients, "take", lambda self, loss: took.append(1) or take(self, loss))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        found, gradients = trained(model, **inputs)
        assert len(took) == 3
        monkeypatch.setattr(HRMGemmaForCausalLM, "_each", lambda *_: None)
        expected, reference = trained(model, **inputs)
    assert len(took) == 3
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if low else {"rtol": 1e-4, "atol": 1e-6}
    assert gradients.keys() == reference.keys() and any("lora" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], **tolerance, msg=name)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.segment_losses, expected.segment_losses)
    assert torch.equal(found.segment_tokens, expected.segment_tokens)
    for name in ("carry", "token_segments", "residuals", "residual_tokens"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_a_model_in_which_nothing_trains_has_a_loss(make_model: Make) -> None:
    model = make_model(segments=2).requires_grad_(False)
    with torch.no_grad():
        expected = model(**given("plain")).loss
    torch.testing.assert_close(model(**given("plain")).loss, expected)


class Live:
    """While entered, the most bytes that autograd holds at a time, each storage once."""

    def __init__(self) -> None:
        self.most, self._count, self._bytes = 0, dict[int, int](), 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held[0])

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        held = Held([tensor])
        if not self._count.get(key):
            self._bytes += size
        self._count[key] = self._count.get(key, 0) + 1
        self.most = max(self.most, self._bytes)
        weakref.finalize(held, self._drop, key, size)
        return held

    def _drop(self, key: int, size: int) -> None:
        self._count[key] -= 1
        if not self._count[key]:
            self._bytes -= size

    def __enter__(self) -> Live:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


class Held(list):
    """A list that can be referred to weakly."""


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_segments(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def most(segments: int) -> int:
        model = make_model(segments=segments).train()
        with Live() as live:
            model(**given("plain"))
        return live.most

    few, many = most(2), most(12)
    assert many == few
    monkeypatch.setattr(HRMGemmaForCausalLM, "_each", lambda *_: None)
    assert most(12) > 1.3 * most(2)  # all at once, it is seen to grow


def test_what_may_halt_cannot_be_taken_one_by_one() -> None:
    core = HRMCore(HRMConfig(hidden_size=16, d_l=16, d_h=16, head_size=16, attn_heads=1, act=True, max_segments=2))
    with pytest.raises(ValueError, match="each is given; it should be None with ACT"):
        core.train()(torch.randn(1, 2, 16), each=lambda segment, h, w_out: segment.z_h.sum())
