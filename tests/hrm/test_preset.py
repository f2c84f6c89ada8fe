"""Presets: by name and by file, under what is typed, kept with the run, planned with, and refused where wrong."""

import json

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from small_models import backbone_config
from tiny_backbone import TINY_CORE, save_tiny_backbone

from hrm.cli import main
from hrm.preset import PRESETS, preset_defaults, preset_names, read_preset
from hrm.profile.command import ProfileSettings, plan_training
from hrm.settings import TrainingSettings, UsageError, check_training, load_settings, load_training_settings
from hrm.train import fine_tune


def write(path, text):
    path.write_text(text)
    return path


def test_the_package_has_these():
    assert preset_names() == ["depth", "gsm8k"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_makes_sense_and_says_what_it_is_for(name):
    settings = load_training_settings([f"preset={name}"])
    check_training(settings)
    assert settings.preset == name
    assert (PRESETS / f"{name}.yaml").read_text().startswith("# ")


def test_what_is_typed_wins_over_the_preset_wherever_it_stands():
    typed = "train.steps=7", "data.task_options.objects=3"
    for words in (["preset=depth", *typed], [*typed, "preset=depth"]):
        settings = load_training_settings(words)
        assert (settings.train.steps, settings.train.batch_size) == (7, 64)
        assert settings.data.task_options == {"objects": 3, "max_depth": 6, "questions": 12}


def test_another_task_does_not_get_the_presets_options():
    settings = load_training_settings(["preset=depth", "data.task=family_relationships", "data.task_options.seed=1"])
    assert settings.data.task_options == {"seed": 1}
    assert settings.data.held_out_options == {}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("hrm: {attn_heads: 8, rope_theta: 100.0}", "hrm.h_mixer=none"),
        ("lora: {low_rank: 8, dropout: 0.1}", "lora.enabled=false"),
        ("train: {segment_growth: plateau, plateau_window: 5}", "train.segment_growth=steps"),
        ("hrm: {act: true, max_segments: 4, q_target: replay, replay_size: 64}", "hrm.q_target=none"),
        ("hrm: {act: true, max_segments: 4, q_target: replay, replay_size: 64}", "hrm.act=false"),
    ],
)
def test_what_is_typed_turns_off_what_the_preset_says_of_it(tmp_path, text, word):
    preset = f"preset={write(tmp_path / 'mine.yaml', text)}"
    check_training(load_training_settings([preset]))
    check_training(load_training_settings([preset, word]))


def test_without_act_the_preset_says_nothing_of_it(tmp_path):
    text = "hrm: {act: true, max_segments: 4, exploration: 0.2, q_target: replay, replay_size: 64, d_l: 64}\n"
    preset = f"preset={write(tmp_path / 'mine.yaml', text)}"
    for act in ("true", "false"):
        settings = load_training_settings([preset, f"hrm.act={act}"])
        check_training(settings)
        assert (settings.hrm.d_l, settings.hrm.exploration) == (64, 0.2 if act == "true" else 0.0)
    with pytest.raises(UsageError, match=r"hrm.exploration is 0.1; .* without hrm.act=true"):
        check_training(load_training_settings([preset, "hrm.act=false", "hrm.exploration=0.1"]))


def test_a_file_of_ones_own(tmp_path):
    text = "# mine\nlora:\ntrain: {core_lr: 1e-4, depth: [[0.5, 1, 1]]}\nhrm:\n  fused: false\n"
    for name in ("mine.yaml", "mine.yml"):
        settings = load_training_settings([f"preset={write(tmp_path / name, text)}"])
        assert (settings.train.core_lr, settings.hrm.fused, settings.train.depth) == (1e-4, False, [[0.5, 1, 1]])
    assert load_training_settings([f"preset={write(tmp_path / 'empty.yaml', '')}"]).train.steps is None


def test_help_shows_the_presets_values(capsys):
    assert main(["train", "preset=depth", "--help"]) == 0
    out = capsys.readouterr().out
    assert "train.steps=1600\n" in out
    assert "preset=depth\n" in out
    assert "data.task_options={'objects': 13, 'max_depth': 6, 'questions': 12}\n" in out


