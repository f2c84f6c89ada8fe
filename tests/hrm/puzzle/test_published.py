"""Against what the published HRM and TRM code computed from the same weights, carries and batches (make_golden.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hrm.puzzle import PuzzleCarry, PuzzleModel, load_published, puzzle_loss
from hrm.puzzle.model import FIELDS
from hrm.puzzle.published import _renamed

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
STEPS = 5
# Processors add up in different orders, and these random networks let rounding grow: moving each weight by half a unit
# in its last place moves what is compared by up to 2e-5, and by 3e-4 once it has passed through five segments.
LIMIT, CHAINED_LIMIT = 5e-5, 1e-3


class Golden:
    """One recorded run."""

    def __init__(self, case: str) -> None:
        self.sizes = json.loads((GOLDEN / f"{case}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{case}.safetensors")

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def model(self) -> PuzzleModel:
        sizes = self.sizes
        values = {"h_cycles": sizes["H_cycles"], "l_steps": sizes["L_cycles"], "num_heads": sizes["num_heads"],
                  "expansion": sizes["expansion"], "max_segments": sizes["halt_max_steps"], "exploration": 0.0,
                  "loss": sizes.get("loss", "stablemax_cross_entropy").split("_")[0]}  # fmt: skip
        if "puzzle_emb_len" in sizes:
            values["puzzle_tokens"] = sizes["puzzle_emb_len"]
        return load_published(self.part("weights."), seq_len=sizes["seq_len"], **values)


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> None:
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-6)
    assert error < limit, f"relative error {error:.1e}"


def given(golden: Golden, model: PuzzleModel, place: str) -> PuzzleCarry:
    """The recorded carry after one step, as ours: halted rows are already back at the start."""
    recorded = golden.part(place)
    data = {name: recorded[f"data.{name}"] for name in FIELDS}
    carry = model.initial_carry(data)
    going = ~recorded["halted"]
    for ours, theirs in ((carry.state.z_l, "z_L"), (carry.state.z_h, "z_H"), (carry.state.steps, "steps")):
        ours[going] = recorded[theirs][going]
    carry.state.halted.copy_(recorded["halted"])
    return carry._replace(data=data)


# Each segment from the published carry; chained, the differences of one segment pass through the next ones.
@pytest.mark.parametrize(("chained", "limit"), [(False, LIMIT), (True, CHAINED_LIMIT)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_step_agrees(golden: Golden, mode: str, chained: bool, limit: float) -> None:
    model = golden.model().train(mode == "train")
    for step in range(STEPS):
        recorded = golden.part(f"{mode}.{step}.")
        batch = {name: recorded[name] for name in FIELDS}
        if step == 0:
            carry = model.initial_carry(batch)
        elif not chained:
            carry = given(golden, model, f"{mode}.{step - 1}.")
        carry, output = model(carry, batch)
        loss = puzzle_loss(output, carry.data["labels"], model.config)
        close(output.logits, recorded["logits"], limit)
        close(output.q_halt, recorded["q_halt_logits"], limit)
        close(output.q_continue, recorded["q_continue_logits"], limit)
        assert (output.q_target is not None) == ("target_q_continue" in recorded)
        if output.q_target is not None:
            close(output.q_target, recorded["target_q_continue"], limit)
        close(loss.loss, recorded["loss"], limit)
        close(output.halted, recorded["halted"])
        close(output.steps, recorded["steps"])
        going = ~output.halted
        close(carry.state.z_h[going], recorded["z_H"][going], limit)
        close(carry.state.z_l[going], recorded["z_L"][going], limit)
        assert torch.equal(carry.state.z_h[~going], model.z_h_init.expand_as(carry.state.z_h)[~going])


def test_rows_halt_at_different_times(golden: Golden) -> None:
    """Or the test above would show little."""
    halted = torch.stack([golden.tensors[f"train.{step}.halted"] for step in range(STEPS)])
    assert 0 < halted[:2].sum() < halted[:2].numel()


def test_gradients_agree(golden: Golden) -> None:
    model = golden.model().train()
    carry = given(golden, model, f"train.{STEPS - 2}.")
    carry, output = model(carry, golden.part(f"train.{STEPS - 1}."))
    loss = puzzle_loss(output, carry.data["labels"], model.config).loss
    loss.backward()
    recorded = golden.part("grad.")
    if "puzzle_rows" in recorded:
        close(model.puzzle_embedding.rows.grad, recorded.pop("puzzle_rows"))
    expected, unexpected = _renamed(recorded)
    assert not unexpected
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name])


def test_prefixes_may_be_missing(golden: Golden) -> None:
    bare = {name.removeprefix("model.inner."): tensor for name, tensor in golden.part("weights.").items()}
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in golden.part("weights.").items()}
    assert all(map(torch.equal, _renamed(bare)[0].values(), _renamed(compiled)[0].values()))


def test_a_file_is_read_without_pickle(golden: Golden, tmp_path: Path) -> None:
    torch.save(golden.part("weights."), tmp_path / "step_1")
    sizes = golden.sizes
    tokens = {"puzzle_tokens": sizes["puzzle_emb_len"]} if "puzzle_emb_len" in sizes else {}
    model = load_published(tmp_path / "step_1", seq_len=9, expansion=2, num_heads=2, **tokens)
    assert torch.equal(model.head, golden.model().head)


def test_problems_are_listed(golden: Golden) -> None:
    state = golden.part("weights.")
    state["model.inner.L_level.layers.0.mlp.extra.weight"] = torch.zeros(1)
    del state["model.inner.lm_head.weight"]
    tokens = {"puzzle_tokens": golden.sizes["puzzle_emb_len"]} if "puzzle_emb_len" in golden.sizes else {}
    with pytest.raises(ValueError, match=r"unexpected: model.inner.L_level.layers.0.mlp.extra.weight\n  missing: head"):
        load_published(state, seq_len=9, expansion=2, num_heads=2, **tokens)


def test_length_has_to_be_given() -> None:
    state = Golden("hrm").part("weights.")
    with pytest.raises(ValueError, match="seq_len is None"):
        load_published(state, expansion=2, num_heads=2)


def test_no_checkpoint() -> None:
    with pytest.raises(ValueError, match="no checkpoint of HRM or TRM"):
        load_published({"weight": torch.zeros(2)})


@pytest.mark.parametrize("part", ["self_attn.qkv_proj.weight", "self_attn.o_proj.weight"])
def test_a_missing_tensor_that_tells_the_kind_of_model_is_listed(part: str) -> None:
    state = Golden("hrm").part("weights.")
    del state[f"model.inner.L_level.layers.0.{part}"]
    with pytest.raises(ValueError, match=r"missing: l_stack\.0\.mix_"):
        load_published(state, seq_len=9, expansion=2, num_heads=2)


def test_dictionaries_that_are_no_state_dict() -> None:
    state = Golden("hrm").part("weights.")
    with pytest.raises(ValueError, match=r"source has a dict under 'model'; it should be a state dict"):
        load_published({"model": state})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"embedding has shape \(3,\); it should be a matrix"):
        load_published({**state, "model.inner.embed_tokens.embedding_weight": torch.zeros(3)}, seq_len=9)
    with pytest.raises(ValueError, match=r"unexpected: lm_head.weight, which is there under another prefix too"):
        load_published({**state, "lm_head.weight": torch.zeros(2)}, seq_len=9, expansion=2, num_heads=2)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "pickled"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "step_1").write_bytes(content)
    else:
        torch.save({"code": Golden}, tmp_path / "step_1")
    with pytest.raises(ValueError, match=r"step_1', which is no file of tensors alone, or is damaged") as error:
        load_published(tmp_path / "step_1")
    assert "weights_only" not in str(error.value)
