"""Segments' losses taken one by one: the same numbers as all at once, in the memory of one."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from small_models import ACT
from torch import Tensor

from hrm import HRMGemmaForCausalLM
from hrm.modeling import HRMOutput
from hrm.replay import ReplayBuffer
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
    model.replay = ReplayBuffer(model.replay.size)
    torch.manual_seed(0)  # of exploration and of what replay draws
    output = model(**inputs)
    (output.loss * 2).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each segment whose gradients are taken by itself."""
    took: list[int] = []
    take = SegmentGradients.take
    monkeypatch.setattr(SegmentGradients, "take", lambda self, loss: took.append(1) or take(self, loss))
    return took


def compare_with_all_at_once(
    model: HRMGemmaForCausalLM, monkeypatch: pytest.MonkeyPatch, low: bool, **inputs: Any
) -> Any:
    """Asserts that every number and gradient of a training step is what all segments at once give; the output."""
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
        found, gradients = trained(model, **inputs)
        replay = model.replay.state()
        with monkeypatch.context() as patch:
            patch.setattr(HRMGemmaForCausalLM, "_one_by_one", lambda *_: False)
            expected, reference = trained(model, **inputs)
    assert gradients.keys() == reference.keys() and any("lora" in name for name in gradients)
    gpu = model.device.type == "cuda"  # its kernels round otherwise with gradients than without
    rounding = 2**-8 if low else 2e-6 if not gpu else 2e-4
    for name, gradient in gradients.items():
        off, size = float((gradient - reference[name]).norm()), float(reference[name].norm())
        # sums of the same parts in another order: a few roundings of the number format
        assert off <= 5 * rounding * size, (name, off, size)
    for name in HRMOutput.__dataclass_fields__:
        close = {"rtol": rounding, "atol": rounding} if gpu else {}
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name, **close)
    torch.testing.assert_close(replay, model.replay.state(), **close)
    return found


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
@pytest.mark.parametrize("how", ["plain", "padded", "packed", "nothing scored"])
def test_a_model_trains_as_with_all_segments_at_once(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, taken: list, how: str, weights: list[float] | None, low: bool
) -> None:
    model = make_model(segments=3, segment_weights=weights, h_cycles=2, l_steps=2, grad_cycles=2).train()
    compare_with_all_at_once(model, monkeypatch, low, **given(how), num_items_in_batch=20)
    assert len(taken) == 3


HALTING = {
    "bootstrap": ACT,
    "bootstrap, weights": {**ACT, "segment_weights": [1.0, 0.5, 0.0, 2.0], "segment_price": 0.1},
    "halt only, head": {**ACT, "q_target": "none", "q_gradient": "head"},
    "replay": {**ACT, "q_target": "replay", "exploration": 0.5},
    "all cycles": {**ACT, "h_cycles": 3, "grad_cycles": 3, "grad_l_steps": 2, "l_reset": "init"},
    "settled": {"segments": 4, "stop_residual": 0.5},
}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("halting", HALTING)
@pytest.mark.parametrize("how", ["padded", "packed"])
def test_a_model_that_halts_trains_as_with_all_segments_at_once(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, taken: list, how: str, halting: str, most: int | None, low: bool
) -> None:
    model = make_model(**HALTING[halting]).train()
    halt_apart(model, given(how))
    found = compare_with_all_at_once(model, monkeypatch, low, **given(how), num_items_in_batch=20, segments=most)
    assert len(taken) == found.token_segments.max()


@pytest.mark.gpu
@pytest.mark.parametrize("halting", ["segments", *HALTING])
def test_on_a_gpu_with_the_kernels(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, taken: list, halting: str
) -> None:
    model = make_model(**HALTING.get(halting, {"segments": 3, "h_cycles": 3, "grad_cycles": 2})).train()
    model.cuda().hrm.fused = True
    inputs = {name: value.cuda() for name, value in given("padded").items()}
    if halting in HALTING:
        halt_apart(model, inputs)
    found = compare_with_all_at_once(model, monkeypatch, False, **inputs, num_items_in_batch=20)
    assert len(taken) == found.token_segments.max() > 1


