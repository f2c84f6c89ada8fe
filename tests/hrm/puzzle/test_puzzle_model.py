"""Properties of the puzzle models, their losses and their training engine (numbers: test_published.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hrm.loss import IGNORED
from hrm.puzzle import PuzzleConfig, PuzzleModel, puzzle_loss, softmax_cross_entropy, stablemax_cross_entropy
from hrm.puzzle.engine import Engine
from hrm.puzzle.model import trunc_normal_
from hrm.schedule import least_segments

SMALL: dict[str, Any] = {"vocab_size": 6, "seq_len": 9, "hidden_size": 16, "num_heads": 2, "expansion": 1.0,
                         "puzzle_emb_size": 16, "max_segments": 4, "num_puzzle_ids": 3}  # fmt: skip


def small(model: str = "hrm", **values: Any) -> PuzzleModel:
    torch.manual_seed(0)
    layers = {"l_layers": 1, "h_layers": 1} if model == "hrm" else {"l_layers": 1, "puzzle_tokens": 2}
    return PuzzleModel(PuzzleConfig.of(model, **SMALL | layers | values))


def batch_of(model: PuzzleModel, rows: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, model.config.seq_len)
    ids = [torch.randint(1, model.config.vocab_size, shape, generator=generator, dtype=torch.int32) for _ in range(2)]
    puzzles = torch.randint(0, 3, (rows,), generator=generator, dtype=torch.int32)
    return {"inputs": ids[0], "labels": ids[1], "puzzle_identifiers": puzzles}


@pytest.mark.parametrize("kind", ["hrm", "trm", "trm-mlp"])
def test_reading_one_position_only_gives_the_same_value(kind: str) -> None:
    """What saves the last block of the bootstrap pass most of its work."""
    model = small(kind)
    batch, weights = batch_of(model), model.weights()
    carry = model.initial_carry(batch)
    embedded = model.embed(batch["inputs"], batch["puzzle_identifiers"], weights)
    _, whole = model.segment(embedded, carry.state.z_l, carry.state.z_h, weights)
    _, first = model.segment(embedded, carry.state.z_l, carry.state.z_h, weights, read_first=True)
    assert first.shape[1] == 1
    torch.testing.assert_close(first[:, 0], whole[:, 0])


def test_rows_do_not_see_each_other() -> None:
    model = small().eval()
    batch = batch_of(model)
    carry = model.initial_carry(batch)
    _, together = model(carry, batch)
    alone = {name: tensor[2:3] for name, tensor in batch.items()}
    _, single = model(model.initial_carry(alone), alone)
    torch.testing.assert_close(single.logits, together.logits[2:3])


def test_rows_that_go_on_ignore_the_batch() -> None:
    model = small().eval()
    first, second = batch_of(model, seed=1), batch_of(model, seed=2)
    carry, _ = model(model.initial_carry(first), first)
    _, kept = model(carry, first)
    _, other = model(carry, second)
    assert torch.equal(kept.logits, other.logits)


def test_exploration_holds_rows_back_and_the_limit_ends_them() -> None:
    model = small("trm").train()
    with torch.no_grad():
        model.q_bias.fill_(5.0)  # every row wants to halt at once
    batch = batch_of(model, rows=2)
    least = torch.tensor([0, 3], dtype=torch.int32)
    carry, ended = model.initial_carry(batch), []
    for _ in range(3):
        carry, output = model(carry, batch, least=least)
        ended.append(output.halted.tolist())
    assert ended == [[True, False], [True, False], [True, True]]
    with torch.no_grad():
        model.q_bias.fill_(-5.0)
    for _ in range(4):
        carry, output = model(carry, batch, least=least)
    assert output.halted.all() and (output.steps == 4).all()
    assert (carry.state.steps == 0).all()


def test_evaluation_runs_all_segments_unless_asked_to_halt() -> None:
    model = small("trm").eval()
    with torch.no_grad():
        model.q_bias.fill_(5.0)
    batch = batch_of(model)
    assert not model(model.initial_carry(batch), batch)[1].halted.any()
    assert model(model.initial_carry(batch), batch, halting=True)[1].halted.all()


def test_exploration_draws_from_two_to_the_limit() -> None:
    draw, choice = torch.rand(2, 10000, generator=torch.Generator().manual_seed(0))
    least = least_segments(draw, choice, 16, 0.1)
    assert set(least.tolist()) == {0, *range(2, 17)}
    assert 0.08 < (least > 0).float().mean() < 0.12


def test_gradient_reaches_every_weight_and_nothing_is_saved_of_early_steps() -> None:
    saved: dict[int, int] = {}
    for steps in (1, 6):
        model = small("trm", h_cycles=steps, l_steps=steps, grad_l_steps=1).train()
        batch = batch_of(model)
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, output = model(model.initial_carry(batch), batch)
        saved[steps] = count
        puzzle_loss(output, batch["labels"], model.config).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n != "q_head")
    assert saved[1] == saved[6]


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_stablemax_in_float32_is_as_good_as_float64(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 11, generator=generator) * scale
    labels = torch.randint(0, 11, (64,), generator=generator)
    labels[::7] = IGNORED
    narrow, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, x = stablemax_cross_entropy(narrow, labels), wide
    s = torch.where(x < 0, 1 / (1 - x), x + 1)
    expected = -(s / s.sum(-1, keepdim=True)).log().gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    expected = torch.where(labels == IGNORED, 0.0, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-5, atol=1e-7 / scale)


def test_stablemax_has_a_gradient_at_zero() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    stablemax_cross_entropy(logits, torch.tensor([0])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-2 / 3, 1 / 3, 1 / 3]]))


def test_softmax_is_pytorchs() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, IGNORED, 2, 1, 1])
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(softmax_cross_entropy(logits, labels), expected)


def test_puzzle_embedding_moves_by_the_sign_and_decays() -> None:
    model = small().train()
    embedding = model.puzzle_embedding
    embedding.weight.fill_(1.0)
    ids = torch.tensor([1, 1, 2])
    rows = embedding(ids)
    (rows * torch.tensor([[3.0], [-1.0], [-5.0]])).sum().backward()
    embedding.step(lr=0.1, weight_decay=0.5)
    assert torch.allclose(embedding.weight[:, 0], torch.tensor([1.0, 0.95 - 0.1, 0.95 + 0.1]))


def test_truncated_normal_has_its_standard_deviation() -> None:
    drawn = trunc_normal_(torch.empty(200_000), 0.5)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.01) and drawn.abs().max() < 1.15


def test_the_engine_keeps_no_graph_and_averages_weights() -> None:
    model = small("trm-mlp").train()
    engine = Engine(model, ema=0.5)
    batch = {name: tensor.numpy() for name, tensor in batch_of(model).items()}
    before = [p.detach().clone() for p in model.parameters()]
    engine.step(0, batch, 1e-2, 1e-2)
    for old, new, averaged in zip(before, model.parameters(), engine.averaged, strict=True):
        torch.testing.assert_close(averaged, (old + new) / 2)
        assert not averaged.requires_grad
    with engine.averaged_weights():
        assert all(map(torch.equal, model.parameters(), engine.averaged))
    assert not torch.equal(next(model.parameters()), engine.averaged[0])


def test_staggered_rows_end_at_different_times() -> None:
    model = small("trm").train()
    batch = {name: tensor.numpy() for name, tensor in batch_of(model, rows=32).items()}
    ended = []
    for stagger in (True, False):
        engine = Engine(model, stagger=stagger)
        engine.step(0, batch, 1e-3, 1e-3)
        ended.append(int(engine.carry.state.halted.sum()))
    assert 0 < ended[0] < 32 and ended[1] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixer": "conv"}, "mixer is 'conv'; it should be one of 'attention', 'mlp'"),
        ({"num_heads": 3}, "num_heads is 3"),
        ({"l_steps": 0}, "l_steps is 0; it should be a whole number, at least 1"),
        ({"grad_l_steps": 9}, "grad_l_steps is 9; it should be from 1 to l_steps = 2"),
        ({"puzzle_emb_size": 513}, "puzzle_emb_size is 513"),
        ({"exploration": 2}, "a probability"),
    ],
)
def test_config_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PuzzleConfig(**values)


def test_config_survives_json() -> None:
    config = PuzzleConfig.of("trm-mlp", l_steps=4)
    assert config.grad_l_steps == 4 and PuzzleConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="the nearest is 'l_steps'"):
        PuzzleConfig.from_dict({"l_step": 3})
    with pytest.raises(ValueError, match="should be one of 'hrm', 'trm', 'trm-mlp'"):
        PuzzleConfig.of("gpt")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["hrm", "trm", "trm-mlp"])
def test_fused_is_as_good_as_eager(kind: str) -> None:
    """Loss and gradients of a bfloat16 segment: no further from float32's than plain PyTorch's in bfloat16."""
    errors = {}
    model = small(kind, hidden_size=128, seq_len=81, l_layers=2, puzzle_emb_size=128, fused=False).cuda().train()
    data = {name: tensor.cuda() for name, tensor in batch_of(model, rows=64).items()}
    reference: list[torch.Tensor] = []
    for name, dtype, fused in (("exact", "float32", False), ("eager", "bfloat16", False), ("fused", "bfloat16", True)):
        model.config.dtype, model.fused = dtype, fused
        model.zero_grad()
        _, output = model(model.initial_carry(data), data, least=torch.zeros(64, dtype=torch.int32, device="cuda"))
        puzzle_loss(output, data["labels"], model.config).loss.backward()
        found = [output.logits.float().detach(), *(p.grad.clone() for p in model.parameters())]
        reference = reference or found
        errors[name] = [((a - b).norm() / b.norm().clamp_min(1e-9)).item()
                        for a, b in zip(found, reference, strict=True)]  # fmt: skip
    assert np.mean(errors["fused"]) <= 1.25 * np.mean(errors["eager"])


@pytest.mark.gpu
def test_a_captured_step_is_the_eager_one() -> None:
    losses = []
    for graph in (True, False):
        model = small("trm-mlp", hidden_size=128, seq_len=81, puzzle_emb_size=128).cuda().train()
        engine = Engine(model, graph=graph)
        for step in range(4):
            batch = {name: tensor.numpy() for name, tensor in batch_of(model, rows=16, seed=step).items()}
            engine.step(step, batch, 1e-3, 1e-3)
        losses.append(engine.read_metrics(4)["loss"])
    assert losses[0] == losses[1]
