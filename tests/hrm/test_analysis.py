"""What `hrm.analysis` measures, against loops, matrices and numbers written out here."""

import copy
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from small_models import ACT, VOCABULARY
from test_core import plain_segment
from tiny_backbone import TINY_CORE, byte_tokenizer, save_tiny_backbone
from torch.autograd.functional import jacobian

from hrm import HRMGemmaForCausalLM
from hrm.analysis import (
    Agreement,
    analyse,
    compare_gradients,
    iterations_to_converge,
    neumann_gradients,
    residual_curve,
    spectral_radius,
)
from hrm.analysis.command import AnalyseSettings, analyse_run
from hrm.analysis.probe import probe, untouched
from hrm.data import Batch
from hrm.settings import TrainingSettings, UsageError, load_settings, load_training_settings
from hrm.train import fine_tune

DEPTH = {"h_cycles": 2, "l_steps": 3}
TINY = {"d_l": 8, "d_h": 8, "head_size": 4, "attn_heads": 2, "attn_kv_heads": 1}


def make_batch(rows=2, tokens=6):
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones_like(ids), ids)


@pytest.fixture
def batch():
    return make_batch()


def agreement(gradient, full):
    g, f = (torch.cat([part.flatten() for part in parts]).double().numpy() for parts in (gradient, full))
    return g @ f / (np.linalg.norm(g) * np.linalg.norm(f)), np.linalg.norm(g - f) / np.linalg.norm(f)


def hidden_states(model, batch):
    return model.get_decoder()(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state


def plain_loss(model, h, z_h, labels):
    logits = model.get_output_embeddings()(h + z_h @ model.hrm.w_out)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def initial_states(model, batch):
    carry = model.hrm.initial_carry(tuple(batch.input_ids.shape))
    return carry.z_l, carry.z_h


def plain_run(model, batch, segments=1, **schedule):
    """Loss and last states of segments written from the equations, under another schedule than the model's."""
    core, losses = copy.copy(model.hrm), []
    core.config = copy.copy(core.config)
    for name, value in schedule.items():
        setattr(core.config, name, value)
    h, (z_l, z_h) = hidden_states(model, batch), initial_states(model, batch)
    for _ in range(segments):
        z_l, z_h = plain_segment(core, h, z_l.detach(), z_h.detach())
        losses.append(plain_loss(model, h, z_h, batch.labels))
    return sum(losses) / segments, (z_l.detach(), z_h.detach())


def plain_map(model, batch, l_steps):
    """One cycle of `l_steps` L steps as a function of both states."""
    core = copy.copy(model.hrm)
    core.config = copy.copy(core.config)
    core.config.h_cycles, core.config.grad_cycles = 1, 1
    core.config.l_steps, core.config.grad_l_steps = l_steps, l_steps
    h = hidden_states(model, batch).detach()
    return lambda z_l, z_h: plain_segment(core, h, z_l, z_h)


def contraction(model):
    """Strong biases and weak feedback, so that the states forget where they came from."""
    core = model.hrm
    with torch.no_grad():
        for name in ("r_gate", "r_up", "w_c", "w_l", "r_h", "w_o"):
            getattr(core, name).mul_(0.3)
        core.b_c.normal_(std=2.0)
        core.b_h.normal_(std=1.0)
        core.b_h.view(3, -1)[2].fill_(2.0)  # the gate lets mostly the candidate through
    return model


# ---------------------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("segments", [1, 2])
def test_agreement_with_full_backpropagation_is_that_of_a_plain_loop(make_model, batch, segments):
    model = make_model(segments=segments, **DEPTH)
    found = compare_gradients(model, batch)
    assert list(found) == ["1/1", "2/1", "3/1", "3/2"]
    core = dict(model.hrm.named_parameters())
    parts = model.trainable_parameters()
    groups = {"r_gate": [core["r_gate"]], "w_qkv": [core["w_qkv"]], **parts, "all": [*itertools.chain(*parts.values())]}
    assert set(found["1/1"]) == {*core, *parts, "all"} - {"w_q", "b_q"}  # without ACT the Q head does not train

    def gradients(steps, cycles):
        loss, _ = plain_run(model, batch, segments, grad_l_steps=steps, grad_cycles=cycles)
        return {
            name: torch.autograd.grad(loss, group, retain_graph=True, materialize_grads=True)
            for name, group in groups.items()
        }

    full = gradients(3, 2)
    for name, row in found.items():
        mine = gradients(*map(int, name.split("/")))
        for group in groups:
            assert row[group] == pytest.approx(agreement(mine[group], full[group]), rel=1e-2, abs=2e-3)
    assert found["1/1"]["all"].relative_error > 0.1  # the comparison is no trivial one
    for same in found["3/2"].values():
        assert same == pytest.approx((1, 0), abs=1e-6)


def test_settings_choose_the_rows(make_model, batch):
    assert list(compare_gradients(make_model(**DEPTH), batch, settings=[(2, 2), (1, 1)])) == ["2/2", "1/1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([(4, 1)], "grad_l_steps is 4; it should be from 1 to 3"),
        ([(1, 1), (1, 3)], "grad_cycles is 3; it should be from 1 to 2"),
        ([(0, 1)], "grad_l_steps is 0; it should be a whole number, at least 1"),
    ],
)
def test_settings_beyond_the_schedule_are_named(make_model, batch, settings, message):
    with pytest.raises(ValueError, match=message):
        compare_gradients(make_model(**DEPTH), batch, settings=settings)