@pytest.mark.parametrize("name", ["depth", "gsm8k", "mine.yaml"])
def test_what_is_planned_is_what_is_trained(name, tmp_path):
    text = "data: {path: rows.jsonl, max_length: 99}\nrun: {name: x}\nlora: {low_rank: 4}\ntrain: {batch_size: 3}\n"
    name = name if name in preset_names() else str(write(tmp_path / name, text))
    words = [f"preset={name}", "hrm.d_l=64", "hrm.d_h=64", "train.gradient_checkpointing=true"]
    planned = load_settings(ProfileSettings, words, preset_defaults(ProfileSettings, words))
    trained = load_training_settings(words)
    assert planned.preset == name
    assert all(planned[section] == trained[section] for section in ("hrm", "lora", "train"))
    plans = [plan_training(settings, backbone_config("qwen3")) for settings in (planned, trained)]
    assert plans[0].parts == plans[1].parts and plans[0].step == plans[1].step


def test_profile_takes_a_preset(tmp_path, capsys):
    backbone_config("qwen3").save_pretrained(tmp_path)
    words = [f"hrm.backbone={tmp_path}", "hrm.d_l=64", "hrm.d_h=64", "data.max_length=64"]
    assert main(["profile", "preset=gsm8k", *words]) == 0
    assert "32 x 64 tokens" in capsys.readouterr().out
    assert main(["profile", "preset=depth", "--help"]) == 0
    assert "train.batch_size=64\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1\n", "mine.yaml is no YAML: while parsing"),
        ("- 1\n", "mine.yaml holds a list; it should hold sections"),
        ("train: {steps: ${x}}\n", "mine.yaml is no YAML"),
        ("train: {stps: 1}\n", "mine.yaml: unknown key 'train.stps'; the nearest is 'train.steps'"),
        ("trian: {steps: 1}\n", "mine.yaml: unknown key 'trian'; the nearest is 'train'"),
        ("core_lr: 1\n", "mine.yaml: unknown key 'core_lr'; the nearest is 'train.core_lr'"),
        ("train: 3\n", "mine.yaml: train is 3; it should be a section"),
        ("train: {steps: many}\n", "mine.yaml: train.steps is 'many'; it should be a whole number or null"),
        ("data: {task_options: [1]}\n", "mine.yaml: data.task_options is [1]; it should be options, {name: value"),
        ("run: {resume: runs/a}\n", "mine.yaml: run.resume is set; it belongs on the command line"),
        ("preset: depth\n", "mine.yaml: preset is set; it belongs on the command line"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, text, message):
    with pytest.raises(UsageError) as error:
        read_preset(str(write(tmp_path / "mine.yaml", text)), TrainingSettings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["preset=dept"], "preset is 'dept'; the nearest is 'depth' (there are depth, gsm8k, and files that end in"),
        (["preset=no/such.yaml"], "preset is 'no/such.yaml', and cannot be read: No such file or directory"),
        (["preset=depth", "puzzle=sudoku"], "preset is given beside puzzle"),
        (["preset=depth", "train.stps=1"], "unknown key 'train.stps'"),
        (["preset=depth", "run.resume=runs/a"], "'preset=depth' is given beside run.resume"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(words, message, capsys):
    for verb in ["train"] if "preset=depth" in words else ["train", "profile"]:
        assert main([verb, *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_quickstart_has_no_preset(capsys):
    assert main(["quickstart", "preset=depth"]) == 2
    assert "unknown key 'preset'" in capsys.readouterr().err


@pytest.mark.usefixtures("no_plots")
def test_a_run_keeps_what_came_out_and_goes_on_without_the_preset(tmp_path):
    rows = "".join(json.dumps({"prompt": f"{n}?", "answer": "yes"}) + "\n" for n in range(20))
    sections = {"data": {"path": str(write(tmp_path / "rows.jsonl", rows))}, "eval": {"max_new_tokens": 1}}
    preset = write(tmp_path / "mine.yaml", OmegaConf.to_yaml({**sections, "train": {"steps": 5, "batch_size": 2}}))
    words = [f"hrm.backbone={save_tiny_backbone(tmp_path / 'backbone')}", *TINY_CORE, f"run.folder={tmp_path / 'runs'}"]
    quiet = Console(quiet=True)
    folder = fine_tune(load_training_settings([f"preset={preset}", *words, "train.steps=2"]), quiet)
    kept = OmegaConf.load(folder / "config.yaml")
    assert (kept.preset, kept.train.steps, kept.train.batch_size) == (str(preset), 2, 2)
    preset.unlink()
    assert fine_tune(load_training_settings([f"run.resume={folder}"]), quiet) == folder
