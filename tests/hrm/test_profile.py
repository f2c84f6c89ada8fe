"""Predicted memory against what real tensors and autograd take."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CORE, backbone_config
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, PreTrainedConfig

from hrm import HRMConfig, HRMCore, HRMGemmaForCausalLM
from hrm.batching import BatchPlan, micro_batches
from hrm.data import Encoded
from hrm.loading import KEPT_WHOLE
from hrm.profile.advice import SAVINGS, check_fits
from hrm.profile.command import ProfileSettings, plan_training, profile
from hrm.profile.command import _measured as profiled
from hrm.profile.formulas import core_activations, nf4_bytes
from hrm.profile.measure import Measurement, measure_memory, resident_tensors, stored_bytes
from hrm.profile.plan import MemoryPlan, Step, predict_memory
from hrm.profile.report import print_plan
from hrm.profile.tracing import LiveBytes, SavedBytes
from hrm.settings import UsageError, load_settings
from hrm.trainer import make_optimizer

Make = Callable[..., HRMGemmaForCausalLM]
EXACT = Step(dtype=torch.float32, fused=False)


def plan_for(kind: str = "gemma3n_text", step: Step = EXACT, **hrm: Any) -> MemoryPlan:
    return predict_memory(backbone_config(kind), HRMConfig(**{**CORE, **hrm}), True, step)


def own_tensors(model: HRMGemmaForCausalLM) -> dict[str, torch.Tensor]:
    named = (*model.backbone.named_parameters(), *model.backbone.named_buffers())
    return {name: tensor for name, tensor in named if ".lora_" not in name}


# ---------------------------------------------------------------------------------------------------- what stays


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("lora", [True, False, {"low_rank": 4, "high_rank": 8}])
def test_tensors_are_counted_exactly(make_model: Make, kind: str, lora: Any, act: bool) -> None:
    model = make_model(kind, trained=False, lora=lora, act=act)
    parts = predict_memory(backbone_config(kind), HRMConfig(**CORE, act=act), lora, EXACT).parts
    own, groups = own_tensors(model), model.trainable_parameters()
    per_layer = sum(t.nbytes for name, t in own.items() if name.endswith("embed_tokens_per_layer.weight"))
    assert parts["per_layer"] == per_layer and (per_layer > 0) == (kind == "gemma3n_text")
    assert parts["weights"] == sum(t.nbytes for t in own.values()) - per_layer
    assert parts["core"] == sum(t.nbytes for t in (*model.hrm.parameters(), *model.hrm.buffers()))
    assert parts["adapters"] == sum(p.nbytes for part in ("lora_low", "lora_high") for p in groups[part])
    assert parts["gradients"] == sum(p.nbytes for group in groups.values() for p in group)


def optimizer_bytes(model: HRMGemmaForCausalLM, kind: str) -> int:
    """Bytes of the states that a step leaves; what all tensors share, and step counts, aside."""
    settings = load_settings(ProfileSettings, [f"train.optimizer={kind}"]).train
    optimizer = make_optimizer(model, settings)
    for group in model.trainable_parameters().values():
        for parameter in group:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step" and "qmap" not in name
    )


def test_the_optimizers_states_are_counted_exactly(make_model: Make) -> None:
    model = make_model("gemma3_text", trained=False)
    assert plan_for("gemma3_text").parts["optimizer"] == optimizer_bytes(model, "adamw")


def test_eight_bit_states_are_counted_exactly(make_model: Make) -> None:
    pytest.importorskip("bitsandbytes", reason="8-bit optimizers need bitsandbytes")
    model = make_model("gemma3_text", trained=False, d_l=64, d_h=128)
    plan = plan_for("gemma3_text", Step(optimizer="adamw_8bit"), d_l=64, d_h=128)
    assert plan.parts["optimizer"] == optimizer_bytes(model, "adamw_8bit")


def test_paged_states_are_the_hosts() -> None:
    plan = predict_memory(backbone_config("qwen3"), HRMConfig(d_l=512, d_h=512), True, Step(optimizer="adamw_8bit"))
    paged = plan.changed(optimizer="paged_adamw_8bit")
    assert 0 < paged.parts["optimizer"] < plan.parts["optimizer"]
    assert paged.parts["optimizer"] + paged.host["optimizer"] == plan.parts["optimizer"]


def test_four_bit_weights_are_counted_exactly(kind: str) -> None:
    """On the modules that transformers itself replaces."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    model = AutoModelForCausalLM.from_config(backbone_config(kind), dtype=torch.bfloat16)
    whole = KEPT_WHOLE.get(kind, ["lm_head"])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=whole)
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    replaced = replace_with_bnb_linear(
        model, modules_to_not_convert=config.llm_int8_skip_modules, quantization_config=config
    )
    total = sum(p.nbytes for p in model.parameters() if p.device.type != "meta")
    total += sum(4 * buffer.numel() for buffer in model.buffers())  # some scalars are bfloat16: two bytes each
    for name, module in replaced.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            packed, state = bitsandbytes.functional.quantize_4bit(
                weights[name].data, quant_type="nf4", compress_statistics=True
            )
            scales = state.state2
            kept = packed, state.absmax, state.code, state.offset, scales.absmax, scales.code
            total += sum(tensor.nbytes for tensor in kept)
    plan = plan_for(kind, Step(four_bit=True))
    assert plan.parts["weights"] + plan.parts["per_layer"] == total
    assert plan.parts["weights"] < plan.changed(four_bit=False).parts["weights"]