def test_an_untrained_model_has_a_gradient_of_its_read_out_alone(make_model, batch):
    row = compare_gradients(make_model(trained=False, **DEPTH), batch, settings=[(1, 1)])["1/1"]
    assert row["w_out"] == pytest.approx((1, 0), abs=1e-6)
    assert row["r_gate"] == row["w_c"] == Agreement(None, None)


# ---------------------------------------------------------------------------------------------------- Neumann series


@pytest.mark.parametrize("segments", [1, 2])
def test_neumann_series_of_a_contraction_converges_to_deep_backpropagation(make_model, batch, segments):
    model = contraction(make_model(h_cycles=24, l_steps=2, segments=segments))
    rows = neumann_gradients(model, batch, terms=20)
    assert len(rows) == 20
    errors = [row["core"].relative_error for row in rows]
    assert errors[0] > 0.3
    assert errors[-1] < 2e-3
    assert all(after < before for before, after in itertools.pairwise(errors))
    for group, found in rows[-1].items():
        assert found.cosine > 0.9999, group
        assert found.relative_error < 5e-3, group


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_neumann_terms_are_products_with_the_transposed_jacobian(make_model, batch, terms):
    model = make_model(**DEPTH)
    core = {name: p for name, p in model.hrm.named_parameters() if p.requires_grad}
    loss, ends = plain_run(model, batch, grad_l_steps=3, grad_cycles=2)
    full = torch.autograd.grad(loss, list(core.values()))
    ends = [end.requires_grad_() for end in ends]
    h = hidden_states(model, batch).detach()
    loss = plain_loss(model, h, ends[1], batch.labels)
    term = [torch.zeros_like(ends[0]), torch.autograd.grad(loss, ends[1], retain_graph=True)[0]]
    new, total = plain_map(model, batch, 3)(*ends), [part.clone() for part in term]
    for _ in range(terms - 1):
        term = torch.autograd.grad(new, ends, term, retain_graph=True)
        total = [sum_ + part for sum_, part in zip(total, term, strict=True)]
    mine = dict(zip(core, torch.autograd.grad(new, list(core.values()), total, materialize_grads=True), strict=True))
    mine["w_out"] = torch.autograd.grad(loss, model.hrm.w_out)[0]  # the loss sees it without the recurrence
    row = neumann_gradients(model, batch, terms=terms)[-1]
    assert set(row) == {*core, "core"}
    assert row["core"] == pytest.approx(agreement(mine.values(), full), rel=1e-2, abs=2e-3)
    for index, name in enumerate(core):
        assert row[name] == pytest.approx(agreement([mine[name]], [full[index]]), rel=1e-2, abs=2e-3)