@pytest.mark.gpu
@pytest.mark.parametrize("act", [False, True])
def test_on_a_gpu_a_segment_takes_no_memory_of_its_own_but_two_states(make_model: Make, act: bool) -> None:
    tokens, d_l, d_h = 8192, 256, 512

    def most(segments: int) -> int:
        config = {"act": True, "max_segments": segments} if act else {"segments": segments}
        model = make_model(d_l=d_l, d_h=d_h, trained=False, fused=True, **config).train().cuda()
        model.hrm.b_q.data[0] = -100.0  # none halts
        ids = torch.randint(1, 256, (tokens // 32, 32), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
        return torch.cuda.max_memory_allocated()

    most(3)  # what is allocated once and for all
    few, many = most(3), most(11)
    states = 8 * tokens * (d_l + d_h) * 2 if act else 0
    assert states <= many - few <= states + 8 * tokens * 64  # losses, masks and Q values of each token


def halt_apart(model: HRMGemmaForCausalLM, inputs: dict[str, Tensor]) -> None:
    """Moves the threshold of halting to where not all sequences run equally many segments."""
    for step in range(1, 100):
        if model.hrm.config.act:
            model.hrm.b_q.data[0] = 2 - step * 0.04
        else:
            model.hrm.config.stop_residual = 0.01 * 1.08**step
        torch.manual_seed(0)
        with torch.no_grad():
            ran = model(**inputs).token_segments
        if len(ran[ran > 0].unique()) > 1:
            return
    pytest.fail("all sequences halt together")


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


@pytest.mark.parametrize("act", [False, True])
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_segments(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, act: bool
) -> None:
    def most(segments: int) -> int:
        model = make_model(segments=segments, **({"act": True, "max_segments": segments} if act else {})).train()
        model.hrm.b_q.data[0] = -100.0  # none halts
        with Live() as live:
            assert model(**given("plain")).token_segments.max() == segments
        return live.most

    few, many = most(2), most(12)
    assert many == few
    monkeypatch.setattr(HRMGemmaForCausalLM, "_one_by_one", lambda *_: False)
    assert most(12) > 1.3 * most(2)  # all at once, it is seen to grow


def test_where_tokens_halt_by_themselves_nothing_is_taken_one_by_one(make_model: Make) -> None:
    model = make_model(**ACT).eval()
    core = model.hrm
    with pytest.raises(ValueError, match="each is given; it should be None in evaluation with ACT"):
        core(torch.randn(1, 2, core.config.hidden_size), each=object())
    model(**given("plain")).loss.backward()
    assert core.w_x.grad.any()


@pytest.mark.parametrize("settings", [ACT, {"segments": 3}], ids=["act", "segments"])
def test_logits_that_are_asked_for_have_a_graph(make_model: Make, settings: Any) -> None:
    model = make_model(**settings).train()
    output = model(**given("plain"), logits_to_keep=0)
    (gradient,) = torch.autograd.grad(output.logits.square().mean(), [model.hrm.w_l], retain_graph=True)
    assert gradient.any()
    output.loss.backward()


def test_segments_leave_their_slots_whole(make_model: Make) -> None:
    model, inputs = make_model(segments=3).requires_grad_(False), given("plain")
    with torch.no_grad():
        expected = model(**inputs, use_cache=True).past_key_values
    found = model(**inputs, use_cache=True).past_key_values
    next_token = inputs["input_ids"][:, :1]
    with torch.no_grad():
        after = (model(next_token, past_key_values=cache).logits for cache in (expected, found))
        torch.testing.assert_close(*after)
    with pytest.raises(ValueError, match="each is given together with cache"):
        model.hrm(torch.randn(1, 2, model.hrm.config.hidden_size), each=object(), cache=found.slots)


def test_a_core_in_evaluation_under_a_model_in_training_halts_by_token(make_model: Make) -> None:
    model = make_model(**ACT).train()
    model.hrm.eval()
    model(**given("plain")).loss.backward()
    assert model.hrm.w_x.grad.any()