def test_nf4_takes_half_a_byte_and_a_scale_a_block() -> None:
    codes = 4 * (16 + 256)
    assert nf4_bytes(64 * 10) == 320 + 10 + 4 + 4 + codes
    assert nf4_bytes(64 * 257 + 1) == 32 * 257 + 1 + 258 + 8 + 4 + codes


# ---------------------------------------------------------------------------------------------------- activations


def test_live_bytes_are_those_not_yet_freed() -> None:
    known = torch.zeros(5)
    with LiveBytes([known]) as live:
        first = known + 1
        second = first.exp()
        view = second.add_(1)[1:]  # neither takes memory
        assert (live.now, live.most) == (60, 60)
        del first, second
        assert (live.now, live.most) == (40, 60)
        live.forget()
        assert live.most == 40
        del view
        assert live.now == 20


def counted(tokens: int = 64, documents: int = 1, **hrm: Any) -> tuple[int, HRMConfig]:
    config = HRMConfig(hidden_size=64, **{**CORE, "h_cycles": 3, "l_steps": 3, "fused": False, **hrm})
    core = HRMCore(config).train()
    hidden = torch.randn(1, tokens, 64, requires_grad=True)
    with SavedBytes((*core.parameters(), *core.buffers(), hidden)) as saved:
        output = core(hidden, position_ids=torch.arange(tokens // documents).repeat(documents)[None])
    assert len(output.segments) == config.segments
    return saved.bytes + hidden.nbytes, config  # the hidden states are the backbone's only in float32


REACHES = [(1, 1), (1, 2), (1, 3), (2, 3)]  # grad_cycles and grad_l_steps, of 3 and 3


@pytest.mark.parametrize("mixer", ["attention", "none"])
@pytest.mark.parametrize("reach", REACHES)
def test_the_cores_activations_are_as_counted(reach: tuple[int, int], mixer: str) -> None:
    saved, config = counted(grad_cycles=reach[0], grad_l_steps=reach[1], h_mixer=mixer)
    assert core_activations(config, 64, 4, fused=False) == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("fused", [False, True])
def test_a_packed_rows_activations_are_as_counted(fused: bool) -> None:
    if fused and torch.cuda.is_available():
        pytest.skip("Triton's interpreter runs on machines without CUDA")
    saved, config = counted(64, 4, grad_cycles=2, attn_kv_heads=1, fused=fused)
    assert core_activations(config, 64, 4, fused=fused, packed=True) == pytest.approx(saved, rel=0.02)
    assert core_activations(config, 64, 4, fused=fused) != pytest.approx(saved, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs on machines without CUDA")
@pytest.mark.parametrize("reach", REACHES)
def test_the_kernels_activations_are_as_counted(reach: tuple[int, int]) -> None:
    saved, config = counted(16, grad_cycles=reach[0], grad_l_steps=reach[1], fused=True)
    assert core_activations(config, 16, 4, fused=True) == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("reset", ["carry", "init"])
def test_activations_do_not_grow_with_depth(reset: str) -> None:
    settings = {"grad_cycles": 2, "grad_l_steps": 2, "l_reset": reset}
    shallow, _ = counted(**settings)
    deep, config = counted(**settings, h_cycles=9, l_steps=12)
    assert deep == shallow
    assert core_activations(config, 64, 4, fused=False) == pytest.approx(deep, rel=0.02)


def test_a_plan_grows_with_the_segments_by_their_two_states_alone_and_where_they_may_halt() -> None:
    two, many = (plan_for(segments=count).peaks for count in (2, 20))
    assert two == many
    few, many = (plan_for(act=True, max_segments=count) for count in (2, 20))
    core = few.skeleton.core
    states = few.step.rows * (core.d_l + core.d_h) * few.step.dtype.itemsize
    assert many.parts["core_activations"] - few.parts["core_activations"] == 18 * states
    assert many.parts["loss"] == few.parts["loss"]


def saved_by(model: HRMGemmaForCausalLM, step: Step) -> dict[str, int]:
    """What autograd saves in a forward pass, by part."""
    saved, marks = SavedBytes((*model.parameters(), *model.buffers())), []
    for part in (model.get_decoder(), model.hrm):
        part.register_forward_hook(lambda *_: marks.append(saved.bytes))
    ids = torch.randint(256, (step.micro_batch, step.tokens))
    mask = torch.ones_like(ids)
    mask[0, -1] = step.micro_batch == 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if step.packed:
        rows = [Encoded(row[:1], row[1:]) for row in ids.tolist()]
        (batch,) = micro_batches(rows, step.micro_batch, 0, pack=True)
    with saved:
        model(**batch)
    backbone, core = marks
    return {"backbone_activations": backbone, "core_activations": core - backbone, "loss": saved.bytes - core}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_activations_of_the_whole_model_are_as_counted(
    make_model: Make, kind: str, rows: int, checkpointing: bool
) -> None:
    step = Step(48, rows, dtype=torch.float32, gradient_checkpointing=checkpointing, fused=False)
    model = make_model(kind, trained=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    found, parts = saved_by(model, step), plan_for(kind, step).parts
    assert parts["backbone_activations"] == pytest.approx(found["backbone_activations"], rel=0.05)
    assert parts["core_activations"] == pytest.approx(found["core_activations"], rel=0.02)
    assert found["loss"] < parts["loss"]  # which is a peak: logits are there before they are thrown away


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_of_the_whole_model_are_as_counted(kind: str, checkpointing: bool, make_model: Make) -> None:
    step = Step(12, 5, packed=True, dtype=torch.float32, gradient_checkpointing=checkpointing, fused=False)
    model = make_model(kind, trained=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    found, plan = saved_by(model, step), plan_for(kind, step)
    backbone = plan.parts["backbone_activations"]
    if checkpointing:  # masks, which the layers are called with again, autograd knows nothing of
        backbone -= 60 * 60 * (1 if kind == "qwen3" else 2)
    assert backbone == pytest.approx(found["backbone_activations"], rel=0.05)
    assert plan.parts["core_activations"] == pytest.approx(found["core_activations"], rel=0.02)
    assert plan.peaks["loss"] > plan.changed(packed=False).peaks["loss"]  # the mask grows with the square of all tokens
    one = plan.changed(micro_batch=1)
    assert one.parts == one.changed(packed=False).parts  # one document needs none


def test_a_packed_step_is_measured_packed(make_model: Make) -> None:
    step = Step(12, 5, packed=True, dtype=torch.float32, fused=False)
    found, plan = measured(make_model("qwen3", trained=False).train(), step), plan_for("qwen3", step)
    for part in ("backbone_activations", "core_activations"):
        assert plan.parts[part] == pytest.approx(found.parts[part], rel=0.01), part


def test_what_autocast_copies_is_counted(make_model: Make, kind: str) -> None:
    step = Step(48, fused=False)
    model = make_model(kind, trained=False).train()
    for parameter in model.backbone.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    found, parts = measure_memory(model, step).parts, plan_for(kind, step).parts
    assert parts["backbone_activations"] == pytest.approx(found["backbone_activations"], rel=0.15)
    assert parts["copies"] == found["copies"]


def measured(model: HRMGemmaForCausalLM, step: Step) -> Measurement:
    settings = load_settings(ProfileSettings, [f"train.optimizer={step.optimizer}"]).train
    return measure_memory(model, step, lambda: make_optimizer(model, settings))


def test_every_part_of_a_step_is_measured(make_model: Make) -> None:
    model, step = make_model("gemma3n_text", trained=False).train(), Step(48, 2, dtype=torch.float32, fused=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found, plan = measured(model, step), plan_for("gemma3n_text", step)
    assert found.parts.keys() == plan.parts.keys() and found.peaks.keys() == {"forward", "backward", "step"}
    for part in ("weights", "per_layer", "adapters", "core", "gradients", "optimizer"):
        assert found.parts[part] == plan.parts[part] > 0, part
    for part in ("carry", "backbone_activations", "core_activations"):
        assert plan.parts[part] == pytest.approx(found.parts[part], rel=0.01), part
    assert plan.parts["loss"] == pytest.approx(found.parts["loss"], rel=0.05)
    assert plan.peaks["loss"] == pytest.approx(found.peaks["forward"], rel=0.01)
    assert found.parts["update"] > 0 and 0 < found.parts["layer"] < plan.parts["layer"]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("segments", [1, 3])
def test_the_parts_of_a_forward_pass_add_up_to_its_peak(make_model: Make, segments: int) -> None:
    """Whichever way the segments' losses are taken."""
    model = make_model("qwen3", trained=False, segments=segments).train()
    found = measured(model, Step(48, 2, fused=False))
    own = ("layer", "update", *(["carry"] if segments > 1 else []))  # which is handed over when all losses are taken
    added = sum(size for part, size in found.parts.items() if part not in own)
    assert added == pytest.approx(found.peaks["forward"], rel=0.005)


@pytest.mark.parametrize("act", [False, True])
def test_several_segments_are_measured_one_by_one(make_model: Make, act: bool) -> None:
    step = Step(48, 2, dtype=torch.float32, fused=False)
    hrm = {"act": True, "max_segments": 3, "min_segments": 3} if act else {"segments": 3}
    model = make_model("qwen3", trained=False, **hrm).train()
    found, plan = measured(model, step).parts, plan_for("qwen3", step, **hrm)
    # what a segment's gradients take beside the sum of those before is there only once its loss is
    core = plan.skeleton.core
    beside = 4 * step.rows * (core.hidden_size + 2 * core.d_l) + plan.skeleton.core_bytes
    assert plan.parts["core_activations"] + plan.parts["carry"] - beside == pytest.approx(
        found["core_activations"], rel=0.03
    )
    assert found["loss"] < plan.parts["loss"]


def test_four_bit_weights_and_a_table_on_the_cpu_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    config = backbone_config("gemma3n_text")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = HRMGemmaForCausalLM.from_backbone(
        tmp_path, hrm=CORE, quantize="nf4", offload_per_layer_embeddings=True, dtype=torch.bfloat16
    ).train()
    step = Step(48, four_bit=True, per_layer_on_cpu=True, fused=False)
    found, plan = measured(model, step), plan_for("gemma3n_text", step)
    assert plan.parts["weights"] == pytest.approx(found.parts["weights"], rel=0.01)
    assert found.parts["per_layer"] == 0 and found.host == plan.host["per_layer"] > 0


def test_paged_states_are_counted_as_the_hosts(make_model: Make) -> None:
    model = make_model("qwen3", trained=False)
    optimizer = torch.optim.SGD(model.hrm.parameters())
    paged, own = torch.zeros(8), torch.zeros(4)
    paged.is_paged = True  # type: ignore[attr-defined]  # as bitsandbytes marks them
    optimizer.state[model.hrm.w_x] = {"state1": paged, "absmax1": own, "step": torch.tensor(3.0), "qmap": None}
    stays, host = resident_tensors(model, optimizer)
    assert stored_bytes(stays["optimizer"]) == 16 and stored_bytes(host) == 32


def test_the_table_has_a_measured_cell_in_every_row(make_model: Make, capsys: pytest.CaptureFixture[str]) -> None:
    step = Step(48, 2, dtype=torch.bfloat16, fused=False)
    plan = plan_for("gemma3n_text", step)
    print_plan(plan, measured(make_model("gemma3n_text", trained=False).train(), step))
    parts, peaks, _ = capsys.readouterr().out.split("├")[:3]
    assert "measured GB" in parts
    rows = [line for section in (parts, peaks) for line in section.splitlines() if line.startswith("│")]
    assert len(rows) == len(plan.parts) + len(plan.peaks) + 1 and "in the CPU's memory" in rows[-1]
    assert all(line.count("0.0") == 2 for line in rows)


def test_what_hrm_profile_measures(tmp_path: Path) -> None:
    """Which it does on machines with a GPU; of bfloat16 here, where a training has float32."""
    AutoModelForCausalLM.from_config(backbone_config("qwen3")).save_pretrained(tmp_path)
    settings = load_settings(ProfileSettings, ["hrm.d_l=64", "hrm.d_h=64", "train.gradient_checkpointing=true"])
    plan = plan_training(settings, backbone_config("qwen3"), [32])
    found = profiled(str(tmp_path), settings, plan.step)
    assert found.parts.keys() == plan.parts.keys()
    assert found.parts["core"] == plan.parts["core"]
    assert found.parts["layer"] > plan.parts["backbone_activations"]  # layers are computed again


def test_a_step_is_measured_with_ids_that_have_per_layer_embeddings() -> None:
    config = backbone_config("gemma3n_text", vocab_size=4096)  # 256 rows of per-layer embeddings
    model = HRMGemmaForCausalLM.from_backbone(AutoModelForCausalLM.from_config(config), hrm=CORE).train()
    seen: list[torch.Tensor] = []
    model.get_decoder().register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"]), with_kwargs=True)
    measure_memory(model, Step(48, 1, dtype=torch.float32, fused=False))
    assert seen[0].max() < 256


def test_checkpointing_saves_the_backbones_activations(kind: str) -> None:
    plan = plan_for(kind, Step(64))
    checkpointed = plan.changed(gradient_checkpointing=True)
    assert checkpointed.parts["backbone_activations"] < 0.4 * plan.parts["backbone_activations"]
    assert checkpointed.parts["layer"] > plan.parts["layer"]  # one layer is computed again


# ---------------------------------------------------------------------------------------------------- what would save

BIG = Gemma3nTextConfig(  # E4B's widths with few layers and words
    num_hidden_layers=6, num_kv_shared_layers=2, vocab_size=2048, vocab_size_per_layer_input=1_000_000,
    layer_types=["sliding_attention", "full_attention"] * 3, intermediate_size=[16384] * 6,
    activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
)  # fmt: skip


@pytest.fixture(scope="module")
def big() -> MemoryPlan:
    return predict_memory(BIG, HRMConfig(segments=2), True, Step(1024, 4, by_segment=True))


def test_each_saving_saves(big: MemoryPlan) -> None:
    for saving in SAVINGS:
        assert saving.applied(big).peak < big.peak, saving.setting
    everything = big
    for saving in SAVINGS:
        everything = saving.applied(everything)
    assert everything.host["per_layer"] == big.parts["per_layer"] > 0


def test_what_a_saving_that_is_on_saves(big: MemoryPlan) -> None:
    for saving in SAVINGS:
        assert saving.undone(big) is big, saving.setting
    big = big.changed(batch=big.step.micro_batch)
    for saving in SAVINGS:
        on = saving.applied(big)
        assert saving.undone(on).step == big.step, saving.setting
        assert saving.undone(on).peak == big.peak > on.peak


def test_the_table_says_what_is_on_and_what_it_saves(big: MemoryPlan, capsys: pytest.CaptureFixture[str]) -> None:
    plan = big.changed(gradient_checkpointing=True, batch=16)
    print_plan(plan)
    rows = [line.strip("│ ").split() for line in capsys.readouterr().out.splitlines() if "(on)" in line]
    without, whole = (plan.changed(**f).peak for f in ({"gradient_checkpointing": False}, {"micro_batch": 16}))
    assert [row[0] for row in rows] == ["train.micro_batch=4", "train.gradient_checkpointing=true"]
    assert [row[-1] for row in rows] == [f"-{(peak - plan.peak) / 1e9:.2f}" for peak in (whole, without)]


def test_what_fits_has_no_warning(big: MemoryPlan) -> None:
    assert check_fits(big, big.peak) is None


def test_advice_names_the_cheapest_savings_that_suffice(big: MemoryPlan) -> None:
    def advice(available: int) -> str:
        text = check_fits(big, available)
        assert text is not None and f"{(big.peak - available) / 1e9:.2f} GB more" in text
        return text.partition(", with: ")[2]

    eight = SAVINGS[0].applied(big).peak
    assert advice(eight) == "train.optimizer=adamw_8bit"
    # 8-bit states alone are too little, and not needed beside the next one
    assert advice(SAVINGS[1].applied(big).peak) == "hrm.offload_per_layer_embeddings=true"
    both = SAVINGS[1].applied(SAVINGS[0].applied(big)).peak
    assert advice(both) == "train.optimizer=adamw_8bit, hrm.offload_per_layer_embeddings=true"
    assert advice(both - 1).startswith("train.micro_batch=2")
    text = check_fits(big, 10**9)
    assert text is not None and "even with" in text and "hrm.quantize=nf4" in text
    assert "adamw_8bit" in text and text.count("train.optimizer") == 1  # the paged ones instead of the others


def test_a_step_a_segment_is_advised_last_and_as_a_change() -> None:
    plan = others = predict_memory(BIG, HRMConfig(act=True, max_segments=16), True, Step(4096, 1, by_segment=True))
    for saving in SAVINGS[:-1]:
        while (smaller := saving.applied(others)).peak < others.peak:
            others = smaller
    change = "train.update_every=segment (changes the training: one optimizer step a segment)"
    text = check_fits(plan, others.peak)
    assert text is not None and "it would fit" in text and "update_every" not in text
    text = check_fits(plan, others.peak - 1)
    assert text is not None and text.endswith(change) and "it would fit" in text
    text = check_fits(plan.changed(by_segment=False), others.peak - 1)
    assert text is not None and "update_every" not in text


@pytest.mark.parametrize(
    ("override", "possible"),
    [
        ("hrm.segments=4", True),
        ("train.pack=true", False),
        ("train.segment_growth=steps", False),
        ("hrm.stop_residual=0.1", False),
        ("hrm.act=true hrm.max_segments=4", True),
        ("hrm.act=true hrm.max_segments=4 hrm.q_target=replay", False),
        ("train.update_every=segment", False),
    ],
)
def test_a_step_a_segment_is_offered_where_it_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, possible: bool
) -> None:
    backbone_config("qwen3").save_pretrained(tmp_path)
    shown(f"hrm.backbone={tmp_path}", "hrm.segments=4", "hrm.d_h=512", "train.batch_size=64", *override.split())
    assert ("train.update_every=segment: " in capsys.readouterr().out) is possible


def test_micro_batches_are_halved_as_often_as_needed(big: MemoryPlan) -> None:
    least = big.changed(optimizer="adamw_8bit", per_layer_on_cpu=True, micro_batch=1).peak
    text = check_fits(big, least)
    assert text is not None and "train.micro_batch=1" in text


# ---------------------------------------------------------------------------------------------------- hrm profile


def shown(*overrides: str) -> None:
    profile(load_settings(ProfileSettings, ["hrm.d_l=64", "hrm.d_h=64", "train.batch_size=2", *overrides]))


def test_a_step_that_does_not_fit_is_predicted_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    backbone_config("qwen3").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("hrm.profile.advice.available_memory", lambda: 10**6)
    monkeypatch.setattr("hrm.profile.command._measured", fail)
    error: Exception = torch.OutOfMemoryError("Tried to allocate much")
    shown(f"hrm.backbone={tmp_path}")
    text = capsys.readouterr().out
    assert "ran out of memory, so nothing is measured: Tried to allocate much" in text and "peak: loss" in text
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        shown(f"hrm.backbone={tmp_path}")


def test_a_folder_with_a_config_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone_config("gemma3n_text").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    shown(f"hrm.backbone={tmp_path}", "data.max_length=64", "gpu_gb=0.001")
    text = capsys.readouterr().out
    assert "2 x 64 tokens" in text and "per-layer embeddings" in text and "train.optimizer=adamw_8bit" in text
    assert "GB more than the 0.00 GB there are" in text
    assert "measured" not in text
    shown(f"hrm.backbone={tmp_path}", "gpu_gb=1")
    assert "It fits into 1.00 GB." in capsys.readouterr().out


def test_settings_decide_what_is_planned() -> None:
    def planned(*overrides: str, **fields: Any) -> Step:
        settings = load_settings(ProfileSettings, ["hrm.d_l=64", "hrm.d_h=64", *overrides])
        return plan_training(settings, backbone_config("qwen3"), **fields).step

    assert planned() == Step(512, 8, batch=8, by_segment=True)
    assert planned("train.micro_batch=3", processes=2, lengths=[8, 32]) == Step(32, 3, batch=4, by_segment=True)
    assert planned("train.micro_batch=8", processes=4).micro_batch == 2
    assert planned("train.update_every=segment", "hrm.segments=4").segments == 1
    assert planned("train.optimizer=adamw_8bit", "hrm.fused=false").fused is False
    assert planned("hrm.quantize=nf4").four_bit
    packed = planned("train.pack=true", "train.micro_batch=4")
    assert packed == Step(512, 4, batch=8, packed=True) and packed.shape == (1, 2048)
    assert planned("hrm.offload_per_layer_embeddings=true").per_layer_on_cpu


@pytest.mark.parametrize("processes", [1, 2])
def test_a_packed_part_is_planned_as_wide_as_it_gets(processes: int) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(2, 40) for _ in range(21)]
    rows = [Encoded([1], [2] * (length - 1)) for length in lengths]
    settings = load_settings(
        ProfileSettings, ["hrm.d_l=64", "hrm.d_h=64", "train.pack=true", "train.batch_size=6", "train.micro_batch=3"]
    )
    step = plan_training(settings, backbone_config("qwen3"), lengths, processes).step
    widths = [
        part["input_ids"].shape[1]
        for rank in range(processes)
        for places in BatchPlan(lengths, batch_size=6, steps=400, seed=0, rank=rank, world=processes)
        for part in micro_batches([rows[place.row] for place in places], 3, 0, pack=True)
    ]
    assert max(widths) <= step.rows
    assert processes > 1 or max(widths) > 0.95 * step.rows


def test_a_smaller_micro_batch_of_packed_rows_still_holds_the_longest() -> None:
    def plan(micro_batch: int) -> MemoryPlan:
        words = ["hrm.d_l=64", "hrm.d_h=64", "train.pack=true", f"train.micro_batch={micro_batch}"]
        settings = load_settings(ProfileSettings, [*words, "train.batch_size=8"])
        return plan_training(settings, backbone_config("qwen3"), [60, *[2] * 100])

    assert plan(8).step.rows < 1.2 * plan(4).step.rows
    assert plan(8).changed(micro_batch=4).parts == plan(4).parts


def test_what_cannot_be_planned_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HRM_MODEL_PATH", raising=False)
    with pytest.raises(UsageError, match="no backbone"):
        shown()
    with pytest.raises(UsageError, match="has no config that can be read"):
        shown(f"hrm.backbone={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "of_the_future", "layers": 3}')
    with pytest.raises(UsageError, match=r"hrm.backbone is .*of_the_future"):
        shown(f"hrm.backbone={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "wide"}')
    with pytest.raises(UsageError, match=r"hrm.backbone is .*has no config that can be read: .*hidden_size"):
        shown(f"hrm.backbone={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UsageError, match=r"hrm.backbone is .*'vit', of which no causal language model can be made"):
        shown(f"hrm.backbone={tmp_path}")
    with pytest.raises(UsageError, match=r"train.micro_batch is 0; it should be at least 1, or null"):
        shown(f"hrm.backbone={tmp_path}", "train.micro_batch=0")
    for given, was in (("-1", r"-1\.0"), ("inf", "inf")):
        with pytest.raises(UsageError, match=f"gpu_gb is {was}; it should be a finite number above 0, or null"):
            shown(f"hrm.backbone={tmp_path}", f"gpu_gb={given}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hrm.quantize=int8", r'hrm.quantize is \'int8\'; it should be "nf4" or null'),
        ("hrm.loader=foo", "hrm.loader is 'foo'; it should be transformers or unsloth"),
        ("train.steps=-3", "train.steps is -3; it should be at least 1, or null"),
        ("train.skip_limit=-1", "train.skip_limit is -1; it should be at least 1"),
        ("train.pack=true", 'train.pack is True; it should be false with train.update_every="segment"'),
        (
            "hrm.offload_per_layer_embeddings=true",
            "offload_per_layer_embeddings is True; it should be False with a qwen3",
        ),
    ],
)
def test_what_hrm_train_refuses_is_not_planned(tmp_path: Path, override: str, message: str) -> None:
    backbone_config("qwen3").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        shown(f"hrm.backbone={tmp_path}", "train.update_every=segment", override)


def test_what_is_planned_needs_no_packages_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    missing = ("bitsandbytes", "unsloth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in missing else find(name))
    backbone_config("qwen3").save_pretrained(tmp_path)
    shown(f"hrm.backbone={tmp_path}", "hrm.quantize=nf4", "hrm.loader=unsloth", "train.optimizer=adamw_8bit")
    assert "peak: loss" in capsys.readouterr().out


def test_a_length_that_the_backbone_does_not_allow_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone_config("qwen3").save_pretrained(tmp_path)
    shown(f"hrm.backbone={tmp_path}", "data.max_length=64")
    assert "data.max_length" not in capsys.readouterr().out
    shown(f"hrm.backbone={tmp_path}", "data.max_length=65")
    said = "data.max_length is 65; the backbone allows 64 tokens, and hrm train refuses a longer row."
    text = capsys.readouterr().out
    assert "2 x 64 tokens" in text and said in text


def test_a_config_without_a_models_fields_is_named() -> None:
    class Odd(PreTrainedConfig):
        model_type = "odd"
        hidden_size = 64

    with pytest.raises(ValueError, match="'odd', of which no causal language model can be made"):
        predict_memory(Odd(), HRMConfig(**CORE))


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokens", 0), ("micro_batch", True), ("batch", 0), ("segments", -1), ("dtype", torch.int8), ("optimizer", "x")],
)
def test_a_wrong_field_of_a_step_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Step: {field} is .*; it should be"):
        Step(**{field: value})


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_takes_what_is_predicted(kind: str, checkpointing: bool) -> None:
    config = backbone_config(kind, hidden_size=512, intermediate_size=2048, head_dim=64, vocab_size=4096)
    hrm = {**CORE, "d_l": 1024, "d_h": 1024, "fused": "auto"}
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=hrm).cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    step = Step(64, 64, gradient_checkpointing=checkpointing)
    before = torch.cuda.memory_allocated()
    found, plan = measured(model, step), predict_memory(config, HRMConfig(**hrm), True, step)
    assert found.parts.keys() == plan.parts.keys()
    for part in ("weights", "per_layer", "adapters", "core", "gradients", "optimizer", "carry", "copies"):
        assert plan.parts[part] == pytest.approx(found.parts[part], rel=0.01), part
    for part in ("backbone_activations", "core_activations", "loss"):
        assert plan.parts[part] == pytest.approx(found.parts[part], rel=0.1), part
    assert before < found.peaks["forward"] and all(p.grad is None for p in model.parameters())


def test_gemma_3n_e4b_takes_what_was_measured_on_an_h100() -> None:
    """docs/results/e4b: the most that was allocated in training, in GB; streams between layers are float32."""
    step = Step(2048, gradient_checkpointing=True, four_bit=True, optimizer="adamw_8bit")
    plan = predict_memory(Gemma3nTextConfig(), HRMConfig(d_l=2048, d_h=4096), True, step)
    assert plan.peak / 1e9 == pytest.approx(14.93, rel=0.01)
    assert plan.changed(per_layer_on_cpu=True).peak / 1e9 == pytest.approx(10.23, rel=0.01)
    assert plan.changed(optimizer="paged_adamw_8bit").peak / 1e9 == pytest.approx(14.49, rel=0.01)