# ---------------------------------------------------------------------------------------------------- spectral radius


def flat(states):
    return torch.cat([state.flatten() for state in states])


def leading(matrix):
    values = np.linalg.eigvals(matrix.numpy())
    return values[np.abs(values).argmax()]


@pytest.mark.parametrize(
    ("seed", "turning"), [(0, True), (10, False)], ids=["complex pairs lead", "real eigenvalues lead"]
)
def test_spectral_radius_is_that_of_the_explicit_jacobian(make_model, seed, turning):
    torch.manual_seed(seed)
    model, batch = make_model("qwen3", **TINY, h_cycles=3, segments=2), make_batch(1, 2)
    z_l, z_h = plain_run(model, batch, segments=2)[1]
    cycle, step = (plain_map(model, batch, l_steps) for l_steps in (2, 1))
    matrices = {
        "cycle": jacobian(lambda z: flat(cycle(*(half.view_as(z_l) for half in z.chunk(2)))), flat((z_l, z_h))),
        "l_step": jacobian(lambda z: step(z.view_as(z_l), z_h)[0].flatten(), z_l.flatten()),
    }
    found = spectral_radius(model, batch, iterations=300)
    for name, matrix in matrices.items():
        value = leading(matrix)
        assert (abs(value.imag) > 0.1) == turning  # the case really occurs
        assert found[name].radius == pytest.approx(abs(value), rel=1e-2 if turning else 1e-4)
        assert found[name].iterations == 300
        late = found[name].growth[150:]
        assert (max(late) / min(late) > 1.01) == turning


def test_the_first_vector_is_drawn_from_the_seed(make_model, batch):
    model = make_model(**DEPTH)
    first, again, other = (spectral_radius(model, batch, iterations=5, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["cycle"].growth != other["cycle"].growth


def test_a_map_that_forgets_its_state_has_radius_0(make_model, batch):
    model = make_model(h_mixer="none", l_reset="init", **DEPTH)
    with torch.no_grad():
        model.hrm.w_c.zero_()
        model.hrm.r_h.zero_()
        model.hrm.b_h.view(3, -1)[2].fill_(200.0)  # its sigmoid is 1
    assert spectral_radius(model, batch, iterations=10)["cycle"].radius == 0


# ---------------------------------------------------------------------------------------------------- residuals


@pytest.mark.parametrize("halting", [{}, ACT], ids=["fixed", "act"])  # tokens that halted are taken to go on
@pytest.mark.parametrize("reset", ["carry", "init"])
def test_residuals_are_those_of_a_plain_loop(make_model, batch, reset, halting):
    model = make_model(l_reset=reset, **halting, **DEPTH)
    batch.attention_mask[1, 3:] = 0
    real = batch.attention_mask.bool()

    def change(old, new):
        return ((new - old).norm(dim=-1) / old.norm(dim=-1))[real].mean().item()

    curve = residual_curve(model, batch, timesteps=5, cycles=3)
    assert [len(cycle) for cycle in curve.z_l] == [5] * 3
    start = z_l, z_h = initial_states(model, batch)
    with torch.no_grad():
        for cycle in range(3):
            z_l = start[0] if reset == "init" else z_l
            runs = [(z_l, None)] + [plain_map(model, batch, steps)(z_l, z_h) for steps in range(1, 6)]
            changes = [change(old, new) for (old, _), (new, _) in itertools.pairwise(runs)]
            assert curve.z_l[cycle] == pytest.approx(changes, rel=1e-2, abs=1e-4)
            assert curve.z_h[cycle] == pytest.approx(change(z_h, runs[-1][1]), rel=1e-2)
            z_l, z_h = runs[-1]


def test_iterations_until_a_threshold():
    curve = [0.5, 0.05, 0.2, 0.01]
    assert [iterations_to_converge(curve, threshold) for threshold in (1.0, 0.1, 0.05, 0.001)] == [1, 2, 4, None]


def test_a_contraction_settles_at_the_pace_of_its_spectral_radius(make_model, batch):
    model = contraction(make_model(h_cycles=24, l_steps=2))
    radius = spectral_radius(model, batch)["cycle"].radius
    curve = residual_curve(model, batch, timesteps=2, cycles=16).z_h
    assert iterations_to_converge(curve, 1e-3) is not None
    assert (curve[-1] / curve[-6]) ** (1 / 5) == pytest.approx(radius, rel=0.15)


# ---------------------------------------------------------------------------------------------------- no trace

MEASURES = {
    "compare_gradients": lambda model, batch: compare_gradients(model, batch),
    "neumann_gradients": lambda model, batch: neumann_gradients(model, batch, terms=2),
    "spectral_radius": lambda model, batch: spectral_radius(model, batch, iterations=6),
    "residual_curve": lambda model, batch: residual_curve(model, batch, timesteps=4, cycles=3),
}


def numbers(value):
    """All numbers in what a measure returns, in their order."""
    if value is None or isinstance(value, float):
        yield from () if value is None else (value,)
        return
    parts = value if isinstance(value, list | tuple) else (value if isinstance(value, dict) else vars(value)).values()
    for part in parts:
        yield from numbers(part)


@pytest.fixture(params=MEASURES)
def measure(request):
    return MEASURES[request.param]


def everything(model):
    """All that training goes on from: tensors, and the rest."""
    tensors = {
        "state": model.state_dict(),
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "replay": model.replay.state(),
        "generator": torch.get_rng_state(),
    }
    rest = {
        "config": model.hrm.config.to_dict(),
        "wanted": [name for name, p in model.named_parameters() if p.requires_grad],
        "modes": [module.training for module in model.modules()],
        "attributes": sorted(vars(model.hrm)),
    }
    return copy.deepcopy(tensors), rest


def assert_same(before, after):
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
    assert before[1] == after[1]


@pytest.fixture
def in_training(make_model, batch):
    """A model in the middle of training, with all that draws random numbers or remembers."""
    settings = {**ACT, "exploration": 0.5, "q_target": "replay", "replay_size": 16}
    model = make_model(lora={"dropout": 0.3}, **settings, **DEPTH).train()
    model(**batch._asdict()).loss.backward()
    model.hrm.w_x.grad = None
    assert model.replay.added
    return model


@pytest.mark.parametrize("gradients", [True, False])
def test_a_model_in_training_is_left_as_it_was(in_training, batch, measure, gradients):
    before = everything(in_training)
    with torch.set_grad_enabled(gradients):
        measure(in_training, batch)
        assert torch.is_grad_enabled() == gradients
    assert_same(before, everything(in_training))


def test_a_model_is_left_as_it_was_by_an_error_too(in_training, batch, measure):
    before = everything(in_training)
    with pytest.raises(ValueError, match="input_ids"):
        measure(in_training, batch._replace(input_ids=batch.input_ids + VOCABULARY))
    assert_same(before, everything(in_training))


def test_all_settings_see_the_same_draws(in_training, batch):
    for same in compare_gradients(in_training, batch, settings=[(3, 2)])["3/2"].values():
        assert same.cosine is None or same.relative_error < 1e-6


def test_a_look_ahead_is_no_segment_of_the_loss(make_model, batch):
    model = make_model(**ACT, stop_residual=100.0, **DEPTH).train()
    with torch.no_grad():
        model.hrm.b_q.copy_(torch.tensor([-100.0, 100.0]))  # no row halts by itself
    with untouched(model):
        loss, segments = probe(model, batch)
    assert loss.requires_grad
    assert len(segments) == 1


def test_fused_kernels_give_the_same(make_model, batch, measure, device):
    model = make_model(**DEPTH).to(device)
    found = []
    for model.hrm.fused in (False, True):  # Triton's interpreter on the CPU
        found.append(list(numbers(measure(model, batch))))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {**ACT, "segments": 2}], ids=["fixed", "act"])
def test_padding_has_no_influence(make_model, batch, measure, side, settings):
    model = make_model(**settings, **DEPTH).train()
    padding = slice(None, 2) if side == "left" else slice(-2, None)
    batch.attention_mask[0, padding] = 0
    other = batch._replace(input_ids=batch.input_ids.clone())
    other.input_ids[0, padding] = torch.tensor([7, 9])
    found, again = (list(numbers(measure(model, each))) for each in (batch, other))
    assert found == pytest.approx(again, rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: neumann_gradients(m, b, terms=0), "terms is 0; it should be a whole number, at least 1"),
        (lambda m, b: spectral_radius(m, b, iterations=1.5), "iterations is 1.5; it should be a whole number"),
        (lambda m, b: residual_curve(m, b, timesteps=0, cycles=1), "timesteps is 0; it should be a whole number"),
        (lambda m, b: residual_curve(m, b, timesteps=1, cycles=True), "cycles is True; it should be a whole number"),
        (lambda m, b: compare_gradients(m, b._replace(attention_mask=0 * b.attention_mask)), "attention_mask is 0"),
        (lambda m, b: analyse(m, [], None), "batches is empty; it should hold at least one batch"),
        (lambda m, b: analyse(m, [b], None, terms=0), "terms is 0; it should be a whole number, at least 1"),
    ],
)
def test_wrong_arguments_are_named(make_model, batch, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model(**DEPTH), batch)


# ---------------------------------------------------------------------------------------------------- the whole

FILES = ["analysis.json", "analysis.md", "gradients.png", "neumann.png", "residuals.png"]


def test_analysis_is_the_mean_over_batches_and_is_written(make_model, tmp_path):
    model, batches = make_model(**DEPTH), [make_batch(2, 6), make_batch(1, 5)]
    found = analyse(model, batches, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == FILES
    assert all((tmp_path / "new" / name).stat().st_size > 5000 for name in FILES if name.endswith("png"))
    each = [compare_gradients(model, batch)["1/1"]["w_c"] for batch in batches]
    mean = np.mean(each, axis=0)
    assert found.gradients["1/1"]["w_c"] == pytest.approx(mean)
    curves = [residual_curve(model, batch, timesteps=12, cycles=2) for batch in batches]
    assert found.more_steps.z_l[1] == pytest.approx(np.mean([curve.z_l[1] for curve in curves], axis=0))
    assert (len(found.more_cycles.z_h), len(found.more_cycles.z_l[0])) == (8, 3)
    radii = [spectral_radius(model, batch)["l_step"].radius for batch in batches]
    assert found.radii["l_step"].radius == max(radii)
    written = json.loads((tmp_path / "new" / "analysis.json").read_text())
    assert written["gradients"]["1/1"]["w_c"] == {"cosine": mean[0], "relative_error": mean[1]}
    assert written["neumann"][0]["core"]["cosine"] == found.neumann[0]["core"].cosine
    assert written["converged"]["z_H, cycles"]["0.1"] == iterations_to_converge(found.more_cycles.z_h, 0.1)
    table = (tmp_path / "new" / "analysis.md").read_text()
    every = found.gradients["1/1"]["all"]
    assert f" {every.cosine:.4f}, {every.relative_error:.3g} |" in table
    assert f"| one L step | {max(radii):.4g} | 100 |" in table


def test_an_untrained_model_can_be_analysed(make_model, batch, tmp_path):
    found = analyse(make_model(trained=False, **DEPTH), [batch], tmp_path)
    assert found.gradients["1/1"]["r_up"] == Agreement(None, None)
    assert found.gradients["1/1"]["lora_low"] == pytest.approx((1, 0), abs=1e-6)  # past the core, which adds nothing
    assert "no gradient" in (tmp_path / "analysis.md").read_text()
    assert json.loads((tmp_path / "analysis.json").read_text())["neumann"][0]["r_up"]["cosine"] is None


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run_folder(tmp_path):
    """What a training run leaves, as far as the command needs it."""
    backbone = save_tiny_backbone(tmp_path / "backbone")
    core = {"d_l": 32, "d_h": 32, "head_size": 16, "attn_heads": 2, **DEPTH}
    model = HRMGemmaForCausalLM.from_backbone(backbone, hrm=core)
    with torch.no_grad():
        model.hrm.w_out.normal_(std=0.1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": str(n)}) + "\n" for n in range(20)))
    folder = tmp_path / "run"
    model.save_pretrained(folder / "checkpoint")
    byte_tokenizer().save_pretrained(folder / "checkpoint")
    OmegaConf.save(load_settings(TrainingSettings, [f"data.path={rows}"]), folder / "config.yaml")
    return folder


def command(*overrides):
    analyse_run(load_settings(AnalyseSettings, overrides))


def test_the_command_analyses_a_run(run_folder, capsys):
    command(f"run={run_folder}", "batch_size=3")
    assert sorted(path.name for path in (run_folder / "analysis").iterdir()) == FILES
    printed = capsys.readouterr().out
    assert (run_folder / "analysis" / "analysis.md").read_text() in printed
    assert f"Written to {run_folder / 'analysis'}" in printed
    assert f"Measuring the trained model in {run_folder / 'checkpoint'}\n" in printed
    written = json.loads((run_folder / "analysis" / "analysis.json").read_text())
    assert (written["h_cycles"], written["l_steps"]) == (2, 3)
    assert math.isfinite(written["gradients"]["1/1"]["core"]["cosine"])


def test_the_command_measures_what_was_trained_on_as_it_trains(run_folder, tmp_path, monkeypatch):
    calls = []

    def fake(model, batches, folder, terms):
        calls.append((model, batches, folder, terms))
        return SimpleNamespace(table=str)

    monkeypatch.setattr("hrm.analysis.report.analyse", fake)
    command(f"run={run_folder}", "batches=2", "batch_size=3", "terms=5", f"output={tmp_path / 'there'}")
    ((model, batches, folder, terms),) = calls
    assert model.training
    assert [len(batch.input_ids) for batch in batches] == [3, 3]
    assert all((batch.labels != -100).any() for batch in batches)
    assert folder == tmp_path / "there" and terms == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=null", "run is None; it should be given: hrm analyse run=FOLDER"),
        ("batches=0", "batches is 0; it should be at least 1"),
        ("batch_size=0", "batch_size is 0; it should be at least 1"),
        ("terms=0", "terms is 0; it should be at least 1"),
        ("terms=1.5", "terms is .1.5.; it should be a whole number"),
        ("run={folder}/checkpoint", "a checkpoint; it should be a run folder"),
        ("run={folder}/nowhere", "holds no checkpoint"),
        ("output={folder}/config.yaml", "output is .*, and cannot be written to"),
    ],
)
def test_what_the_command_cannot_use_is_named(run_folder, override, message):
    with pytest.raises(UsageError, match=message):
        command(f"run={run_folder}", override.format(folder=run_folder))


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """A run of four steps with a checkpoint after each, whose trained model is taken away."""
    place = tmp_path_factory.mktemp("training")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": str(n)}) + "\n" for n in range(20)))
    own = [f"hrm.backbone={save_tiny_backbone(place / 'backbone')}", *TINY_CORE, f"data.path={rows}"]
    own += [f"run.folder={place}", "train.steps=4", "train.save_every=1", "eval.max_new_tokens=1", "train.core_lr=0.1"]
    folder = fine_tune(load_training_settings(own), Console(quiet=True))
    (folder / "checkpoint").rename(folder / "finished")
    return folder


@pytest.fixture
def unfinished(trained_folder, tmp_path):
    """A copy of `trained_folder`, which may be changed."""
    return shutil.copytree(trained_folder, tmp_path / "unfinished")


@pytest.fixture
def measured(monkeypatch):
    """The models that the command measures, which it then does not."""
    found = []

    def fake(model, batches, folder, terms):
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return SimpleNamespace(table=str)

    monkeypatch.setattr("hrm.analysis.report.analyse", fake)
    return found


def test_a_run_that_is_not_over_is_measured_by_its_newest_checkpoint(unfinished, measured, capsys):
    command(f"run={unfinished}")
    newest = unfinished / "checkpoints" / "step-00000004"
    assert f"Measuring the training checkpoint of step 4 in {newest}\n" in capsys.readouterr().out
    whole = HRMGemmaForCausalLM.from_pretrained(unfinished / "finished").state_dict()
    assert measured[0].keys() == whole.keys()
    assert all(torch.equal(measured[0][name], tensor) for name, tensor in whole.items())


def test_a_checkpoint_is_measured_itself_though_the_run_is_over(unfinished, measured, capsys, monkeypatch):
    (unfinished / "finished").rename(unfinished / "checkpoint")
    monkeypatch.chdir(unfinished / "checkpoints" / "step-00000003")
    command("run=.")
    command(f"run={unfinished}/checkpoints/step-00000003")
    command(f"run={unfinished}")
    printed = capsys.readouterr().out
    assert printed.count("Measuring the training checkpoint of step 3 in ") == 2
    assert f"Measuring the trained model in {unfinished / 'checkpoint'}\n" in printed
    assert printed.count(f"Written to {unfinished / 'analysis'}\n") == 3
    kept = load_file(unfinished / "checkpoints" / "step-00000003" / "model.safetensors")
    for weights in measured[:2]:
        assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    assert not torch.equal(measured[0]["hrm.w_out"], measured[2]["hrm.w_out"])


def test_a_checkpoint_is_analysed_like_a_trained_model(unfinished, capsys):
    command(f"run={unfinished}", "batch_size=2", "terms=2")
    there = json.loads((unfinished / "analysis" / "analysis.json").read_text())
    assert len(there["neumann"]) == 2
    (unfinished / "finished").rename(unfinished / "checkpoint")
    command(f"run={unfinished}", "batch_size=2", "terms=2")
    assert json.loads((unfinished / "analysis" / "analysis.json").read_text()) == there


def edit_config(folder, old, new):
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: edit_config(run, "h_cycles: 2", "h_cycles: 3"), "hrm.h_cycles is 3 in .*; it should be 2"),
        (lambda run: (run / "config.yaml").unlink(), "run is .*; it should be of a run on text, with its config.yaml"),
        (lambda run: edit_config(run, "lora:", "puzzle:"), "run is .*; it should be of a run on text"),
        (
            lambda run: (run / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"cut"),
            "step-00000004/model.safetensors cannot be read: it is not what was written",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_measured_is_named(unfinished, measured, change, message):
    change(unfinished)
    with pytest.raises(UsageError, match=message):
        command(f"run={unfinished}")
    assert not measured


def test_a_checkpoint_on_another_backbone_is_named(unfinished, measured, monkeypatch):
    monkeypatch.setattr("hrm.trainer.digest_backbone", lambda model: "another")
    with pytest.raises(UsageError, match=r"hrm.backbone is .*, which is not what .*step-00000004 was trained on"):
        command(f"run={unfinished}")
    assert not measured
